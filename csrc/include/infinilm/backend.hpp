// What a backend in C++17 needs at the boundary of infinilm/backend.h: no exception passes it, no struct is written past
// its end, and a buffer that is lent out is freed exactly once. Header-only; includes the standard library alone.
//
//   int32_t cache_spec(infinilm_model *model, infinilm_cache_spec *spec, infinilm_error *error) {
//     return infinilm::guard(error, [&] { infinilm::give(spec, as_model(model).cache_spec()); });
//   }
#ifndef INFINILM_BACKEND_HPP_
#define INFINILM_BACKEND_HPP_

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "infinilm/backend.h"

namespace infinilm {

// What a function of the table throws inside to return `code` and a message.
class Error : public std::runtime_error {
 public:
  Error(int32_t code, const std::string &message) : std::runtime_error(message), code_(code) {}
  int32_t code() const noexcept { return code_; }

 private:
  int32_t code_;
};

// "This is not for me": the reason the user reads.
class Unsupported : public Error {
 public:
  explicit Unsupported(const std::string &reason) : Error(INFINILM_UNSUPPORTED, reason) {}
};

// Writes a message into the caller's struct, cut at a whole character where it is too long.
inline void set_message(infinilm_error *error, std::string_view message) noexcept {
  if (error == nullptr || !INFINILM_COVERS(error, infinilm_error, message)) return;
  std::size_t size = std::min<std::size_t>(message.size(), INFINILM_MESSAGE_SIZE - 1);
  if (size < message.size()) {
    while (size > 0 && (static_cast<unsigned char>(message[size]) & 0xC0u) == 0x80u) --size;
  }
  std::memcpy(error->message, message.data(), size);
  error->message[size] = '\0';
}

// Runs `body` and returns the code for what came of it. Everything that is thrown stops here.
template <class Body>
int32_t guard(infinilm_error *error, Body &&body) noexcept {
  try {
    std::forward<Body>(body)();
    return INFINILM_OK;
  } catch (const Error &err) {
    set_message(error, err.what());
    return err.code();
  } catch (const std::bad_alloc &) {
    set_message(error, "out of memory");
    return INFINILM_OUT_OF_MEMORY;
  } catch (const std::invalid_argument &err) {
    set_message(error, err.what());
    return INFINILM_INVALID;
  } catch (const std::exception &err) {
    set_message(error, err.what());
  } catch (...) {
    set_message(error, "something that is no std::exception was thrown");
  }
  return INFINILM_FAILED;
}

// Fills a struct of the caller's as far as the caller knows it: it may be older, and shorter, or newer, and longer.
template <class Struct>
void give(Struct *out, const Struct &value) noexcept {
  static_assert(std::is_trivially_copyable<Struct>::value, "structs of the ABI are plain data");
  constexpr std::size_t kHead = sizeof(uint64_t) + sizeof(void *);
  const std::size_t size = std::min<std::size_t>(out->struct_size, sizeof(Struct));
  if (size <= kHead) return;
  std::memcpy(reinterpret_cast<char *>(out) + kHead, reinterpret_cast<const char *>(&value) + kHead, size - kHead);
}

// Returns a struct of zeros that says how large it is.
template <class Struct>
Struct make_struct() noexcept {
  Struct made;
  std::memset(&made, 0, sizeof made);
  made.struct_size = sizeof made;
  return made;
}

// Says something to the user's log.
inline void log(const infinilm_host *host, int32_t level, const std::string &message) noexcept {
  if (host != nullptr && INFINILM_COVERS(host, infinilm_host, log) && host->log != nullptr) {
    host->log(host->context, level, message.c_str());
  }
}

// ---------------------------------------------------------------- tensors

// Returns the DLPack dtype of a name as parameters have it. Throws Unsupported.
inline DLDataType dtype_of(std::string_view name) {
  struct Named {
    std::string_view name;
    uint8_t code, bits;
  };
  constexpr Named kNames[] = {
      {"bool", kDLBool, 8},
      {"uint8", kDLUInt, 8},
      {"int8", kDLInt, 8},
      {"uint16", kDLUInt, 16},
      {"int16", kDLInt, 16},
      {"float16", kDLFloat, 16},
      {"bfloat16", kDLBfloat, 16},
      {"uint32", kDLUInt, 32},
      {"int32", kDLInt, 32},
      {"float32", kDLFloat, 32},
      {"uint64", kDLUInt, 64},
      {"int64", kDLInt, 64},
      {"float64", kDLFloat, 64},
      {"float8_e4m3fn", kDLFloat8_e4m3fn, 8},
      {"float8_e4m3fnuz", kDLFloat8_e4m3fnuz, 8},
      {"float8_e5m2", kDLFloat8_e5m2, 8},
      {"float8_e5m2fnuz", kDLFloat8_e5m2fnuz, 8},
      {"float8_e8m0fnu", kDLFloat8_e8m0fnu, 8},
  };
  for (const Named &known : kNames) {
    if (known.name == name) return DLDataType{known.code, known.bits, 1};
  }
  throw Unsupported("unknown dtype '" + std::string(name) + "'");
}

// Lends a row-major buffer on the CPU to the host. `owner` is kept until the host calls the deleter.
inline DLManagedTensorVersioned *lend(void *data, DLDataType dtype, std::vector<int64_t> shape,
                                      std::shared_ptr<void> owner) {
  struct Loan {
    DLManagedTensorVersioned tensor;
    std::vector<int64_t> shape, strides;
    std::shared_ptr<void> owner;
  };
  auto loan = std::make_unique<Loan>();
  loan->shape = std::move(shape);
  loan->strides.resize(loan->shape.size());
  loan->owner = std::move(owner);
  int64_t stride = 1;
  for (std::size_t i = loan->shape.size(); i-- > 0;) {
    loan->strides[i] = stride;
    stride *= std::max<int64_t>(loan->shape[i], 1);
  }
  DLManagedTensorVersioned &tensor = loan->tensor;
  tensor.version = DLPackVersion{DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  tensor.manager_ctx = loan.get();
  tensor.deleter = [](DLManagedTensorVersioned *self) { delete static_cast<Loan *>(self->manager_ctx); };
  tensor.flags = 0;
  tensor.dl_tensor = DLTensor{data,
                              DLDevice{kDLCPU, 0},
                              static_cast<int32_t>(loan->shape.size()),
                              dtype,
                              loan->shape.data(),
                              loan->strides.data(),
                              0};
  return &loan.release()->tensor;
}

}  // namespace infinilm

#endif
