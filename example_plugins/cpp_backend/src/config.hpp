// What this backend understands of a DecoderConfig: llama as it was published, without rope scaling.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace plain {

struct Layer {
  int64_t num_heads, num_kv_heads, head_dim, intermediate_size;
  double rope_theta;
  float scale;  // of attention scores
  float mixer_eps, mlp_eps;
};

struct Config {
  int64_t vocab_size, hidden_size, max_positions;
  bool is_tied;
  float final_eps;
  std::vector<Layer> layers;
};

// Throws infinilm::Unsupported naming the key or the value that this backend does not know.
Config read_config(std::string_view json);

}  // namespace plain
