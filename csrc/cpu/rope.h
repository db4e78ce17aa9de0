// Rotary position embedding: frequencies of every scaling, and the cosines and sines of a token.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder_config.h"

namespace infinilm::cpu {

class Rotary {
 public:
  Rotary(const RopeConfig& config, int64_t head_dim);

  bool is_for(const RopeConfig& config, int64_t head_dim) const {
    return config == config_ && head_dim == head_dim_;
  }
  int64_t head_dim() const { return head_dim_; }

  // Cosines and sines, (head_dim / 2,) each, of a token at `position` in a sequence that counts as `length` long; only
  // dynamic scaling looks at that. Frequencies and angles are float32, because models are trained with those.
  void rotation(int64_t position, int64_t length, float* cosines, float* sines) const;

  const std::vector<float>& frequencies() const { return frequencies_; }

 private:
  float dynamic_base(int64_t length) const;

  RopeConfig config_;
  int64_t head_dim_;
  std::vector<float> exponents_;    // 2 i / head_dim
  std::vector<float> frequencies_;  // with dynamic scaling, those of a short sequence
};

}  // namespace infinilm::cpu
