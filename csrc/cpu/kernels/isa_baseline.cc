// The level of every processor this was built for: no instruction beyond the compiler's baseline.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/tables.h"

namespace infinilm::cpu::baseline {

namespace {

constexpr Isa kIsa = Isa::kScalar;
constexpr int kWidth = 4;
constexpr bool kMultipliesBf16 = false;
// Rows of a tile of one block and of kWideBlocks: as many as keep their sums in registers.
constexpr int kFloatRows = 3, kWideBlocks = 2, kWideFloatRows = 1, kIntRows = 2, kWideIntRows = 1;

#include "kernels/vector.inl"

// sums + the products of four unsigned bytes each with the four signed bytes of x
INFINILM_INLINE VI dot4(VI sums, VI w, int32_t x) {
  for (int byte = 0; byte < 4; ++byte) {
    sums += (w >> (8 * byte) & 0xff) * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * byte)));
  }
  return sums;
}

// Widen fp16: its exponent counts from 15, that of a float from 127.
INFINILM_INLINE VF load_half(const std::byte* p) {
  VI halves;
  for (int i = 0; i < kWidth; ++i) {
    uint16_t half;
    std::memcpy(&half, p + i * 2, 2);
    halves[i] = half;
  }
  const VF magnitudes = as_floats((halves & 0x7fff) << 13) * 0x1p112f;
  return as_floats(as_bits(magnitudes) | (halves & 0x8000) << 16);
}

#include "kernels/gemm.inl"
#include "kernels/elementwise.inl"
#include "kernels/attention.inl"
#include "kernels/packing.inl"

}  // namespace

#include "kernels/table.inl"

}  // namespace infinilm::cpu::baseline
