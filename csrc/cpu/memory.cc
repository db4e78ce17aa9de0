#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <utility>

#include "errors.h"
#include "guarded_pages.h"

namespace infinilm::cpu {

namespace {

constexpr int64_t kSmallPage = 4 << 10, kHugePage = 2 << 20, kArenaChunk = kGuardsPages ? 0 : 64 << 20;

int64_t meminfo(const std::string& wanted) {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  for (int64_t kib = 0; file >> name >> kib; std::getline(file, unit)) {
    if (name == wanted + ":") return kib * 1024;
  }
  return -1;
}

[[noreturn]] void refuse(int64_t num_bytes) {
  throw OutOfMemory("no room for " + std::to_string(num_bytes) + " bytes; " + std::to_string(available_memory()) +
                    " are available");
}

}  // namespace

Buffer::Buffer(int64_t num_bytes) {
  if (num_bytes <= 0) return;
  if (kGuardsPages) {
    data_ = map_guarded(num_bytes);
    if (data_ == nullptr) refuse(num_bytes);
    size_ = num_bytes;
    return;
  }
  const int64_t spare = num_bytes >= kHugePage ? kHugePage : 0;
  void* pages = mmap(nullptr, num_bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) refuse(num_bytes);
  data_ = static_cast<std::byte*>(pages);
  size_ = num_bytes;
  if (spare == 0) return;
  // Weights are read from end to end for every token: with small pages the processor would look up a page every 64
  // lines. So begin at a large page, and give back what lies before and behind.
  const int64_t before = -reinterpret_cast<int64_t>(pages) & (kHugePage - 1);
  const int64_t in_pages = (num_bytes + kSmallPage - 1) / kSmallPage * kSmallPage;
  if (before) munmap(data_, before);
  data_ += before;
  if (spare > before + in_pages - num_bytes) munmap(data_ + in_pages, num_bytes + spare - before - in_pages);
  madvise(data_, num_bytes, MADV_HUGEPAGE);  // a refusal costs speed only
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (kGuardsPages) {
    unmap_guarded(data_, size_);
  } else {
    munmap(data_, size_);
  }
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
  *this = Buffer(kGuardsPages ? num_bytes : num_bytes + num_bytes / 4);
}

std::byte* Arena::take(int64_t num_bytes) {
  const int64_t rounded = (num_bytes + 63) / 64 * 64;
  if (rounded > kArenaChunk) {
    large_.emplace_back(rounded);
    num_bytes_ += rounded;
    return large_.back().data();
  }
  if (chunks_.empty() || used_ + rounded > kArenaChunk) {
    chunks_.emplace_back(kArenaChunk);
    used_ = 0;
  }
  used_ += rounded;
  num_bytes_ += rounded;
  return chunks_.back().data() + used_ - rounded;
}

int64_t available_memory() { return meminfo("MemAvailable"); }

int64_t total_memory() { return meminfo("MemTotal"); }

}  // namespace infinilm::cpu
