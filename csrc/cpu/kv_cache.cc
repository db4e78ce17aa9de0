#include "kv_cache.h"

#include <cstring>
#include <string>
#include <utility>

#include "errors.h"
#include "packed_matrix.h"

namespace infinilm::cpu {

namespace {

int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <typename Element>
void scatter(const float* x, int64_t size, std::byte* out, int64_t pack, int64_t offset, Element (*convert)(float)) {
  // Keys: element d of token `offset` is [d / pack][offset][d % pack].
  Element* elements = reinterpret_cast<Element*>(out);
  for (int64_t d = 0; d < size; ++d) elements[(d / pack * kBlock + offset) * pack + d % pack] = convert(x[d]);
  if (size % pack) elements[(size / pack * kBlock + offset) * pack + size % pack] = convert(0);  // the last's partner
}

template <typename Element>
void scatter_value(const float* x, int64_t size, std::byte* out, int64_t pack, int64_t offset,
                   Element (*convert)(float)) {
  // Values: element d of token `offset` is [d / 16][offset / pack][d % 16][offset % pack].
  Element* elements = reinterpret_cast<Element*>(out) + offset / pack * kBlock * pack + offset % pack;
  for (int64_t d = 0; d < size; ++d) elements[d / kBlock * kBlock * kBlock + d % kBlock * pack] = convert(x[d]);
}

float same(float x) { return x; }

}  // namespace

CacheLayout::CacheLayout(const AttentionConfig& mixer, bool bf16)
    : is_bf16(bf16), num_kv_heads(mixer.num_kv_heads), head_dim(mixer.head_dim) {
  const int64_t element = bf16 ? 2 : 4;
  key_bytes = rounded_up(head_dim, bf16 ? 2 : 1) * kBlock * element;
  value_bytes = rounded_up(head_dim, kBlock) * kBlock * element;
}

KvCache::KvCache(std::vector<CacheLayout> layers, int64_t num_blocks)
    : layers_(std::move(layers)), num_blocks_(num_blocks) {
  int64_t num_bytes = 0;
  for (const CacheLayout& layer : layers_) {
    offsets_.push_back(num_bytes);
    num_bytes += layer.block_bytes() * num_blocks;
  }
  const int64_t available = available_memory();
  if (available >= 0 && num_bytes > available) {
    throw OutOfMemory("a cache of " + std::to_string(num_blocks) + " blocks needs " + std::to_string(num_bytes) +
                      " bytes, and " + std::to_string(available) + " are available");
  }
  memory_ = Buffer(num_bytes);
}

std::byte* KvCache::head(int64_t layer, int64_t head) const {
  return memory_.data() + offsets_[layer] + head * layers_[layer].head_bytes();
}

void KvCache::write_key(int64_t layer, int64_t head, int64_t slot, const float* key) const {
  const CacheLayout& layout = layers_[layer];
  std::byte* out = this->head(layer, head) + slot / kBlock * layout.block_bytes();
  if (layout.is_bf16) {
    scatter<uint16_t>(key, layout.head_dim, out, 2, slot % kBlock, float_to_bf16);
  } else {
    scatter<float>(key, layout.head_dim, out, 1, slot % kBlock, same);
  }
}

void KvCache::write_value(int64_t layer, int64_t head, int64_t slot, const float* value) const {
  const CacheLayout& layout = layers_[layer];
  std::byte* out = this->head(layer, head) + slot / kBlock * layout.block_bytes() + layout.key_bytes;
  if (layout.is_bf16) {
    scatter_value<uint16_t>(value, layout.head_dim, out, 2, slot % kBlock, float_to_bf16);
  } else {
    scatter_value<float>(value, layout.head_dim, out, 1, slot % kBlock, same);
  }
}

void KvCache::copy_blocks(const int32_t* pairs, int64_t num_pairs) {
  for (int64_t i = 0; i < 2 * num_pairs; ++i) {
    if (pairs[i] < 0 || pairs[i] >= num_blocks_) {
      throw Invalid("block " + std::to_string(pairs[i]) + " is to be copied, and there are " +
                    std::to_string(num_blocks_));
    }
  }
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const int64_t size = layers_[layer].block_bytes();
    std::byte* base = memory_.data() + offsets_[layer];
    Buffer read(num_pairs * size);
    for (int64_t i = 0; i < num_pairs; ++i) std::memcpy(read.data() + i * size, base + pairs[2 * i] * size, size);
    for (int64_t i = 0; i < num_pairs; ++i) std::memcpy(base + pairs[2 * i + 1] * size, read.data() + i * size, size);
  }
}

}  // namespace infinilm::cpu
