#include "host.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "text.hpp"

namespace infinilm::host {
namespace {

constexpr std::size_t kLogLimit = 8192;
std::atomic<LogSink> log_sink{nullptr};
std::atomic<bool> aborted{false};

void write_log(void *context, int32_t level, const char *message) {
  const auto *host = static_cast<const HostTable *>(context);
  const std::string text = clean_text(message, kLogLimit);
  const LogSink sink = log_sink.load();
  if (sink != nullptr) {
    sink(host->library.c_str(), level, text.c_str());
  } else {
    std::fprintf(stderr, "%s: %s\n", host->library.c_str(), text.c_str());
  }
}

void *allocate(void *, uint64_t num_bytes, uint64_t alignment) {
  if (alignment == 0 || (alignment & (alignment - 1)) != 0 || num_bytes > SIZE_MAX / 2) return nullptr;
  void *pointer = nullptr;
  const std::size_t aligned = std::max<std::size_t>(alignment, sizeof(void *));
  return posix_memalign(&pointer, aligned, std::max<std::size_t>(num_bytes, 1)) == 0 ? pointer : nullptr;
}

void deallocate(void *, void *pointer) { std::free(pointer); }

int64_t num_processors() {
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(CPU_COUNT(&allowed), 1);
#endif
  return std::max<int64_t>(std::thread::hardware_concurrency(), 1);
}

void parallel_for(void *, int64_t count, void (*body)(void *, int64_t, int64_t), void *argument) {
  if (count <= 0) return;
  const int64_t num_ranges = std::min(count, num_processors());
  const auto bound = [&](int64_t range) { return count / num_ranges * range + std::min(range, count % num_ranges); };
  std::vector<std::thread> threads;
  int64_t mine = 1;
  try {
    threads.reserve(static_cast<std::size_t>(num_ranges));
    for (; mine < num_ranges; ++mine) threads.emplace_back(body, argument, bound(mine), bound(mine + 1));
  } catch (const std::exception &) {
    // no thread, or no memory for one: what is left is done here
  }
  body(argument, 0, bound(1));
  if (mine < num_ranges) body(argument, bound(mine), count);
  for (std::thread &thread : threads) thread.join();
}

int32_t report_aborted(void *) { return aborted.load(std::memory_order_relaxed) ? 1 : 0; }

}  // namespace

void set_log_sink(LogSink sink) { log_sink.store(sink); }
void set_aborted() { aborted.store(true); }
bool is_aborted() { return aborted.load(); }

HostTable::HostTable(std::string name) : library(std::move(name)) {
  std::memset(&table, 0, sizeof table);
  table.struct_size = sizeof table;
  table.abi_major = INFINILM_ABI_MAJOR;
  table.abi_minor = INFINILM_ABI_MINOR;
  table.name = "infinilm";
  table.version = INFINILM_VERSION;
  table.context = this;
  table.log = write_log;
  table.allocate = allocate;
  table.deallocate = deallocate;
  table.parallel_for = parallel_for;
  table.is_aborted = report_aborted;
  table.world_size = 1;
}

}  // namespace infinilm::host
