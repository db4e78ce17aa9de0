#include "packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace infinilm::cpu {

namespace {

constexpr int64_t kMaxGroup = 128;

void widen(const SourceMatrix& source, int64_t offset, int64_t size, float* out) {
  if (!source.is_bf16) {
    std::memcpy(out, source.data + offset * 4, size * 4);
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    uint16_t bits;
    std::memcpy(&bits, source.data + (offset + i) * 2, 2);
    out[i] = bf16_to_float(bits);
  }
}

}  // namespace

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return static_cast<uint16_t>((bits | 0x400000) >> 16);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                        : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(magnitude * 0x1p24f);
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  return sign | static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(fraction * 2048) - 1024));
}

PackedMatrix::PackedMatrix(const Kernels& kernels, Packing packing, int64_t num_blocks, int64_t in_features, Arena& arena)
    : kernels_(&kernels), packing_(packing), num_blocks_(num_blocks), in_features_(in_features) {
  const int64_t multiple = depth_multiple(packing.format, packing.group);
  depth_ = (in_features + multiple - 1) / multiple * multiple;
  block_bytes_ = cpu::block_bytes(packing.format, depth_, packing.group);
  memory_ = arena.take(num_blocks * block_bytes_);
}

void PackedMatrix::pack_block(const SourceMatrix& source, int64_t num_rows, int64_t index, int64_t block,
                              float* scratch) {
  std::byte* out = memory_ + block * block_bytes_;
  const int64_t first = index * kBlock, count = std::min(kBlock, num_rows - first);
  const bool is_float = packing_.format == WeightFormat::kF32 || packing_.format == WeightFormat::kBf16;
  if (is_float) {
    pack_floats(source, first, count, out);
  } else {
    pack_integers(source, first, count, out, scratch);
  }
}

// f32 elements and pairs of bf16 are both four bytes: a transposition, in squares that stay in the first cache.
void PackedMatrix::pack_floats(const SourceMatrix& source, int64_t first_row, int64_t num_rows, std::byte* out) const {
  constexpr int64_t kSquare = 16;
  const int64_t row_bytes = in_features_ * (source.is_bf16 ? 2 : 4);
  const int64_t num_words = row_bytes / 4;
  const std::byte* in = source.data + first_row * row_bytes;
  uint32_t* words = reinterpret_cast<uint32_t*>(out);
  for (int64_t begin = 0; begin < num_words; begin += kSquare) {
    const int64_t end = std::min(begin + kSquare, num_words);
    for (int64_t n = 0; n < num_rows; ++n) {
      for (int64_t word = begin; word < end; ++word) std::memcpy(words + word * kBlock + n, in + n * row_bytes + word * 4, 4);
    }
  }
  if (row_bytes % 4) {  // an odd number of bf16: the last has no partner
    for (int64_t n = 0; n < num_rows; ++n) {
      uint16_t last;
      std::memcpy(&last, in + n * row_bytes + num_words * 4, 2);
      words[num_words * kBlock + n] = last;
    }
  }
}

void PackedMatrix::pack_integers(const SourceMatrix& source, int64_t first_row, int64_t num_rows, std::byte* out,
                                 float* scratch) const {
  const int64_t group = packing_.group;
  const bool is_int8 = packing_.format == WeightFormat::kI8;
  const uint8_t zero = is_int8 ? 128 : 8;
  std::byte* data = out + scale_bytes(depth_, group);
  float values[kMaxGroup];
  uint8_t levels[kMaxGroup];
  for (int64_t n = 0; n < kBlock; ++n) {
    if (n < num_rows) widen(source, (first_row + n) * in_features_, in_features_, scratch);
    for (int64_t g = 0; g < depth_ / group; ++g) {
      const int64_t size = std::clamp<int64_t>(in_features_ - g * group, 0, group);
      float scale = 0;
      std::fill(levels, levels + group, zero);
      if (n < num_rows) {
        std::fill(values, values + group, 0.0f);
        std::copy(scratch + g * group, scratch + g * group + size, values);
        scale = is_int8 ? kernels_->quantize_i8(values, group, levels) : kernels_->quantize_i4(values, group, levels);
      }
      const uint16_t half = float_to_half(scale);
      std::memcpy(out + (g * kBlock + n) * 2, &half, 2);
      for (int64_t k = 0; k < group; k += is_int8 ? 4 : 8) {
        std::byte* four = data + (g * group + k) / (is_int8 ? 4 : 8) * 64 + n * 4;
        uint8_t bytes[4];
        for (int i = 0; i < 4; ++i) bytes[i] = is_int8 ? levels[k + i] : levels[k + i] | levels[k + 4 + i] << 4;
        std::memcpy(four, bytes, 4);
      }
    }
  }
}

void PackedMatrix::unpack_row(int64_t feature, float* out) const {
  const std::byte* block = memory_ + feature / kBlock * block_bytes_;
  const int64_t n = feature % kBlock;
  const bool has_zeros = packing_.format == WeightFormat::kI4Zero;
  const int64_t group = packing_.group;
  const int64_t header = has_zeros ? scale_and_zero_bytes(depth_, group) : group ? scale_bytes(depth_, group) : 0;
  const std::byte* data = block + header;
  for (int64_t k = 0; k < in_features_; ++k) {
    float scale = 1;
    if (packing_.group) {
      uint16_t half;
      std::memcpy(&half, block + (k / packing_.group * kBlock + n) * 2, 2);
      scale = half_to_float(half);
    }
    switch (packing_.format) {
      case WeightFormat::kF32: std::memcpy(out + k, data + (k * kBlock + n) * 4, 4); break;
      case WeightFormat::kBf16: {
        uint16_t bits;
        std::memcpy(&bits, data + k / 2 * 64 + n * 4 + k % 2 * 2, 2);
        out[k] = bf16_to_float(bits);
        break;
      }
      case WeightFormat::kI8:
        out[k] = scale * (std::to_integer<int>(data[k / 4 * 64 + n * 4 + k % 4]) - 128);
        break;
      case WeightFormat::kI4:
      case WeightFormat::kI4Zero: {
        const int both = std::to_integer<int>(data[k / 8 * 64 + n * 4 + k % 4]);
        const std::byte* zeros = block + (depth_ / group * 2 + k / group) * kBlock;
        const int zero = has_zeros ? std::to_integer<int>(zeros[n]) : 8;
        out[k] = scale * ((k % 8 < 4 ? both & 15 : both >> 4) - zero);
        break;
      }
    }
  }
}

}  // namespace infinilm::cpu
