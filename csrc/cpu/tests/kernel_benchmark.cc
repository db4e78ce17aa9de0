// How fast one thread's kernels are, by its own processor time: the best of several rounds, because a machine that is
// shared is never faster than it is. Arguments: a level of Isa, and how many MiB of weights.
//
// `kernel_benchmark read THREADS MIB` prints instead how many GB/s so many threads read from memory, each its own part,
// by the clock: the median of several rounds.
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "packed_matrix.h"
#include "row_buffer.h"

using namespace infinilm::cpu;

namespace {

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double best_seconds(int rounds, const std::function<void()>& body) {
  double best = 1e30;
  for (int round = 0; round < rounds; ++round) {
    const double start = thread_seconds();
    body();
    best = std::min(best, thread_seconds() - start);
  }
  return best;
}

#pragma GCC push_options
#pragma GCC target("avx2")
int64_t read_all(const std::byte* data, int64_t num_bytes) {
  typedef int64_t Four __attribute__((vector_size(32)));
  Four sums[8] = {};
  const Four* words = reinterpret_cast<const Four*>(data);
  for (int64_t i = 0; i + 8 <= num_bytes / 32; i += 8) {
    for (int line : {0, 64, 128, 192}) __builtin_prefetch(reinterpret_cast<const char*>(words + i) + 2048 + line);
    for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
  }
  int64_t total = 0;
  for (const Four& sum : sums) total += sum[0] + sum[1] + sum[2] + sum[3];
  return total;
}
#pragma GCC pop_options

int read_bandwidth(int num_threads, int64_t num_bytes) {
  Buffer memory(num_bytes);
  std::memset(memory.data(), 1, num_bytes);
  std::vector<double> seconds;
  for (int round = 0; round < 15; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    std::vector<int64_t> sums(num_threads);
    for (int thread = 0; thread < num_threads; ++thread) {
      threads.emplace_back([&, thread] {
        const int64_t part = num_bytes / num_threads / 256 * 256;
        sums[thread] = read_all(memory.data() + thread * part, part);
      });
    }
    for (std::thread& thread : threads) thread.join();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(seconds.begin(), seconds.end());
  std::printf("%.2f\n", num_bytes / seconds[seconds.size() / 2] / 1e9);
  return 0;
}

struct Shape {
  const char* name;
  Packing packing;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc > 3 && std::string(argv[1]) == "read") return read_bandwidth(std::atoi(argv[2]), std::atol(argv[3]) << 20);
  if (argc > 1) setenv("INFINILM_CPU_ISA", argv[1], 1);
  const int64_t num_bytes = (argc > 2 ? std::atol(argv[2]) : 512) << 20;
  const Kernels& kernels = kernels_for(chosen_isa());
  Buffer memory(num_bytes);
  std::memset(memory.data(), 1, num_bytes);
  int64_t sum = 0;
  const double reading = best_seconds(7, [&] { sum += read_all(memory.data(), num_bytes); });
  std::printf("%s, read %.1f GB/s (%ld)\n", isa_name(kernels.isa), num_bytes / reading / 1e9, static_cast<long>(sum % 2));
  const Shape shapes[] = {{"f32", {WeightFormat::kF32, 0}},
                          {"bf16", {WeightFormat::kBf16, 0}},
                          {"int8", {WeightFormat::kI8, 32}},
                          {"int4", {WeightFormat::kI4, 32}},
                          {"int4-g128", {WeightFormat::kI4, 128}},
                          {"stored-g32", {WeightFormat::kI4Zero, 32}},
                          {"stored-g128", {WeightFormat::kI4Zero, 128}}};
  for (const Shape& shape : shapes) {
    for (int64_t depth : {896, 2048, 4864}) {
      const int64_t bytes = block_bytes(shape.packing.format, depth, shape.packing.group);
      const int64_t num_blocks = num_bytes / bytes;
      const Panel panel{memory.data(), bytes, depth, shape.packing.group};
      std::vector<float> x(depth, 0.5f), out(48 * 16 * 16);
      const RowFormat format = kernels.row_format(shape.packing.format);
      RowBuffer buffer;
      buffer.reserve(48, depth);
      std::printf("%-11s depth %5ld:", shape.name, static_cast<long>(depth));
      for (int64_t num_rows : {1, 2, 4, 8, 16, 48}) {
        const Rows rows = buffer.rows(format, num_rows, depth);
        for (int64_t row = 0; row < num_rows; ++row) put_row(kernels, format, rows, row, x.data(), depth, depth);
        // Few rows: all of memory, in GB/s. Many: what fits into the second cache, in GFLOP/s.
        const int64_t unit = std::max<int64_t>(std::min<int64_t>((num_rows > 12 ? 512 << 10 : 64 << 10) / bytes, 16), 1);
        const int64_t total = num_rows > 16 ? unit * 20 : num_blocks / unit * unit;
        const double seconds = best_seconds(num_rows > 16 ? 20 : 4, [&] {
          for (int64_t block = 0; block + unit <= total; block += unit) {
            const int64_t at = num_rows > 16 ? 0 : block;
            kernels.gemm(shape.packing.format, format)(rows, num_rows,
                                               {panel.data + at * bytes, bytes, depth, shape.packing.group}, unit,
                                               out.data(), unit * kBlock);
          }
        });
        const double flops = 2.0 * num_rows * total * kBlock * depth;
        std::printf("  %ld rows %.1f GB/s %.0f GFLOP/s", static_cast<long>(num_rows), total * bytes / seconds / 1e9,
                    flops / seconds / 1e9);
      }
      std::printf("\n");
    }
  }
}
