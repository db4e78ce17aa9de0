#include "row_buffer.h"

#include <cstring>

namespace infinilm::cpu {

namespace {

constexpr int64_t kElementBytes[] = {4, 2, 1};  // by RowFormat

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
  if (format != RowFormat::kI8) return rows;
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
    case RowFormat::kI8: break;
  }
  int8_t* levels = reinterpret_cast<int8_t*>(out);
  float* scales = const_cast<float*>(rows.scales) + row * rows.num_groups;
  int32_t* sums = const_cast<int32_t*>(rows.sums) + row * rows.num_groups;
  const int64_t num_whole = size / kGroup, rest = size % kGroup;
  kernels.to_i8(x, num_whole * kGroup, levels, scales, sums);
  int64_t group = num_whole;
  if (rest) {
    float padded[kGroup] = {};
    std::memcpy(padded, x + num_whole * kGroup, rest * 4);
    kernels.to_i8(padded, kGroup, levels + group * kGroup, scales + group, sums + group);
    ++group;
  }
  for (; group < rows.num_groups; ++group) {
    std::memset(levels + group * kGroup, 0, kGroup);
    scales[group] = 0;
    sums[group] = 0;
  }
}

void copy_row(RowFormat format, const Rows& source, int64_t from, const Rows& target, int64_t to) {
  std::memcpy(const_cast<std::byte*>(target.data) + to * target.stride, source.data + from * source.stride,
              source.stride);
  if (format != RowFormat::kI8) return;
  std::memcpy(const_cast<float*>(target.scales) + to * target.num_groups, source.scales + from * source.num_groups,
              source.num_groups * 4);
  std::memcpy(const_cast<int32_t*>(target.sums) + to * target.num_groups, source.sums + from * source.num_groups,
              source.num_groups * 4);
}

}  // namespace infinilm::cpu
