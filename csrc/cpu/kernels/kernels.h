// The kernels: what one thread computes on memory it was given. One table of functions for every level of Isa.
//
// Weights come packed in blocks of 16 output features (packed_matrix.h), activations in rows (row_buffer.h). Kernels
// know nothing of models, threads or allocation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decoder_config.h"
#include "isa.h"

namespace infinilm::cpu {

constexpr int64_t kBlock = 16;          // output features of a packed block; tokens of a cache block
constexpr int64_t kGroup = 32;          // activations that share a scale where they are int8
constexpr int64_t kMaxGroup = 128;      // weights that share a scale, at most
constexpr int64_t kAttentionChunk = 8;  // cache blocks whose scores are held at once

// How weights are kept.
enum class WeightFormat { kF32, kBf16, kI8, kI4, kI4Zero };

// How a kernel wants its activations. kBf16Pair is the sum of two bf16, within 2^-17: all high ones of a row, zeros up to
// a multiple of 32, then all low ones. kI8Pair is levels of 15 bits, 128 * high + low: the 32 high bytes of a group, then
// its 32 low ones.
enum class RowFormat { kF32, kBf16, kI8, kI8Pair, kBf16Pair };

// With fewer rows than this a product waits for memory, whatever multiplies.
constexpr int64_t kManyRows = 5;

// Rows of activations: row r begins `stride` bytes behind row r - 1, and is zero from its last element to the depth of
// the weights it meets.
struct Rows {
  const std::byte* data = nullptr;
  int64_t stride = 0;
  // Of levels only, [row][num_groups]: what each group of 32 is multiplied by, and its sum.
  const float* scales = nullptr;
  const int32_t* sums = nullptr;
  int64_t num_groups = 0;
  RowFormat format = RowFormat::kF32;

  Rows from(int64_t row) const {
    return {data + row * stride, stride, scales + row * num_groups, sums + row * num_groups, num_groups, format};
  }
};

// Consecutive blocks of packed weights: block b begins b * stride bytes behind the first.
struct Panel {
  const std::byte* data = nullptr;
  int64_t stride = 0;
  int64_t depth = 0;  // input features, padded as the format wants it
  int64_t group = 0;  // input features that share a scale; integers only
};

// At most 16 rows of a weight as the host has them, one output feature each.
struct SourceRows {
  const std::byte* data = nullptr;
  int64_t num_rows = 0, num_features = 0;
  bool is_bf16 = false;  // else f32

  int64_t row_bytes() const { return num_features * (is_bf16 ? 2 : 4); }
};

// out[r][16 * b + n] = sum over k of rows[r][k] * weights[b][n][k], for r < num_rows and b < num_blocks.
using Gemm = void (*)(const Rows& rows, int64_t num_rows, const Panel& weights, int64_t num_blocks, float* out,
                      int64_t out_stride);

// Some rows of queries of one sequence against a run of cache blocks of one key-value head: scores, softmax and sum of
// values, in one pass over the cache. May be called again for later blocks.
struct AttentionTile {
  Rows queries;                // (num_rows, head_dim)
  int64_t num_rows = 0;
  const int32_t* begins = nullptr;  // row r sees positions [begins[r], ends[r])
  const int32_t* ends = nullptr;
  const std::byte* cache = nullptr;  // block b: keys at b * block_stride, values value_offset behind them
  int64_t block_stride = 0, value_offset = 0;
  const int32_t* block_table = nullptr;
  int64_t first_block = 0, last_block = 0;  // [first, last) of the table
  int64_t context_length = 0;
  int64_t head_dim = 0;
  float scale = 1, softcap = 0;
  // Set up by start_attention, added to by attend: values (num_rows, out_stride) times weights that have yet to be
  // divided by sums.
  float* out = nullptr;
  int64_t out_stride = 0;
  float* maxima = nullptr;
  float* sums = nullptr;
  std::byte* scratch = nullptr;  // attention_scratch_bytes
};

struct Kernels {
  Isa isa;
  RowFormat bf16_rows;       // what gemm_bf16 wants: bf16 where the processor multiplies it, else f32
  RowFormat many_bf16_rows;  // what is best for many rows that must not be rounded: f32 or pairs

  Gemm gemm_f32, gemm_bf16, gemm_i8, gemm_i4, gemm_i4_zero;
  Gemm gemm_bf16_by_f32, gemm_bf16_by_pairs;  // bf16 weights, and rows that are f32 or kBf16Pair; pairs where wanted

  // Keys and values in f32 or in bf16, queries in f32.
  void (*attend_f32)(const AttentionTile& tile);
  void (*attend_bf16)(const AttentionTile& tile);

  // Round to nearest even.
  void (*to_bf16)(const float* x, int64_t size, uint16_t* out);
  // x = high + low
  void (*to_bf16_pairs)(const float* x, int64_t size, uint16_t* high, uint16_t* low);
  // `size` is a multiple of 32.
  void (*to_i8)(const float* x, int64_t size, int8_t* out, float* scales, int32_t* sums);
  void (*to_i8_pairs)(const float* x, int64_t size, int8_t* out, float* scales, int32_t* sums);
  // x * weight / rms(x), plus bias where there is one.
  void (*rms_norm)(const float* x, int64_t size, const float* weight, const float* bias, float eps, float* out);
  void (*layer_norm)(const float* x, int64_t size, const float* weight, const float* bias, float eps, float* out);
  // out = activation(x)
  void (*activate)(Activation activation, const float* x, int64_t size, float* out);
  // Blocks of 16 gates and the 16 values they are for, [num_pairs][2][16]: out[num_pairs * 16] = activation(gate) * value
  void (*activate_pairs)(Activation activation, const float* pairs, int64_t num_pairs, float* out);
  // x = cap * tanh(x * scale / cap)
  void (*softcap)(float* x, int64_t size, float scale, float cap);
  // Rotate the first half of a head against its second, in place: cosines and sines are (head_dim / 2,).
  void (*rotate)(float* head, int64_t head_dim, const float* cosines, const float* sines);
  // x += y * factor
  void (*add)(float* x, const float* y, int64_t size, float factor);

  // Pack rows into the memory of one block (packed_matrix.h); what a block has and they have not is zero. Integers are
  // chosen with their scales, group by group.
  void (*pack_floats)(const SourceRows& source, std::byte* out);
  void (*pack_i8)(const SourceRows& source, int64_t depth, int64_t group, std::byte* out);
  void (*pack_i4)(const SourceRows& source, int64_t depth, int64_t group, std::byte* out);

  Gemm gemm(WeightFormat weights, RowFormat rows) const;
  // The fastest for these weights, and the one that rounds nothing off unless weights are integers.
  RowFormat row_format(WeightFormat format) const;
  RowFormat exact_row_format(WeightFormat format, int64_t num_rows) const;
};

// The table for a level. Throws std::logic_error where this build has none.
const Kernels& kernels_for(Isa isa);

int64_t attention_scratch_bytes(int64_t num_rows, int64_t head_dim);

// So many input features a format's blocks are padded to a multiple of.
int64_t depth_multiple(WeightFormat format, int64_t group);

// Bytes of a block of 16 output features. int8 and int4 begin with their scales, fp16 [depth / group][16], padded to
// a multiple of 64; those of kI4Zero are followed by zeros, bytes [depth / group][16], and both are padded together.
int64_t block_bytes(WeightFormat format, int64_t depth, int64_t group);
int64_t scale_bytes(int64_t depth, int64_t group);
int64_t scale_and_zero_bytes(int64_t depth, int64_t group);

}  // namespace infinilm::cpu
