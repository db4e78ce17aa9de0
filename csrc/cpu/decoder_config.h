// A decoder as the host describes it: what infinilm_hookspecs.DecoderConfig says, parsed from its JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace infinilm::cpu {

struct NormConfig {
  bool is_rms = true;  // else layer norm
  double eps = 1e-6;
  double offset = 0;
  bool has_bias = false;
};

enum class RopeScaling { kNone, kLinear, kDynamic, kLlama3, kYarn };

struct RopeConfig {
  double theta = 10000;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1;
  int64_t original_max_position_embeddings = 0;
  double low_freq_factor = 1, high_freq_factor = 1;  // llama3
  double attention_factor = 1, beta_fast = 32, beta_slow = 1;  // yarn
  bool truncate = true;

  bool operator==(const RopeConfig& other) const;
};

struct AttentionConfig {
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::optional<RopeConfig> rope;
  double scale = 1;
  bool has_qkv_bias = false, has_output_bias = false;
  int64_t sliding_window = 0;  // 0: none
  double softcap = 0;          // 0: none
  std::optional<NormConfig> query_key_norm;

  int64_t group() const { return num_heads / num_kv_heads; }
};

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// num_experts is 0 where there is one MLP and no router.
struct MlpConfig {
  int64_t intermediate_size = 0;
  Activation activation = Activation::kSilu;
  bool has_bias = false;
  bool is_gated = true;
  int64_t num_experts = 0, experts_per_token = 0;
  bool normalize = false;
};

struct LayerConfig {
  AttentionConfig mixer;
  std::optional<MlpConfig> mlp;
  std::optional<NormConfig> before_mixer, after_mixer, before_mlp, after_mlp;
};

struct DecoderConfig {
  std::string model_type;
  int64_t vocab_size = 0, hidden_size = 0, max_position_embeddings = 0;
  std::vector<LayerConfig> layers;
  NormConfig final_norm;
  bool is_tied = false;
  double embedding_scale = 1;
  int64_t num_positions = 0;  // learned; 0: none
  double logits_scale = 1;
  double logits_softcap = 0;  // 0: none
};

// Throws infinilm::Unsupported with the words a user reads where a part is not known here, and where this is no config.
DecoderConfig parse_decoder_config(const std::string& json);

}  // namespace infinilm::cpu
