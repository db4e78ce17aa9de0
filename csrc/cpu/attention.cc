#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear.h"

namespace infinilm::cpu {

namespace {

constexpr int64_t kTileRows = 48;       // queries times heads of a group that are attended together
constexpr int64_t kLeastPartBlocks = 16;  // a context is not cut into smaller parts

int64_t tile_tokens(int64_t group) { return std::max<int64_t>(kTileRows / group, 1); }

// Cut [first, last) blocks into parts, each a task.
void add_parts(AttentionPlan* plan, AttentionTask task, int64_t num_parts) {
  task.merge = num_parts > 1 ? static_cast<int32_t>(plan->num_merges++) : -1;
  plan->max_parts = std::max(plan->max_parts, num_parts);
  const int32_t first = task.first_block, size = task.last_block - task.first_block;
  for (int64_t part = 0; part < num_parts; ++part) {
    task.part = static_cast<int32_t>(part);
    task.first_block = first + static_cast<int32_t>(size * part / num_parts);
    task.last_block = first + static_cast<int32_t>(size * (part + 1) / num_parts);
    plan->tasks.push_back(task);
  }
}

int64_t row_limit(const AttentionConfig& config) { return tile_tokens(config.group()) * config.group(); }

}  // namespace

AttentionPlan plan_attention(const infinilm_batch& batch, const AttentionConfig& mixer, int num_threads) {
  AttentionPlan plan{mixer.num_kv_heads, mixer.group(), mixer.sliding_window, {}, 0, 0, nullptr};
  const int64_t height = tile_tokens(plan.group);
  int64_t num_tiles = 0;
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    num_tiles += (batch.query_starts[s + 1] - batch.query_starts[s] + height - 1) / height * plan.num_kv_heads;
  }
  // With fewer tiles than this, threads would wait for one that has the longest context.
  const int64_t wanted_parts = num_tiles ? (2 * num_threads + num_tiles - 1) / num_tiles : 1;
  for (int32_t s = 0; s < batch.num_sequences; ++s) {
    for (int32_t head = 0; head < plan.num_kv_heads; ++head) {
      for (int64_t row = batch.query_starts[s]; row < batch.query_starts[s + 1]; row += height) {
        const int64_t num_tokens = std::min<int64_t>(height, batch.query_starts[s + 1] - row);
        const int64_t first = batch.positions[row], last = batch.positions[row + num_tokens - 1];
        const int64_t begin = plan.window ? std::max<int64_t>(first - plan.window + 1, 0) : 0;
        AttentionTask task{s, head, static_cast<int32_t>(row), static_cast<int32_t>(num_tokens),
                           static_cast<int32_t>(begin / kBlock), static_cast<int32_t>(last / kBlock + 1), -1, 0};
        const int64_t most_parts = (task.last_block - task.first_block) / kLeastPartBlocks;
        add_parts(&plan, task, std::clamp<int64_t>(most_parts, 1, std::max<int64_t>(wanted_parts, 1)));
      }
    }
  }
  plan.num_done.reset(new std::atomic<int32_t>[plan.num_merges]);
  for (int64_t merge = 0; merge < plan.num_merges; ++merge) plan.num_done[merge] = 0;
  return plan;
}

Attention::Attention(const AttentionConfig& config, const std::string& name, int64_t layer, int64_t hidden_size,
                     const Kernels& kernels, Packing packing, ParameterList& parameters)
    : config_(config),
      layer_(layer),
      hidden_size_(hidden_size),
      is_bf16_(parameters.is_bf16()),
      qkv_(kernels,
           parameters.packing_of({name + ".q_proj.weight", name + ".k_proj.weight", name + ".v_proj.weight"}, packing),
           (config.num_heads + 2 * config.num_kv_heads) * head_blocks(), hidden_size,
           parameters.arena()),
      output_(kernels, parameters.packing_of({name + ".o_proj.weight"}, packing), (hidden_size + kBlock - 1) / kBlock,
              config.num_heads * config.head_dim, parameters.arena()),
      qkv_bias_(config.has_qkv_bias ? (config.num_heads + 2 * config.num_kv_heads) * config.head_dim : 0),
      output_bias_(config.has_output_bias ? hidden_size : 0) {
  const int64_t counts[] = {config.num_heads, config.num_kv_heads, config.num_kv_heads};
  int64_t first_head = 0;
  for (int part = 0; part < 3; ++part) {
    const std::string projection = name + "." + "qkv"[part] + "_proj";
    const int64_t size = counts[part] * config.head_dim, first_block = first_head * head_blocks();
    Parameter& weight = parameters.add_matrix(
        projection + ".weight", size, &qkv_, [=](int64_t block) { return first_block + block; }, config.head_dim);
    weight.shard_dim = 0;
    weight.shard_multiple = config.head_dim;
    if (config.has_qkv_bias) {
      Parameter& bias =
          parameters.add_vector(projection + ".bias", size, qkv_bias_.data() + first_head * config.head_dim);
      bias.shard_dim = 0;
      bias.shard_multiple = config.head_dim;
    }
    first_head += counts[part];
  }
  make_norm(query_norm_, config.query_key_norm, name + ".q_norm", config.head_dim, parameters);
  make_norm(key_norm_, config.query_key_norm, name + ".k_norm", config.head_dim, parameters);
  Parameter& weight = parameters.add_matrix(name + ".o_proj.weight", hidden_size, &output_, [](int64_t b) { return b; });
  weight.shard_dim = 1;
  weight.shard_multiple = config.head_dim;
  if (config.has_output_bias) parameters.add_vector(name + ".o_proj.bias", hidden_size, output_bias_.data());
}

void Attention::reserve(Workspace& space, int64_t num_tokens, const AttentionPlan& plan) const {
  const int64_t columns = config_.num_heads * config_.head_dim, padded_dim = head_blocks() * kBlock;
  space.queries.reserve(num_tokens * config_.num_heads * padded_dim * 4);
  space.attended.reserve(num_tokens * columns * 4);
  space.partials.reserve(plan.num_merges * plan.max_parts * row_limit(config_) * (padded_dim + 2) * 4);
  const int64_t rows = row_limit(config_);
  for (ThreadScratch& scratch : space.threads) {
    scratch.attention.reserve(rows * (padded_dim + 4) * 4 + attention_scratch_bytes(rows, config_.head_dim));
    scratch.products.reserve(kRowsAtOnce * unit_columns(head_blocks()) * 4);
    scratch.vector.reserve(std::max(columns, hidden_size_) * 4);
  }
}

void Attention::run(const Step& step, int thread, const NormIfAny& norm, AttentionPlan& plan, const Rotation* rotation,
                    bool is_added) const {
  const Rows rows = prepare_rows(step, thread, step.num_tokens, hidden_size_, norm, qkv_,
                                 [&](int64_t row) { return step.hidden() + row * hidden_size_; }, kExact);
  project(step, thread, rows, rotation);
  step.pool.phase(thread, static_cast<int64_t>(plan.tasks.size()),
                  [&](int64_t task) { attend(step, thread, plan, plan.tasks[task]); });
  const int64_t columns = config_.num_heads * config_.head_dim;
  const Rows attended = prepare_rows(step, thread, step.num_tokens, columns, std::nullopt, output_,
                                     [&](int64_t row) { return step.space.attended.as<float>() + row * columns; });
  multiply_into(step, thread, attended, step.num_tokens, output_, output_bias_.empty() ? nullptr : output_bias_.data(),
                hidden_size_, is_added, is_added ? step.hidden() : step.delta());
}

// Queries go to memory that all threads see, [kv head][token][head of the group]; keys and values into the cache.
void Attention::project(const Step& step, int thread, const Rows& rows, const Rotation* rotation) const {
  multiply(step, thread, rows, step.num_tokens, qkv_, head_blocks(),
           [&](int64_t first_row, int64_t height, int64_t first_block, int64_t num_blocks, const float* products,
               int64_t stride) {
             const int64_t first_head = first_block / head_blocks(), num_heads = num_blocks / head_blocks();
             for (int64_t row = 0; row < height; ++row) {
               for (int64_t head = 0; head < num_heads; ++head) {
                 finish_head(step, thread, first_head + head, first_row + row,
                             products + row * stride + head * head_blocks() * kBlock, rotation);
               }
             }
           });
}

void Attention::finish_head(const Step& step, int thread, int64_t head, int64_t row, const float* product,
                            const Rotation* rotation) const {
  const int64_t dim = config_.head_dim, group = config_.group();
  float* x = step.vector(thread);
  std::memcpy(x, product, dim * 4);
  if (!qkv_bias_.empty()) step.kernels.add(x, qkv_bias_.data() + head * dim, dim, 1);
  const int64_t slot = step.batch.slot_mapping[row];
  const int64_t kv_head = head - config_.num_heads;
  if (kv_head >= config_.num_kv_heads) {
    step.cache.write_value(layer_, kv_head - config_.num_kv_heads, slot, x);
    return;
  }
  const NormIfAny& norm = kv_head < 0 ? query_norm_ : key_norm_;
  if (norm) norm->apply(step.kernels, x, x);
  if (rotation != nullptr) {
    const int64_t offset = row * rotation->half;
    step.kernels.rotate(x, dim, rotation->cosines.as<float>() + offset, rotation->sines.as<float>() + offset);
  }
  if (kv_head >= 0) {
    step.cache.write_key(layer_, kv_head, slot, x);
    return;
  }
  const int64_t index = (head / group * step.num_tokens + row) * group + head % group;
  put_row(step.kernels, RowFormat::kF32, queries(step), index, x, dim, head_blocks() * kBlock);
}

Rows Attention::queries(const Step& step) const {
  Rows rows;
  rows.data = step.space.queries.data();
  rows.stride = head_blocks() * kBlock * 4;
  return rows;
}

float* Attention::partial(const Step& step, const AttentionPlan& plan, int64_t merge, int64_t part) const {
  const int64_t size = row_limit(config_) * (head_blocks() * kBlock + 2);
  return step.space.partials.as<float>() + (merge * plan.max_parts + part) * size;
}

void Attention::attend(const Step& step, int thread, AttentionPlan& plan, const AttentionTask& task) const {
  const int64_t group = config_.group(), limit = row_limit(config_), padded_dim = head_blocks() * kBlock;
  const int64_t num_rows = task.num_tokens * group;
  float* memory = step.space.threads[thread].attention.as<float>();
  int32_t* begins = reinterpret_cast<int32_t*>(memory);
  int32_t* ends = begins + limit;
  float* out = task.merge < 0 ? memory + 2 * limit : partial(step, plan, task.merge, task.part);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int32_t position = step.batch.positions[task.first_row + row / group];
    begins[row] = plan.window ? std::max<int32_t>(position - static_cast<int32_t>(plan.window) + 1, 0) : 0;
    ends[row] = position + 1;
  }
  const CacheLayout& layout = step.cache.layout(layer_);
  AttentionTile tile;
  tile.queries = queries(step).from((task.kv_head * step.num_tokens + task.first_row) * group);
  tile.num_rows = num_rows;
  tile.begins = begins;
  tile.ends = ends;
  tile.cache = step.cache.head(layer_, task.kv_head);
  tile.block_stride = layout.block_bytes();
  tile.value_offset = layout.key_bytes;
  tile.block_table = step.batch.block_tables + task.sequence * step.batch.max_blocks;
  tile.first_block = task.first_block;
  tile.last_block = task.last_block;
  tile.context_length = step.batch.context_lengths[task.sequence];
  tile.head_dim = config_.head_dim;
  tile.scale = static_cast<float>(config_.scale);
  tile.softcap = static_cast<float>(config_.softcap);
  tile.out = out;
  tile.out_stride = padded_dim;
  tile.maxima = out + limit * padded_dim;
  tile.sums = tile.maxima + limit;
  tile.scratch = reinterpret_cast<std::byte*>(memory + limit * (padded_dim + 4));
  std::fill(out, out + num_rows * padded_dim, 0.0f);
  std::fill(tile.maxima, tile.maxima + num_rows, -1e30f);
  std::fill(tile.sums, tile.sums + num_rows, 0.0f);
  (is_bf16_ ? step.kernels.attend_bf16 : step.kernels.attend_f32)(tile);
  if (task.merge < 0) {
    put_attended(step, task, out, tile.sums);
  } else {
    merge(step, thread, plan, task);
  }
}

// Divide by the sums, and put every head where the product that follows looks for it.
void Attention::put_attended(const Step& step, const AttentionTask& task, const float* out, const float* sums) const {
  const int64_t group = config_.group(), dim = config_.head_dim, padded_dim = head_blocks() * kBlock;
  for (int64_t row = 0; row < task.num_tokens * group; ++row) {
    const int64_t token = task.first_row + row / group, head = task.kv_head * group + row % group;
    float* to = step.space.attended.as<float>() + (token * config_.num_heads + head) * dim;
    const float factor = 1 / sums[row];
    for (int64_t i = 0; i < dim; ++i) to[i] = out[row * padded_dim + i] * factor;
  }
}

// The last part to be done joins all of them.
void Attention::merge(const Step& step, int thread, const AttentionPlan& plan, const AttentionTask& task) const {
  const int64_t limit = row_limit(config_), padded_dim = head_blocks() * kBlock;
  const int64_t num_rows = task.num_tokens * config_.group();
  int32_t num_parts = 0;
  for (const AttentionTask& other : plan.tasks) num_parts += other.merge == task.merge;
  if (plan.num_done[task.merge].fetch_add(1, std::memory_order_acq_rel) + 1 < num_parts) return;
  plan.num_done[task.merge].store(0, std::memory_order_relaxed);  // for the next layer
  float* joined = step.space.threads[thread].attention.as<float>() + 2 * limit;
  float* sums = joined + limit * padded_dim;
  for (int64_t row = 0; row < num_rows; ++row) {
    float most = -1e30f;
    for (int32_t part = 0; part < num_parts; ++part) {
      most = std::max(most, partial(step, plan, task.merge, part)[limit * padded_dim + row]);
    }
    float* to = joined + row * padded_dim;
    std::fill(to, to + padded_dim, 0.0f);
    sums[row] = 0;
    for (int32_t part = 0; part < num_parts; ++part) {
      const float* from = partial(step, plan, task.merge, part);
      const float factor = std::exp(from[limit * padded_dim + row] - most);
      sums[row] += factor * from[limit * (padded_dim + 1) + row];
      step.kernels.add(to, from + row * padded_dim, padded_dim, factor);
    }
  }
  put_attended(step, task, joined, sums);
}

}  // namespace infinilm::cpu
