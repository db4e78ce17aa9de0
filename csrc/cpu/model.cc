#include "model.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "linear.h"

namespace infinilm::cpu {

namespace {

int64_t blocks_of(int64_t features) { return (features + kBlock - 1) / kBlock; }

[[noreturn]] void refuse(const char* what, int64_t value, int64_t index) {
  throw Invalid("this batch cannot be run: " + std::string(what) + " " + std::to_string(value) + " at " +
                std::to_string(index) + " is out of range, or contradicts the rest of it");
}

}  // namespace

int64_t Workspace::num_bytes() const {
  int64_t total = hidden.size() + delta.size() + attended.size() + intermediate.size() + queries.size() +
                  partials.size() + rows.num_bytes() + router_logits.size() +
                  expert_outputs.size() + expert_rows.num_bytes();
  for (const ThreadScratch& thread : threads) {
    total += thread.products.size() + thread.vector.size() + thread.ordered.size() + thread.attention.size();
  }
  return total;
}

Model::Model(const DecoderConfig& config, const ModelOptions& options, const Kernels& kernels, ThreadPool& pool)
    : config_(config),
      options_(options),
      kernels_(kernels),
      pool_(pool),
      parameters_(pool, options.is_bf16, options.stored),
      embedding_scale_(static_cast<float>(config.embedding_scale)),
      head_(kernels,
            config.is_tied ? options.head_packing : parameters_.packing_of({"lm_head.weight"}, options.head_packing),
            blocks_of(config.vocab_size), config.hidden_size, parameters_.arena()) {
  const int64_t vocab_size = config.vocab_size, hidden_size = config.hidden_size;
  // The contract rounds the scale to the dtype of the model.
  if (options.is_bf16) embedding_scale_ = bf16_to_float(float_to_bf16(embedding_scale_));
  const std::string embedding = "model.embed_tokens.weight";
  if (config.is_tied) {
    parameters_.add_matrix(embedding, vocab_size, &head_, [](int64_t block) { return block; }).shard_dim = 0;
  } else {
    const int64_t num_bytes = vocab_size * hidden_size * (options.is_bf16 ? 2 : 4);
    parameters_.add(embedding, {vocab_size, hidden_size}, [this, num_bytes](const SourceMatrix& source) {
      if (embedding_ == nullptr) embedding_ = parameters_.arena().take(num_bytes);
      std::memcpy(embedding_, source.data, num_bytes);
    }).shard_dim = 0;
  }
  if (config.num_positions) {
    const int64_t size = config.num_positions * hidden_size;
    parameters_.add("model.embed_positions.weight", {config.num_positions, hidden_size},
                    [this, size](const SourceMatrix& source) {
                      if (positions_ == nullptr) positions_ = reinterpret_cast<float*>(parameters_.arena().take(size * 4));
                      widen(source, 0, size, positions_);
                    });
  }
  const Packing float_packing{options.is_bf16 ? WeightFormat::kBf16 : WeightFormat::kF32, 0};
  for (const LayerConfig& layer : config.layers) {
    layers_.push_back(std::make_unique<Layer>(layer, static_cast<int64_t>(layers_.size()), hidden_size, kernels,
                                              options.packing, float_packing, parameters_));
    rotary_of_layer_.push_back(-1);
    if (!layer.mixer.rope) continue;
    const auto is_same = [&](const Rotary& rotary) { return rotary.is_for(*layer.mixer.rope, layer.mixer.head_dim); };
    const auto found = std::find_if(rotaries_.begin(), rotaries_.end(), is_same);
    rotary_of_layer_.back() = static_cast<int>(found - rotaries_.begin());
    if (found == rotaries_.end()) rotaries_.emplace_back(*layer.mixer.rope, layer.mixer.head_dim);
  }
  make_norm(final_norm_, config.final_norm, "model.norm", hidden_size, parameters_);
  if (config.is_tied) {
    Parameter& head = parameters_.add("lm_head.weight", {vocab_size, hidden_size}, nullptr);
    head.tied_to = embedding;
    head.shard_dim = 0;
  } else {
    parameters_.add_matrix("lm_head.weight", vocab_size, &head_, [](int64_t block) { return block; }).shard_dim = 0;
  }
  space_.threads.resize(pool.num_threads());
  rotations_.resize(rotaries_.size());
}

std::vector<CacheLayout> Model::cache_layouts() const {
  std::vector<CacheLayout> layouts;
  for (const auto& layer : layers_) layouts.emplace_back(layer->mixer(), options_.is_bf16);
  return layouts;
}

bool Model::has_shareable_cache() const {
  return std::none_of(config_.layers.begin(), config_.layers.end(), [](const LayerConfig& layer) {
    return layer.mixer.rope && layer.mixer.rope->scaling == RopeScaling::kDynamic;
  });
}

void Model::finish_loading() {
  require_all_loaded();
  parameters_.finish();
}

void Model::require_all_loaded() const {
  std::string names;
  int num_missing = 0;
  for (const Parameter& parameter : parameters_.parameters()) {
    if (parameter.is_loaded || !parameter.tied_to.empty()) continue;
    if (++num_missing <= 5) names += (names.empty() ? "" : ", ") + parameter.name;
  }
  if (num_missing > 5) names += ", ...";
  if (num_missing) throw Invalid(std::to_string(num_missing) + " parameters were not loaded: " + names);
}

void Model::forward(const infinilm_batch& batch, KvCache& cache, float* logits,
                    const std::function<bool()>& should_stop) {
  check(batch, cache);
  plan(batch);
  reserve(batch.num_tokens, batch.num_rows);
  const Step step{pool_, kernels_, batch, cache, space_, batch.num_tokens, config_.hidden_size};
  std::atomic<int64_t> stop_before{-1};
  const int64_t max_phases = static_cast<int64_t>(layers_.size()) * (Layer::kMaxPhases + 1) + 4;
  pool_.run(max_phases, [&](int thread) {
    begin(step, thread);
    for (int64_t index = 0; index < static_cast<int64_t>(layers_.size()); ++index) {
      // One asks for all, and says which layer it is about: a thread that is late goes through the ones before.
      pool_.phase(thread, 1, [&](int64_t) {
        if (should_stop()) stop_before = index;
      });
      if (stop_before == index) return;
      const int rotary = rotary_of_layer_[index];
      layers_[index]->run(step, thread, plans_[plan_of(layers_[index]->mixer())],
                          rotary < 0 ? nullptr : &rotations_[rotary]);
    }
    finish(step, thread, logits);
  });
  if (stop_before >= 0) throw Cancelled("the step was cancelled");
}

void Model::check(const infinilm_batch& batch, const KvCache& cache) const {
  if (batch.num_sequences < 1) refuse("number of sequences", batch.num_sequences, 0);
  if (batch.num_rows < 0) refuse("number of rows", batch.num_rows, 0);
  if (batch.num_tokens < 1 || batch.query_starts[0] != 0 ||
      batch.query_starts[batch.num_sequences] != batch.num_tokens) {
    refuse("number of tokens", batch.num_tokens, 0);
  }
  for (int64_t row = 0; row < batch.num_tokens; ++row) {
    const int32_t token = batch.token_ids[row], position = batch.positions[row], slot = batch.slot_mapping[row];
    if (token < 0 || token >= config_.vocab_size) refuse("token id", token, row);
    if (position < 0 || (config_.num_positions && position >= config_.num_positions)) refuse("position", position, row);
    if (slot < 0 || slot >= cache.num_blocks() * kBlock) refuse("slot", slot, row);
  }
  int64_t window = layers_.empty() ? 1 : layers_.front()->mixer().sliding_window;  // the widest; 0: all there is
  for (const auto& layer : layers_) {
    const int64_t other = layer->mixer().sliding_window;
    window = window == 0 || other == 0 ? 0 : std::max(window, other);
  }
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t begin = batch.query_starts[s], end = batch.query_starts[s + 1], length = batch.context_lengths[s];
    if (begin >= end || end > batch.num_tokens) refuse("query start", begin, s);
    if (blocks_of(length) > batch.max_blocks) refuse("context length", length, s);
    for (int64_t row = begin; row < end; ++row) {
      if (batch.positions[row] != length - (end - row)) refuse("position", batch.positions[row], row);
    }
    const int64_t first_seen = window ? std::max<int64_t>(batch.positions[begin] - window + 1, 0) : 0;
    for (int64_t block = first_seen / kBlock; block < blocks_of(length); ++block) {
      const int32_t id = batch.block_tables[s * batch.max_blocks + block];
      if (id < 0 || id >= cache.num_blocks()) refuse("block", id, s);
    }
  }
  for (int64_t i = 0; i < batch.num_rows; ++i) {
    const int32_t row = batch.logits_indices[i];
    if (row < 0 || row >= batch.num_tokens) refuse("logits index", row, i);
  }
}

size_t Model::plan_of(const AttentionConfig& mixer) const {
  size_t index = 0;
  while (index < plans_.size() && !plans_[index].is_for(mixer)) ++index;
  return index;
}

void Model::plan(const infinilm_batch& batch) {
  plans_.clear();
  for (const auto& layer : layers_) {
    if (plan_of(layer->mixer()) < plans_.size()) continue;
    plans_.push_back(plan_attention(batch, layer->mixer(), pool_.num_threads()));
  }
}

void Model::reserve(int64_t num_tokens, int64_t num_rows) {
  const int64_t hidden_size = config_.hidden_size;
  space_.hidden.reserve(num_tokens * hidden_size * 4);
  space_.delta.reserve(num_tokens * hidden_size * 4);
  // Rows are padded to a group of integers, which is at most 128.
  int64_t deepest = hidden_size;
  for (const LayerConfig& layer : config_.layers) {
    deepest = std::max(deepest, layer.mixer.num_heads * layer.mixer.head_dim);
    if (layer.mlp) deepest = std::max(deepest, layer.mlp->intermediate_size);
  }
  deepest += 128;
  space_.rows.reserve(std::max(num_tokens, num_rows), deepest);
  for (ThreadScratch& scratch : space_.threads) {
    scratch.vector.reserve(deepest * 4);
    scratch.ordered.reserve(deepest * 4);
    scratch.products.reserve(kRowsAtOnce * unit_columns(1) * 4);
  }
  for (const auto& layer : layers_) layer->reserve(space_, num_tokens, plans_[plan_of(layer->mixer())]);
  for (size_t i = 0; i < rotaries_.size(); ++i) {
    rotations_[i].half = rotaries_[i].head_dim() / 2;
    rotations_[i].cosines.reserve(num_tokens * rotations_[i].half * 4);
    rotations_[i].sines.reserve(num_tokens * rotations_[i].half * 4);
  }
}

// A phase: embed tokens and look up their rotations.
void Model::begin(const Step& step, int thread) {
  const infinilm_batch& batch = step.batch;
  pool_.phase(thread, batch.num_tokens, [&](int64_t row) {
    const int32_t* starts = batch.query_starts;
    const int64_t sequence = std::upper_bound(starts, starts + batch.num_sequences, row) - starts - 1;
    const int64_t position = batch.positions[row];
    embed(batch.token_ids[row], position, step.hidden() + row * config_.hidden_size);
    const int32_t* lengths = batch.prompt_lengths ? batch.prompt_lengths : batch.context_lengths;
    const int64_t length = std::max<int64_t>(lengths[sequence], position + 1);
    for (size_t i = 0; i < rotaries_.size(); ++i) {
      const int64_t offset = row * rotations_[i].half;
      rotaries_[i].rotation(position, length, rotations_[i].cosines.as<float>() + offset,
                            rotations_[i].sines.as<float>() + offset);
    }
  });
}

void Model::embed(int64_t token, int64_t position, float* out) const {
  const int64_t size = config_.hidden_size;
  if (config_.is_tied) {
    head_.unpack_row(token, out);
  } else if (options_.is_bf16) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(embedding_) + token * size;
    for (int64_t i = 0; i < size; ++i) out[i] = bf16_to_float(row[i]);
  } else {
    std::memcpy(out, embedding_ + token * size * 4, size * 4);
  }
  for (int64_t i = 0; embedding_scale_ != 1 && i < size; ++i) out[i] *= embedding_scale_;
  if (config_.num_positions) kernels_.add(out, positions_ + position * size, size, 1);
}

void Model::finish(const Step& step, int thread, float* logits) const {
  const int64_t num_rows = step.batch.num_rows, size = config_.hidden_size, vocab_size = config_.vocab_size;
  if (num_rows == 0) return;
  const Rows rows = prepare_rows(step, thread, num_rows, size, final_norm_, head_, [&](int64_t row) {
    return step.hidden() + step.batch.logits_indices[row] * size;
  });
  multiply_into(step, thread, rows, num_rows, head_, nullptr, vocab_size, false, logits);
  const float scale = static_cast<float>(config_.logits_scale), cap = static_cast<float>(config_.logits_softcap);
  if (scale == 1 && cap == 0) return;
  pool_.phase(thread, num_rows, [&](int64_t row) {
    float* values = logits + row * vocab_size;
    if (cap > 0) {
      kernels_.softcap(values, vocab_size, scale, cap);
    } else {
      for (int64_t i = 0; i < vocab_size; ++i) values[i] *= scale;
    }
  });
}

}  // namespace infinilm::cpu
