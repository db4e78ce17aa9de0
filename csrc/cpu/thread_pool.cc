#include "thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infinilm::cpu {

namespace {

constexpr uint64_t kOpen = 1u << 31;  // threads may still come in

uint64_t region_of(uint64_t gate) { return gate >> 32; }

uint64_t num_inside(uint64_t gate) { return gate & (kOpen - 1); }

}  // namespace

int64_t WaitingRoom::clock_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void WaitingRoom::pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), process_(getpid()), cursors_(new Cursor[num_threads]) {
  try {
    for (int thread = 1; thread < num_threads; ++thread) threads_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // the system has no more threads: those there are must end before they can be destroyed
    is_closing_ = true;
    regions_.wake();
    for (std::thread& thread : threads_) thread.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != process_) {
    for (std::thread& thread : threads_) thread.detach();  // they are the parent's
    return;
  }
  is_closing_ = true;
  regions_.wake();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int64_t max_phases, const std::function<void(int)>& body) {
  if (getpid() != process_) {
    throw std::runtime_error("this process was forked after the cpu backend was made, and has none of its " +
                             std::to_string(num_threads_) + " threads; start processes before models, or spawn them");
  }
  std::lock_guard<std::mutex> lock(running_);
  const int64_t num_counters = max_phases * (num_threads_ + 1);
  if (max_phases > max_phases_) {
    counters_.reset(new Counter[num_counters]);
    max_phases_ = max_phases;
  } else {
    for (int64_t i = 0; i < num_counters; ++i) counters_[i].value.store(0, std::memory_order_relaxed);
  }
  body_ = &body;
  gate_.store((region_of(gate_.load()) + 1) << 32 | kOpen);
  regions_.wake();
  cursors_[0].value = 0;
  body(0);
  gate_.fetch_sub(kOpen);
  exits_.wait([&] { return num_inside(gate_.load()) == 0; });
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    regions_.wait([&] { return region_of(gate_.load()) != seen || is_closing_.load(); });
    if (is_closing_) return;
    seen = region_of(gate_.load());
    if (!enter(seen)) continue;
    cursors_[thread].value = 0;
    (*body_)(thread);
    leave();
  }
}

// A thread that wakes too late finds the gate closed, and what the body pointed to is not touched any more. Or it finds
// that of the next region, which it must not enter as if it were this one: it would come again.
bool ThreadPool::enter(uint64_t region) {
  uint64_t gate = gate_.load();
  while (gate & kOpen && region_of(gate) == region) {
    if (gate_.compare_exchange_weak(gate, gate + 1)) return true;
  }
  return false;
}

void ThreadPool::leave() {
  if ((gate_.fetch_sub(1) & (2 * kOpen - 1)) == 1) exits_.wake();  // closed, and the last
}

}  // namespace infinilm::cpu
