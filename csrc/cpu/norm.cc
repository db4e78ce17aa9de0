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

Rows prepare_rows(const Step& step, int thread, const float* x, int64_t stride, int64_t num_rows, int64_t size,
                  const NormIfAny& norm, const PackedMatrix& weights) {
  const bool is_private = num_rows <= kFewRows;
  const RowFormat format = step.kernels.row_format(weights.format());
  const Rows rows = (is_private ? step.space.threads[thread].rows : step.space.rows)
                        .rows(format, num_rows, weights.depth());
  ThreadPool::Range range{0, num_rows};
  if (!is_private) range = step.pool.own_range(thread, num_rows);
  for (int64_t row = range.begin; row < range.end; ++row) {
    const float* from = x + row * stride;
    if (norm) {
      norm->apply(step.kernels, from, step.vector(thread));
      from = step.vector(thread);
    }
    put_row(step.kernels, format, rows, row, from, size, weights.depth());
  }
  if (!is_private) step.pool.barrier();
  return rows;
}

}  // namespace infinilm::cpu
