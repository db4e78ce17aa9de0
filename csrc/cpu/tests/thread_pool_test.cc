// The pool: phases, work that is taken over, sleeping and waking, callers that take turns. Also run under TSan.
#include "thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "available_cpus.h"
#include "check.h"

using infinilm::cpu::ThreadPool;

namespace {

void test_the_caller_runs_and_others_at_most_once(int num_threads) {
  ThreadPool pool(num_threads);
  for (int round = 0; round < 5000; ++round) {
    std::vector<int> calls(num_threads, 0);
    pool.run(0, [&](int thread) { ++calls[thread]; });
    CHECK(calls[0] == 1, std::to_string(num_threads));
    for (int count : calls) CHECK(count <= 1, std::to_string(num_threads));
  }
}

// What is written in a phase, without any atomics, is read by all in the next.
void test_phases_order_memory(int num_threads) {
  ThreadPool pool(num_threads);
  std::vector<int64_t> cells(8, 0);
  std::atomic<int> num_wrong{0};
  pool.run(600, [&](int thread) {
    for (int64_t round = 1; round <= 300; ++round) {
      pool.phase(thread, 8, [&](int64_t cell) { cells[cell] = round; });
      pool.phase(thread, 5, [&](int64_t) {
        for (int64_t cell : cells) num_wrong += cell != round;
      });
    }
  });
  CHECK(num_wrong == 0, std::to_string(num_wrong));
}

void test_a_phase_takes_each_index_once(int num_threads) {
  ThreadPool pool(num_threads);
  for (int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
    std::vector<int> taken(count, 0), again(count, 0);
    pool.run(2, [&](int thread) {
      pool.phase(thread, count, [&](int64_t index) { ++taken[index]; });
      pool.phase(thread, count, [&](int64_t index) { again[index] += taken[index]; });
    });
    for (int64_t i = 0; i < count; ++i) CHECK(taken[i] == 1 && again[i] == 1, std::to_string(i));
  }
}

// Everybody takes part where there is something to do for long enough.
void test_all_threads_help() {
  ThreadPool pool(3);
  std::atomic<int> num_inside{0};
  pool.run(1, [&](int thread) {
    pool.phase(thread, 3, [&](int64_t) {
      ++num_inside;
      while (num_inside < 3) std::this_thread::yield();
    });
  });
  CHECK(num_inside == 3, std::to_string(num_inside));
}

// A thread that is held up inside of one piece of work does not hold up the rest of what was to be its own.
void test_work_is_taken_over() {
  ThreadPool pool(2);
  std::atomic<int> num_others{0};
  pool.run(1, [&](int thread) {
    pool.phase(thread, 8, [&](int64_t index) {
      while (index == 4 && num_others < 7) std::this_thread::yield();
      if (index != 4) ++num_others;
    });
  });
  CHECK(num_others == 7, std::to_string(num_others));
}

void test_sleeping_threads_wake() {
  ThreadPool pool(3);
  std::atomic<int> calls{0};
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // longer than threads spin
    pool.run(2, [&](int thread) {
      pool.phase(thread, 1, [&](int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); });
      pool.phase(thread, 3, [&](int64_t) { ++calls; });
    });
  }
  CHECK(calls == 15, std::to_string(calls));
}

void test_callers_take_turns() {
  ThreadPool pool(2);
  int inside = 0, most = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        pool.run(1, [&](int thread) {
          pool.phase(thread, 1, [&](int64_t) {
            most = std::max(most, ++inside);
            --inside;
          });
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(most == 1, std::to_string(most));
}

void test_a_fork_is_told() {
  ThreadPool pool(2);
  const pid_t child = fork();
  if (child == 0) {
    try {
      pool.run(0, [](int) {});
    } catch (const std::runtime_error&) {
      _exit(0);
    }
    _exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, std::to_string(status));
}

void test_quotas() {
  using infinilm::cpu::quota_cpus;
  CHECK(quota_cpus("max", "100000") == 0, "no limit");
  CHECK(quota_cpus("-1", "100000") == 0, "no limit, version 1");
  CHECK(quota_cpus("", "") == 0, "no file");
  CHECK(quota_cpus("150000", "100000") == 2, "one and a half");
  CHECK(quota_cpus("50000", "100000") == 1, "a half");
  CHECK(quota_cpus("400000", "100000") == 4, "four");
}

}  // namespace

int main() {
  for (int num_threads : {1, 2, 3, 5}) {
    test_the_caller_runs_and_others_at_most_once(num_threads);
    test_phases_order_memory(num_threads);
    test_a_phase_takes_each_index_once(num_threads);
  }
  test_all_threads_help();
  test_work_is_taken_over();
  test_sleeping_threads_wake();
  test_callers_take_turns();
  test_a_fork_is_told();
  test_quotas();
  return finish();
}
