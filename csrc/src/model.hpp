// A model of a library, its parameters' buffers, and its cache. Calls are kept from overlapping here.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "library.hpp"

namespace infinilm::host {

struct Parameter {
  std::string name;
  std::string dtype;
  std::string tied_to;  // "": none
  std::vector<int64_t> shape;
  int64_t shard_dim;
  int64_t shard_multiple;
  std::vector<int64_t> shard_segments;
};

struct Deleted {
  void operator()(DLManagedTensorVersioned *tensor) const;
};
using Buffer = std::unique_ptr<DLManagedTensorVersioned, Deleted>;

class Model {
 public:
  static std::shared_ptr<Model> create(const std::shared_ptr<Library> &library, const infinilm_model_request &request);
  ~Model();
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;

  // All of these throw Failure; after destroy(), INFINILM_INVALID.
  std::vector<Parameter> parameters();
  Buffer open(int64_t index);
  void close(int64_t index);
  void loading_done();
  infinilm_cache_spec cache_spec();
  void create_cache(int64_t num_blocks, int64_t num_slots);  // in place of the one before
  void copy_blocks(const int32_t *pairs, int64_t num_pairs);
  void release_slots(const int32_t *slots, int64_t num_slots);
  void forward(const infinilm_batch &batch, const DLTensor &logits);

  void cancel();   // from any thread
  void destroy();  // waits for the call that runs; safe to call twice
  // As destroy(); returns false where a call still runs at `deadline`.
  bool destroy_until(std::chrono::steady_clock::time_point deadline);

 private:
  explicit Model(std::shared_ptr<Library> library) : library_(std::move(library)) {}
  std::mutex &calls() { return library_->is_concurrent ? calls_ : library_->calls; }
  infinilm_model *require_model() const;
  infinilm_cache *require_cache() const;
  void destroy_locked();

  std::shared_ptr<Library> library_;
  std::mutex calls_;
  std::mutex life_;  // held while model_ changes, and while cancel() uses it
  infinilm_model *model_ = nullptr;
  infinilm_cache *cache_ = nullptr;
};

}  // namespace infinilm::host
