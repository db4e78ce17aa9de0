// infinilm._native: the loader of backend libraries, for Python. Only names functions, and turns types into each other.
//
// The GIL is released around everything that enters a library. Errors are CallError(message, code) and
// RefusedError(message, path, stage, reason, abi_found, abi_wanted).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "library.hpp"
#include "model.hpp"

namespace py = pybind11;
using namespace infinilm::host;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;
using Int32 = py::array_t<int32_t, py::array::c_style>;

std::atomic<bool> is_python_over{false};

void log_to_python(const char *library, int32_t level, const char *message) {
  if (is_python_over) {
    std::fprintf(stderr, "%s: %s\n", library, message);
    return;
  }
  const py::gil_scoped_acquire gil;
  try {
    const std::string logger = std::string("infinilm.native.") + library;
    py::module_::import("logging").attr("getLogger")(logger).attr("log")(level, "%s", message);
  } catch (py::error_already_set &err) {
    err.discard_as_unraisable("log of a backend library");
  }
}

// ---------------------------------------------------------------- tensors

// What DLPack called a managed tensor before 1.0: every torch takes it.
struct LegacyTensor {
  DLTensor tensor;
  void *manager_ctx;
  void (*deleter)(LegacyTensor *);
};

struct Lent {
  LegacyTensor legacy;
  Buffer buffer;
};

py::capsule to_capsule(Buffer buffer) {
  auto lent = std::make_unique<Lent>();
  lent->legacy.tensor = buffer->dl_tensor;
  DLDataType &dtype = lent->legacy.tensor.dtype;
  if (dtype.code >= kDLFloat8_e4m3fn && dtype.code <= kDLFloat8_e8m0fnu) dtype.code = kDLUInt;  // viewed in Python
  lent->buffer = std::move(buffer);
  lent->legacy.manager_ctx = lent.get();
  lent->legacy.deleter = [](LegacyTensor *self) { delete static_cast<Lent *>(self->manager_ctx); };
  PyObject *capsule = PyCapsule_New(&lent->legacy, "dltensor", [](PyObject *self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;  // somebody took the tensor out
    auto *legacy = static_cast<LegacyTensor *>(PyCapsule_GetPointer(self, "dltensor"));
    legacy->deleter(legacy);
  });
  if (capsule == nullptr) throw py::error_already_set();
  (void)lent.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

// ---------------------------------------------------------------- arguments

struct Request {
  std::string config, dtype, device;
  std::optional<std::string> quantization, stored_quantization;
  int64_t max_model_len, max_num_seqs;

  infinilm_model_request view() const {
    infinilm_model_request made;
    std::memset(&made, 0, sizeof made);
    made.struct_size = sizeof made;
    made.config = config.c_str();
    made.dtype = dtype.c_str();
    made.device = device.c_str();
    made.quantization = quantization ? quantization->c_str() : nullptr;
    made.stored_quantization = stored_quantization ? stored_quantization->c_str() : nullptr;
    made.max_model_len = max_model_len;
    made.max_num_seqs = max_num_seqs;
    return made;
  }
};

void require_size(const Int32 &array, const char *name, py::ssize_t size) {
  if (array.ndim() == 1 && array.size() == size) return;
  throw py::value_error(std::string("the batch has ") + std::to_string(array.size()) + " " + name + ", and " +
                        std::to_string(size) + " are wanted");
}

std::shared_ptr<Model> create_model(const std::shared_ptr<Library> &library, const Request &request) {
  std::shared_ptr<Model> model;
  {
    const py::gil_scoped_release unlocked;
    model = Model::create(library, request.view());
  }
  Model *raw = model.get();
  // Destroying it may wait for a call that wants to log.
  return std::shared_ptr<Model>(raw, [model = std::move(model)](Model *) mutable {
    const py::gil_scoped_release unlocked;
    model.reset();
  });
}

void forward(Model &model, const Int32 &token_ids, const Int32 &positions, const Int32 &query_starts,
             const Int32 &context_lengths, const Int32 &block_tables, const Int32 &slot_mapping, const Int32 &slots,
             const Int32 &logits_indices, const Int32 &prompt_lengths, uint64_t logits_address, int64_t vocab_size) {
  infinilm_batch batch;
  std::memset(&batch, 0, sizeof batch);
  batch.struct_size = sizeof batch;
  batch.num_tokens = token_ids.size();
  batch.num_sequences = context_lengths.size();
  batch.num_rows = logits_indices.size();
  require_size(token_ids, "token_ids", token_ids.size());
  require_size(positions, "positions", batch.num_tokens);
  require_size(slot_mapping, "slot_mapping", batch.num_tokens);
  require_size(query_starts, "query_starts", batch.num_sequences + 1);
  require_size(context_lengths, "context_lengths", batch.num_sequences);
  require_size(slots, "slots", batch.num_sequences);
  require_size(prompt_lengths, "prompt_lengths", batch.num_sequences);
  require_size(logits_indices, "logits_indices", batch.num_rows);
  if (block_tables.ndim() != 2 || block_tables.shape(0) != batch.num_sequences) {
    throw py::value_error("the batch has no block table (num_sequences, max_blocks)");
  }
  batch.max_blocks = block_tables.shape(1);
  batch.token_ids = token_ids.data();
  batch.positions = positions.data();
  batch.query_starts = query_starts.data();
  batch.context_lengths = context_lengths.data();
  batch.block_tables = block_tables.data();
  batch.slot_mapping = slot_mapping.data();
  batch.slots = slots.data();
  batch.logits_indices = logits_indices.data();
  batch.prompt_lengths = prompt_lengths.data();
  int64_t shape[] = {batch.num_rows, vocab_size}, strides[] = {vocab_size, 1};
  DLTensor logits{};
  logits.data = reinterpret_cast<void *>(static_cast<uintptr_t>(logits_address));
  logits.device = DLDevice{kDLCPU, 0};
  logits.ndim = 2;
  logits.dtype = DLDataType{kDLFloat, 32, 1};
  logits.shape = shape;
  logits.strides = strides;
  const py::gil_scoped_release unlocked;
  model.forward(batch, logits);
}

py::dict memory(Library &library) {
  infinilm_memory found;
  {
    const py::gil_scoped_release unlocked;
    found = library.memory();
  }
  py::dict made;
  made["device_free"] = found.device_free;
  made["device_total"] = found.device_total;
  made["parameters"] = found.parameters;
  made["buffers"] = found.buffers;
  made["caches"] = found.caches;
  made["scratch"] = found.scratch;
  return made;
}

// ---------------------------------------------------------------- classes

void bind_errors(py::module_ &module) {
  static PyObject *call_error = PyErr_NewException("infinilm._native.CallError", PyExc_RuntimeError, nullptr);
  static PyObject *refused_error = PyErr_NewException("infinilm._native.RefusedError", PyExc_ImportError, nullptr);
  module.attr("CallError") = py::handle(call_error);
  module.attr("RefusedError") = py::handle(refused_error);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Failure &failure) {
      PyErr_SetObject(call_error, py::make_tuple(failure.what(), failure.code()).ptr());
    } catch (const Refused &refused) {
      const Refusal &its = refused.refusal();
      PyErr_SetObject(refused_error, py::make_tuple(refused.what(), its.path, its.stage, its.reason, its.abi_found,
                                                    its.abi_wanted)
                                         .ptr());
    }
  });
}

void bind_library(py::module_ &module) {
  py::class_<Library, std::shared_ptr<Library>>(module, "Library")
      .def_property_readonly("path",
                             [](const Library &library) {
                               PyObject *path = PyUnicode_DecodeFSDefault(library.path.c_str());
                               if (path == nullptr) throw py::error_already_set();
                               return py::reinterpret_steal<py::str>(path);
                             })
      .def_readonly("name", &Library::name)
      .def_readonly("version", &Library::version)
      .def_readonly("build", &Library::build)
      .def_readonly("abi", &Library::abi)
      .def("query", &Library::query, py::arg("name"), Unlocked())
      .def("memory", &memory)
      .def(
          "require_support", [](Library &library, const Request &request) { library.require_support(request.view()); },
          py::arg("request"), Unlocked())
      .def("create_model", &create_model, py::arg("request"));
  module.def("load_library", &load_library, py::arg("path"), Unlocked());
  module.def("loaded_libraries", &loaded_libraries, Unlocked());
  module.def("refusals", [] {
    std::vector<Refusal> found;
    {
      const py::gil_scoped_release unlocked;  // a library that is being created may hold the lock, and log
      found = refusals();
    }
    std::vector<py::tuple> made;
    for (const Refusal &its : found) {
      made.push_back(py::make_tuple(its.path, its.stage, its.reason, its.abi_found, its.abi_wanted));
    }
    return made;
  });
  module.def(
      "shut_down",
      [](int64_t timeout_ms) {
        {
          const py::gil_scoped_release unlocked;
          shut_down(timeout_ms);
        }
        is_python_over = true;
      },
      py::arg("timeout_ms"));
}

void bind_model(py::module_ &module) {
  py::class_<Request>(module, "Request")
      .def_readonly("device", &Request::device)
      .def(py::init([](std::string config, std::string dtype, std::string device,
                       std::optional<std::string> quantization, std::optional<std::string> stored_quantization,
                       int64_t max_model_len, int64_t max_num_seqs) {
             return Request{std::move(config), std::move(dtype), std::move(device), std::move(quantization),
                            std::move(stored_quantization), max_model_len, max_num_seqs};
           }),
           py::kw_only(), py::arg("config"), py::arg("dtype"), py::arg("device"), py::arg("quantization"),
           py::arg("stored_quantization"), py::arg("max_model_len"), py::arg("max_num_seqs"));
  py::class_<Parameter>(module, "Parameter")
      .def_readonly("name", &Parameter::name)
      .def_readonly("dtype", &Parameter::dtype)
      .def_readonly("tied_to", &Parameter::tied_to)
      .def_readonly("shape", &Parameter::shape)
      .def_readonly("shard_dim", &Parameter::shard_dim)
      .def_readonly("shard_multiple", &Parameter::shard_multiple)
      .def_readonly("shard_segments", &Parameter::shard_segments);
  py::class_<infinilm_cache_spec>(module, "CacheSpec")
      .def_readonly("block_size", &infinilm_cache_spec::block_size)
      .def_readonly("bytes_per_block", &infinilm_cache_spec::bytes_per_block)
      .def_readonly("bytes_per_slot", &infinilm_cache_spec::bytes_per_slot)
      .def_readonly("shareable", &infinilm_cache_spec::shareable);
  py::class_<Model, std::shared_ptr<Model>>(module, "Model")
      .def("parameters", &Model::parameters, Unlocked())
      .def(
          "open",
          [](Model &model, int64_t index) {
            Buffer buffer;
            {
              const py::gil_scoped_release unlocked;
              buffer = model.open(index);
            }
            return to_capsule(std::move(buffer));
          },
          py::arg("index"))
      .def("close", &Model::close, py::arg("index"), Unlocked())
      .def("loading_done", &Model::loading_done, Unlocked())
      .def("cache_spec", &Model::cache_spec, Unlocked())
      .def("create_cache", &Model::create_cache, py::arg("num_blocks"), py::arg("num_slots"), Unlocked())
      .def(
          "copy_blocks",
          [](Model &model, const Int32 &pairs) {
            if (pairs.ndim() != 2 || pairs.shape(1) != 2) throw py::value_error("pairs are wanted, (num_pairs, 2)");
            const int64_t num_pairs = pairs.shape(0);
            const int32_t *data = pairs.data();
            const py::gil_scoped_release unlocked;
            model.copy_blocks(data, num_pairs);
          },
          py::arg("pairs"))
      .def(
          "release_slots",
          [](Model &model, const Int32 &slots) {
            const int32_t *data = slots.data();
            const int64_t num_slots = slots.size();
            const py::gil_scoped_release unlocked;
            model.release_slots(data, num_slots);
          },
          py::arg("slots"))
      .def("forward", &forward)
      .def("cancel", &Model::cancel, Unlocked())
      .def("destroy", &Model::destroy, Unlocked());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The loader of backend libraries; see infinilm.native.";
  module.attr("ABI_VERSION") = py::make_tuple(INFINILM_ABI_MAJOR, INFINILM_ABI_MINOR);
  module.attr("INVALID") = INFINILM_INVALID;
  module.attr("UNSUPPORTED") = INFINILM_UNSUPPORTED;
  module.attr("UNAVAILABLE") = INFINILM_UNAVAILABLE;
  module.attr("OUT_OF_MEMORY") = INFINILM_OUT_OF_MEMORY;
  module.attr("CANCELLED") = INFINILM_CANCELLED;
  bind_errors(module);
  bind_library(module);
  bind_model(module);
  set_log_sink(log_to_python);
}
