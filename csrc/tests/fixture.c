/* A backend library as small as one can be, in C99, and all the ways it can be wrong: each is a macro.
 *
 * Its model has one parameter, "table" (vocab_size,) in float32, and a tied one; the logits of token t are table + t.
 * What happened is counted, and told to `query`.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "infinilm/backend.h"

#ifndef NAME
#define NAME "fixture"
#endif
#ifndef MAJOR
#define MAJOR INFINILM_ABI_MAJOR
#endif
#ifndef MINOR
#define MINOR INFINILM_ABI_MINOR
#endif
#ifndef MAGIC
#define MAGIC INFINILM_BACKEND_MAGIC
#endif
#ifndef TABLE_SIZE
#define TABLE_SIZE sizeof(infinilm_backend_table)
#endif
#ifndef DLPACK_MAJOR
#define DLPACK_MAJOR DLPACK_MAJOR_VERSION
#endif

struct infinilm_backend {
  const infinilm_host *host;
};

struct infinilm_model {
  int64_t shape[1];
  int64_t strides[1];
  float *table;
  int is_open;
  int is_loaded;
  int is_cancelled;
};

struct infinilm_cache {
  int64_t num_blocks;
};

/* Outside names may be those of another library: each must have its own. */
INFINILM_EXPORT extern int64_t shared_counter;
int64_t shared_counter = 0;
#define ADD(counter, number) __atomic_add_fetch(&(counter), (number), __ATOMIC_SEQ_CST)
#define READ(counter) __atomic_load_n(&(counter), __ATOMIC_SEQ_CST)
static int64_t num_probes, num_creates, num_models, num_deleters, num_caches, num_copies, num_releases, num_forwards;

#ifndef CONCURRENT
static int64_t num_unguarded; /* a race, unless calls are kept apart */
#endif

static int32_t fail(infinilm_error *error, int32_t code, const char *message) {
  if (INFINILM_COVERS(error, infinilm_error, message)) {
    strncpy(error->message, message, INFINILM_MESSAGE_SIZE - 1);
    error->message[INFINILM_MESSAGE_SIZE - 1] = '\0';
  }
  return code;
}

/* Wait until somebody has written a byte to a pipe. */
__attribute__((unused)) static void wait_for(const char *path) {
  FILE *file = fopen(path, "r");
  if (file == NULL) return;
  (void)fgetc(file);
  fclose(file);
}

static int32_t probe(const infinilm_host *host, infinilm_error *error) {
#ifdef PROBE_WAITS
  wait_for(PROBE_WAITS);
#endif
  ADD(num_probes, 1);
  if (!INFINILM_COVERS(host, infinilm_host, all_gather)) return fail(error, INFINILM_INVALID, "the host is too small");
  host->log(host->context, INFINILM_LOG_DEBUG, "probed");
#ifdef PROBE_MESSAGE
  return fail(error, INFINILM_UNAVAILABLE, PROBE_MESSAGE);
#endif
  return INFINILM_OK;
}

static int32_t query(infinilm_backend *backend, const char *name, int64_t *value, infinilm_error *error) {
  if (strcmp(name, "counter") == 0) ADD(shared_counter, 1);
  const struct {
    const char *name;
    int64_t value;
  } known[] = {{"probes", READ(num_probes)},
               {"creates", READ(num_creates)},
               {"models", READ(num_models)},
               {"deleters", READ(num_deleters)},
               {"caches", READ(num_caches)},
               {"copies", READ(num_copies)},
               {"releases", READ(num_releases)},
               {"forwards", READ(num_forwards)},
               {"counter", READ(shared_counter)},
#ifdef CONCURRENT
               {INFINILM_QUERY_CONCURRENT, 1},
#endif
               {"rank", backend == NULL ? -1 : backend->host->rank}};
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
    if (strcmp(known[i].name, name) == 0) {
      *value = known[i].value;
      return INFINILM_OK;
    }
  }
  return fail(error, INFINILM_UNSUPPORTED, "no such name");
}

static int32_t create(const infinilm_host *host, const char *options, infinilm_backend **backend,
                      infinilm_error *error) {
  ADD(num_creates, 1);
#ifdef CREATE_WAITS
  wait_for(CREATE_WAITS);
#endif
#ifdef CREATE_MESSAGE
  return fail(error, INFINILM_UNAVAILABLE, CREATE_MESSAGE);
#endif
#ifdef CREATE_LONG_MESSAGE
  memset(error->message, 'x', INFINILM_MESSAGE_SIZE); /* and no zero at the end */
  return INFINILM_FAILED;
#endif
#ifdef CREATE_WITHOUT_BACKEND
  return INFINILM_OK;
#endif
  if (strcmp(options, "{}") != 0) return fail(error, INFINILM_UNSUPPORTED, "no option is known");
  *backend = malloc(sizeof **backend);
  if (*backend == NULL) return fail(error, INFINILM_OUT_OF_MEMORY, "no memory");
  (*backend)->host = host;
  host->log(host->context, INFINILM_LOG_DEBUG, "created");
  return INFINILM_OK;
}

static void destroy(infinilm_backend *backend) {
#ifdef TELL_END
  backend->host->log(backend->host->context, INFINILM_LOG_WARNING, READ(num_models) == 0 ? "destroyed" : "models are left");
#endif
  free(backend);
}

static int64_t vocab_size_of(const char *config) {
  const char *found = strstr(config, "\"vocab_size\": ");
  return found == NULL ? 0 : strtol(found + strlen("\"vocab_size\": "), NULL, 10);
}

static int32_t supports_model(infinilm_backend *backend, const infinilm_model_request *request,
                              infinilm_error *error) {
  (void)backend;
  if (vocab_size_of(request->config) < 1) return fail(error, INFINILM_UNSUPPORTED, "the config has no vocab_size");
  if (strcmp(request->dtype, "float32") != 0) return fail(error, INFINILM_UNSUPPORTED, "float32 is all there is");
  return INFINILM_OK;
}

static int32_t model_create(infinilm_backend *backend, const infinilm_model_request *request, infinilm_model **model,
                            infinilm_error *error) {
  const int32_t code = supports_model(backend, request, error);
  if (code != INFINILM_OK) return code;
  *model = calloc(1, sizeof **model);
  if (*model == NULL) return fail(error, INFINILM_OUT_OF_MEMORY, "no memory");
  (*model)->shape[0] = vocab_size_of(request->config);
  (*model)->strides[0] = 1;
  ADD(num_models, 1);
  return INFINILM_OK;
}

static void model_destroy(infinilm_model *model) {
  if (!model->is_open) free(model->table); /* what is open is freed by its deleter */
  free(model);
  ADD(num_models, -1);
}

static int64_t num_parameters(infinilm_model *model) {
  (void)model;
  return 2;
}

static int32_t parameter(infinilm_model *model, int64_t index, infinilm_parameter *out, infinilm_error *error) {
  if (index < 0 || index > 1) return fail(error, INFINILM_INVALID, "there are two parameters");
  out->name = index == 0 ? "table" : "copy";
  out->dtype = "float32";
  out->tied_to = index == 0 ? NULL : "table";
  out->shape = model->shape;
  out->num_dims = 1;
  out->shard_dim = -1;
  out->shard_multiple = 1;
  return INFINILM_OK;
}

typedef struct {
  DLManagedTensorVersioned tensor;
  int64_t shape[1];
  int64_t strides[1];
  void *memory; /* to free: not before the deleter is called */
} loan;

static void delete_loan(DLManagedTensorVersioned *self) {
  loan *its = self->manager_ctx;
  free(its->memory);
  free(its);
  ADD(num_deleters, 1);
}

static int32_t open_parameter(infinilm_model *model, int64_t index, DLManagedTensorVersioned **buffer,
                              infinilm_error *error) {
  if (index != 0) return fail(error, INFINILM_INVALID, "only parameter 0 has a buffer");
  loan *made = calloc(1, sizeof *made);
  float *memory = calloc((size_t)model->shape[0], sizeof(float));
  if (made == NULL || memory == NULL) return fail(error, INFINILM_OUT_OF_MEMORY, "no memory");
  made->shape[0] = model->shape[0];
  made->strides[0] = 1;
  made->memory = memory;
  made->tensor.version.major = DLPACK_MAJOR;
  made->tensor.manager_ctx = made;
  made->tensor.deleter = delete_loan;
  made->tensor.dl_tensor.data = memory;
  made->tensor.dl_tensor.device.device_type = kDLCPU;
  made->tensor.dl_tensor.ndim = 1;
  made->tensor.dl_tensor.dtype.code = kDLFloat;
  made->tensor.dl_tensor.dtype.bits = 32;
  made->tensor.dl_tensor.dtype.lanes = 1;
  made->tensor.dl_tensor.shape = made->shape;
  made->tensor.dl_tensor.strides = made->strides;
  free(model->table);
  model->table = memory;
  model->is_open = 1;
  *buffer = &made->tensor;
  return INFINILM_OK;
}

static int32_t close_parameter(infinilm_model *model, int64_t index, infinilm_error *error) {
  if (index != 0 || !model->is_open) return fail(error, INFINILM_INVALID, "that parameter is not open");
  float *packed = malloc((size_t)model->shape[0] * sizeof(float));
  if (packed == NULL) return fail(error, INFINILM_OUT_OF_MEMORY, "no memory");
  memcpy(packed, model->table, (size_t)model->shape[0] * sizeof(float));
  model->table = packed;
  model->is_open = 0;
  model->is_loaded = 1;
  return INFINILM_OK;
}

static int32_t loading_done(infinilm_model *model, infinilm_error *error) {
  return model->is_loaded ? INFINILM_OK : fail(error, INFINILM_INVALID, "table was never loaded");
}

static int32_t cache_spec(infinilm_model *model, infinilm_cache_spec *spec, infinilm_error *error) {
  (void)model;
  (void)error;
  spec->block_size = 4;
  spec->bytes_per_block = 64;
  spec->shareable = 1;
  return INFINILM_OK;
}

static int32_t cache_create(infinilm_model *model, int64_t num_blocks, int64_t num_slots, infinilm_cache **cache,
                            infinilm_error *error) {
  (void)model;
  (void)num_slots;
  *cache = malloc(sizeof **cache);
  if (*cache == NULL) return fail(error, INFINILM_OUT_OF_MEMORY, "no memory");
  (*cache)->num_blocks = num_blocks;
  ADD(num_caches, 1);
  return INFINILM_OK;
}

static int32_t cache_copy_blocks(infinilm_cache *cache, const int32_t *pairs, int64_t num_pairs,
                                 infinilm_error *error) {
  for (int64_t i = 0; i < 2 * num_pairs; ++i) {
    if (pairs[i] < 0 || pairs[i] >= cache->num_blocks) return fail(error, INFINILM_INVALID, "there is no such block");
  }
  ADD(num_copies, num_pairs);
  return INFINILM_OK;
}

static int32_t cache_release_slots(infinilm_cache *cache, const int32_t *slots, int64_t num_slots,
                                   infinilm_error *error) {
  (void)cache;
  (void)slots;
  (void)error;
  ADD(num_releases, num_slots);
  return INFINILM_OK;
}

static void cache_destroy(infinilm_cache *cache) {
  free(cache);
  ADD(num_caches, -1);
}

#ifdef FORWARD_THROWS
void throw_something(void);
#endif

static int32_t forward(infinilm_model *model, infinilm_cache *cache, const infinilm_batch *batch,
                       const DLTensor *logits, infinilm_error *error) {
  (void)cache;
  ADD(num_forwards, 1);
#ifndef CONCURRENT
  ++num_unguarded;
#endif
#ifdef FORWARD_THROWS
  throw_something();
#endif
#ifdef FORWARD_WAITS
  while (!READ(model->is_cancelled)) continue;
  ADD(model->is_cancelled, -1);
  return fail(error, INFINILM_CANCELLED, "cancelled");
#endif
  if (!model->is_loaded) return fail(error, INFINILM_INVALID, "the model is not loaded");
  float *row = (float *)((char *)logits->data + logits->byte_offset);
  for (int64_t i = 0; i < batch->num_rows; ++i) {
    const int32_t token = batch->token_ids[batch->logits_indices[i]];
    for (int64_t v = 0; v < model->shape[0]; ++v) *row++ = model->table[v] + (float)token;
  }
  return INFINILM_OK;
}

static void cancel(infinilm_model *model) { __atomic_store_n(&model->is_cancelled, 1, __ATOMIC_SEQ_CST); }

static int32_t memory(infinilm_backend *backend, infinilm_memory *out, infinilm_error *error) {
  (void)backend;
  (void)error;
  out->device_free = out->device_total = out->scratch = -1;
  out->parameters = READ(num_models);
  out->caches = READ(num_caches);
  return INFINILM_OK;
}

static const infinilm_backend_table table = {MAGIC,
                                             MAJOR,
                                             MINOR,
                                             TABLE_SIZE,
                                             NULL,
                                             NAME,
                                             "0.1",
                                             "fixture.c",
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
                                             cache_release_slots,
                                             cache_destroy,
#ifdef WITHOUT_FORWARD
                                             sizeof(&forward) ? NULL : forward,
#else
                                             forward,
#endif
                                             cancel,
                                             memory};

#ifdef ENTRY_NAME
#define infinilm_backend_entry ENTRY_NAME
INFINILM_EXPORT const infinilm_backend_table *infinilm_backend_entry(uint32_t host_major, uint32_t host_minor);
#endif

#ifdef OPEN_WAITS
__attribute__((constructor)) static void open_late(void) { wait_for(OPEN_WAITS); }
#endif

#ifdef UNDEFINED
extern void nobody_has_this(void);
#endif

const infinilm_backend_table *infinilm_backend_entry(uint32_t host_major, uint32_t host_minor) {
  (void)host_major;
  (void)host_minor;
#ifdef UNDEFINED
  nobody_has_this();
#endif
#ifdef NO_TABLE
  return NULL;
#endif
  return &table;
}
