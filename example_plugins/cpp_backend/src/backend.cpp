// The table: every function turns the ABI's arguments into the model's, and stops exceptions.
#include <cstring>
#include <memory>
#include <string>

#include "infinilm/backend.hpp"
#include "model.hpp"

struct infinilm_backend {
  const infinilm_host *host;
};

struct infinilm_model {
  plain::Model its;
};

struct infinilm_cache {
  plain::Cache its;
};

namespace {

using infinilm::guard;

int32_t probe(const infinilm_host *, infinilm_error *) { return INFINILM_OK; }

int32_t query(infinilm_backend *, const char *name, int64_t *value, infinilm_error *error) {
  return guard(error, [&] {
    if (std::strcmp(name, INFINILM_QUERY_KEEPS_PARAMETERS) != 0 && std::strcmp(name, INFINILM_QUERY_CONCURRENT) != 0) {
      throw infinilm::Unsupported(std::string("nothing is called ") + name);
    }
    *value = 1;
  });
}

int32_t create(const infinilm_host *host, const char *options, infinilm_backend **backend, infinilm_error *error) {
  return guard(error, [&] {
    if (std::strcmp(options, "{}") != 0) throw infinilm::Unsupported("it has no options");
    *backend = new infinilm_backend{host};
  });
}

void destroy(infinilm_backend *backend) { delete backend; }

plain::Config config_of(const infinilm_model_request *request) {
  if (std::strcmp(request->dtype, "float32") != 0) {
    throw infinilm::Unsupported(std::string("it computes in float32, not in ") + request->dtype);
  }
  if (std::strcmp(request->device, "cpu") != 0) {
    throw infinilm::Unsupported(std::string("it runs on the CPU, not on ") + request->device);
  }
  if (request->quantization != nullptr) {
    throw infinilm::Unsupported(std::string("it does not quantize, and was asked for ") + request->quantization);
  }
  return plain::read_config(request->config);
}

int32_t supports_model(infinilm_backend *, const infinilm_model_request *request, infinilm_error *error) {
  return guard(error, [&] { (void)config_of(request); });
}

int32_t model_create(infinilm_backend *backend, const infinilm_model_request *request, infinilm_model **model,
                     infinilm_error *error) {
  return guard(error, [&] { *model = new infinilm_model{{config_of(request), backend->host}}; });
}

void model_destroy(infinilm_model *model) { delete model; }

int64_t num_parameters(infinilm_model *model) { return model->its.num_parameters(); }

int32_t parameter(infinilm_model *model, int64_t index, infinilm_parameter *out, infinilm_error *error) {
  return guard(error, [&] {
    const plain::Parameter &its = model->its.parameter(index);
    auto made = infinilm::make_struct<infinilm_parameter>();
    made.name = its.name.c_str();
    made.dtype = "float32";
    made.tied_to = its.tied_to.empty() ? nullptr : its.tied_to.c_str();
    made.shape = its.shape.data();
    made.num_dims = static_cast<int64_t>(its.shape.size());
    made.shard_dim = -1;
    made.shard_multiple = 1;
    infinilm::give(out, made);
  });
}

int32_t open_parameter(infinilm_model *model, int64_t index, DLManagedTensorVersioned **buffer,
                       infinilm_error *error) {
  return guard(error, [&] {
    const auto values = model->its.open(index);
    *buffer = infinilm::lend(values->data(), infinilm::dtype_of("float32"), model->its.parameter(index).shape, values);
  });
}

int32_t close_parameter(infinilm_model *model, int64_t index, infinilm_error *error) {
  return guard(error, [&] { model->its.close(index); });
}

int32_t loading_done(infinilm_model *model, infinilm_error *error) {
  return guard(error, [&] { model->its.require_all(); });
}

int32_t cache_spec(infinilm_model *model, infinilm_cache_spec *out, infinilm_error *error) {
  return guard(error, [&] {
    auto made = infinilm::make_struct<infinilm_cache_spec>();
    made.block_size = plain::kBlockSize;
    made.bytes_per_block = plain::bytes_per_block(model->its.config());
    made.shareable = 1;
    infinilm::give(out, made);
  });
}

int32_t cache_create(infinilm_model *model, int64_t num_blocks, int64_t, infinilm_cache **cache,
                     infinilm_error *error) {
  return guard(error, [&] { *cache = new infinilm_cache{{model->its.config(), num_blocks}}; });
}

int32_t cache_copy_blocks(infinilm_cache *cache, const int32_t *pairs, int64_t num_pairs, infinilm_error *error) {
  return guard(error, [&] { cache->its.copy_blocks(pairs, num_pairs); });
}

void cache_destroy(infinilm_cache *cache) { delete cache; }

int32_t forward(infinilm_model *model, infinilm_cache *cache, const infinilm_batch *batch, const DLTensor *logits,
                infinilm_error *error) {
  return guard(error, [&] {
    char *out = static_cast<char *>(logits->data) + logits->byte_offset;
    model->its.forward(cache->its, *batch, reinterpret_cast<float *>(out));
  });
}

void cancel(infinilm_model *model) { model->its.cancel(); }

const infinilm_backend_table table = {
    INFINILM_BACKEND_MAGIC,
    INFINILM_ABI_MAJOR,
    INFINILM_ABI_MINOR,
    sizeof(infinilm_backend_table),
    nullptr,
    "plain_cpp",
    "0.1.0",
    "C++17 " __VERSION__,
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
    nullptr,  // memory
};

}  // namespace

const infinilm_backend_table *infinilm_backend_entry(uint32_t, uint32_t) { return &table; }
