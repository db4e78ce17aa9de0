// AVX-512 with VNNI and BF16: two products of bf16 summed by one instruction.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/tables.h"

#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")

namespace infinilm::cpu::avx512_bf16 {

namespace {

constexpr Isa kIsa = Isa::kAvx512Bf16;
constexpr int kWidth = 16;
constexpr bool kMultipliesBf16 = true;
// Rows of a tile of one block and of kWideBlocks: as many as keep their sums in registers.
constexpr int kFloatRows = 12, kWideBlocks = 2, kWideFloatRows = 12, kIntRows = 12, kWideIntRows = 6;

#include "kernels/vector.inl"

INFINILM_INLINE VF dot_bf16(VF sums, VI w, VI pair) {
  return reinterpret_cast<VF>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(w),
                                               reinterpret_cast<__m512bh>(pair)));
}

// sums + the products of four unsigned bytes each with the four signed bytes of x
INFINILM_INLINE VI dot4(VI sums, VI w, int32_t x) {
  return reinterpret_cast<VI>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(w),
                                                  _mm512_set1_epi32(x)));
}

INFINILM_INLINE VF load_half(const std::byte* p) {
  return reinterpret_cast<VF>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

#include "kernels/gemm.inl"
#include "kernels/elementwise.inl"
#include "kernels/attention.inl"
#include "kernels/packing.inl"

}  // namespace

#include "kernels/table.inl"

}  // namespace infinilm::cpu::avx512_bf16
