#include "reference.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace reference {

using namespace infinilm::cpu;

namespace {

constexpr double kTurn = 2 * 3.14159265358979323846;

struct Decoder {
  const DecoderConfig& config;
  const Weights& weights;
  int64_t prompt_length;

  Row linear(const std::string& name, const Row& x) const {
    const Row& matrix = weights.at(name + ".weight");
    const auto bias = weights.find(name + ".bias");
    Row y(matrix.size() / x.size());
    for (size_t i = 0; i < y.size(); ++i) {
      y[i] = std::inner_product(x.begin(), x.end(), matrix.begin() + i * x.size(),
                                bias == weights.end() ? 0.0 : bias->second[i]);
    }
    return y;
  }

  Row normed(const std::optional<NormConfig>& norm, const std::string& name, Row x) const {
    if (!norm) return x;
    const double size = static_cast<double>(x.size());
    const double mean = norm->is_rms ? 0 : std::accumulate(x.begin(), x.end(), 0.0) / size;
    double square = 0;
    for (double value : x) square += (value - mean) * (value - mean) / size;
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = (x[i] - mean) / std::sqrt(square + norm->eps) * (weights.at(name + ".weight")[i] + norm->offset);
      if (norm->has_bias) x[i] += weights.at(name + ".bias")[i];
    }
    return x;
  }

  static double frequency(const RopeConfig& rope, double dim, double pair, double length) {
    const double original = static_cast<double>(rope.original_max_position_embeddings), factor = rope.factor;
    double theta = rope.theta;
    if (rope.scaling == RopeScaling::kDynamic && length > original) {
      theta *= std::pow(factor * length / original - (factor - 1), dim / (dim - 2));
    }
    const double plain = std::pow(theta, -2 * pair / dim);
    double kept = 1;  // the rest is divided by the factor
    if (rope.scaling == RopeScaling::kLinear) kept = 0;
    if (rope.scaling == RopeScaling::kLlama3) {
      const double turns = original * plain / kTurn;
      kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
    }
    if (rope.scaling == RopeScaling::kYarn) {
      const auto pair_of = [&](double turns) { return dim * std::log(original / (turns * kTurn)) / (2 * std::log(theta)); };
      double first = pair_of(rope.beta_fast), last = pair_of(rope.beta_slow);
      if (rope.truncate) first = std::floor(first), last = std::ceil(last);
      first = std::max(first, 0.0), last = std::min(last, dim - 1);
      kept = 1 - (pair - first) / std::max(last - first, 0.001);
    }
    kept = std::clamp(kept, 0.0, 1.0);
    return plain * kept + plain / factor * (1 - kept);
  }

  void rotate(const RopeConfig& rope, int64_t position, double* head, int64_t dim) const {
    const double magnitude = rope.scaling == RopeScaling::kYarn ? rope.attention_factor : 1;
    for (int64_t i = 0; i < dim / 2; ++i) {
      const double angle = position * frequency(rope, dim, i, std::max(prompt_length, position + 1));
      const double a = head[i], b = head[i + dim / 2];
      head[i] = (a * std::cos(angle) - b * std::sin(angle)) * magnitude;
      head[i + dim / 2] = (b * std::cos(angle) + a * std::sin(angle)) * magnitude;
    }
  }

  // Queries or keys of one token, through their norm and rotated.
  Row heads(const AttentionConfig& mixer, const std::string& name, const char* kind, const Row& x, int64_t position) const {
    Row all = linear(name + "." + kind + "_proj", x);
    for (size_t at = 0; at < all.size(); at += mixer.head_dim) {
      Row head(all.begin() + at, all.begin() + at + mixer.head_dim);
      head = normed(mixer.query_key_norm, name + "." + kind + "_norm", head);
      if (mixer.rope) rotate(*mixer.rope, position, head.data(), mixer.head_dim);
      std::copy(head.begin(), head.end(), all.begin() + at);
    }
    return all;
  }

  std::vector<Row> attention(const AttentionConfig& mixer, const std::string& name, const std::vector<Row>& xs) const {
    std::vector<Row> keys, values, results;
    const int64_t dim = mixer.head_dim;
    for (int64_t t = 0; t < static_cast<int64_t>(xs.size()); ++t) {
      keys.push_back(heads(mixer, name, "k", xs[t], t));
      values.push_back(linear(name + ".v_proj", xs[t]));
      const Row queries = heads(mixer, name, "q", xs[t], t);
      Row attended(queries.size(), 0);
      for (int64_t head = 0; head < mixer.num_heads; ++head) {
        const int64_t at = head * dim, kv = head / mixer.group() * dim;
        const int64_t first = mixer.sliding_window ? std::max<int64_t>(t - mixer.sliding_window + 1, 0) : 0;
        Row shares;
        for (int64_t s = first; s <= t; ++s) {
          const double score = mixer.scale * std::inner_product(&queries[at], &queries[at] + dim, &keys[s][kv], 0.0);
          shares.push_back(std::exp(mixer.softcap > 0 ? mixer.softcap * std::tanh(score / mixer.softcap) : score));
        }
        const double total = std::accumulate(shares.begin(), shares.end(), 0.0);
        for (int64_t s = first; s <= t; ++s) {
          for (int64_t i = 0; i < dim; ++i) attended[at + i] += shares[s - first] / total * values[s][kv + i];
        }
      }
      results.push_back(linear(name + ".o_proj", attended));
    }
    return results;
  }

  static double activated(Activation activation, double x) {
    switch (activation) {
      case Activation::kSilu: return x / (1 + std::exp(-x));
      case Activation::kGelu: return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
      case Activation::kGeluTanh: return x / 2 * (1 + std::tanh(std::sqrt(4 / kTurn) * (x + 0.044715 * x * x * x)));
      case Activation::kRelu: return std::max(x, 0.0);
    }
    return x;
  }

  Row mlp(const MlpConfig& its, const std::string& name, const Row& x) const {
    Row up = linear(name + ".up_proj", x);
    const Row gate = its.is_gated ? linear(name + ".gate_proj", x) : Row();
    for (size_t i = 0; i < up.size(); ++i) {
      up[i] = its.is_gated ? activated(its.activation, gate[i]) * up[i] : activated(its.activation, up[i]);
    }
    return linear(name + ".down_proj", up);
  }

  Row experts(const MlpConfig& its, const std::string& name, const Row& x) const {
    Row shares = linear(name + ".gate", x);
    double total = 0, chosen_total = 0;
    for (double& share : shares) total += share = std::exp(share);
    std::vector<int64_t> order(shares.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return shares[a] > shares[b]; });
    order.resize(its.experts_per_token);
    for (int64_t expert : order) chosen_total += shares[expert];
    Row sum(x.size(), 0);
    for (int64_t expert : order) {
      const Row y = mlp(its, name + ".experts." + std::to_string(expert), x);
      for (size_t i = 0; i < y.size(); ++i) sum[i] += y[i] * shares[expert] / (its.normalize ? chosen_total : total);
    }
    return sum;
  }

  void run(const LayerConfig& layer, const std::string& name, std::vector<Row>* hidden) const {
    const std::string after_mixer = name + ".post_attention_layernorm";
    const std::string before_mlp = layer.after_mixer ? name + ".pre_feedforward_layernorm" : after_mixer;
    const auto add = [&](int64_t t, const Row& x) {
      for (size_t i = 0; i < x.size(); ++i) (*hidden)[t][i] += x[i];
    };
    std::vector<Row> xs;
    for (const Row& x : *hidden) xs.push_back(normed(layer.before_mixer, name + ".input_layernorm", x));
    const std::vector<Row> mixed = attention(layer.mixer, name + ".self_attn", xs);
    for (size_t t = 0; t < xs.size(); ++t) {
      add(t, normed(layer.after_mixer, after_mixer, mixed[t]));
      if (!layer.mlp) continue;
      const Row x = normed(layer.before_mlp, before_mlp, (*hidden)[t]);
      const Row y = layer.mlp->num_experts ? experts(*layer.mlp, name + ".mlp", x) : mlp(*layer.mlp, name + ".mlp", x);
      add(t, normed(layer.after_mlp, name + ".post_feedforward_layernorm", y));
    }
  }
};

}  // namespace

std::vector<Row> logits(const DecoderConfig& config, const Weights& weights, const std::vector<int32_t>& tokens,
                        int64_t prompt_length) {
  const Decoder decoder{config, weights, prompt_length};
  const int64_t size = config.hidden_size;
  const Row& embedding = weights.at("model.embed_tokens.weight");
  std::vector<Row> hidden;
  for (size_t t = 0; t < tokens.size(); ++t) {
    hidden.emplace_back(embedding.begin() + tokens[t] * size, embedding.begin() + (tokens[t] + 1) * size);
    for (int64_t i = 0; i < size; ++i) {
      hidden[t][i] *= config.embedding_scale;
      if (config.num_positions) hidden[t][i] += weights.at("model.embed_positions.weight")[t * size + i];
    }
  }
  for (size_t i = 0; i < config.layers.size(); ++i) {
    decoder.run(config.layers[i], "model.layers." + std::to_string(i), &hidden);
  }
  for (Row& x : hidden) {
    x = decoder.linear(config.is_tied ? "model.embed_tokens" : "lm_head", decoder.normed(config.final_norm, "model.norm", x));
    for (double& logit : x) {
      logit *= config.logits_scale;
      if (config.logits_softcap > 0) logit = config.logits_softcap * std::tanh(logit / config.logits_softcap);
    }
  }
  return hidden;
}

}  // namespace reference
