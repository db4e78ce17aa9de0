// What can go wrong beside what infinilm/backend.hpp knows, each with the code that the ABI has for it.
#pragma once

#include <string>

#include "infinilm/backend.hpp"

namespace infinilm::cpu {

struct Invalid : Error {
  explicit Invalid(const std::string& message) : Error(INFINILM_INVALID, message) {}
};

struct OutOfMemory : Error {
  explicit OutOfMemory(const std::string& message) : Error(INFINILM_OUT_OF_MEMORY, message) {}
};

struct Cancelled : Error {
  explicit Cancelled(const std::string& message) : Error(INFINILM_CANCELLED, message) {}
};

}  // namespace infinilm::cpu
