// The paged cache: keys and values of every layer, packed as the products of attention want them.
//
// Of a block of 16 tokens and one key-value head there are the keys, a packed matrix with tokens as output features and
// the head as input features, and the values, one with the head as output features and tokens as input features.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder_config.h"
#include "kernels/kernels.h"
#include "memory.h"

namespace infinilm::cpu {

// Where the parts of a layer's cache lie. Sizes are bytes.
struct CacheLayout {
  bool is_bf16 = false;
  int64_t num_kv_heads = 0, head_dim = 0;
  int64_t key_bytes = 0, value_bytes = 0;  // of one block and head

  CacheLayout(const AttentionConfig& mixer, bool is_bf16);
  int64_t head_bytes() const { return key_bytes + value_bytes; }
  int64_t block_bytes() const { return num_kv_heads * head_bytes(); }
};

class KvCache {
 public:
  // Throws OutOfMemory, before memory is touched, where the machine has not enough available.
  KvCache(std::vector<CacheLayout> layers, int64_t num_blocks);

  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_bytes() const { return memory_.size(); }
  const CacheLayout& layout(int64_t layer) const { return layers_[layer]; }

  // A head's part of the first block of a layer; the next block's is layout(layer).block_bytes() behind it.
  std::byte* head(int64_t layer, int64_t head) const;

  // Write one token's key or value, (head_dim,), into `slot`.
  void write_key(int64_t layer, int64_t head, int64_t slot, const float* key) const;
  void write_value(int64_t layer, int64_t head, int64_t slot, const float* value) const;

  // (from, to) pairs, as if all were read before any is written.
  void copy_blocks(const int32_t* pairs, int64_t num_pairs);

 private:
  std::vector<CacheLayout> layers_;
  std::vector<int64_t> offsets_;  // of layers in memory
  int64_t num_blocks_;
  Buffer memory_;
};

}  // namespace infinilm::cpu
