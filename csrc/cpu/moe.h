// A sparse mixture of experts: a router, and MLPs that each see the tokens that chose them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mlp.h"

namespace infinilm::cpu {

class Moe {
 public:
  // The router is packed as `router_packing` says: it is small, and what it rounds decides who computes.
  Moe(const MlpConfig& config, const std::string& name, int64_t hidden_size, const Kernels& kernels, Packing packing,
      Packing router_packing, ParameterList& parameters);

  // As Attention::run.
  void run(const Step& step, int thread, const NormIfAny& norm, bool is_added) const;
  void reserve(Workspace& space, int64_t num_tokens) const;

 private:
  void route(const Step& step) const;
  Rows gather(const Step& step, int thread, const NormIfAny& norm) const;
  void combine(const Step& step, int thread, bool is_added) const;

  MlpConfig config_;
  PackedMatrix router_;
  std::vector<std::unique_ptr<MlpWeights>> experts_;
};

}  // namespace infinilm::cpu
