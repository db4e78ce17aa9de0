// The parameters a model wants from the host, and where each goes when its buffer is full.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "packed_matrix.h"
#include "stored_int4.h"
#include "thread_pool.h"

namespace infinilm::cpu {

struct Parameter {
  std::string name;
  std::vector<int64_t> shape;
  std::string tied_to;  // empty: not tied
  std::string dtype;    // empty: that of the model, else one that a checkpoint stores
  int64_t shard_dim = -1, shard_multiple = 1;
  // Take the values: pack or copy them. Called outside of any region.
  std::function<void(const SourceMatrix& source)> store;
  bool is_loaded = false;
};

// Collects parameters while the parts of a model are made.
class ParameterList {
 public:
  ParameterList(ThreadPool& pool, bool is_bf16, StoredWeights stored)
      : pool_(&pool), is_bf16_(is_bf16), stored_(std::move(stored)) {}

  ThreadPool& pool() const { return *pool_; }
  bool is_bf16() const { return is_bf16_; }
  Arena& arena() { return arena_; }
  const Arena& arena() const { return arena_; }

  Parameter& add(std::string name, std::vector<int64_t> shape, std::function<void(const SourceMatrix&)> store);

  // A vector kept as floats from `out` on; `offset` is added. `out` must stay where it is.
  Parameter& add_vector(std::string name, int64_t size, float* out, float offset = 0);

  // The same, in runs of 16 that begin `stride` floats apart.
  Parameter& add_vector_in_blocks(std::string name, int64_t size, float* out, int64_t stride, float offset = 0);

  // How a matrix of these parameters is kept: as they are stored where all of them are stored alike, else as `otherwise`.
  Packing packing_of(const std::vector<std::string>& names, Packing otherwise) const;

  // A matrix (num_rows, in_features of `matrix`) whose rows are packed into the blocks place(0), place(1), ..., sixteen
  // rows each. With `rows_per_part`, such as head_dim, every so many rows begin a block of their own. `matrix` must stay
  // where it is; it takes its memory when the first of its parameters is stored, so that matrices lie in the order in
  // which they come. Blocks are packed by the thread that will read them. Where packing_of says so it is its stored
  // parts.
  Parameter& add_matrix(std::string name, int64_t num_rows, PackedMatrix* matrix, std::function<int64_t(int64_t)> place,
                        int64_t rows_per_part = 0);

  // All are loaded. Throws Invalid where stored parts of one matrix contradict each other.
  void finish();

  std::vector<Parameter>& parameters() { return parameters_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }

 private:
  Parameter& add_stored(const std::string& name, int64_t num_rows, PackedMatrix* matrix,
                        const std::function<int64_t(int64_t)>& place, int64_t rows_per_part);

  ThreadPool* pool_;
  bool is_bf16_;
  StoredWeights stored_;
  std::vector<std::shared_ptr<StoredMatrix>> stored_matrices_;
  Arena arena_;
  std::vector<Parameter> parameters_;
};

}  // namespace infinilm::cpu
