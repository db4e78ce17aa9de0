// What the layers of one step share: the batch, the activations between layers, and each thread's scratch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "infinilm/backend.h"
#include "kernels/kernels.h"
#include "kv_cache.h"
#include "row_buffer.h"
#include "thread_pool.h"

namespace infinilm::cpu {

// Rows whose products are held at once before something is done with them.
constexpr int64_t kRowsAtOnce = 64;

// A thread's own memory.
struct ThreadScratch {
  Buffer products;   // (kRowsAtOnce, columns of a unit) of a product
  Buffer vector;     // a row in float32
  Buffer ordered;    // the same, in the order of a weight's input features
  Buffer attention;  // attention.cc's
};

// Which experts a step's tokens chose. Choice c is token c / experts_per_token's; its row among those of all experts is
// rows[c], and the rows of expert e are [starts[e], starts[e + 1]).
struct Routing {
  std::vector<float> shares, probabilities;
  std::vector<int32_t> experts, rows, starts, active, ends;
};

// What a step needs, kept from one to the next: it only grows.
struct Workspace {
  Buffer hidden, delta, attended, intermediate, queries, partials;
  RowBuffer rows;
  std::vector<ThreadScratch> threads;
  Buffer router_logits, expert_outputs;
  RowBuffer expert_rows;
  Routing routing;

  int64_t num_bytes() const;
};

// Cosines and sines of a step's tokens for one kind of rope, (num_tokens, head_dim / 2) each.
struct Rotation {
  int64_t half = 0;
  Buffer cosines, sines;
};

struct Step {
  ThreadPool& pool;
  const Kernels& kernels;
  const infinilm_batch& batch;
  KvCache& cache;
  Workspace& space;
  int64_t num_tokens;
  int64_t hidden_size;

  float* hidden() const { return space.hidden.as<float>(); }  // (num_tokens, hidden_size)
  float* delta() const { return space.delta.as<float>(); }    // what a half of a layer adds, where that is normalised
  float* vector(int thread) const { return space.threads[thread].vector.as<float>(); }
};

}  // namespace infinilm::cpu
