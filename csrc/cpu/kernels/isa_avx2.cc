// AVX2 with FMA and F16C.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/tables.h"

#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

namespace infinilm::cpu::avx2 {

namespace {

constexpr Isa kIsa = Isa::kAvx2;
constexpr int kWidth = 8;
constexpr bool kMultipliesBf16 = false;
// Rows of a tile of one block and of kWideBlocks: as many as keep their sums in registers.
constexpr int kFloatRows = 6, kWideBlocks = 2, kWideFloatRows = 3, kIntRows = 3, kWideIntRows = 1;

#include "kernels/vector.inl"

// sums + the products of four unsigned bytes each with the four signed bytes of x, exactly: the instruction that takes
// bytes saturates, so both are widened to 16 bits.
INFINILM_INLINE VI dot4(VI sums, VI w, int32_t x) {
  const __m256i weights = reinterpret_cast<__m256i>(w), fours = _mm256_set1_epi32(x);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(fours, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), _mm256_srai_epi16(fours, 8));
  return sums + reinterpret_cast<VI>(even) + reinterpret_cast<VI>(odd);
}

INFINILM_INLINE VF load_half(const std::byte* p) {
  return reinterpret_cast<VF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#include "kernels/gemm.inl"
#include "kernels/elementwise.inl"
#include "kernels/attention.inl"
#include "kernels/packing.inl"

}  // namespace

#include "kernels/table.inl"

}  // namespace infinilm::cpu::avx2
