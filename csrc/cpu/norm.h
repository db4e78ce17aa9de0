// Normalisation, and the way of activations from one product into the next.
#pragma once

#include <algorithm>
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

// May rows be rounded to the format that is fastest? Not those that queries, keys or the choice of experts are made of:
// a softmax makes much of a small difference between scores, and so does a choice.
enum Rounding { kFast, kExact };

// Write x, (size,), as row `row` in the format and the order that `weights` wants.
inline void put_row_for(const Step& step, int thread, const PackedMatrix& weights, const Rows& rows, int64_t row,
                        const float* x, int64_t size) {
  const std::vector<int32_t>& order = weights.order();
  if (!order.empty()) {
    float* ordered = step.space.threads[thread].ordered.as<float>();
    std::transform(order.begin(), order.end(), ordered, [x](int32_t k) { return k < 0 ? 0 : x[k]; });
    x = ordered;
    size = weights.depth();
  }
  put_row(step.kernels, rows.format, rows, row, x, size, weights.depth());
}

// A phase: rows of activations for a product, num_rows of `size` floats, through `norm` where there is one, in the
// format that `shape` wants and the order of weights_of(row), a matrix like it. from(row) is where a row is. They are
// valid until the next call.
template <typename From, typename WeightsOf>
Rows prepare_rows(const Step& step, int thread, int64_t num_rows, int64_t size, const NormIfAny& norm,
                  const PackedMatrix& shape, const From& from, const WeightsOf& weights_of, Rounding rounding) {
  const RowFormat format = rounding == kExact ? step.kernels.exact_row_format(shape.format(), num_rows)
                                              : step.kernels.row_format(shape.format());
  const Rows rows = step.space.rows.rows(format, num_rows, shape.depth());
  step.pool.phase(thread, num_rows, [&](int64_t row) {
    const float* x = from(row);
    if (norm) {
      norm->apply(step.kernels, x, step.vector(thread));
      x = step.vector(thread);
    }
    put_row_for(step, thread, weights_of(row), rows, row, x, size);
  });
  return rows;
}

// The same where all rows meet one matrix.
template <typename From>
Rows prepare_rows(const Step& step, int thread, int64_t num_rows, int64_t size, const NormIfAny& norm,
                  const PackedMatrix& weights, const From& from, Rounding rounding = kFast) {
  return prepare_rows(
      step, thread, num_rows, size, norm, weights, from, [&](int64_t) -> const PackedMatrix& { return weights; },
      rounding);
}

}  // namespace infinilm::cpu
