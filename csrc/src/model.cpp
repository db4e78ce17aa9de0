#include "model.hpp"

#include <utility>

namespace infinilm::host {
namespace {

using Lock = std::lock_guard<std::mutex>;
constexpr std::size_t kNameLimit = 4096;
constexpr int64_t kMaxDims = 16;

template <class Struct>
Struct zeroed() {
  Struct made;
  std::memset(&made, 0, sizeof made);
  made.struct_size = sizeof made;
  return made;
}

void require(bool is_so, const std::string &otherwise) {
  if (!is_so) throw Failure(INFINILM_FAILED, otherwise);
}

Parameter checked_parameter(const infinilm_parameter &given, int64_t index) {
  const std::string where = "parameter " + std::to_string(index) + " of the library ";
  require(given.name != nullptr && given.dtype != nullptr, where + "has no name, or no dtype");
  require(given.num_dims >= 0 && given.num_dims <= kMaxDims && (given.num_dims == 0 || given.shape != nullptr),
          where + "has " + std::to_string(given.num_dims) + " dimensions");
  require(given.shard_dim >= -1 && given.shard_dim < given.num_dims,
          where + "is cut along dimension " + std::to_string(given.shard_dim));
  require(given.num_shard_segments >= 0 && (given.num_shard_segments == 0 || given.shard_segments != nullptr),
          where + "has " + std::to_string(given.num_shard_segments) + " segments");
  Parameter made;
  made.name = clean_text(given.name, kNameLimit);
  made.dtype = clean_text(given.dtype, kNameLimit);
  made.tied_to = clean_text(given.tied_to, kNameLimit);
  made.shape.assign(given.shape, given.shape + given.num_dims);
  for (const int64_t size : made.shape) require(size >= 0, where + "has a dimension of " + std::to_string(size));
  made.shard_dim = given.shard_dim;
  made.shard_multiple = given.shard_multiple < 1 ? 1 : given.shard_multiple;
  made.shard_segments.assign(given.shard_segments, given.shard_segments + given.num_shard_segments);
  return made;
}

}  // namespace

void Deleted::operator()(DLManagedTensorVersioned *tensor) const {
  if (tensor->deleter != nullptr) tensor->deleter(tensor);
}

std::shared_ptr<Model> Model::create(const std::shared_ptr<Library> &library, const infinilm_model_request &request) {
  const std::shared_ptr<Model> made(new Model(library));
  {
    const Lock lock(library->calls);
    if (library->backend == nullptr) {
      throw Failure(INFINILM_UNAVAILABLE, "backend '" + library->name + "' is shut down");
    }
    checked("model_create", [&](infinilm_error *error) {
      return library->table->model_create(library->backend, &request, &made->model_, error);
    });
    if (made->model_ != nullptr) ++library->num_models;
    require(made->model_ != nullptr, "model_create returned INFINILM_OK and no model");
  }
  library->add(made);
  return made;
}

Model::~Model() { destroy(); }

infinilm_model *Model::require_model() const {
  if (model_ == nullptr) throw Failure(INFINILM_INVALID, "this model is closed");
  return model_;
}

infinilm_cache *Model::require_cache() const {
  (void)require_model();
  if (cache_ == nullptr) throw Failure(INFINILM_INVALID, "this model has no cache; allocate one first");
  return cache_;
}

std::vector<Parameter> Model::parameters() {
  const Lock lock(calls());
  infinilm_model *model = require_model();
  const int64_t count = library_->table->num_parameters(model);
  require(count >= 0, "num_parameters returned " + std::to_string(count));
  std::vector<Parameter> made;
  made.reserve(static_cast<std::size_t>(count));
  for (int64_t index = 0; index < count; ++index) {
    auto given = zeroed<infinilm_parameter>();
    given.shard_dim = -1;
    checked("parameter",
            [&](infinilm_error *error) { return library_->table->parameter(model, index, &given, error); });
    made.push_back(checked_parameter(given, index));
  }
  return made;
}

Buffer Model::open(int64_t index) {
  const Lock lock(calls());
  infinilm_model *model = require_model();
  DLManagedTensorVersioned *given = nullptr;
  checked("open_parameter",
          [&](infinilm_error *error) { return library_->table->open_parameter(model, index, &given, error); });
  require(given != nullptr, "open_parameter returned INFINILM_OK and no buffer");
  Buffer buffer(given);
  require(given->version.major == DLPACK_MAJOR_VERSION,
          "open_parameter returned a tensor of DLPack " + std::to_string(given->version.major) + "." +
              std::to_string(given->version.minor) + ", and this host knows " + std::to_string(DLPACK_MAJOR_VERSION) +
              ".x; build the library against infinilm/dlpack.h");
  const DLTensor &tensor = given->dl_tensor;
  require(tensor.ndim >= 0 && tensor.ndim <= kMaxDims &&
              (tensor.ndim == 0 || (tensor.shape != nullptr && tensor.strides != nullptr)),
          "open_parameter returned a tensor without shape or strides");
  require((given->flags & 1) == 0, "open_parameter returned a tensor that is read-only");
  return buffer;
}

void Model::close(int64_t index) {
  const Lock lock(calls());
  infinilm_model *model = require_model();
  checked("close_parameter",
          [&](infinilm_error *error) { return library_->table->close_parameter(model, index, error); });
}

void Model::loading_done() {
  const Lock lock(calls());
  infinilm_model *model = require_model();
  checked("loading_done", [&](infinilm_error *error) { return library_->table->loading_done(model, error); });
}

infinilm_cache_spec Model::cache_spec() {
  const Lock lock(calls());
  infinilm_model *model = require_model();
  auto spec = zeroed<infinilm_cache_spec>();
  checked("cache_spec", [&](infinilm_error *error) { return library_->table->cache_spec(model, &spec, error); });
  require(spec.block_size > 0 && spec.bytes_per_block >= 0 && spec.bytes_per_slot >= 0,
          "cache_spec has blocks of " + std::to_string(spec.block_size) + " tokens, " +
              std::to_string(spec.bytes_per_block) + " bytes a block and " + std::to_string(spec.bytes_per_slot) +
              " a slot");
  return spec;
}

void Model::create_cache(int64_t num_blocks, int64_t num_slots) {
  const Lock lock(calls());
  infinilm_model *model = require_model();
  if (cache_ != nullptr) library_->table->cache_destroy(std::exchange(cache_, nullptr));
  checked("cache_create", [&](infinilm_error *error) {
    return library_->table->cache_create(model, num_blocks, num_slots, &cache_, error);
  });
  require(cache_ != nullptr, "cache_create returned INFINILM_OK and no cache");
}

void Model::copy_blocks(const int32_t *pairs, int64_t num_pairs) {
  const Lock lock(calls());
  infinilm_cache *cache = require_cache();
  checked("cache_copy_blocks",
          [&](infinilm_error *error) { return library_->table->cache_copy_blocks(cache, pairs, num_pairs, error); });
}

void Model::release_slots(const int32_t *slots, int64_t num_slots) {
  const infinilm_backend_table *table = library_->table;
  if (!INFINILM_COVERS(table, infinilm_backend_table, cache_release_slots) || table->cache_release_slots == nullptr) {
    return;
  }
  const Lock lock(calls());
  infinilm_cache *cache = require_cache();
  checked("cache_release_slots",
          [&](infinilm_error *error) { return table->cache_release_slots(cache, slots, num_slots, error); });
}

void Model::forward(const infinilm_batch &batch, const DLTensor &logits) {
  const Lock lock(calls());
  infinilm_model *model = require_model();
  infinilm_cache *cache = require_cache();
  checked("forward",
          [&](infinilm_error *error) { return library_->table->forward(model, cache, &batch, &logits, error); });
}

void Model::cancel() {
  const infinilm_backend_table *table = library_->table;
  if (!INFINILM_COVERS(table, infinilm_backend_table, cancel) || table->cancel == nullptr) return;
  const std::lock_guard<std::mutex> lock(life_);
  if (model_ != nullptr) table->cancel(model_);
}

void Model::destroy() {
  const Lock lock(calls());
  destroy_locked();
}

bool Model::destroy_until(std::chrono::steady_clock::time_point deadline) {
  const std::unique_lock<std::mutex> lock = lock_until(calls(), deadline);
  if (lock.owns_lock()) destroy_locked();
  return lock.owns_lock();
}

void Model::destroy_locked() {
  if (cache_ != nullptr) library_->table->cache_destroy(std::exchange(cache_, nullptr));
  infinilm_model *model;
  {
    const std::lock_guard<std::mutex> lock(life_);
    model = std::exchange(model_, nullptr);
  }
  if (model == nullptr) return;
  library_->table->model_destroy(model);
  --library_->num_models;
}

}  // namespace infinilm::host
