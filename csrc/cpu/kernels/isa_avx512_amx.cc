// AVX-512 with BF16 and AMX: tiles of 16 rows by 16 output features, 32 input features at a time. What AMX does not do,
// and products of few rows, which wait for memory whatever multiplies them, are the level below's.
#include <algorithm>
#include <cstring>

#include "kernels/tables.h"

#include <immintrin.h>

#pragma GCC target("avx512f,amx-tile,amx-bf16")

namespace infinilm::cpu::avx512_amx {

namespace {

constexpr int64_t kTile = 16;            // rows, and pairs of input features
constexpr int64_t kStepDepth = 2 * kTile;
constexpr int64_t kStepBytes = 64;       // of a row
constexpr int64_t kWeightBytes = 64 * kTile;
constexpr int64_t kStepsAtOnce = 16;     // 32 rows of so many steps stay in the first cache

// GCC's intrinsics do not say what memory they read: what was written before must be there.
inline void finish_writes() { asm volatile("" ::: "memory"); }

// Products are in tiles 0 to 3, rows in 4 and 5, weights in 6 and 7.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};
};

// The first and second 16 rows have so many, which is what is left of them, and a step so many pairs of input features.
void shape_tiles(int64_t first_rows, int64_t second_rows, int64_t num_pairs) {
  TileShapes shapes;
  const auto shape = [&](int tile, int64_t rows, int64_t bytes) {
    shapes.num_rows[tile] = static_cast<uint8_t>(rows);
    shapes.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  for (int half = 0; half < 2; ++half) {
    const int64_t rows = std::max<int64_t>(half ? second_rows : first_rows, 1);
    shape(2 * half, rows, 64);
    shape(2 * half + 1, rows, 64);
    shape(4 + half, rows, 4 * num_pairs);
    shape(6 + half, num_pairs, 64);
  }
  finish_writes();
  _tile_loadconfig(&shapes);
}

// out (16 * M rows, 16 * N features) gets, or gains, `num_steps` steps. Tiles are numbers the compiler must see.
template <int M, int N>
inline void tile_steps(const std::byte* x, int64_t x_stride, const std::byte* w, int64_t w_stride, int64_t num_steps,
                       bool is_first, float* out, int64_t out_stride) {
  finish_writes();
  const int64_t out_bytes = out_stride * 4;
  float* below = out + kTile * out_stride;
  if (is_first) {
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && N > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, out, out_bytes);
    if (N > 1) _tile_loadd(1, out + kBlock, out_bytes);
    if (M > 1) _tile_loadd(2, below, out_bytes);
    if (M > 1 && N > 1) _tile_loadd(3, below + kBlock, out_bytes);
  }
  for (int64_t step = 0; step < num_steps; ++step) {
    const std::byte* rows = x + step * kStepBytes;
    const std::byte* weights = w + step * kWeightBytes;
    _tile_loadd(6, weights, 64);
    _tile_loadd(4, rows, x_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (M > 1) {
      _tile_loadd(5, rows + kTile * x_stride, x_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (N > 1) {
      _tile_loadd(7, weights + w_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (M > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if (N > 1) _tile_stored(1, out + kBlock, out_bytes);
  if (M > 1) _tile_stored(2, below, out_bytes);
  if (M > 1 && N > 1) _tile_stored(3, below + kBlock, out_bytes);
  finish_writes();
}

// All rows and blocks, for the input features of `num_steps` steps.
void multiply_steps(const std::byte* x, int64_t x_stride, int64_t num_rows, const std::byte* w, int64_t w_stride,
                    int64_t num_blocks, int64_t num_steps, int64_t num_pairs, bool is_first, float* out,
                    int64_t out_stride) {
  int64_t shaped = -1;
  for (int64_t row = 0; row < num_rows; row += 2 * kTile) {
    const int64_t height = std::min(num_rows - row, 2 * kTile), first = std::min(height, kTile);
    if (height != shaped) shape_tiles(first, height - first, num_pairs);
    shaped = height;
    const std::byte* rows = x + row * x_stride;
    const auto tiles = height > kTile ? tile_steps<2, 2> : tile_steps<1, 2>;
    const auto last_tiles = height > kTile ? tile_steps<2, 1> : tile_steps<1, 1>;
    for (int64_t block = 0; block < num_blocks; block += 2) {
      (num_blocks - block > 1 ? tiles : last_tiles)(rows, x_stride, w + block * w_stride, w_stride, num_steps, is_first,
                                                    out + row * out_stride + block * kBlock, out_stride);
    }
  }
}

// Call multiply_run(first step, number of steps, pairs of input features in each) for all input features.
template <typename MultiplyRun>
void for_runs(int64_t depth, const MultiplyRun& multiply_run) {
  const int64_t num_steps = depth / kStepDepth, rest = depth % kStepDepth / 2;
  for (int64_t step = 0; step < num_steps; step += kStepsAtOnce) {
    multiply_run(step, std::min(kStepsAtOnce, num_steps - step), kTile);
  }
  if (rest > 0) multiply_run(num_steps, 1, rest);
}

void gemm_bf16(const Rows& rows, int64_t num_rows, const Panel& weights, int64_t num_blocks, float* out,
               int64_t out_stride) {
  if (num_rows < kManyRows) {
    avx512_bf16::table().gemm_bf16(rows, num_rows, weights, num_blocks, out, out_stride);
    return;
  }
  for_runs(weights.depth, [&](int64_t step, int64_t num_steps, int64_t num_pairs) {
    multiply_steps(rows.data + step * kStepBytes, rows.stride, num_rows, weights.data + step * kWeightBytes,
                   weights.stride, num_blocks, num_steps, num_pairs, step == 0, out, out_stride);
  });
  _tile_release();
}

// Twice the products, and none of the rounding.
void gemm_bf16_by_pairs(const Rows& rows, int64_t num_rows, const Panel& weights, int64_t num_blocks, float* out,
                        int64_t out_stride) {
  const int64_t half_bytes = (weights.depth + kGroup - 1) / kGroup * kGroup * 2;
  for_runs(weights.depth, [&](int64_t step, int64_t num_steps, int64_t num_pairs) {
    for (int64_t half = 0; half < 2; ++half) {
      multiply_steps(rows.data + half * half_bytes + step * kStepBytes, rows.stride, num_rows,
                     weights.data + step * kWeightBytes, weights.stride, num_blocks, num_steps, num_pairs,
                     step == 0 && half == 0, out, out_stride);
    }
  });
  _tile_release();
}

Kernels make_table() {
  Kernels table = avx512_bf16::table();
  table.isa = Isa::kAvx512Amx;
  table.gemm_bf16 = gemm_bf16;
  table.gemm_bf16_by_pairs = gemm_bf16_by_pairs;
  table.many_bf16_rows = RowFormat::kBf16Pair;
  table.attend_bf16 = avx512_vnni::table().attend_bf16;  // who has AMX multiplies floats faster than pairs of bf16
  return table;
}

}  // namespace

const Kernels& table() {
  static const Kernels kTable = make_table();
  return kTable;
}

}  // namespace infinilm::cpu::avx512_amx
