// Attention of one layer: queries, keys and values, the cache, and the product that follows.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "decoder_config.h"
#include "norm.h"
#include "packed_matrix.h"
#include "parameters.h"
#include "step.h"

namespace infinilm::cpu {

// Some tokens of one sequence and one key-value head, against a run of the cache.
struct AttentionTask {
  int32_t sequence, kv_head;
  int32_t first_row, num_tokens;
  int32_t first_block, last_block;
  int32_t merge;  // -1: this task sees all there is
  int32_t part;   // its place among the parts of the merge
};

// How the sequences of a step are attended, the same for all layers with the same heads and window.
struct AttentionPlan {
  int64_t num_kv_heads, group, window;
  std::vector<AttentionTask> tasks;
  int64_t num_merges = 0, max_parts = 0;
  std::unique_ptr<std::atomic<int32_t>[]> num_done;  // parts of a merge

  bool is_for(const AttentionConfig& mixer) const {
    return num_kv_heads == mixer.num_kv_heads && group == mixer.group() && window == mixer.sliding_window;
  }
};

AttentionPlan plan_attention(const infinilm_batch& batch, const AttentionConfig& mixer, int num_threads);

class Attention {
 public:
  Attention(const AttentionConfig& config, const std::string& name, int64_t layer, int64_t hidden_size,
            const Kernels& kernels, Packing packing, ParameterList& parameters);

  // Add the result to step.hidden(), or put it into step.delta(). Phases of a region.
  void run(const Step& step, int thread, const NormIfAny& norm, AttentionPlan& plan, const Rotation* rotation,
           bool is_added) const;

  const AttentionConfig& config() const { return config_; }
  void reserve(Workspace& space, int64_t num_tokens, const AttentionPlan& plan) const;
  int64_t head_blocks() const { return (config_.head_dim + kBlock - 1) / kBlock; }

 private:
  void project(const Step& step, int thread, const Rows& rows, const Rotation* rotation) const;
  void finish_head(const Step& step, int thread, int64_t head, int64_t row, const float* product,
                   const Rotation* rotation) const;
  void attend(const Step& step, int thread, AttentionPlan& plan, const AttentionTask& task) const;
  void put_attended(const Step& step, const AttentionTask& task, const float* out, const float* sums) const;
  void merge(const Step& step, int thread, const AttentionPlan& plan, const AttentionTask& task) const;
  Rows queries(const Step& step) const;
  float* partial(const Step& step, const AttentionPlan& plan, int64_t merge, int64_t part) const;

  const AttentionConfig config_;
  const int64_t layer_, hidden_size_;
  const bool is_bf16_;
  NormIfAny query_norm_, key_norm_;
  PackedMatrix qkv_;  // every head begins a block of its own
  PackedMatrix output_;
  std::vector<float> qkv_bias_;  // (heads, head_dim)
  std::vector<float> output_bias_;
};

}  // namespace infinilm::cpu
