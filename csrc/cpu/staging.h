// Buffers that the host fills with parameters. While a load goes on they are used again: pages that were just read from
// are in the caches, and new ones would have to be zeroed for every parameter.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.h"

namespace infinilm::cpu {

class Staging : public std::enable_shared_from_this<Staging> {
 public:
  // `held` counts the bytes of all buffers, those that wait to be used again too.
  explicit Staging(std::shared_ptr<std::atomic<int64_t>> held) : held_(std::move(held)) {}

  // A buffer of at least so many bytes, with anything in them. Any thread may free it, whenever. Throws OutOfMemory.
  std::shared_ptr<Buffer> take(int64_t num_bytes);

  // The load is over: free what waits, and whatever comes back before something is taken again.
  void end();

 private:
  std::unique_ptr<Buffer> find(int64_t num_bytes);
  void give_back(std::unique_ptr<Buffer> buffer);

  const std::shared_ptr<std::atomic<int64_t>> held_;
  std::mutex mutex_;
  bool is_loading_ = false;
  std::vector<std::unique_ptr<Buffer>> waiting_;
  int64_t waiting_bytes_ = 0;
};

}  // namespace infinilm::cpu
