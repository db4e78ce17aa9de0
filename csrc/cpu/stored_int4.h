// Int4 weights that a checkpoint keeps packed, GPTQ's and AWQ's: which of them are run as they are stored, and their way
// into packed blocks, word by word. No weight is a number on that way, and no scale is another than was stored.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "packed_matrix.h"
#include "thread_pool.h"

namespace infinilm::cpu {

// How one matrix, (out_features, in_features) to the model, is stored.
struct StoredInt4 {
  bool is_awq = false;          // else GPTQ
  bool is_less_by_one = false;  // its zeros: GPTQ's first version
  int64_t group = 0;            // input features that share a scale and a zero
  bool has_groups = false;      // g_idx: which group an input feature is in, else as many in a row as make one
};

// What of a checkpoint can be run as it is stored, by the names of parameters.
class StoredWeights {
 public:
  StoredWeights() = default;
  // `json` is infinilm_model_request.stored_quantization. What is not understood to the last word is left out, and the
  // host dequantizes it.
  explicit StoredWeights(const char* json);

  const StoredInt4* find(const std::string& name) const;
  bool is_empty() const { return weights_.empty(); }
  // How many were left out, and why the first of them was; empty where all are run.
  std::string left_out() const;

 private:
  std::map<std::string, StoredInt4> weights_;
  int64_t num_left_out_ = 0;
  std::string reason_;
};

// One stored matrix, whose parts come in any order and again at an update. `rows` says which of its output features each
// block of `matrix` gets.
class StoredMatrix {
 public:
  struct BlockRows {
    int64_t first = 0, count = 0;  // 0: the block is not this one's
  };

  StoredMatrix(std::string name, StoredInt4 stored, int64_t num_rows, PackedMatrix* matrix,
               std::vector<BlockRows> rows, ThreadPool* pool);

  const std::string& name() const { return name_; }
  PackedMatrix* matrix() const { return matrix_; }
  // Which input feature is at each place of the depth, -1 for none; empty where they are in order.
  const std::vector<int32_t>& order() const { return order_; }

  void put_weight(const std::byte* words);  // int32, GPTQ (in_features / 8, num_rows), AWQ (in_features, num_rows / 8)
  void put_zero(const std::byte* words);    // int32 (groups, num_rows / 8), rounded up
  void put_scale(const std::byte* halves);  // fp16 (groups, num_rows)
  void put_group(const std::byte* groups);  // int32 (in_features,). Throws Invalid where no order makes whole groups.

 private:
  void for_blocks(const std::function<void(std::byte* block, BlockRows rows)>& body) const;
  std::vector<int32_t> order_of(const int32_t* groups) const;
  int64_t num_groups() const { return matrix_->depth() / stored_.group; }

  const std::string name_;
  const StoredInt4 stored_;
  const int64_t num_rows_;
  PackedMatrix* const matrix_;
  const std::vector<BlockRows> rows_;
  ThreadPool* const pool_;
  std::vector<int32_t> order_;
  bool has_weight_ = false;
};

}  // namespace infinilm::cpu
