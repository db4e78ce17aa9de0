#include "memory.h"

#include <sys/mman.h>

#include <fstream>
#include <string>
#include <utility>

#include "errors.h"

namespace infinilm::cpu {

namespace {

constexpr int64_t kHugePage = 2 << 20;

int64_t meminfo(const std::string& wanted) {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  for (int64_t kib = 0; file >> name >> kib; std::getline(file, unit)) {
    if (name == wanted + ":") return kib * 1024;
  }
  return -1;
}

}  // namespace

Buffer::Buffer(int64_t num_bytes) {
  if (num_bytes <= 0) return;
  void* pages = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) {
    throw OutOfMemory("no room for " + std::to_string(num_bytes) + " bytes; " + std::to_string(available_memory()) +
                      " are available");
  }
  // Weights are read from end to end for every token: with small pages the processor would look up a page every 64
  // lines. A refusal costs speed only.
  if (num_bytes >= kHugePage) madvise(pages, num_bytes, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(pages);
  size_ = num_bytes;
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, size_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void Buffer::reserve(int64_t num_bytes) {
  if (num_bytes <= size_) return;
  *this = Buffer();
  *this = Buffer(num_bytes + num_bytes / 4);
}

int64_t available_memory() { return meminfo("MemAvailable"); }

int64_t total_memory() { return meminfo("MemTotal"); }

}  // namespace infinilm::cpu
