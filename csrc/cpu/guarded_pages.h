// Memory of builds that are checked by AddressSanitizer: it ends where a page begins that nobody may touch. Pages of the
// system have no red zones, and the kernels of most levels are not instrumented (CMakeLists.txt says why).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace infinilm::cpu {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kGuardsPages = true;
#else
constexpr bool kGuardsPages = false;
#endif

constexpr int64_t kGuardedPage = 4096, kGuardedLine = 64;

inline int64_t in_guarded_pages(int64_t num_bytes) {
  return (num_bytes + kGuardedPage - 1) / kGuardedPage * kGuardedPage;
}

// Zeroed bytes that begin at a multiple of 64; nullptr where there are none.
inline std::byte* map_guarded(int64_t num_bytes) {
  const int64_t size = in_guarded_pages(num_bytes);
  void* pages = mmap(nullptr, size + kGuardedPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  std::byte* end = static_cast<std::byte*>(pages) + size;
  mprotect(end, kGuardedPage, PROT_NONE);
  std::byte* data = end - (num_bytes + kGuardedLine - 1) / kGuardedLine * kGuardedLine;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(data + num_bytes, end - data - num_bytes);
#endif
  return data;
}

inline void unmap_guarded(std::byte* data, int64_t num_bytes) {
  const int64_t size = in_guarded_pages(num_bytes);
  std::byte* pages = data - reinterpret_cast<uintptr_t>(data) % kGuardedPage;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(pages, size);
#endif
  munmap(pages, size + kGuardedPage);
}

}  // namespace infinilm::cpu
