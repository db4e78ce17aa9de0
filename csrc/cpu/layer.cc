#include "layer.h"

namespace infinilm::cpu {

Layer::Layer(const LayerConfig& config, int64_t index, int64_t hidden_size, const Kernels& kernels, Packing packing,
             Packing float_packing, ParameterList& parameters) {
  const std::string name = "model.layers." + std::to_string(index);
  make_norm(before_mixer_, config.before_mixer, name + ".input_layernorm", hidden_size, parameters);
  attention_.emplace(config.mixer, name + ".self_attn", index, hidden_size, kernels, packing, parameters);
  make_norm(after_mixer_, config.after_mixer, name + ".post_attention_layernorm", hidden_size, parameters);
  // llama calls the norm before the MLP by the name that the one after the mixer has where there are both.
  const char* before_mlp = config.after_mixer ? ".pre_feedforward_layernorm" : ".post_attention_layernorm";
  make_norm(before_mlp_, config.before_mlp, name + before_mlp, hidden_size, parameters);
  if (config.mlp && config.mlp->num_experts) {
    moe_.emplace(*config.mlp, name + ".mlp", hidden_size, kernels, packing, float_packing, parameters);
  } else if (config.mlp) {
    mlp_.emplace(*config.mlp, name + ".mlp", hidden_size, kernels, packing, parameters);
  }
  make_norm(after_mlp_, config.after_mlp, name + ".post_feedforward_layernorm", hidden_size, parameters);
}

void Layer::reserve(Workspace& space, int64_t num_tokens, const AttentionPlan& plan) const {
  attention_->reserve(space, num_tokens, plan);
  if (mlp_) mlp_->reserve(space, num_tokens);
  if (moe_) moe_->reserve(space, num_tokens);
}

void Layer::run(const Step& step, int thread, AttentionPlan& plan, const Rotation* rotation) const {
  attention_->run(step, thread, before_mixer_, plan, rotation, !after_mixer_);
  finish_half(step, thread, after_mixer_);
  if (mlp_) mlp_->run(step, thread, before_mlp_, !after_mlp_);
  if (moe_) moe_->run(step, thread, before_mlp_, !after_mlp_);
  if (mlp_ || moe_) finish_half(step, thread, after_mlp_);
}

void Layer::finish_half(const Step& step, int thread, const NormIfAny& after) {
  if (!after) return;
  step.pool.phase(thread, step.num_tokens, [&](int64_t row) {
    const int64_t offset = row * step.hidden_size;
    after->apply(step.kernels, step.delta() + offset, step.vector(thread));
    step.kernels.add(step.hidden() + offset, step.vector(thread), step.hidden_size, 1);
  });
}

}  // namespace infinilm::cpu
