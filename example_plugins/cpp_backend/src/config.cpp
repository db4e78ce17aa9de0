#include "config.hpp"

#include <cmath>
#include <string>

#include "infinilm/config.hpp"

namespace plain {
namespace {

using infinilm::Fields;
using infinilm::Json;
using infinilm::read_object;

void require(const std::string &place, const std::string &value, const std::string &wanted) {
  if (value != wanted) throw infinilm::Unsupported(place + " is '" + value + "', and '" + wanted + "' is all there is");
}

// Every key is asked for, those too that have to be at their default: read_object declines the ones that are not.
float read_norm(const Json &json, const std::string &path) {
  return read_object(json, path, [](Fields &fields) {
    require(fields.place("kind"), fields.text("kind", "rms"), "rms");
    return static_cast<float>(fields.number("eps", 1e-6));
  });
}

void read_mixer(Layer &layer, const Json &json, const std::string &path) {
  read_object(json, path, [&](Fields &fields) {
    fields.require_kind("attention");
    layer.num_heads = fields.integer("num_heads");
    layer.num_kv_heads = fields.integer("num_kv_heads");
    layer.head_dim = fields.integer("head_dim");
    layer.scale = static_cast<float>(fields.number("scale", 1 / std::sqrt(static_cast<double>(layer.head_dim))));
    if (layer.num_kv_heads < 1 || layer.num_heads % layer.num_kv_heads != 0 || layer.head_dim % 2 != 0) {
      throw infinilm::Unsupported(fields.path() + " has heads that cannot be shared or rotated");
    }
    layer.rope_theta = read_object(fields.require("rope"), fields.place("rope"),
                                   [](Fields &rope) { return rope.number("theta", 10000.0); });
  });
}

void read_mlp(Layer &layer, const Json &json, const std::string &path) {
  read_object(json, path, [&](Fields &fields) {
    fields.require_kind("mlp");
    require(fields.place("activation"), fields.text("activation", "silu"), "silu");
    layer.intermediate_size = fields.integer("intermediate_size");
  });
}

Layer read_layer(const Json &json, const std::string &path) {
  return read_object(json, path, [](Fields &fields) {
    Layer layer{};
    read_mixer(layer, fields.require("mixer"), fields.place("mixer"));
    read_mlp(layer, fields.require("mlp"), fields.place("mlp"));
    read_object(fields.require("norms"), fields.place("norms"), [&](Fields &norms) {
      layer.mixer_eps = read_norm(norms.require("before_mixer"), norms.place("before_mixer"));
      layer.mlp_eps = read_norm(norms.require("before_mlp"), norms.place("before_mlp"));
    });
    return layer;
  });
}

}  // namespace

Config read_config(std::string_view json) {
  return read_object(infinilm::parse_json(json), "", [](Fields &fields) {
    Config config{};
    (void)fields.text("model_type");
    config.vocab_size = fields.integer("vocab_size");
    config.hidden_size = fields.integer("hidden_size");
    config.max_positions = fields.integer("max_position_embeddings");
    const auto &layers = fields.array("layers");
    for (std::size_t i = 0; i < layers.size(); ++i) {
      config.layers.push_back(read_layer(layers[i], "layers[" + std::to_string(i) + "]"));
    }
    read_object(fields.require("embedding"), "embedding",
                [&](Fields &embedding) { config.is_tied = embedding.flag("tied", false); });
    config.final_eps = read_norm(fields.require("final_norm"), "final_norm");
    read_object(fields.require("logits"), "logits", [](Fields &) {});
    return config;
  });
}

}  // namespace plain
