#include "stored_int4.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "errors.h"
#include "infinilm/config.hpp"

namespace infinilm::cpu {

namespace {

constexpr int64_t kPerWord = 8;            // weights, or zeros, in an int32
constexpr uint32_t kOnes = 0x11111111;     // one in each of them
constexpr int64_t kLongestPadded = 128;    // rows of activations have room for no more behind their end
// Where the eight columns of AWQ's words lie: stored from the lowest bits on are 0, 2, 4, 6, 1, 3, 5, 7.
constexpr int kAwqShifts[] = {0, 16, 4, 20, 8, 24, 12, 28};
// Where eight input features lie in a packed word: the first four are the low halves of its bytes.
constexpr int kPackedShifts[] = {0, 8, 16, 24, 4, 12, 20, 28};

uint32_t word_at(const std::byte* words, int64_t index) {
  uint32_t word;
  std::memcpy(&word, words + index * 4, 4);
  return word;
}

// Spread four numbers of four bits over the low halves of four bytes.
uint32_t spread(uint32_t four) {
  four = (four | four << 8) & 0x00ff00ff;
  return (four | four << 4) & 0x0f0f0f0f;
}

const std::vector<Json>* array_of(const Json& object, const char* key) {
  const Json* value = object.find(key);
  return value == nullptr ? nullptr : &value->array;
}

// Returns why a group cannot be run as it is stored, empty where it can, and how it is stored.
std::string read_group(const Json& group, StoredInt4* stored) {
  const Json *weight = group.find("weight"), *zero = group.find("zero"), *scale = group.find("scale");
  if (weight == nullptr || zero == nullptr || scale == nullptr) return "it has no weight, zero and scale";
  for (const auto& [role, tensor] : group.object) {
    const Json* dtype = tensor.find("dtype");
    const std::string found = dtype == nullptr ? "" : dtype->string;
    if (role == "group" && !stored->is_awq) {
      stored->has_groups = true;
    } else if (role == "scale" ? found != "float16" : (role != "weight" && role != "zero") || found != "int32") {
      return "its " + role + " is " + found;
    }
  }
  const std::vector<Json>* shape = array_of(*weight, "shape");
  if (shape == nullptr || shape->size() != 2) return "its weight is no matrix";
  const int64_t in_features = (*shape)[0].integer * (stored->is_awq ? 1 : kPerWord);
  if (stored->group < 0) stored->group = in_features;
  const int64_t size = stored->group;
  if (size < kGroup || size % kGroup) return "its groups of " + std::to_string(size) + " are no multiple of 32";
  if (size > kLongestPadded && in_features % size) return "its last group of " + std::to_string(size) + " is cut short";
  return "";
}

// GPTQ: a word is eight input features of one output feature, so a block's words are the stored ones, shuffled inside.
void pack_gptq(const std::byte* words, int64_t num_rows, int64_t in_features, StoredMatrix::BlockRows rows,
               std::byte* out) {
  for (int64_t k = 0; k < in_features / kPerWord; ++k) {
    const std::byte* in = words + (k * num_rows + rows.first) * 4;
    for (int64_t n = 0; n < rows.count; ++n) {
      const uint32_t word = word_at(in, n), packed = spread(word & 0xffff) | spread(word >> 16) << 4;
      std::memcpy(out + (k * kBlock + n) * 4, &packed, 4);
    }
  }
}

// The same where input features are in the order of their groups.
void pack_gptq(const std::byte* words, int64_t num_rows, const std::vector<int32_t>& order,
               StoredMatrix::BlockRows rows, std::byte* out) {
  for (size_t k = 0; k < order.size(); k += kPerWord) {
    uint32_t packed[kBlock] = {};
    for (int64_t i = 0; i < kPerWord; ++i) {
      const int64_t feature = order[k + i];
      if (feature < 0) continue;
      const std::byte* in = words + (feature / kPerWord * num_rows + rows.first) * 4;
      const int shift = static_cast<int>(feature % kPerWord) * 4;
      for (int64_t n = 0; n < rows.count; ++n) packed[n] |= (word_at(in, n) >> shift & 15) << kPackedShifts[i];
    }
    std::memcpy(out + k / kPerWord * 64, packed, 64);
  }
}

// AWQ: a word is eight output features of one input feature.
void pack_awq(const std::byte* words, int64_t num_rows, int64_t in_features, StoredMatrix::BlockRows rows,
              std::byte* out) {
  int64_t word_of[kBlock] = {};
  int shift_of[kBlock] = {};
  for (int64_t n = 0; n < rows.count; ++n) {
    word_of[n] = (rows.first + n) / kPerWord;
    shift_of[n] = kAwqShifts[(rows.first + n) % kPerWord];
  }
  for (int64_t k = 0; k < in_features; k += kPerWord) {
    uint32_t packed[kBlock] = {};
    for (int64_t i = 0; i < std::min(kPerWord, in_features - k); ++i) {
      const std::byte* in = words + (k + i) * (num_rows / kPerWord) * 4;
      for (int64_t n = 0; n < rows.count; ++n) {
        packed[n] |= (word_at(in, word_of[n]) >> shift_of[n] & 15) << kPackedShifts[i];
      }
    }
    std::memcpy(out + k / kPerWord * 64, packed, 64);
  }
}

// Put a block's input features into another order: empty is the natural one.
void reorder(const std::vector<int32_t>& from, const std::vector<int32_t>& to, int64_t depth, std::byte* block) {
  std::vector<uint8_t> levels(depth * kBlock);  // [input feature][16]
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t feature = from.empty() ? k : from[k];
    for (int64_t n = 0; feature >= 0 && n < kBlock; ++n) {
      levels[feature * kBlock + n] = word_at(block, k / kPerWord * kBlock + n) >> kPackedShifts[k % kPerWord] & 15;
    }
  }
  for (int64_t k = 0; k < depth; k += kPerWord) {
    uint32_t packed[kBlock] = {};
    for (int64_t i = 0; i < kPerWord; ++i) {
      const int64_t feature = to.empty() ? k + i : to[k + i];
      for (int64_t n = 0; feature >= 0 && n < kBlock; ++n) {
        packed[n] |= static_cast<uint32_t>(levels[feature * kBlock + n]) << kPackedShifts[i];
      }
    }
    std::memcpy(block + k / kPerWord * 64, packed, 64);
  }
}

}  // namespace

StoredWeights::StoredWeights(const char* json) {
  const Json document = parse_json(json);
  const Json *scheme = document.find("scheme"), *groups = document.find("groups");
  const std::vector<Json>* block = array_of(document, "block_shape");
  if (scheme == nullptr || groups == nullptr) return;
  const bool is_awq = scheme->string == "awq", is_first = scheme->string == "gptq";
  for (const auto& [name, group] : groups->object) {
    std::string reason = "the cpu backend does not run '" + scheme->string + "'";
    StoredInt4 stored{is_awq, is_first, block == nullptr || block->empty() ? 0 : block->back().integer, false};
    if (is_awq || is_first || scheme->string == "gptq_v2") reason = read_group(group, &stored);
    if (reason.empty()) {
      weights_[name] = stored;
    } else if (num_left_out_++ == 0) {
      reason_ = name + ": " + reason;
    }
  }
}

const StoredInt4* StoredWeights::find(const std::string& name) const {
  const auto found = weights_.find(name);
  return found == weights_.end() ? nullptr : &found->second;
}

std::string StoredWeights::left_out() const {
  if (num_left_out_ == 0) return "";
  return std::to_string(num_left_out_) + " quantized weights are dequantized, not run as they are stored; " + reason_;
}

StoredMatrix::StoredMatrix(std::string name, StoredInt4 stored, int64_t num_rows, PackedMatrix* matrix,
                           std::vector<BlockRows> rows, ThreadPool* pool)
    : name_(std::move(name)),
      stored_(stored),
      num_rows_(num_rows),
      matrix_(matrix),
      rows_(std::move(rows)),
      pool_(pool) {}

// By the thread that a product gives a block to.
void StoredMatrix::for_blocks(const std::function<void(std::byte* block, BlockRows rows)>& body) const {
  matrix_->take_memory();
  pool_->run(1, [&](int thread) {
    pool_->phase(thread, matrix_->num_blocks(), [&](int64_t target) {
      if (rows_[target].count) body(matrix_->block(target), rows_[target]);
    });
  });
}

void StoredMatrix::put_weight(const std::byte* words) {
  const int64_t header = scale_and_zero_bytes(matrix_->depth(), stored_.group);
  const int64_t in_features = matrix_->in_features();
  for_blocks([&](std::byte* block, BlockRows rows) {
    if (stored_.is_awq) {
      pack_awq(words, num_rows_, in_features, rows, block + header);
    } else if (order_.empty()) {
      pack_gptq(words, num_rows_, in_features, rows, block + header);
    } else {
      pack_gptq(words, num_rows_, order_, rows, block + header);
    }
  });
  has_weight_ = true;
}

void StoredMatrix::put_zero(const std::byte* words) {
  const int64_t words_per_group = (num_rows_ + kPerWord - 1) / kPerWord;
  const uint32_t more = stored_.is_less_by_one ? kOnes : 0;  // a zero that was 0 borrowed from its neighbour
  for_blocks([&](std::byte* block, BlockRows rows) {
    std::byte* out = block + num_groups() * kBlock * 2;
    for (int64_t g = 0; g < num_groups(); ++g) {
      for (int64_t n = 0; n < rows.count; ++n) {
        const int64_t column = rows.first + n, place = column % kPerWord;
        const uint32_t word = word_at(words, g * words_per_group + column / kPerWord) + more;
        const int shift = stored_.is_awq ? kAwqShifts[place] : static_cast<int>(place) * 4;
        out[g * kBlock + n] = static_cast<std::byte>(word >> shift & 15);
      }
    }
  });
}

void StoredMatrix::put_scale(const std::byte* halves) {
  for_blocks([&](std::byte* block, BlockRows rows) {
    for (int64_t g = 0; g < num_groups(); ++g) {
      std::memcpy(block + g * kBlock * 2, halves + (g * num_rows_ + rows.first) * 2, rows.count * 2);
    }
  });
}

void StoredMatrix::put_group(const std::byte* groups) {
  std::vector<int32_t> order = order_of(reinterpret_cast<const int32_t*>(groups));
  if (order == order_) return;
  const int64_t header = scale_and_zero_bytes(matrix_->depth(), stored_.group);
  if (has_weight_) {
    for_blocks([&](std::byte* block, BlockRows) { reorder(order_, order, matrix_->depth(), block + header); });
  }
  order_ = std::move(order);
}

std::vector<int32_t> StoredMatrix::order_of(const int32_t* groups) const {
  std::vector<int32_t> order(matrix_->depth(), -1);
  std::vector<int64_t> sizes(num_groups());
  bool is_natural = true;
  for (int64_t k = 0; k < matrix_->in_features(); ++k) {
    const int64_t group = groups[k];
    if (group < 0 || group >= num_groups() || sizes[group] == stored_.group) {
      throw Invalid("g_idx of " + name_ + " puts input feature " + std::to_string(k) + " into group " +
                    std::to_string(group) + ", and there are " + std::to_string(num_groups()) + " groups of " +
                    std::to_string(stored_.group) + "; run the model on another backend");
    }
    is_natural = is_natural && group == k / stored_.group;
    order[group * stored_.group + sizes[group]++] = static_cast<int32_t>(k);
  }
  return is_natural ? std::vector<int32_t>() : order;
}

}  // namespace infinilm::cpu
