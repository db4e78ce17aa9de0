// Products of a step's rows with a packed matrix, shared out over the threads in units of a few blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "packed_matrix.h"
#include "step.h"

namespace infinilm::cpu {

constexpr int64_t kMaxUnitBlocks = 32;

// How many blocks a thread takes at once: a multiple of `multiple`, few enough that threads end together. With many
// rows the unit's weights are to stay in the second cache while rows pass by.
inline int64_t unit_blocks(const PackedMatrix& weights, int64_t num_rows, int64_t multiple, int num_threads) {
  const int64_t bytes = num_rows > 12 ? 512 << 10 : 64 << 10;
  const int64_t by_size = bytes / weights.block_bytes();
  const int64_t by_threads = weights.num_blocks() / (4 * num_threads);
  const int64_t least = num_rows == 1 ? 2 : 1;  // kernels read two blocks at once for a row that is alone
  const int64_t blocks = std::max(std::min({by_size, by_threads, kMaxUnitBlocks}), least);
  return std::max(blocks / multiple, int64_t{1}) * multiple;
}

// Columns of the scratch that products need for this matrix.
inline int64_t unit_columns(int64_t multiple) { return std::max(kMaxUnitBlocks, multiple) * kBlock; }

// One unit: call use(first_row, num_rows, products, stride) for parts of rows * weights^T, where products are
// (num_rows, num_blocks * 16).
template <typename Use>
void multiply_unit(const Step& step, int thread, const Rows& rows, int64_t num_rows, const PackedMatrix& weights,
                   int64_t first_block, int64_t num_blocks, const Use& use) {
  const Gemm gemm = step.kernels.gemm(weights.format(), rows.format);
  const int64_t stride = num_blocks * kBlock;
  float* products = step.space.threads[thread].products.as<float>();
  for (int64_t row = 0; row < num_rows; row += kRowsAtOnce) {
    const int64_t height = std::min(kRowsAtOnce, num_rows - row);
    gemm(rows.from(row), height, weights.panel(first_block), num_blocks, products, stride);
    use(row, height, products, stride);
  }
}

// A phase: call use(first_row, num_rows, first_block, num_blocks, products, stride) for parts of rows * weights^T, each
// part once.
template <typename Use>
void multiply(const Step& step, int thread, const Rows& rows, int64_t num_rows, const PackedMatrix& weights,
              int64_t multiple, const Use& use) {
  const int64_t blocks = unit_blocks(weights, num_rows, multiple, step.pool.num_threads());
  const int64_t num_units = (weights.num_blocks() + blocks - 1) / blocks;
  step.pool.phase(thread, num_units, [&](int64_t unit) {
    const int64_t first_block = unit * blocks, num_blocks = std::min(blocks, weights.num_blocks() - first_block);
    multiply_unit(step, thread, rows, num_rows, weights, first_block, num_blocks,
                  [&](int64_t row, int64_t height, float* products, int64_t stride) {
                    use(row, height, first_block, num_blocks, products, stride);
                  });
  });
}

// multiply, added to `out`, (num_rows, num_features), or put there, plus `bias` where it is not nullptr.
inline void multiply_into(const Step& step, int thread, const Rows& rows, int64_t num_rows, const PackedMatrix& weights,
                          const float* bias, int64_t num_features, bool is_added, float* out) {
  multiply(step, thread, rows, num_rows, weights, 1,
           [&](int64_t first_row, int64_t height, int64_t first_block, int64_t num_blocks, const float* products,
               int64_t stride) {
             const int64_t column = first_block * kBlock;
             const int64_t width = std::min(num_blocks * kBlock, num_features - column);
             for (int64_t row = 0; row < height; ++row) {
               float* to = out + (first_row + row) * num_features + column;
               if (is_added) {
                 step.kernels.add(to, products + row * stride, width, 1);
               } else {
                 std::copy(products + row * stride, products + row * stride + width, to);
               }
               if (bias != nullptr) step.kernels.add(to, bias + column, width, 1);
             }
           });
}

}  // namespace infinilm::cpu
