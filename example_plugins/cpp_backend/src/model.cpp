#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "infinilm/backend.hpp"

namespace plain {
namespace {

// out[row][n] = sum over k of in[row][k] * weight[n][k]
void multiply(const float *in, const float *weight, float *out, int64_t rows, int64_t num_in, int64_t num_out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < num_out; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < num_in; ++k) sum += in[row * num_in + k] * weight[n * num_in + k];
      out[row * num_out + n] = sum;
    }
  }
}

void normalize(const float *in, const float *weight, float *out, int64_t rows, int64_t size, float eps) {
  for (int64_t row = 0; row < rows; ++row, in += size, out += size) {
    float squares = 0;
    for (int64_t k = 0; k < size; ++k) squares += in[k] * in[k];
    const float factor = 1 / std::sqrt(squares / static_cast<float>(size) + eps);
    for (int64_t k = 0; k < size; ++k) out[k] = in[k] * factor * weight[k];
  }
}

void add(float *to, const std::vector<float> &what) {
  for (std::size_t k = 0; k < what.size(); ++k) to[k] += what[k];
}

// Row i of the first half of a head pairs with row i of the second.
void rotate(float *heads, int64_t num_heads, int64_t head_dim, int32_t position, double theta) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const double angle = position * std::pow(theta, -static_cast<double>(i) / static_cast<double>(half));
    const auto cosine = static_cast<float>(std::cos(angle)), sine = static_cast<float>(std::sin(angle));
    for (int64_t head = 0; head < num_heads; ++head) {
      float &first = heads[head * head_dim + i], &second = heads[head * head_dim + half + i];
      const float before = first;
      first = before * cosine - second * sine;
      second = second * cosine + before * sine;
    }
  }
}

}  // namespace

// ---------------------------------------------------------------- cache

int64_t bytes_per_block(const Config &config) {
  int64_t width = 0;
  for (const Layer &layer : config.layers) width += 2 * layer.num_kv_heads * layer.head_dim;
  return width * kBlockSize * static_cast<int64_t>(sizeof(float));
}

Cache::Cache(const Config &config, int64_t num_blocks) : num_blocks(num_blocks) {
  for (const Layer &layer : config.layers) {
    widths.push_back(layer.num_kv_heads * layer.head_dim);
    keys.emplace_back(static_cast<std::size_t>(num_blocks * kBlockSize * widths.back()));
    values.emplace_back(keys.back().size());
  }
}

void Cache::copy_blocks(const int32_t *pairs, int64_t num_pairs) {
  for (std::size_t layer = 0; layer < widths.size(); ++layer) {
    const int64_t size = kBlockSize * widths[layer];
    for (std::vector<float> *store : {&keys[layer], &values[layer]}) {
      std::vector<float> read(static_cast<std::size_t>(num_pairs * size));  // all of them before any is written
      for (int64_t i = 0; i < num_pairs; ++i) std::copy_n(&(*store)[pairs[2 * i] * size], size, &read[i * size]);
      for (int64_t i = 0; i < num_pairs; ++i) std::copy_n(&read[i * size], size, &(*store)[pairs[2 * i + 1] * size]);
    }
  }
}

// ---------------------------------------------------------------- parameters

Model::Model(Config config, const infinilm_host *host) : config_(std::move(config)), host_(host) {
  const int64_t hidden = config_.hidden_size;
  const auto want = [&](std::string name, std::vector<int64_t> shape) {
    parameters_.push_back({std::move(name), "", std::move(shape), nullptr});
  };
  want("model.embed_tokens.weight", {config_.vocab_size, hidden});
  for (std::size_t i = 0; i < config_.layers.size(); ++i) {
    const Layer &layer = config_.layers[i];
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const int64_t heads = layer.num_heads * layer.head_dim, kv_heads = layer.num_kv_heads * layer.head_dim;
    want(prefix + "input_layernorm.weight", {hidden});
    want(prefix + "self_attn.q_proj.weight", {heads, hidden});
    want(prefix + "self_attn.k_proj.weight", {kv_heads, hidden});
    want(prefix + "self_attn.v_proj.weight", {kv_heads, hidden});
    want(prefix + "self_attn.o_proj.weight", {hidden, heads});
    want(prefix + "post_attention_layernorm.weight", {hidden});
    want(prefix + "mlp.gate_proj.weight", {layer.intermediate_size, hidden});
    want(prefix + "mlp.up_proj.weight", {layer.intermediate_size, hidden});
    want(prefix + "mlp.down_proj.weight", {hidden, layer.intermediate_size});
  }
  want("model.norm.weight", {hidden});
  want("lm_head.weight", {config_.vocab_size, hidden});
  if (config_.is_tied) parameters_.back().tied_to = "model.embed_tokens.weight";
}

Parameter &Model::parameter(int64_t index) {
  if (index < 0 || index >= num_parameters()) {
    throw infinilm::Error(INFINILM_INVALID, "there is no parameter " + std::to_string(index));
  }
  return parameters_[static_cast<std::size_t>(index)];
}

std::shared_ptr<std::vector<float>> Model::open(int64_t index) {
  Parameter &wanted = parameter(index);
  if (!wanted.tied_to.empty()) throw infinilm::Error(INFINILM_INVALID, wanted.name + " is tied, and has no buffer");
  if (wanted.values == nullptr) {
    int64_t size = 1;
    for (const int64_t dim : wanted.shape) size *= dim;
    wanted.values = std::make_shared<std::vector<float>>(static_cast<std::size_t>(size));
  }
  return wanted.values;
}

void Model::close(int64_t index) {
  if (parameter(index).values == nullptr) throw infinilm::Error(INFINILM_INVALID, "it was never opened");
  parameter(index).is_loaded = true;
}

void Model::require_all() const {
  for (const Parameter &its : parameters_) {
    if (its.tied_to.empty() && !its.is_loaded) throw infinilm::Error(INFINILM_INVALID, its.name + " was not loaded");
  }
}

const float *Model::weights(const std::string &name) const {
  for (const Parameter &its : parameters_) {
    if (its.name == name) return its.tied_to.empty() ? its.values->data() : weights(its.tied_to);
  }
  throw infinilm::Error(INFINILM_FAILED, "there is no parameter " + name);
}

// ---------------------------------------------------------------- a step

struct Model::Step {
  Cache &cache;
  const infinilm_batch &batch;
  std::vector<float> hidden;  // [num_tokens][hidden_size]
  std::vector<float> normal;  // the same, after a norm
};

void Model::require_running() const {
  if (is_cancelled_ || host_->is_aborted(host_->context) != 0) throw infinilm::Error(INFINILM_CANCELLED, "cancelled");
}

void Model::forward(Cache &cache, const infinilm_batch &batch, float *logits) {
  require_all();
  is_cancelled_ = false;
  const int64_t size = config_.hidden_size;
  Step step{cache, batch, {}, std::vector<float>(static_cast<std::size_t>(batch.num_tokens * size))};
  const float *embedding = weights("model.embed_tokens.weight");
  for (int64_t token = 0; token < batch.num_tokens; ++token) {
    const int32_t id = batch.token_ids[token];
    if (id < 0 || id >= config_.vocab_size) {
      throw infinilm::Error(INFINILM_INVALID, "there is no token " + std::to_string(id));
    }
    step.hidden.insert(step.hidden.end(), embedding + id * size, embedding + (id + 1) * size);
  }
  for (std::size_t index = 0; index < config_.layers.size(); ++index) {
    require_running();
    attend(step, index);
    mix(step, index);
  }
  std::vector<float> rows;
  for (int64_t row = 0; row < batch.num_rows; ++row) {
    const float *from = &step.hidden[static_cast<std::size_t>(batch.logits_indices[row] * size)];
    rows.insert(rows.end(), from, from + size);
  }
  normalize(rows.data(), weights("model.norm.weight"), rows.data(), batch.num_rows, size, config_.final_eps);
  multiply(rows.data(), weights("lm_head.weight"), logits, batch.num_rows, size, config_.vocab_size);
}

void Model::attend(Step &step, std::size_t index) {
  const Layer &layer = config_.layers[index];
  const infinilm_batch &batch = step.batch;
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const int64_t size = config_.hidden_size, dim = layer.head_dim;
  const int64_t width = layer.num_heads * dim, kv_width = layer.num_kv_heads * dim;
  float *keys = step.cache.keys[index].data(), *values = step.cache.values[index].data();

  normalize(step.hidden.data(), weights(prefix + "input_layernorm.weight"), step.normal.data(), batch.num_tokens, size,
            layer.mixer_eps);
  std::vector<float> query(static_cast<std::size_t>(batch.num_tokens * width)), mixed(query.size());
  multiply(step.normal.data(), weights(prefix + "self_attn.q_proj.weight"), query.data(), batch.num_tokens, size, width);
  for (int64_t token = 0; token < batch.num_tokens; ++token) {  // keys and values go where they stay
    const float *normal = &step.normal[static_cast<std::size_t>(token * size)];
    float *key = keys + batch.slot_mapping[token] * kv_width;
    multiply(normal, weights(prefix + "self_attn.k_proj.weight"), key, 1, size, kv_width);
    multiply(normal, weights(prefix + "self_attn.v_proj.weight"), values + batch.slot_mapping[token] * kv_width, 1, size,
             kv_width);
    rotate(key, layer.num_kv_heads, dim, batch.positions[token], layer.rope_theta);
    rotate(&query[static_cast<std::size_t>(token * width)], layer.num_heads, dim, batch.positions[token],
           layer.rope_theta);
  }

  std::vector<float> scores;
  for (int64_t sequence = 0; sequence < batch.num_sequences; ++sequence) {
    const int32_t *blocks = batch.block_tables + sequence * batch.max_blocks;
    const auto slot_of = [&](int64_t position) {
      return blocks[position / kBlockSize] * kBlockSize + position % kBlockSize;
    };
    for (int64_t token = batch.query_starts[sequence]; token < batch.query_starts[sequence + 1]; ++token) {
      const int64_t length = batch.positions[token] + 1;
      scores.resize(static_cast<std::size_t>(length));
      for (int64_t head = 0; head < layer.num_heads; ++head) {
        const int64_t kv_head = head / (layer.num_heads / layer.num_kv_heads);
        const float *its_query = &query[static_cast<std::size_t>(token * width + head * dim)];
        float largest = -INFINITY, total = 0;
        for (int64_t at = 0; at < length; ++at) {
          const float *key = keys + slot_of(at) * kv_width + kv_head * dim;
          float score = 0;
          for (int64_t k = 0; k < dim; ++k) score += its_query[k] * key[k];
          scores[static_cast<std::size_t>(at)] = score * layer.scale;
          largest = std::max(largest, score * layer.scale);
        }
        for (float &score : scores) total += score = std::exp(score - largest);
        float *out = &mixed[static_cast<std::size_t>(token * width + head * dim)];
        for (int64_t at = 0; at < length; ++at) {
          const float *value = values + slot_of(at) * kv_width + kv_head * dim;
          const float share = scores[static_cast<std::size_t>(at)] / total;
          for (int64_t k = 0; k < dim; ++k) out[k] += share * value[k];
        }
      }
    }
  }
  multiply(mixed.data(), weights(prefix + "self_attn.o_proj.weight"), step.normal.data(), batch.num_tokens, width, size);
  add(step.hidden.data(), step.normal);
}

void Model::mix(Step &step, std::size_t index) {
  const Layer &layer = config_.layers[index];
  const int64_t rows = step.batch.num_tokens, size = config_.hidden_size, width = layer.intermediate_size;
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  normalize(step.hidden.data(), weights(prefix + "post_attention_layernorm.weight"), step.normal.data(), rows, size,
            layer.mlp_eps);
  std::vector<float> gate(static_cast<std::size_t>(rows * width)), up(gate.size());
  multiply(step.normal.data(), weights(prefix + "mlp.gate_proj.weight"), gate.data(), rows, size, width);
  multiply(step.normal.data(), weights(prefix + "mlp.up_proj.weight"), up.data(), rows, size, width);
  for (std::size_t k = 0; k < gate.size(); ++k) up[k] *= gate[k] / (1 + std::exp(-gate[k]));
  multiply(up.data(), weights(prefix + "mlp.down_proj.weight"), step.normal.data(), rows, width, size);
  add(step.hidden.data(), step.normal);
}

}  // namespace plain
