// AVX-512 with its byte, word and short-vector parts.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/tables.h"

#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace infinilm::cpu::avx512 {

namespace {

constexpr Isa kIsa = Isa::kAvx512;
constexpr int kWidth = 16;
constexpr bool kMultipliesBf16 = false;
// Rows of a tile of one block and of kWideBlocks: as many as keep their sums in registers.
constexpr int kFloatRows = 12, kWideBlocks = 2, kWideFloatRows = 10, kIntRows = 12, kWideIntRows = 6;

#include "kernels/vector.inl"

// sums + the products of four unsigned bytes each with the four signed bytes of x, exactly: see AVX2's.
INFINILM_INLINE VI dot4(VI sums, VI w, int32_t x) {
  const __m512i weights = reinterpret_cast<__m512i>(w), fours = _mm512_set1_epi32(x);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(weights, _mm512_set1_epi16(0xff)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(fours, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(weights, 8), _mm512_srai_epi16(fours, 8));
  return sums + reinterpret_cast<VI>(even) + reinterpret_cast<VI>(odd);
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

}  // namespace infinilm::cpu::avx512
