#include "decoder_config.h"

#include <cmath>
#include <tuple>

#include "infinilm/config.hpp"

namespace infinilm::cpu {

namespace {

[[noreturn]] void decline(const std::string& reason) { throw Unsupported("the cpu backend does not run " + reason); }

// Far above any model's, and so few that the bytes of two of these multiplied can be counted in an int64_t.
constexpr int64_t kLargestSize = 1 << 24, kMostExperts = 1 << 12, kLongestContext = INT32_MAX;

int64_t positive(Fields& fields, const char* key, int64_t most = kLargestSize) {
  const int64_t value = fields.integer(key);
  if (value < 1 || value > most) decline("a model whose " + fields.place(key) + " is " + std::to_string(value));
  return value;
}

NormConfig parse_norm(const Json& json, const std::string& path) {
  return read_object(json, path, [](Fields& fields) {
    const std::string kind = fields.text("kind", "rms");
    if (kind != "rms" && kind != "layer") decline(fields.path() + ": the norm is '" + kind + "'");
    NormConfig norm;
    norm.is_rms = kind == "rms";
    norm.eps = fields.number("eps", norm.eps);
    norm.offset = fields.number("offset", norm.offset);
    norm.has_bias = fields.flag("bias", norm.has_bias);
    return norm;
  });
}

std::optional<NormConfig> parse_norm_if_any(Fields& parent, const char* key) {
  const Json* json = parent.find(key);
  if (json == nullptr) return std::nullopt;
  return parse_norm(*json, parent.place(key));
}

void parse_scaling(Fields& fields, RopeConfig* rope) {
  const std::string kind = fields.text("kind");
  if (kind == "linear") {
    rope->scaling = RopeScaling::kLinear;
  } else if (kind == "dynamic") {
    rope->scaling = RopeScaling::kDynamic;
  } else if (kind == "llama3") {
    rope->scaling = RopeScaling::kLlama3;
    rope->low_freq_factor = fields.number("low_freq_factor");
    rope->high_freq_factor = fields.number("high_freq_factor");
  } else if (kind == "yarn") {
    rope->scaling = RopeScaling::kYarn;
    rope->attention_factor = fields.number("attention_factor");
    rope->beta_fast = fields.number("beta_fast", rope->beta_fast);
    rope->beta_slow = fields.number("beta_slow", rope->beta_slow);
    rope->truncate = fields.flag("truncate", rope->truncate);
  } else {
    decline(fields.path() + ": its kind is '" + kind + "'");
  }
  rope->factor = fields.number("factor");
  if (kind != "linear") rope->original_max_position_embeddings = positive(fields, "original_max_position_embeddings", kLongestContext);
}

RopeConfig parse_rope(const Json& json, const std::string& path, int64_t head_dim) {
  RopeConfig rope;
  read_object(json, path, [&](Fields& fields) {
    rope.theta = fields.number("theta", rope.theta);
    const Json* scaling = fields.find("scaling");
    if (scaling == nullptr) return;
    read_object(*scaling, fields.place("scaling"), [&](Fields& scaling_fields) { parse_scaling(scaling_fields, &rope); });
  });
  if (head_dim % 2) decline(path + ": a head of " + std::to_string(head_dim) + " has no two halves to rotate");
  if (rope.scaling == RopeScaling::kDynamic && head_dim < 4) {
    decline(path + ": dynamic rope scaling has no base for a head of " + std::to_string(head_dim));
  }
  return rope;
}

// Decline a part by its kind, before its other keys are looked at; a Named one also by its name.
void require_kind(const Json& json, const std::string& path, std::initializer_list<const char*> known) {
  const Json *kind = json.find("kind"), *name = json.find("name");
  const std::string said = kind != nullptr ? kind->string : "";
  for (const char* wanted : known) {
    if (said == wanted) return;
  }
  decline(path + ": it is '" + said + "'" + (name != nullptr ? " '" + name->string + "'" : ""));
}

void parse_attention(Fields& fields, AttentionConfig* mixer) {
  const std::string& path = fields.path();
  fields.text("kind");
  mixer->num_heads = positive(fields, "num_heads");
  mixer->num_kv_heads = positive(fields, "num_kv_heads");
  mixer->head_dim = positive(fields, "head_dim");
  if (const Json* rope = fields.find("rope")) mixer->rope = parse_rope(*rope, fields.place("rope"), mixer->head_dim);
  mixer->scale = fields.number("scale", 1 / std::sqrt(static_cast<double>(mixer->head_dim)));
  mixer->has_qkv_bias = fields.flag("qkv_bias", false);
  mixer->has_output_bias = fields.flag("output_bias", false);
  if (fields.find("sliding_window")) mixer->sliding_window = positive(fields, "sliding_window", kLongestContext);
  if (fields.find("softcap")) {
    mixer->softcap = fields.number("softcap");
    if (mixer->softcap <= 0) decline(path + ": scores cannot be capped at " + std::to_string(mixer->softcap));
  }
  mixer->query_key_norm = parse_norm_if_any(fields, "query_key_norm");
  if (mixer->num_heads > kLargestSize / mixer->head_dim) {
    decline(path + ": " + std::to_string(mixer->num_heads) + " heads of " + std::to_string(mixer->head_dim));
  }
  if (mixer->num_heads % mixer->num_kv_heads) {
    decline(path + ": " + std::to_string(mixer->num_heads) + " query heads cannot share " +
            std::to_string(mixer->num_kv_heads) + " key-value heads evenly");
  }
}

Activation parse_activation(Fields& fields) {
  const std::string name = fields.text("activation", "silu");
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  decline(fields.path() + ": its activation is '" + name + "'");
}

MlpConfig parse_mlp(Fields& fields) {
  MlpConfig mlp;
  mlp.intermediate_size = positive(fields, "intermediate_size");
  mlp.activation = parse_activation(fields);
  if (fields.text("kind") == "mlp") {
    mlp.has_bias = fields.flag("bias", false);
    mlp.is_gated = fields.flag("gated", true);
    return mlp;
  }
  mlp.num_experts = positive(fields, "num_experts", kMostExperts);
  mlp.experts_per_token = positive(fields, "experts_per_token");
  mlp.normalize = fields.flag("normalize", false);
  if (mlp.experts_per_token > mlp.num_experts) {
    decline(fields.path() + ": " + std::to_string(mlp.experts_per_token) + " of " + std::to_string(mlp.num_experts) +
            " experts cannot be chosen");
  }
  return mlp;
}

LayerConfig parse_layer(Fields& fields) {
  LayerConfig layer;
  const Json& mixer = fields.require("mixer");
  require_kind(mixer, fields.place("mixer"), {"attention"});
  read_object(mixer, fields.place("mixer"), [&](Fields& part) { parse_attention(part, &layer.mixer); });
  if (const Json* mlp = fields.find("mlp")) {
    require_kind(*mlp, fields.place("mlp"), {"mlp", "moe"});
    layer.mlp = read_object(*mlp, fields.place("mlp"), parse_mlp);
  }
  read_object(fields.require("norms"), fields.place("norms"), [&](Fields& norms) {
    layer.before_mixer = parse_norm_if_any(norms, "before_mixer");
    layer.after_mixer = parse_norm_if_any(norms, "after_mixer");
    layer.before_mlp = parse_norm_if_any(norms, "before_mlp");
    layer.after_mlp = parse_norm_if_any(norms, "after_mlp");
  });
  return layer;
}

void parse_embedding(Fields& fields, DecoderConfig* config) {
  config->is_tied = fields.flag("tied", false);
  config->embedding_scale = fields.number("scale", 1);
  if (fields.find("num_positions")) config->num_positions = positive(fields, "num_positions");
}

void parse_logits(Fields& fields, DecoderConfig* config) {
  config->logits_scale = fields.number("scale", 1);
  if (!fields.find("softcap")) return;
  config->logits_softcap = fields.number("softcap");
  if (config->logits_softcap <= 0) decline("logits capped at " + std::to_string(config->logits_softcap));
}

DecoderConfig parse_config(Fields& fields) {
  DecoderConfig config;
  config.model_type = fields.text("model_type");
  config.vocab_size = positive(fields, "vocab_size");
  config.hidden_size = positive(fields, "hidden_size");
  config.max_position_embeddings = fields.integer("max_position_embeddings");
  if (fields.find("quantization")) decline("weights that are quantized already");
  config.final_norm = parse_norm(fields.require("final_norm"), "final_norm");
  read_object(fields.require("embedding"), "embedding", [&](Fields& part) { parse_embedding(part, &config); });
  read_object(fields.require("logits"), "logits", [&](Fields& part) { parse_logits(part, &config); });
  for (const Json& layer : fields.array("layers")) {
    config.layers.push_back(read_object(layer, "layers[" + std::to_string(config.layers.size()) + "]", parse_layer));
  }
  return config;
}

}  // namespace

bool RopeConfig::operator==(const RopeConfig& other) const {
  const auto all = [](const RopeConfig& rope) {
    return std::tie(rope.theta, rope.scaling, rope.factor, rope.original_max_position_embeddings, rope.low_freq_factor,
                    rope.high_freq_factor, rope.attention_factor, rope.beta_fast, rope.beta_slow, rope.truncate);
  };
  return all(*this) == all(other);
}

DecoderConfig parse_decoder_config(const std::string& text) { return read_object(parse_json(text), "", parse_config); }

}  // namespace infinilm::cpu
