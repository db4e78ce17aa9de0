// One call into a library, and what it says when it fails.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "infinilm/backend.h"
#include "text.hpp"

namespace infinilm::host {

// What a call into a library came to, other than INFINILM_OK.
class Failure : public std::runtime_error {
 public:
  Failure(int32_t code, const std::string &message) : std::runtime_error(message), code_(code) {}
  int32_t code() const noexcept { return code_; }

 private:
  int32_t code_;
};

// Runs call(error), a call of the function `what` of a library, and throws Failure unless it returns INFINILM_OK.
template <class Call>
void checked(const char *what, Call &&call) {
  infinilm_error error;
  std::memset(&error, 0, sizeof error);
  error.struct_size = sizeof error;
  int32_t code;
  try {
    code = call(&error);
  } catch (...) {
    throw Failure(INFINILM_FAILED, std::string(what) + " let an exception through; a library must stop its own");
  }
  if (code == INFINILM_OK) return;
  std::string message = clean_text(error.message, INFINILM_MESSAGE_SIZE);
  if (message.empty()) message = std::string(what) + " failed with code " + std::to_string(code) + " and no message";
  throw Failure(code, message);
}

}  // namespace infinilm::host
