#include "kernels/kernels.h"

#include <stdexcept>

#include "kernels/tables.h"

namespace infinilm::cpu {

const Kernels& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return baseline::table();
#if defined(__x86_64__)
    case Isa::kAvx2: return avx2::table();
    case Isa::kAvx512: return avx512::table();
    case Isa::kAvx512Vnni: return avx512_vnni::table();
    case Isa::kAvx512Bf16: return avx512_bf16::table();
    case Isa::kAvx512Amx: return avx512_amx::table();
#endif
    default: throw std::logic_error(std::string("this build has no kernels for ") + isa_name(isa));
  }
}

Gemm Kernels::gemm(WeightFormat weights, RowFormat rows) const {
  switch (weights) {
    case WeightFormat::kF32: return gemm_f32;
    case WeightFormat::kBf16:
      if (rows == RowFormat::kBf16Pair) return gemm_bf16_by_pairs;
      return rows == RowFormat::kF32 ? gemm_bf16_by_f32 : gemm_bf16;
    case WeightFormat::kI8: return gemm_i8;
    case WeightFormat::kI4: return gemm_i4;
    case WeightFormat::kI4Zero: return gemm_i4_zero;
  }
  return nullptr;
}

RowFormat Kernels::row_format(WeightFormat format) const {
  switch (format) {
    case WeightFormat::kF32: return RowFormat::kF32;
    case WeightFormat::kBf16: return bf16_rows;
    case WeightFormat::kI4Zero: return RowFormat::kI8Pair;
    default: return RowFormat::kI8;
  }
}

RowFormat Kernels::exact_row_format(WeightFormat format, int64_t num_rows) const {
  if (format != WeightFormat::kBf16) return row_format(format);
  return num_rows < kManyRows ? RowFormat::kF32 : many_bf16_rows;
}

int64_t attention_scratch_bytes(int64_t num_rows, int64_t head_dim) {
  // Scores, in f32 and again as rows of the second product, and the values of the two blocks at the edges.
  const int64_t padded_dim = (head_dim + kBlock - 1) / kBlock * kBlock;
  return num_rows * kAttentionChunk * kBlock * 8 + 2 * padded_dim * kBlock * 4;
}

int64_t depth_multiple(WeightFormat format, int64_t group) {
  switch (format) {
    case WeightFormat::kF32: return 1;
    case WeightFormat::kBf16: return 2;
    default: return group;
  }
}

int64_t scale_bytes(int64_t depth, int64_t group) { return (depth / group * kBlock * 2 + 63) / 64 * 64; }

int64_t scale_and_zero_bytes(int64_t depth, int64_t group) { return (depth / group * kBlock * 3 + 63) / 64 * 64; }

int64_t block_bytes(WeightFormat format, int64_t depth, int64_t group) {
  switch (format) {
    case WeightFormat::kF32: return depth * kBlock * 4;
    case WeightFormat::kBf16: return depth * kBlock * 2;
    case WeightFormat::kI8: return scale_bytes(depth, group) + depth * kBlock;
    case WeightFormat::kI4: return scale_bytes(depth, group) + depth * kBlock / 2;
    case WeightFormat::kI4Zero: return scale_and_zero_bytes(depth, group) + depth * kBlock / 2;
  }
  return 0;
}

}  // namespace infinilm::cpu
