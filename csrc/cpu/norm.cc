#include "norm.h"

namespace infinilm::cpu {

Norm::Norm(const NormConfig& config, const std::string& name, int64_t size, ParameterList& parameters)
    : config_(config), weight_(size), bias_(config.has_bias ? size : 0) {
  parameters.add_vector(name + ".weight", size, weight_.data(), static_cast<float>(config.offset));
  if (config.has_bias) parameters.add_vector(name + ".bias", size, bias_.data());
}

void Norm::apply(const Kernels& kernels, const float* x, float* out) const {
  const float* bias = bias_.empty() ? nullptr : bias_.data();
  (config_.is_rms ? kernels.rms_norm : kernels.layer_norm)(x, static_cast<int64_t>(weight_.size()), weight_.data(), bias,
                                                           static_cast<float>(config_.eps), out);
}

void make_norm(NormIfAny& norm, const std::optional<NormConfig>& config, const std::string& name, int64_t size,
               ParameterList& parameters) {
  if (config) norm.emplace(*config, name, size, parameters);
}

}  // namespace infinilm::cpu
