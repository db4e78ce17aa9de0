// The MLP of one layer, gated or not.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "decoder_config.h"
#include "norm.h"
#include "packed_matrix.h"
#include "parameters.h"
#include "step.h"

namespace infinilm::cpu {

// How the matrices of MLPs are kept, those of all that `names` has alike.
struct MlpPackings {
  MlpPackings(const MlpConfig& config, const std::vector<std::string>& names, Packing otherwise,
              const ParameterList& parameters);

  Packing gate_up, down;
};

// The matrices of one MLP. Blocks of gates and of the values they are for take turns, so that a thread that has one has
// the other.
struct MlpWeights {
  MlpWeights(const MlpConfig& config, const std::string& name, int64_t hidden_size, const Kernels& kernels,
             MlpPackings packings, ParameterList& parameters);

  // Put activation(gate) * up, or activation(up), of `height` rows into `out`, whose rows are out_stride apart.
  // `products` are those of the blocks [first_block, first_block + num_blocks).
  void activate(const Kernels& kernels, float* products, int64_t stride, int64_t height, int64_t first_block,
                int64_t num_blocks, float* out, int64_t out_stride) const;

  int64_t multiple() const { return config.is_gated ? 2 : 1; }
  int64_t padded_size() const { return gate_up.num_blocks() / multiple() * kBlock; }

  MlpConfig config;
  PackedMatrix gate_up, down;
  std::vector<float> gate_up_bias, down_bias;  // the first in the order of blocks
};

class Mlp {
 public:
  Mlp(const MlpConfig& config, const std::string& name, int64_t hidden_size, const Kernels& kernels, Packing packing,
      ParameterList& parameters);

  // As Attention::run.
  void run(const Step& step, int thread, const NormIfAny& norm, bool is_added) const;
  void reserve(Workspace& space, int64_t num_tokens) const;

 private:
  MlpWeights weights_;
};

}  // namespace infinilm::cpu
