// Threads that live as long as a backend, and what they do together: regions, and in them phases of shared work.
//
// A step of a model is one region, run by all threads from its first layer to its last. A phase is over when its work
// is done, whoever did it: a thread that has lost its processor to another program is not waited for, unless it holds a
// piece of work, and finds when it comes back that there is nothing left to do. Waiting spins for a while, because the
// next phase is microseconds away, and then sleeps.
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

// Where threads wait for something that another thread makes true: in a loop for a while, then asleep.
class WaitingRoom {
 public:
  // Return once is_over(), which reads atomics sequentially consistently, is true.
  template <typename IsOver>
  void wait(const IsOver& is_over) {
    if (spin(is_over)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    // Sequentially consistent, as in wake(): one of the two sees what the other wrote.
    num_asleep_.fetch_add(1);
    changed_.wait(lock, is_over);
    num_asleep_.fetch_sub(1);
  }

  // Call after something that may be waited for was made true.
  void wake() {
    if (num_asleep_.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

 private:
  template <typename IsOver>
  static bool spin(const IsOver& is_over) {
    if (is_over()) return true;
    const int64_t until = clock_ns() + kSpinNs;
    do {
      for (int look = 0; look < kLooksPerClock; ++look) {
        if (is_over()) return true;
        pause();
      }
    } while (clock_ns() < until);
    return false;
  }

  static constexpr int64_t kSpinNs = 100'000;  // longer than most waits, shorter than a time slice
  static constexpr int kLooksPerClock = 32;
  static int64_t clock_ns();
  static void pause();

  alignas(64) std::atomic<int> num_asleep_{0};
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

  // Call body(thread) on the caller's thread, as thread 0, and on those others that come before it has returned; return
  // when all that came have. All must go through the same phases, of which there are at most `max_phases`, and do
  // nothing between them that others may see. The body must not throw. Regions of several callers run one after the
  // other. Throws std::runtime_error in a process that was forked from the one that made the pool: it has no threads.
  void run(int64_t max_phases, const std::function<void(int thread)>& body);

  // Inside of run(): call work(index) once for each index below count, shared out over the threads, and return when all
  // calls have returned; what they wrote is seen by all. `count` must be the same for all threads, and so must not be
  // read from what other phases write: a thread that is late finds there what later ones wrote. A thread takes what is
  // its own first, the same indices each time, then what others have not begun; several at once while many are left,
  // because taking waits for the reads of memory that are on their way.
  template <typename Work>
  void phase(int thread, int64_t count, const Work& work) {
    const int64_t index = cursors_[thread].value++;
    Counter* taken = counters_.get() + index * (num_threads_ + 1);
    std::atomic<int64_t>& num_done = taken[num_threads_].value;
    int64_t num_mine = 0;
    for (int ahead = 0; ahead < num_threads_; ++ahead) {
      const int owner = (thread + ahead) % num_threads_;
      const int64_t begin = count * owner / num_threads_, end = count * (owner + 1) / num_threads_;
      for (Range range; (range = take(taken[owner].value, end - begin)).size > 0; num_mine += range.size) {
        for (int64_t i = 0; i < range.size; ++i) work(begin + range.first + i);
      }
    }
    if (num_mine > 0 && num_done.fetch_add(num_mine) + num_mine == count) phases_.wake();
    phases_.wait([&] { return num_done.load() == count; });
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  struct alignas(64) Cursor {
    int64_t value = 0;
  };

  struct Range {
    int64_t first, size;
  };

  static Range take(std::atomic<int64_t>& taken, int64_t count) {
    int64_t first = taken.load(std::memory_order_relaxed);
    while (first < count) {
      const int64_t size = (count - first + 3) / 4;
      if (taken.compare_exchange_weak(first, first + size, std::memory_order_relaxed)) return {first, size};
    }
    return {first, 0};
  }

  void work(int thread);
  bool enter(uint64_t region);
  void leave();

  const int num_threads_;
  const int64_t process_;
  std::vector<std::thread> threads_;
  std::mutex running_;
  const std::function<void(int)>* body_ = nullptr;
  // By phase: how many indices of each thread's own are taken, and how many calls have returned.
  std::unique_ptr<Counter[]> counters_;
  int64_t max_phases_ = 0;
  std::unique_ptr<Cursor[]> cursors_;  // the phase each thread comes to next
  std::atomic<bool> is_closing_{false};
  // From the highest bit on: the number of the region, 32 bits; kOpen; how many threads beside the caller are inside.
  alignas(64) std::atomic<uint64_t> gate_{0};
  WaitingRoom regions_, phases_, exits_;
};

}  // namespace infinilm::cpu
