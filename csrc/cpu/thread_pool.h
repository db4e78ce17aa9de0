// Threads that live as long as a backend, and what they do together: regions, barriers, shared loops.
//
// A step of a model is one region, run by all threads from its first layer to its last. Waiting spins for a while,
// because the next barrier is microseconds away, and then sleeps, because the thread waited for may have lost its
// processor to somebody else.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace infinilm::cpu {

// A counter that threads wait on: for a while in a loop, then asleep.
class SpinThenPark {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void wait_while(uint32_t old);
  void advance();

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  std::atomic<int> num_parked_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

class ThreadPool {
 public:
  // Starts num_threads - 1 threads: the one that calls run() is the other.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Call body(thread) on every thread, the caller's being thread 0, and return when all have returned. The body must
  // not throw: others would wait at the next barrier for ever. Regions of several callers run one after the other.
  // Throws std::runtime_error in a process that was forked from the one that made the pool: it has no threads.
  void run(const std::function<void(int thread)>& body);

  // Inside of run(): returns when every thread has called it. What was written before is seen after.
  void barrier();

  // Inside of run(): call body(index) once for each index below count, shared out over the threads. A thread takes
  // what is its own first, the same indices each time, then what others have not begun. One loop between two barriers.
  template <typename Body>
  void share(int thread, int64_t count, const Body& body) {
    for (int ahead = 0; ahead < num_threads_; ++ahead) {
      const int owner = (thread + ahead) % num_threads_;
      const int64_t begin = count * owner / num_threads_, end = count * (owner + 1) / num_threads_;
      std::atomic<int64_t>& taken = taken_[owner].count;
      if (taken.load(std::memory_order_relaxed) >= end - begin) continue;
      for (;;) {
        const int64_t index = begin + taken.fetch_add(1, std::memory_order_relaxed);
        if (index >= end) break;
        body(index);
      }
    }
  }

  // Inside of run(): the part of `count` that is this thread's own: [begin, end).
  struct Range {
    int64_t begin, end;
  };
  Range own_range(int thread, int64_t count) const {
    return {count * thread / num_threads_, count * (thread + 1) / num_threads_};
  }

 private:
  struct alignas(64) Taken {
    std::atomic<int64_t> count{0};
  };

  void work(int thread);
  void reset_taken();

  const int num_threads_;
  const int64_t process_;
  std::unique_ptr<Taken[]> taken_;
  std::vector<std::thread> threads_;
  std::mutex running_;
  const std::function<void(int)>* body_ = nullptr;
  std::atomic<bool> is_closing_{false};
  SpinThenPark regions_;   // how many have begun
  SpinThenPark barriers_;  // how many have been passed
  alignas(64) std::atomic<int> num_arrived_{0};
};

}  // namespace infinilm::cpu
