// One layer of a decoder: attention, an MLP or experts, and the norms around them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "attention.h"
#include "mlp.h"
#include "moe.h"

namespace infinilm::cpu {

class Layer {
 public:
  // `packing` is for the matrices, `float_packing` for those that are never quantized.
  Layer(const LayerConfig& config, int64_t index, int64_t hidden_size, const Kernels& kernels, Packing packing,
        Packing float_packing, ParameterList& parameters);

  const AttentionConfig& mixer() const { return attention_->config(); }
  void reserve(Workspace& space, int64_t num_tokens, const AttentionPlan& plan) const;

  // Phases of a region, at most kMaxPhases.
  static constexpr int64_t kMaxPhases = 16;
  void run(const Step& step, int thread, AttentionPlan& plan, const Rotation* rotation) const;

 private:
  // Add what a half of the layer left in step.delta() where there is a norm behind it.
  static void finish_half(const Step& step, int thread, const NormIfAny& after);

  NormIfAny before_mixer_, after_mixer_, before_mlp_, after_mlp_;
  std::optional<Attention> attention_;
  std::optional<Mlp> mlp_;
  std::optional<Moe> moe_;
};

}  // namespace infinilm::cpu
