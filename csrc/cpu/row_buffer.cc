#include "row_buffer.h"

#include <cstring>

namespace infinilm::cpu {

namespace {

constexpr int64_t kElementBytes[] = {4, 2, 1, 2, 4};  // by RowFormat

bool is_of_levels(RowFormat format) { return format == RowFormat::kI8 || format == RowFormat::kI8Pair; }

int64_t groups_of(int64_t depth) { return (depth + kGroup - 1) / kGroup; }

// An odd number of cache lines: rows whose distance is a power of two would all want the same place in the cache.
int64_t stride_of(RowFormat format, int64_t depth) {
  const int64_t bytes = groups_of(depth) * kGroup * kElementBytes[static_cast<int>(format)];
  return ((bytes + 63) / 64 | 1) * 64;
}

}  // namespace

void RowBuffer::reserve(int64_t num_rows, int64_t max_depth) {
  memory_.reserve(num_rows * (stride_of(RowFormat::kF32, max_depth) + groups_of(max_depth) * 8) + 128);
}

Rows RowBuffer::rows(RowFormat format, int64_t num_rows, int64_t depth) const {
  Rows rows;
  rows.data = memory_.data();
  rows.stride = stride_of(format, depth);
  rows.format = format;
  if (!is_of_levels(format)) return rows;
  rows.num_groups = groups_of(depth);
  std::byte* behind = memory_.data() + num_rows * rows.stride;
  rows.scales = reinterpret_cast<const float*>(behind);
  rows.sums = reinterpret_cast<const int32_t*>(behind + num_rows * rows.num_groups * 4);
  return rows;
}

void put_row(const Kernels& kernels, RowFormat format, const Rows& rows, int64_t row, const float* x, int64_t size,
             int64_t depth) {
  std::byte* out = const_cast<std::byte*>(rows.data) + row * rows.stride;
  switch (format) {
    case RowFormat::kF32:
      std::memcpy(out, x, size * 4);
      std::memset(out + size * 4, 0, (depth - size) * 4);
      return;
    case RowFormat::kBf16:
      kernels.to_bf16(x, size, reinterpret_cast<uint16_t*>(out));
      std::memset(out + size * 2, 0, (depth - size) * 2);
      return;
    case RowFormat::kBf16Pair: {
      uint16_t* high = reinterpret_cast<uint16_t*>(out);
      uint16_t* low = high + groups_of(depth) * kGroup;
      kernels.to_bf16_pairs(x, size, high, low);
      for (uint16_t* half : {high, low}) std::memset(half + size, 0, (depth - size) * 2);
      return;
    }
    case RowFormat::kI8:
    case RowFormat::kI8Pair: break;
  }
  const auto to_levels = format == RowFormat::kI8 ? kernels.to_i8 : kernels.to_i8_pairs;
  const int64_t group_bytes = kGroup * kElementBytes[static_cast<int>(format)];
  int8_t* levels = reinterpret_cast<int8_t*>(out);
  float* scales = const_cast<float*>(rows.scales) + row * rows.num_groups;
  int32_t* sums = const_cast<int32_t*>(rows.sums) + row * rows.num_groups;
  const int64_t num_whole = size / kGroup, rest = size % kGroup;
  to_levels(x, num_whole * kGroup, levels, scales, sums);
  int64_t group = num_whole;
  if (rest) {
    float padded[kGroup] = {};
    std::memcpy(padded, x + num_whole * kGroup, rest * 4);
    to_levels(padded, kGroup, levels + group * group_bytes, scales + group, sums + group);
    ++group;
  }
  for (; group < rows.num_groups; ++group) {
    std::memset(levels + group * group_bytes, 0, group_bytes);
    scales[group] = 0;
    sums[group] = 0;
  }
}

void copy_row(RowFormat format, const Rows& source, int64_t from, const Rows& target, int64_t to) {
  std::memcpy(const_cast<std::byte*>(target.data) + to * target.stride, source.data + from * source.stride,
              source.stride);
  if (!is_of_levels(format)) return;
  std::memcpy(const_cast<float*>(target.scales) + to * target.num_groups, source.scales + from * source.num_groups,
              source.num_groups * 4);
  std::memcpy(const_cast<int32_t*>(target.sums) + to * target.num_groups, source.sums + from * source.num_groups,
              source.num_groups * 4);
}

}  // namespace infinilm::cpu
