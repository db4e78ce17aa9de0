// Memory for weights, caches and activations: pages of the system, untouched until somebody writes, large where it pays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace infinilm::cpu {

// Owns zeroed bytes that begin at a page, a large one where there are enough of them. Moves, does not copy.
class Buffer {
 public:
  Buffer() = default;
  // Throws OutOfMemory.
  explicit Buffer(int64_t num_bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

  // Make room for at least so many bytes. What was there may be gone.
  void reserve(int64_t num_bytes);

 private:
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

// Hands out pieces of large buffers that are freed together: weights, which in buffers of their own would lie on small
// pages at both ends. Holds nothing before something is taken. One call at a time.
class Arena {
 public:
  // Zeroed bytes that begin at a multiple of 64. Throws OutOfMemory, and is then as before.
  std::byte* take(int64_t num_bytes);

  // What was taken.
  int64_t num_bytes() const { return num_bytes_; }

 private:
  std::vector<Buffer> large_;   // a piece each
  std::vector<Buffer> chunks_;  // for the others
  int64_t used_ = 0;            // of the last chunk
  int64_t num_bytes_ = 0;
};

// The bytes of memory this machine has available now; -1 where it does not say.
int64_t available_memory();
int64_t total_memory();

}  // namespace infinilm::cpu
