#include "moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear.h"

namespace infinilm::cpu {

namespace {

void softmax(float* x, int64_t size) {
  const float most = *std::max_element(x, x + size);
  float total = 0;
  for (int64_t i = 0; i < size; ++i) total += x[i] = std::exp(x[i] - most);
  for (int64_t i = 0; i < size; ++i) x[i] /= total;
}

// A phase: call use(expert, first_block, num_blocks) for units of one matrix of every active expert. How many are active
// is looked up inside: a thread that comes late may find the choices of a later layer there.
template <typename Use>
void share_experts(const Step& step, int thread, const PackedMatrix& shape, int64_t num_choices, int64_t num_experts,
                   int64_t multiple, const Use& use) {
  const int64_t most_active = std::min(num_choices, num_experts);
  const int64_t blocks = unit_blocks(shape, num_choices / most_active, multiple, step.pool.num_threads());
  const int64_t num_units = (shape.num_blocks() + blocks - 1) / blocks;
  step.pool.phase(thread, num_units * most_active, [&](int64_t index) {
    const std::vector<int32_t>& active = step.space.routing.active;
    if (index / num_units >= static_cast<int64_t>(active.size())) return;
    const int64_t first_block = index % num_units * blocks;
    use(active[index / num_units], first_block, std::min(blocks, shape.num_blocks() - first_block));
  });
}

}  // namespace

Moe::Moe(const MlpConfig& config, const std::string& name, int64_t hidden_size, const Kernels& kernels,
         Packing packing, Packing router_packing, ParameterList& parameters)
    : config_(config), router_(kernels, router_packing, (config.num_experts + kBlock - 1) / kBlock, hidden_size,
              parameters.arena()) {
  parameters.add_matrix(name + ".gate.weight", config.num_experts, &router_, [](int64_t block) { return block; });
  std::vector<std::string> names;
  for (int64_t expert = 0; expert < config.num_experts; ++expert) {
    names.push_back(name + ".experts." + std::to_string(expert));
  }
  const MlpPackings packings(config, names, packing, parameters);
  for (const std::string& expert : names) {
    experts_.push_back(std::make_unique<MlpWeights>(config, expert, hidden_size, kernels, packings, parameters));
  }
}

void Moe::reserve(Workspace& space, int64_t num_tokens) const {
  const MlpWeights& expert = *experts_.front();
  const int64_t num_choices = num_tokens * config_.experts_per_token, hidden_size = router_.in_features();
  space.intermediate.reserve(num_choices * expert.padded_size() * 4);
  space.router_logits.reserve(num_tokens * config_.num_experts * 4);
  space.expert_outputs.reserve(num_choices * hidden_size * 4);
  space.expert_rows.reserve(num_choices, std::max(expert.gate_up.depth(), expert.down.depth()));
  space.rows.reserve(num_choices, std::max(expert.gate_up.depth(), expert.down.depth()));
  Routing& routing = space.routing;
  routing.shares.resize(std::max<size_t>(routing.shares.size(), num_choices));
  routing.experts.resize(std::max<size_t>(routing.experts.size(), num_choices));
  routing.rows.resize(std::max<size_t>(routing.rows.size(), num_choices));
  routing.starts.resize(std::max<size_t>(routing.starts.size(), config_.num_experts + 1));
  routing.ends.resize(std::max<size_t>(routing.ends.size(), config_.num_experts));
  routing.active.reserve(config_.num_experts);
  routing.probabilities.resize(std::max<size_t>(routing.probabilities.size(), config_.num_experts));
  for (ThreadScratch& scratch : space.threads) {
    scratch.products.reserve(kRowsAtOnce * unit_columns(expert.multiple()) * 4);
    scratch.vector.reserve(std::max(expert.padded_size(), hidden_size) * 4);
  }
}

void Moe::run(const Step& step, int thread, const NormIfAny& norm, bool is_added) const {
  const int64_t num_choices = step.num_tokens * config_.experts_per_token;
  const MlpWeights& shape = *experts_.front();
  const int64_t stride = shape.padded_size();
  float* intermediate = step.space.intermediate.as<float>();
  const Routing& routing = step.space.routing;

  const Rows routed = prepare_rows(step, thread, step.num_tokens, step.hidden_size, norm, router_,
                                   [&](int64_t row) { return step.hidden() + row * step.hidden_size; }, kExact);
  multiply_into(step, thread, routed, step.num_tokens, router_, nullptr, config_.num_experts, false,
                step.space.router_logits.as<float>());
  step.pool.phase(thread, 1, [&](int64_t) { route(step); });
  const Rows rows = gather(step, thread, norm);
  share_experts(step, thread, shape.gate_up, num_choices, config_.num_experts, shape.multiple(),
                [&](int64_t expert, int64_t first_block, int64_t num_blocks) {
                  const int64_t start = routing.starts[expert];
                  multiply_unit(step, thread, rows.from(start), routing.starts[expert + 1] - start,
                                experts_[expert]->gate_up, first_block, num_blocks,
                                [&](int64_t row, int64_t height, float* products, int64_t product_stride) {
                                  experts_[expert]->activate(step.kernels, products, product_stride, height,
                                                             first_block, num_blocks,
                                                             intermediate + (start + row) * stride, stride);
                                });
                });
  const Rows activated = prepare_rows(
      step, thread, num_choices, config_.intermediate_size, std::nullopt, shape.down,
      [&](int64_t row) { return intermediate + row * stride; },
      [&](int64_t row) -> const PackedMatrix& {
        const auto starts = routing.starts.begin(), end = starts + config_.num_experts + 1;
        return experts_[std::upper_bound(starts, end, row) - starts - 1]->down;
      },
      kFast);
  float* outputs = step.space.expert_outputs.as<float>();
  share_experts(step, thread, shape.down, num_choices, config_.num_experts, 1,
                [&](int64_t expert, int64_t first_block, int64_t num_blocks) {
    const int64_t start = routing.starts[expert], column = first_block * kBlock;
    const int64_t width = std::min(num_blocks * kBlock, step.hidden_size - column);
    multiply_unit(step, thread, activated.from(start), routing.starts[expert + 1] - start, experts_[expert]->down,
                  first_block, num_blocks,
                  [&](int64_t row, int64_t height, const float* products, int64_t product_stride) {
                    for (int64_t i = 0; i < height; ++i) {
                      std::memcpy(outputs + (start + row + i) * step.hidden_size + column,
                                  products + i * product_stride, width * 4);
                    }
                  });
  });
  combine(step, thread, is_added);
}

// Choose every token's experts, and give its choices rows, in the order of experts.
void Moe::route(const Step& step) const {
  Routing& routing = step.space.routing;
  const int64_t num_experts = config_.num_experts, num_chosen = config_.experts_per_token;
  float* probabilities = routing.probabilities.data();
  std::fill(routing.starts.begin(), routing.starts.begin() + num_experts + 1, 0);
  for (int64_t token = 0; token < step.num_tokens; ++token) {
    std::memcpy(probabilities, step.space.router_logits.as<float>() + token * num_experts, num_experts * 4);
    softmax(probabilities, num_experts);
    float total = 0;
    float* shares = routing.shares.data() + token * num_chosen;
    for (int64_t choice = 0; choice < num_chosen; ++choice) {
      const int64_t expert = std::max_element(probabilities, probabilities + num_experts) - probabilities;
      routing.experts[token * num_chosen + choice] = static_cast<int32_t>(expert);
      ++routing.starts[expert + 1];
      total += shares[choice] = probabilities[expert];
      probabilities[expert] = -1;
    }
    for (int64_t choice = 0; config_.normalize && choice < num_chosen; ++choice) shares[choice] /= total;
  }
  routing.active.clear();
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (routing.starts[expert + 1] > 0) routing.active.push_back(static_cast<int32_t>(expert));
    routing.starts[expert + 1] += routing.starts[expert];
    routing.ends[expert] = routing.starts[expert];
  }
  for (int64_t choice = 0; choice < step.num_tokens * num_chosen; ++choice) {
    routing.rows[choice] = routing.ends[routing.experts[choice]]++;
  }
}

// The rows of all choices, each expert's one behind the other.
Rows Moe::gather(const Step& step, int thread, const NormIfAny& norm) const {
  const PackedMatrix& weights = experts_.front()->gate_up;
  const RowFormat format = step.kernels.row_format(weights.format());
  const int64_t num_chosen = config_.experts_per_token;
  const Rows rows = step.space.expert_rows.rows(format, step.num_tokens * num_chosen, weights.depth());
  step.pool.phase(thread, step.num_tokens, [&](int64_t token) {
    const float* x = step.hidden() + token * step.hidden_size;
    if (norm) {
      norm->apply(step.kernels, x, step.vector(thread));
      x = step.vector(thread);
    }
    const int32_t* to = step.space.routing.rows.data() + token * num_chosen;
    const int32_t* chosen = step.space.routing.experts.data() + token * num_chosen;
    const PackedMatrix& first = experts_[chosen[0]]->gate_up;
    put_row_for(step, thread, first, rows, to[0], x, step.hidden_size);
    for (int64_t choice = 1; choice < num_chosen; ++choice) {
      const PackedMatrix& matrix = experts_[chosen[choice]]->gate_up;
      if (matrix.order() == first.order()) {
        copy_row(format, rows, to[0], rows, to[choice]);
      } else {
        put_row_for(step, thread, matrix, rows, to[choice], x, step.hidden_size);
      }
    }
  });
  return rows;
}

// Sum the results of a token's experts, in the order of its choice: a sum does not depend on the rest of the batch.
void Moe::combine(const Step& step, int thread, bool is_added) const {
  const Routing& routing = step.space.routing;
  const int64_t size = step.hidden_size, num_chosen = config_.experts_per_token;
  step.pool.phase(thread, step.num_tokens, [&](int64_t token) {
    float* to = (is_added ? step.hidden() : step.delta()) + token * size;
    if (!is_added) std::fill(to, to + size, 0.0f);
    for (int64_t choice = token * num_chosen; choice < (token + 1) * num_chosen; ++choice) {
      step.kernels.add(to, step.space.expert_outputs.as<float>() + routing.rows[choice] * size, size,
                       routing.shares[choice]);
    }
  });
}

}  // namespace infinilm::cpu
