/* The C ABI of infinilm for backends that come as a shared library (.so).
 *
 * A backend is a library that exports one symbol, infinilm_backend_entry. It is given a model as JSON, says which
 * parameters it wants, is filled, and runs steps over a paged cache. Layouts, fusion, packing and threads are its own
 * affair: this is an interface of model steps, not of operators. It links nothing of infinilm and no Python.
 *
 * The life of a model, in order; whatever is in brackets may be missing from the table:
 *
 *   infinilm_backend_entry         -> the table                       once a process; pure
 *   probe                          can this run here?                 before anything else
 *   create                         -> backend
 *   supports_model                 does it run this model?            as often as users ask
 *   model_create                   -> model                           allocates no parameters
 *   num_parameters, parameter      what it wants
 *   open_parameter                 -> a buffer, filled by the host    several may be open, several threads fill them
 *   close_parameter                it is full: pack it, free it
 *   loading_done
 *   cache_spec, cache_create       -> cache                           a later one replaces it: destroy comes first
 *   forward                        one step                           again and again
 *   cache_copy_blocks, [cache_release_slots]                          between steps
 *   open_parameter ...             an update goes the same way again, on the cache there is
 *   cache_destroy, model_destroy, destroy
 *
 * [query], [cancel] and [memory] may be called at any time after their object was made.
 *
 * Rules
 *   Versions   Hosts and backends of one INFINILM_ABI_MAJOR work together, whichever is newer. A minor version only
 *              appends: fields at the end of structs, slots at the end of the table, names that can be queried. A
 *              reader asks INFINILM_COVERS(pointer, type, field) before it reads a field that is newer than 1.0. The
 *              first 56 bytes of the table, up to and with `build`, never change, also not in another major version.
 *   Structs    Each begins with its size as its writer knows it, and a chain of extensions; a reader passes over those
 *              that it does not know. There is no padding, what is reserved is 0. In a struct that the callee fills,
 *              the caller sets struct_size before the call to what it has room for, and the callee writes no further.
 *   Errors     A function that returns int32_t returns INFINILM_OK or another code, and then has written a message
 *              into `error`, which is never NULL: what was wrong, with the value, and what to do. No exception and no
 *              longjmp leaves a function; nothing calls abort() or exit().
 *   Outputs    Where a function does not return INFINILM_OK it has written nothing to its outputs, and nothing needs to
 *              be freed.
 *   Threads    Calls on one backend or its models never overlap, except for `cancel` and deleters, which any thread may
 *              call at any time. Consecutive calls may come from different threads. A backend that answers 1 to the
 *              query "concurrent" allows calls on different models of it to overlap.
 *   Process    A library touches no signal handler, locale, floating-point mode or environment variable of the process,
 *              and starts no thread before `create`. Nothing is registered by static constructors: they run before
 *              anybody can catch what they throw. It is never unloaded once its entry has been called.
 *   Pointers   Arguments are borrowed for the call, unless it is said otherwise. A backend's own strings and arrays
 *              live as long as the object they came from, those of the table as long as the process. Text is UTF-8 and
 *              ends with a zero byte.
 *   Linking    Build with hidden visibility: libraries are opened with RTLD_NOW | RTLD_LOCAL, in one process with others.
 */
#ifndef INFINILM_BACKEND_H_
#define INFINILM_BACKEND_H_

#include <stddef.h>
#include <stdint.h>

#include "infinilm/dlpack.h"

#define INFINILM_ABI_MAJOR 1
#define INFINILM_ABI_MINOR 0
#define INFINILM_BACKEND_MAGIC UINT64_C(0x4241434B494E464C)
#define INFINILM_MESSAGE_SIZE 1024

#if defined(_WIN32)
#define INFINILM_EXPORT __declspec(dllexport)
#else
#define INFINILM_EXPORT __attribute__((visibility("default")))
#endif

/* Whether the writer of *pointer knew `field`. A slot of the table must also be checked for NULL. */
#define INFINILM_COVERS(pointer, type, field) \
  ((pointer)->struct_size >= (uint64_t)(offsetof(type, field) + sizeof(((type *)0)->field)))

/* What functions return. A code that the host does not know is INFINILM_FAILED to it. */
#define INFINILM_OK 0
#define INFINILM_FAILED 1        /* anything that has no code of its own */
#define INFINILM_INVALID 2       /* an argument that the caller should not have given */
#define INFINILM_UNSUPPORTED 3   /* the backend does not do this: the host asks somebody else */
#define INFINILM_UNAVAILABLE 4   /* not on this machine, or not now: a driver, a processor feature, a busy device */
#define INFINILM_OUT_OF_MEMORY 5 /* the message has the numbers: bytes wanted, bytes there are */
#define INFINILM_CANCELLED 6     /* `cancel` was called, or the host's is_aborted says so */

/* Levels of infinilm_host.log, as Python's logging has them. */
#define INFINILM_LOG_DEBUG 10
#define INFINILM_LOG_INFO 20
#define INFINILM_LOG_WARNING 30
#define INFINILM_LOG_ERROR 40

#ifdef __cplusplus
extern "C" {
#endif

typedef struct infinilm_backend infinilm_backend; /* what these three are is the plugin's affair */
typedef struct infinilm_model infinilm_model;
typedef struct infinilm_cache infinilm_cache;

/* The first fields of every extension; what follows them belongs to whoever owns the name. */
typedef struct infinilm_extension infinilm_extension;
struct infinilm_extension {
  uint64_t struct_size;
  const infinilm_extension *next; /* NULL at the end */
  const char *name;               /* "vendor.what", for example "acme.topology" */
};

/* Owned by the caller of the function that fails. */
typedef struct infinilm_error {
  uint64_t struct_size;
  const infinilm_extension *extension;
  char message[INFINILM_MESSAGE_SIZE]; /* at most 1,023 bytes and a zero */
} infinilm_error;

/* ---------------------------------------------------------------- what the host offers */

/* Valid from `probe`, or `create`, until that call, or `destroy`, has returned. Functions take `context` first. */
typedef struct infinilm_host {
  uint64_t struct_size;
  const infinilm_extension *extension;
  uint32_t abi_major;
  uint32_t abi_minor;
  const char *name;    /* "infinilm" */
  const char *version; /* of the host's package */
  void *context;
  /* Say something to the user's log. From any thread, but not while holding a lock that another thread holding the
   * host's own might wait for. */
  void (*log)(void *context, int32_t level, const char *message);
  /* Return memory whose address is a multiple of `alignment`, a power of two; NULL where there is none. Large blocks
   * begin as untouched pages. Using these is a choice, not a duty. */
  void *(*allocate)(void *context, uint64_t num_bytes, uint64_t alignment);
  void (*deallocate)(void *context, void *pointer); /* NULL is fine */
  /* Call body(argument, begin, end) for disjoint ranges that cover 0 to count, from several threads, and return when
   * all have returned. For setting up; a backend whose steps need threads has its own. */
  void (*parallel_for)(void *context, int64_t count, void (*body)(void *argument, int64_t begin, int64_t end),
                       void *argument);
  /* Return 1 as soon as the process wants all work to end; long loops ask now and then. From any thread. */
  int32_t (*is_aborted)(void *context);
  int32_t rank;       /* from 0 */
  int32_t world_size; /* 1: a model in one process */
  /* Both NULL in a world of one. All ranks call the same functions in the same order, with the same shapes. Tensors are
   * contiguous and on the device of the model. Return INFINILM_OK or what went wrong. */
  int32_t (*all_reduce)(void *context, const DLTensor *in_out, infinilm_error *error); /* the sum of all ranks' */
  int32_t (*all_gather)(void *context, const DLTensor *mine, const DLTensor *all,      /* all: (world_size, ...mine) */
                        infinilm_error *error);
} infinilm_host;

/* ---------------------------------------------------------------- what is asked */

typedef struct infinilm_model_request {
  uint64_t struct_size;
  const infinilm_extension *extension;
  /* A DecoderConfig as one JSON object. A field at its default is left out, so a key, or a "kind", that the backend
   * does not know changes the model: it must decline it, by name. infinilm/config.hpp does that. */
  const char *config;
  const char *dtype;        /* to compute in: "float32", "bfloat16", "float16", "float64" */
  const char *device;       /* "cpu", "cuda:1", ... */
  const char *quantization; /* what the user asked to quantize to at load, such as "int8"; NULL: nothing */
  /* How the checkpoint is quantized, NULL where it is not: {"scheme": "gptq", "block_shape": [1, 128], "groups":
   * {"model.layers.0.mlp.up_proj.weight": {"weight": {"name": ..., "shape": [...], "dtype": "int32"}, ...}}}. A group has
   * the name of its parameter. One that a model's weight rules changed otherwise is not there, and is dequantized, as is
   * every one whose parts the backend does not ask for. */
  const char *stored_quantization;
  int64_t max_model_len; /* in tokens; 0: nobody said */
  int64_t max_num_seqs;
} infinilm_model_request;

/* ---------------------------------------------------------------- parameters */

typedef struct infinilm_parameter {
  uint64_t struct_size;
  const infinilm_extension *extension;
  /* Canonical: "model.layers.0.self_attn.q_proj.weight", matrices (out_features, in_features). In the place of one that
   * is stored quantized a backend may ask for all its parts, stored shapes and dtypes: "...weight:weight", ":zero",
   * ":scale" and so on, the roles that infinilm_model_request.stored_quantization has for it. */
  const char *name;
  const char *dtype; /* of the buffer; the host converts */
  /* Of another parameter that it shares its values with; NULL: none. It has no buffer of its own and is never opened. */
  const char *tied_to;
  const int64_t *shape; /* [num_dims], of the whole: all ranks together */
  int64_t num_dims;
  int64_t shard_dim;             /* the dimension that is cut over ranks; -1: every rank has all of it */
  int64_t shard_multiple;        /* cut at multiples of so many elements only; at least 1 */
  const int64_t *shard_segments; /* [num_shard_segments]: pieces of a fused dimension, each cut by itself */
  int64_t num_shard_segments;    /* 0: one piece */
} infinilm_parameter;

/* ---------------------------------------------------------------- cache and steps */

typedef struct infinilm_cache_spec {
  uint64_t struct_size;
  const infinilm_extension *extension;
  int64_t block_size;      /* in tokens */
  int64_t bytes_per_block; /* on this rank */
  int64_t bytes_per_slot;  /* state of a sequence that does not grow with its context */
  int64_t shareable;       /* 1: two sequences may have a block in common; 0: a preempted one starts again at token 0 */
} infinilm_cache_spec;

/* One step: the new tokens of every scheduled sequence, end to end, and where their cache lies. */
typedef struct infinilm_batch {
  uint64_t struct_size;
  const infinilm_extension *extension;
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t max_blocks;            /* columns of block_tables */
  int64_t num_rows;              /* of logits wanted; 0 in the middle of a prompt */
  const int32_t *token_ids;      /* [num_tokens] */
  const int32_t *positions;      /* [num_tokens] */
  const int32_t *query_starts;   /* [num_sequences + 1]: sequence i has the tokens from [i] to [i + 1] */
  const int32_t *context_lengths; /* [num_sequences], in tokens, this step's included */
  const int32_t *block_tables;   /* [num_sequences, max_blocks]: blocks in order of position, padded with -1 */
  const int32_t *slot_mapping;   /* [num_tokens]: block * block_size + offset, where its key and value go */
  const int32_t *slots;          /* [num_sequences]: kept from a sequence's first token until it is released */
  const int32_t *logits_indices; /* [num_rows]: ascending rows of token_ids */
  const int32_t *prompt_lengths; /* [num_sequences]: tokens given, not generated */
} infinilm_batch;

/* Bytes that a backend holds; -1: it does not know. */
typedef struct infinilm_memory {
  uint64_t struct_size;
  const infinilm_extension *extension;
  int64_t device_free; /* of the device, whoever has the rest */
  int64_t device_total;
  int64_t parameters; /* as they are kept: packed, without open buffers */
  int64_t buffers;    /* of parameters that are open */
  int64_t caches;
  int64_t scratch;    /* everything else */
} infinilm_memory;

/* ---------------------------------------------------------------- the table */

/* Names for `query`. Whoever does not know a name returns INFINILM_UNSUPPORTED, which means 0. */
#define INFINILM_QUERY_KEEPS_PARAMETERS "keeps_parameters" /* 1: open_parameter has the value, in the same place, always */
#define INFINILM_QUERY_CONCURRENT "concurrent"             /* 1: calls on different models may overlap */
#define INFINILM_QUERY_MAX_WORLD_SIZE "max_world_size"     /* 0 or 1: it cannot shard a model over processes */

typedef struct infinilm_backend_table {
  /* Frozen for ever: a host of another major version reads these to say no. */
  uint64_t magic; /* INFINILM_BACKEND_MAGIC */
  uint32_t abi_major;
  uint32_t abi_minor;
  uint64_t struct_size; /* of the whole table */
  const infinilm_extension *extension;
  const char *name;    /* "acme": letters, digits, '-', '_' and '.'; one library a process has it */
  const char *version; /* the plugin's own */
  const char *build;   /* compiler, flags, commit: for bug reports */

  /* Say whether this machine will do; INFINILM_UNAVAILABLE and the reason where it will not. Runs no instruction that
   * a baseline processor lacks. */
  int32_t (*probe)(const infinilm_host *host, infinilm_error *error);
  /* Answer an INFINILM_QUERY_... name. `backend` may be NULL. May be missing. */
  int32_t (*query)(infinilm_backend *backend, const char *name, int64_t *value, infinilm_error *error);
  /* `options` is a JSON object, "{}" where there are none; decline a key that is not known. */
  int32_t (*create)(const infinilm_host *host, const char *options, infinilm_backend **backend, infinilm_error *error);
  void (*destroy)(infinilm_backend *backend); /* all its models are destroyed already */

  /* INFINILM_OK: model_create will take it. INFINILM_UNSUPPORTED: the message is the reason that the user reads. */
  int32_t (*supports_model)(infinilm_backend *backend, const infinilm_model_request *request, infinilm_error *error);
  int32_t (*model_create)(infinilm_backend *backend, const infinilm_model_request *request, infinilm_model **model,
                          infinilm_error *error);
  void (*model_destroy)(infinilm_model *model); /* at any time: before, while and after it is loaded */

  int64_t (*num_parameters)(infinilm_model *model);
  int32_t (*parameter)(infinilm_model *model, int64_t index, infinilm_parameter *parameter, infinilm_error *error);
  /* Give this rank's buffer for a parameter to the host, which may be a view into a larger one. The memory stays valid
   * until its deleter has been called, even after close_parameter, and, unless "keeps_parameters", not longer. A
   * parameter that is open is not opened again. A buffer whose deleter is called without close_parameter was given up:
   * the parameter is then not loaded. */
  int32_t (*open_parameter)(infinilm_model *model, int64_t index, DLManagedTensorVersioned **buffer,
                            infinilm_error *error);
  /* It is full: pack it here. The deleter is called soon after. */
  int32_t (*close_parameter)(infinilm_model *model, int64_t index, infinilm_error *error);
  /* All are loaded: compute what is derived from them. INFINILM_INVALID names a parameter that is missing. */
  int32_t (*loading_done)(infinilm_model *model, infinilm_error *error);

  int32_t (*cache_spec)(infinilm_model *model, infinilm_cache_spec *spec, infinilm_error *error);
  /* Before or after the model is loaded. INFINILM_OUT_OF_MEMORY where it cannot fit, before memory is touched. */
  int32_t (*cache_create)(infinilm_model *model, int64_t num_blocks, int64_t num_slots, infinilm_cache **cache,
                          infinilm_error *error);
  /* pairs: [num_pairs, 2], from and to. As if all were read before any is written. */
  int32_t (*cache_copy_blocks)(infinilm_cache *cache, const int32_t *pairs, int64_t num_pairs, infinilm_error *error);
  /* These sequences ended: their slots may be given out again. Missing where there is nothing to forget. */
  int32_t (*cache_release_slots)(infinilm_cache *cache, const int32_t *slots, int64_t num_slots, infinilm_error *error);
  void (*cache_destroy)(infinilm_cache *cache); /* before its model */

  /* Run one step. `logits` is the host's: (num_rows, vocab_size), float32, contiguous, on the CPU; every element is
   * written. Where it fails, the cache of the sequences in the batch is lost and that of others is not. */
  int32_t (*forward)(infinilm_model *model, infinilm_cache *cache, const infinilm_batch *batch, const DLTensor *logits,
                     infinilm_error *error);
  /* Have the call that runs on the model now return INFINILM_CANCELLED soon; nothing happens where none does. From any
   * thread. May be missing. */
  void (*cancel)(infinilm_model *model);
  /* May be missing. */
  int32_t (*memory)(infinilm_backend *backend, infinilm_memory *memory, infinilm_error *error);
} infinilm_backend_table;

#define INFINILM_BACKEND_ENTRY "infinilm_backend_entry"

/* The one symbol of a library. Given the version of the host; returns a table that never changes, or NULL where it has
 * none for such a host. Does nothing else: it may be called by a tool that only wants to know what a file is. */
typedef const infinilm_backend_table *(*infinilm_backend_entry_function)(uint32_t host_major, uint32_t host_minor);
INFINILM_EXPORT const infinilm_backend_table *infinilm_backend_entry(uint32_t host_major, uint32_t host_minor);

#ifdef __cplusplus
}
#endif

#endif
