// One call into a library, what it says when it fails, and waiting for the one before.
#pragma once

#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

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

// Returns the lock, or one that owns nothing where `deadline` came first. Polls: thread sanitizers do not know of the
// timed locks of POSIX.
inline std::unique_lock<std::mutex> lock_until(std::mutex &mutex, std::chrono::steady_clock::time_point deadline) {
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  while (!lock.owns_lock() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    (void)lock.try_lock();
  }
  return lock;
}

}  // namespace infinilm::host
