#include "mlp.h"

#include "linear.h"

namespace infinilm::cpu {

MlpPackings::MlpPackings(const MlpConfig& config, const std::vector<std::string>& names, Packing otherwise,
                         const ParameterList& parameters) {
  std::vector<std::string> in, out;
  for (const std::string& name : names) {
    if (config.is_gated) in.push_back(name + ".gate_proj.weight");
    in.push_back(name + ".up_proj.weight");
    out.push_back(name + ".down_proj.weight");
  }
  gate_up = parameters.packing_of(in, otherwise);
  down = parameters.packing_of(out, otherwise);
}

MlpWeights::MlpWeights(const MlpConfig& mlp, const std::string& name, int64_t hidden_size, const Kernels& kernels,
                       MlpPackings packings, ParameterList& parameters)
    : config(mlp),
      gate_up(kernels, packings.gate_up, (mlp.intermediate_size + kBlock - 1) / kBlock * (mlp.is_gated ? 2 : 1),
              hidden_size, parameters.arena()),
      down(kernels, packings.down, (hidden_size + kBlock - 1) / kBlock, mlp.intermediate_size, parameters.arena()),
      gate_up_bias(mlp.has_bias ? gate_up.num_blocks() * kBlock : 0),
      down_bias(mlp.has_bias ? hidden_size : 0) {
  const int64_t step = multiple();
  for (int64_t part = 0; part < step; ++part) {
    const std::string projection = name + (mlp.is_gated && part == 0 ? ".gate_proj" : ".up_proj");
    parameters
        .add_matrix(projection + ".weight", mlp.intermediate_size, &gate_up,
                    [=](int64_t block) { return block * step + part; })
        .shard_dim = 0;
    if (!mlp.has_bias) continue;
    float* out = gate_up_bias.data() + part * kBlock;
    parameters.add_vector_in_blocks(projection + ".bias", mlp.intermediate_size, out, step * kBlock).shard_dim = 0;
  }
  parameters.add_matrix(name + ".down_proj.weight", hidden_size, &down, [](int64_t b) { return b; }).shard_dim = 1;
  if (mlp.has_bias) parameters.add_vector(name + ".down_proj.bias", hidden_size, down_bias.data());
}

void MlpWeights::activate(const Kernels& kernels, float* products, int64_t stride, int64_t height, int64_t first_block,
                          int64_t num_blocks, float* out, int64_t out_stride) const {
  for (int64_t row = 0; row < height; ++row) {
    float* x = products + row * stride;
    float* to = out + row * out_stride + first_block / multiple() * kBlock;
    if (config.has_bias) kernels.add(x, gate_up_bias.data() + first_block * kBlock, num_blocks * kBlock, 1);
    if (config.is_gated) {
      kernels.activate_pairs(config.activation, x, num_blocks / 2, to);
    } else {
      kernels.activate(config.activation, x, num_blocks * kBlock, to);
    }
  }
}

Mlp::Mlp(const MlpConfig& config, const std::string& name, int64_t hidden_size, const Kernels& kernels,
         Packing packing, ParameterList& parameters)
    : weights_(config, name, hidden_size, kernels, MlpPackings(config, {name}, packing, parameters), parameters) {}

void Mlp::reserve(Workspace& space, int64_t num_tokens) const {
  space.intermediate.reserve(num_tokens * weights_.padded_size() * 4);
  for (ThreadScratch& scratch : space.threads) {
    scratch.products.reserve(kRowsAtOnce * unit_columns(weights_.multiple()) * 4);
    scratch.vector.reserve(weights_.padded_size() * 4);
  }
}

void Mlp::run(const Step& step, int thread, const NormIfAny& norm, bool is_added) const {
  const int64_t hidden_size = step.hidden_size, size = weights_.config.intermediate_size;
  const int64_t stride = weights_.padded_size();
  float* intermediate = step.space.intermediate.as<float>();
  const Rows rows = prepare_rows(step, thread, step.num_tokens, hidden_size, norm, weights_.gate_up,
                                 [&](int64_t row) { return step.hidden() + row * hidden_size; });
  multiply(step, thread, rows, step.num_tokens, weights_.gate_up, weights_.multiple(),
           [&](int64_t first_row, int64_t height, int64_t first_block, int64_t num_blocks, float* products,
               int64_t product_stride) {
             weights_.activate(step.kernels, products, product_stride, height, first_block, num_blocks,
                               intermediate + first_row * stride, stride);
           });
  const Rows activated = prepare_rows(step, thread, step.num_tokens, size, std::nullopt, weights_.down,
                                      [&](int64_t row) { return intermediate + row * stride; });
  multiply_into(step, thread, activated, step.num_tokens, weights_.down,
                weights_.down_bias.empty() ? nullptr : weights_.down_bias.data(), hidden_size, is_added,
                is_added ? step.hidden() : step.delta());
}

}  // namespace infinilm::cpu
