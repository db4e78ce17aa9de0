// Normalisation, and the way of activations from one product into the next.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "decoder_config.h"
#include "parameters.h"
#include "step.h"

namespace infinilm::cpu {

class Norm {
 public:
  // Adds its parameters to the list, under `name`.
  Norm(const NormConfig& config, const std::string& name, int64_t size, ParameterList& parameters);

  void apply(const Kernels& kernels, const float* x, float* out) const;

 private:
  NormConfig config_;
  std::vector<float> weight_, bias_;
};

// A Norm where the config has one. Its address must not change once it is made.
using NormIfAny = std::optional<Norm>;
void make_norm(NormIfAny& norm, const std::optional<NormConfig>& config, const std::string& name, int64_t size,
               ParameterList& parameters);

// Rows of activations that every thread may read: num_rows of `size` floats, `stride` apart, through `norm` where there
// is one, in the format that `weights` wants. Ends with a barrier, or each thread has its own where there are few.
Rows prepare_rows(const Step& step, int thread, const float* x, int64_t stride, int64_t num_rows, int64_t size,
                  const NormIfAny& norm, const PackedMatrix& weights);

}  // namespace infinilm::cpu
