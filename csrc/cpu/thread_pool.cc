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

// Longer than any wait for a thread that runs, shorter than a time slice.
constexpr auto kSpinFor = std::chrono::microseconds(100);
constexpr int kSpinsPerLook = 64;  // at the clock

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void SpinThenPark::wait_while(uint32_t old) {
  const auto until = std::chrono::steady_clock::now() + kSpinFor;
  do {
    for (int spin = 0; spin < kSpinsPerLook; ++spin) {
      if (value_.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  std::unique_lock<std::mutex> lock(mutex_);
  // Sequentially consistent, as in advance(): one of the two sees what the other wrote.
  num_parked_.fetch_add(1);
  changed_.wait(lock, [&] { return value_.load() != old; });
  num_parked_.fetch_sub(1);
}

void SpinThenPark::advance() {
  value_.fetch_add(1);
  if (num_parked_.load() == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  changed_.notify_all();
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), process_(getpid()), taken_(new Taken[num_threads]) {
  try {
    for (int thread = 1; thread < num_threads; ++thread) threads_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // the system has no more threads: those there are must end before they can be destroyed
    is_closing_ = true;
    regions_.advance();
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
  regions_.advance();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const std::function<void(int)>& body) {
  if (getpid() != process_) {
    throw std::runtime_error("this process was forked after the cpu backend was made, and has none of its " +
                             std::to_string(num_threads_) + " threads; start processes before models, or spawn them");
  }
  std::lock_guard<std::mutex> lock(running_);
  reset_taken();
  body_ = &body;
  regions_.advance();
  body(0);
  barrier();
}

void ThreadPool::work(int thread) {
  for (uint32_t region = 0;; ++region) {
    regions_.wait_while(region);
    if (is_closing_) return;
    (*body_)(thread);
    barrier();
  }
}

void ThreadPool::barrier() {
  const uint32_t passed = barriers_.value();
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads_) {
    barriers_.wait_while(passed);
    return;
  }
  num_arrived_.store(0, std::memory_order_relaxed);
  reset_taken();
  barriers_.advance();
}

void ThreadPool::reset_taken() {
  for (int thread = 0; thread < num_threads_; ++thread) taken_[thread].count.store(0, std::memory_order_relaxed);
}

}  // namespace infinilm::cpu
