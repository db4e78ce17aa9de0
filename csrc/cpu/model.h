// A decoder: its parameters, and one step of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "decoder_config.h"
#include "kv_cache.h"
#include "layer.h"
#include "parameters.h"
#include "rope.h"
#include "step.h"
#include "thread_pool.h"

namespace infinilm::cpu {

// How a model is to be computed.
struct ModelOptions {
  bool is_bf16 = false;  // else float32
  Packing packing;       // of matrices
  Packing head_packing;  // of the output projection, and of an embedding that is tied to it
  StoredWeights stored;  // what is kept as the checkpoint has it
};

class Model {
 public:
  Model(const DecoderConfig& config, const ModelOptions& options, const Kernels& kernels, ThreadPool& pool);

  std::vector<Parameter>& parameters() { return parameters_.parameters(); }
  const DecoderConfig& config() const { return config_; }
  bool is_bf16() const { return options_.is_bf16; }
  std::vector<CacheLayout> cache_layouts() const;
  // No: keys depend on how long their prompt is.
  bool has_shareable_cache() const;
  int64_t num_bytes() const { return parameters_.arena().num_bytes(); }  // of weights that were stored
  int64_t scratch_bytes() const { return space_.num_bytes(); }

  // All parameters are loaded. Throws Invalid naming those that were never stored.
  void finish_loading();

  // Run one step; `logits` is (batch.num_rows, vocab_size). Throws Invalid where the batch points anywhere it should
  // not, Cancelled where `should_stop` said so between two layers.
  void forward(const infinilm_batch& batch, KvCache& cache, float* logits, const std::function<bool()>& should_stop);

 private:
  void require_all_loaded() const;
  void check(const infinilm_batch& batch, const KvCache& cache) const;
  void reserve(int64_t num_tokens, int64_t num_rows);
  void plan(const infinilm_batch& batch);
  void begin(const Step& step, int thread);
  void finish(const Step& step, int thread, float* logits) const;
  void embed(int64_t token, int64_t position, float* out) const;
  size_t plan_of(const AttentionConfig& mixer) const;

  const DecoderConfig config_;
  const ModelOptions options_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  ParameterList parameters_;
  // Taken when they are stored:
  std::byte* embedding_ = nullptr;  // (vocab_size, hidden_size) as the host has it, where it is not tied
  float* positions_ = nullptr;      // (num_positions, hidden_size)
  float embedding_scale_;
  std::vector<std::unique_ptr<Layer>> layers_;
  NormIfAny final_norm_;
  PackedMatrix head_;
  std::vector<Rotary> rotaries_;
  std::vector<int> rotary_of_layer_;  // -1: none
  // Of the step that runs:
  Workspace space_;
  std::vector<Rotation> rotations_;  // by rotary
  std::vector<AttentionPlan> plans_;
};

}  // namespace infinilm::cpu
