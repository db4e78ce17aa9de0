// The table: every function of the C ABI, over Model and KvCache.
#include "infinilm/backend.h"

#include <atomic>
#include <memory>
#include <string>

#include "available_cpus.h"
#include "errors.h"
#include "infinilm/config.hpp"
#include "isa.h"
#include "kernels/kernels.h"
#include "kv_cache.h"
#include "memory.h"
#include "model.h"
#include "staging.h"
#include "support.h"

struct infinilm_backend {
  infinilm_backend(const infinilm_host* the_host, int num_threads)
      : host(the_host), kernels(infinilm::cpu::kernels_for(infinilm::cpu::chosen_isa())), pool(num_threads) {}

  const infinilm_host* host;
  const infinilm::cpu::Kernels& kernels;
  infinilm::cpu::ThreadPool pool;
  // What its models hold, for `memory`, which may be asked while one runs.
  std::atomic<int64_t> parameter_bytes{0}, cache_bytes{0}, scratch_bytes{0};
  // Of open parameters; a buffer may be freed after its model, and after this.
  std::shared_ptr<std::atomic<int64_t>> buffer_bytes = std::make_shared<std::atomic<int64_t>>(0);
};

struct infinilm_model {
  infinilm_model(infinilm_backend* the_backend, const infinilm::cpu::Request& request)
      : backend(the_backend),
        model(request.config, request.options, the_backend->kernels, the_backend->pool),
        staging(std::make_shared<infinilm::cpu::Staging>(the_backend->buffer_bytes)) {
    open.resize(model.parameters().size());
  }
  ~infinilm_model() {
    staging->end();
    backend->parameter_bytes -= parameter_bytes;
    backend->scratch_bytes -= scratch_bytes;
  }

  infinilm_backend* backend;
  infinilm::cpu::Model model;
  std::shared_ptr<infinilm::cpu::Staging> staging;
  std::vector<std::weak_ptr<infinilm::cpu::Buffer>> open;  // by parameter
  std::atomic<bool> is_cancelled{false};
  bool is_loaded = false;  // loading_done was called, and found that nothing is missing
  int64_t parameter_bytes = 0, scratch_bytes = 0;  // its parts of the backend's
};

struct infinilm_cache {
  infinilm_cache(infinilm_model* the_model, int64_t num_blocks)
      : model(the_model), cache(the_model->model.cache_layouts(), num_blocks) {
    model->backend->cache_bytes += cache.num_bytes();
  }
  ~infinilm_cache() { model->backend->cache_bytes -= cache.num_bytes(); }

  infinilm_model* model;
  infinilm::cpu::KvCache cache;
};

namespace infinilm::cpu {

namespace {

int64_t read_num_threads(const char* options) {
  return read_object(parse_json(options), "options", [](Fields& fields) {
    if (!fields.find("num_threads")) return int64_t{available_cpus()};
    const int64_t num_threads = fields.integer("num_threads");
    if (num_threads < 1 || num_threads > 4096) {
      throw Invalid("num_threads is " + std::to_string(num_threads) + "; this process may use " +
                    std::to_string(available_cpus()) + " processors");
    }
    return num_threads;
  });
}

int32_t probe(const infinilm_host*, infinilm_error* error) {
  return guard(error, [] { chosen_isa(); });
}

int32_t query(infinilm_backend* backend, const char* name, int64_t* value, infinilm_error* error) {
  return guard(error, [&] {
    const std::string wanted = name;
    if (wanted == "cpu.level") {  // of isa.h, 0 being scalar
      *value = static_cast<int64_t>(backend->kernels.isa);
      return;
    }
    if (wanted != INFINILM_QUERY_KEEPS_PARAMETERS && wanted != INFINILM_QUERY_CONCURRENT &&
        wanted != INFINILM_QUERY_MAX_WORLD_SIZE) {
      throw Unsupported("the cpu backend has no answer to '" + wanted + "'");
    }
    *value = wanted == INFINILM_QUERY_MAX_WORLD_SIZE ? 1 : 0;
  });
}

int32_t create(const infinilm_host* host, const char* options, infinilm_backend** backend, infinilm_error* error) {
  return guard(error, [&] {
    if (INFINILM_COVERS(host, infinilm_host, world_size) && host->world_size > 1) {
      throw Unsupported("the cpu backend runs in one process, and world_size is " + std::to_string(host->world_size));
    }
    auto made = std::make_unique<infinilm_backend>(host, static_cast<int>(read_num_threads(options)));
    log(host, INFINILM_LOG_DEBUG,
        std::string("cpu backend: ") + isa_name(made->kernels.isa) + ", " + std::to_string(made->pool.num_threads()) +
            " threads");
    *backend = made.release();
  });
}

void destroy(infinilm_backend* backend) { delete backend; }

int32_t supports_model(infinilm_backend*, const infinilm_model_request* request, infinilm_error* error) {
  return guard(error, [&] { read_request(*request); });
}

int32_t model_create(infinilm_backend* backend, const infinilm_model_request* request, infinilm_model** model,
                     infinilm_error* error) {
  return guard(error, [&] {
    const Request read = read_request(*request);
    const std::string left_out = read.options.stored.left_out();
    if (!left_out.empty()) log(backend->host, INFINILM_LOG_INFO, "cpu backend: " + left_out);
    *model = new infinilm_model(backend, read);
  });
}

void model_destroy(infinilm_model* model) { delete model; }

int64_t num_parameters(infinilm_model* model) { return static_cast<int64_t>(model->model.parameters().size()); }

Parameter& parameter_at(infinilm_model* model, int64_t index) {
  if (index < 0 || index >= num_parameters(model)) {
    throw Invalid("there is no parameter " + std::to_string(index) + " of " + std::to_string(num_parameters(model)));
  }
  return model->model.parameters()[index];
}

const char* dtype_name(const infinilm_model& model, const Parameter& parameter) {
  if (!parameter.dtype.empty()) return parameter.dtype.c_str();
  return model.model.is_bf16() ? "bfloat16" : "float32";
}

int32_t parameter(infinilm_model* model, int64_t index, infinilm_parameter* out, infinilm_error* error) {
  return guard(error, [&] {
    const Parameter& from = parameter_at(model, index);
    infinilm_parameter value = make_struct<infinilm_parameter>();
    value.name = from.name.c_str();
    value.dtype = dtype_name(*model, from);
    value.tied_to = from.tied_to.empty() ? nullptr : from.tied_to.c_str();
    value.shape = from.shape.data();
    value.num_dims = static_cast<int64_t>(from.shape.size());
    // What is stored quantized has other dimensions than its matrix, and is nowhere cut.
    value.shard_dim = from.dtype.empty() ? from.shard_dim : -1;
    value.shard_multiple = from.dtype.empty() ? from.shard_multiple : 1;
    give(out, value);
  });
}

int32_t open_parameter(infinilm_model* model, int64_t index, DLManagedTensorVersioned** buffer,
                       infinilm_error* error) {
  return guard(error, [&] {
    const Parameter& wanted = parameter_at(model, index);
    if (!wanted.tied_to.empty()) throw Invalid(wanted.name + " has no buffer: it is tied to " + wanted.tied_to);
    if (!model->open[index].expired()) throw Invalid(wanted.name + " is open already");
    const DLDataType dtype = dtype_of(dtype_name(*model, wanted));
    int64_t num_bytes = dtype.bits / 8;
    for (int64_t size : wanted.shape) num_bytes *= size;
    const std::shared_ptr<Buffer> memory = model->staging->take(num_bytes);
    *buffer = lend(memory->data(), dtype, wanted.shape, memory);
    model->open[index] = memory;
  });
}

int32_t close_parameter(infinilm_model* model, int64_t index, infinilm_error* error) {
  return guard(error, [&] {
    Parameter& closed = parameter_at(model, index);
    const std::shared_ptr<Buffer> memory = model->open[index].lock();
    if (memory == nullptr) throw Invalid(closed.name + " is not open");
    model->open[index].reset();
    closed.store(SourceMatrix{memory->data(), model->model.is_bf16()});
    closed.is_loaded = true;
    const int64_t held = model->model.num_bytes();
    model->backend->parameter_bytes += held - model->parameter_bytes;
    model->parameter_bytes = held;
  });
}

int32_t loading_done(infinilm_model* model, infinilm_error* error) {
  return guard(error, [&] {
    model->model.finish_loading();
    model->is_loaded = true;
    model->staging->end();
  });
}

int32_t cache_spec(infinilm_model* model, infinilm_cache_spec* spec, infinilm_error* error) {
  return guard(error, [&] {
    infinilm_cache_spec value = make_struct<infinilm_cache_spec>();
    value.block_size = kBlock;
    for (const CacheLayout& layout : model->model.cache_layouts()) value.bytes_per_block += layout.block_bytes();
    value.shareable = model->model.has_shareable_cache() ? 1 : 0;
    give(spec, value);
  });
}

int32_t cache_create(infinilm_model* model, int64_t num_blocks, int64_t, infinilm_cache** cache,
                     infinilm_error* error) {
  return guard(error, [&] {
    if (num_blocks < 1 || num_blocks > INT32_MAX / kBlock) {
      throw Invalid("a cache of " + std::to_string(num_blocks) + " blocks was asked for");
    }
    *cache = new infinilm_cache(model, num_blocks);
  });
}

int32_t cache_copy_blocks(infinilm_cache* cache, const int32_t* pairs, int64_t num_pairs, infinilm_error* error) {
  return guard(error, [&] { cache->cache.copy_blocks(pairs, num_pairs); });
}

void cache_destroy(infinilm_cache* cache) { delete cache; }

int32_t forward(infinilm_model* model, infinilm_cache* cache, const infinilm_batch* batch, const DLTensor* logits,
                infinilm_error* error) {
  return guard(error, [&] {
    const infinilm_host* host = model->backend->host;
    const bool has_abort = INFINILM_COVERS(host, infinilm_host, is_aborted) && host->is_aborted != nullptr;
    float* out = reinterpret_cast<float*>(static_cast<std::byte*>(logits->data) + logits->byte_offset);
    if (!model->is_loaded) throw Invalid("this model cannot run before loading_done");
    model->is_cancelled = false;
    model->model.forward(*batch, cache->cache, out, [&] {
      return model->is_cancelled.load(std::memory_order_relaxed) || (has_abort && host->is_aborted(host->context));
    });
    const int64_t scratch = model->model.scratch_bytes();
    model->backend->scratch_bytes += scratch - model->scratch_bytes;
    model->scratch_bytes = scratch;
  });
}

void cancel(infinilm_model* model) { model->is_cancelled = true; }

int32_t memory(infinilm_backend* backend, infinilm_memory* out, infinilm_error* error) {
  return guard(error, [&] {
    infinilm_memory value = make_struct<infinilm_memory>();
    value.device_free = available_memory();
    value.device_total = total_memory();
    value.parameters = backend->parameter_bytes;
    value.buffers = *backend->buffer_bytes;
    value.caches = backend->cache_bytes;
    value.scratch = backend->scratch_bytes;
    give(out, value);
  });
}

constexpr infinilm_backend_table kTable = {
    INFINILM_BACKEND_MAGIC,
    INFINILM_ABI_MAJOR,
    INFINILM_ABI_MINOR,
    sizeof(infinilm_backend_table),
    nullptr,
    "cpu",
    "0.1.0",
    "C++ " __VERSION__,
    probe,
    query,
    create,
    destroy,
    supports_model,
    model_create,
    model_destroy,
    num_parameters,
    parameter,
    open_parameter,
    close_parameter,
    loading_done,
    cache_spec,
    cache_create,
    cache_copy_blocks,
    nullptr,  // cache_release_slots: a sequence's state is its blocks
    cache_destroy,
    forward,
    cancel,
    memory,
};

}  // namespace

}  // namespace infinilm::cpu

extern "C" const infinilm_backend_table* infinilm_backend_entry(uint32_t host_major, uint32_t) {
  return host_major == INFINILM_ABI_MAJOR ? &infinilm::cpu::kTable : nullptr;
}
