// A weight as kernels read it: blocks of 16 output features, each one run of memory from its first input feature to its
// last, because a step reads every weight once and from end to end.
//
//   f32   [depth][16]
//   bf16  [depth / 2][16][2]
//   int8  scales [depth / group][16] in fp16, then [depth / 4][16][4], each weight plus 128
//   int4  scales, then [depth / 8][16][4 bytes], each weight plus 8: four input features low, the next four high
//   int4 with zeros  scales, zeros [depth / group][16] in bytes, then as int4, each weight plus its zero
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"

namespace infinilm::cpu {

// A row-major matrix as the host filled it: (rows, in_features), f32 or bf16.
struct SourceMatrix {
  const std::byte* data;
  bool is_bf16;
};

// Put `size` elements from the one at `offset` on into `out`.
void widen(const SourceMatrix& source, int64_t offset, int64_t size, float* out);

// How a matrix is to be kept.
struct Packing {
  WeightFormat format = WeightFormat::kF32;
  int64_t group = 0;  // input features that share a scale, a multiple of 32; integers only
};

class PackedMatrix {
 public:
  PackedMatrix() = default;
  // Of so many blocks, none of which has memory yet; it will be of `arena`, which must live longer.
  PackedMatrix(const Kernels& kernels, Packing packing, int64_t num_blocks, int64_t in_features, Arena& arena);

  // Take memory for all blocks, where that was not done: call before the first is packed. Throws OutOfMemory.
  void take_memory();

  WeightFormat format() const { return packing_.format; }
  int64_t group() const { return packing_.group; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t in_features() const { return in_features_; }
  int64_t depth() const { return depth_; }
  int64_t block_bytes() const { return block_bytes_; }

  std::byte* block(int64_t index) { return memory_ + index * block_bytes_; }

  Panel panel(int64_t first_block) const {
    return {memory_ + first_block * block_bytes_, block_bytes_, depth_, packing_.group};
  }

  // Which input feature is at each place of the depth, -1 for none; empty where they are in order.
  const std::vector<int32_t>& order() const { return order_; }
  void set_order(std::vector<int32_t> order) { order_ = std::move(order); }

  // Pack rows [16 * index, 16 * index + 16) of a source of `num_rows` into `block`; features that are not there are
  // zero. May be called from several threads for different blocks.
  void pack_block(const SourceMatrix& source, int64_t num_rows, int64_t index, int64_t block);

  // The weights of one output feature, (in_features,), in the order they are kept in.
  void unpack_row(int64_t feature, float* out) const;

 private:
  const Kernels* kernels_ = nullptr;
  Arena* arena_ = nullptr;
  Packing packing_;
  std::vector<int32_t> order_;
  int64_t num_blocks_ = 0, in_features_ = 0, depth_ = 0, block_bytes_ = 0;
  std::byte* memory_ = nullptr;
};

float bf16_to_float(uint16_t bits);
uint16_t float_to_bf16(float x);
float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);  // of a number that fp16 has

}  // namespace infinilm::cpu
