#include "packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace infinilm::cpu {

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
    : kernels_(&kernels), arena_(&arena), packing_(packing), num_blocks_(num_blocks), in_features_(in_features) {
  const int64_t multiple = depth_multiple(packing.format, packing.group);
  depth_ = (in_features + multiple - 1) / multiple * multiple;
  block_bytes_ = cpu::block_bytes(packing.format, depth_, packing.group);
}

void PackedMatrix::take_memory() {
  if (memory_ == nullptr) memory_ = arena_->take(num_blocks_ * block_bytes_);
}

void PackedMatrix::pack_block(const SourceMatrix& source, int64_t num_rows, int64_t index, int64_t block) {
  std::byte* out = memory_ + block * block_bytes_;
  SourceRows rows{source.data, std::min(kBlock, num_rows - index * kBlock), in_features_, source.is_bf16};
  rows.data += index * kBlock * rows.row_bytes();
  switch (packing_.format) {
    case WeightFormat::kF32:
    case WeightFormat::kBf16: return kernels_->pack_floats(rows, out);
    case WeightFormat::kI8: return kernels_->pack_i8(rows, depth_, packing_.group, out);
    case WeightFormat::kI4: return kernels_->pack_i4(rows, depth_, packing_.group, out);
    case WeightFormat::kI4Zero: throw std::logic_error("weights that are stored so are put into their blocks, not packed");
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
