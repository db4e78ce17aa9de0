// Buffers and arenas: what is zeroed, what lies together, when memory is taken, and what is left when there is none.
#include "guarded_pages.h"
#include "memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "errors.h"
#include "packed_matrix.h"
#include "staging.h"

using namespace infinilm::cpu;

namespace {

constexpr int64_t kMiB = 1 << 20;

int64_t address_space() {
  long pages = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  CHECK(file != nullptr && std::fscanf(file, "%ld", &pages) == 1, "statm");
  if (file != nullptr) std::fclose(file);
  return pages * sysconf(_SC_PAGESIZE);
}

// Runs body() with at most `spare` bytes of address space beyond those there are.
template <typename Body>
void with_address_space(int64_t spare, const Body& body) {
  rlimit before;
  getrlimit(RLIMIT_AS, &before);
  rlimit limited = before;
  limited.rlim_cur = address_space() + spare;
  setrlimit(RLIMIT_AS, &limited);
  body();
  setrlimit(RLIMIT_AS, &before);
}

bool is_zero(const std::byte* data, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (data[i] != std::byte{0}) return false;
  }
  return true;
}

// Where pages are guarded every piece has pages of its own.
void test_pieces_lie_together() {
  Arena arena;
  CHECK(arena.num_bytes() == 0, "nothing was taken");
  std::byte* before = arena.take(100);
  CHECK(kGuardsPages || reinterpret_cast<uintptr_t>(before) % (2 * kMiB) == 0, "a chunk begins at a large page");
  for (int64_t size : {64, 1, 65, 3 << 20, 128}) {
    std::byte* next = arena.take(size);
    CHECK(reinterpret_cast<uintptr_t>(next) % 64 == 0, std::to_string(size));
    CHECK(kGuardsPages || (next - before < 4 * kMiB && next > before), std::to_string(size) + " lies behind the one before");
    CHECK(is_zero(next, size), std::to_string(size));
    std::memset(next, 1, size);
    before = next;
  }
  CHECK(arena.num_bytes() == 128 + 64 + 64 + 128 + (3 << 20) + 128, std::to_string(arena.num_bytes()));
}

void test_a_large_piece_leaves_the_chunk_to_small_ones() {
  Arena arena;
  std::byte* first = arena.take(64);
  std::byte* large = arena.take(200 * kMiB);
  std::byte* second = arena.take(64);
  CHECK(kGuardsPages || second == first + 64, "the chunk goes on");
  CHECK(large + 200 * kMiB <= first || large > second, "a piece of its own");
  CHECK(arena.num_bytes() == 200 * kMiB + 128, std::to_string(arena.num_bytes()));
}

void test_no_room() {
  Arena arena;
  std::byte* first = arena.take(64);
  for (int64_t size : {63 * kMiB + 64, 300 * kMiB}) {
    arena.take(2 * kMiB);
    const int64_t held = arena.num_bytes();
    bool is_refused = false;
    with_address_space(kMiB, [&] {
      try {
        arena.take(size);
      } catch (const OutOfMemory&) {
        is_refused = true;
      }
    });
    CHECK(is_refused, std::to_string(size));
    CHECK(arena.num_bytes() == held, std::to_string(size));
  }
  const std::byte* last = arena.take(64);
  CHECK(kGuardsPages || last == first + 64 + 4 * kMiB, "the chunk there was is still used");
}

void test_a_matrix_takes_memory_when_it_is_told() {
  const Kernels& kernels = kernels_for(Isa::kScalar);
  Arena arena;
  const int64_t before = address_space();
  std::vector<PackedMatrix> matrices;
  for (int i = 0; i < 20; ++i) matrices.emplace_back(kernels, Packing{WeightFormat::kBf16, 0}, 4096, 4096, arena);
  CHECK(address_space() - before < kMiB, "made without memory");
  matrices[7].take_memory();
  const std::byte* memory = matrices[7].panel(0).data;
  matrices[7].take_memory();
  CHECK(matrices[7].panel(0).data == memory, "memory is taken once");
  CHECK(arena.num_bytes() == 4096 * 4096 * 16 * 2, std::to_string(arena.num_bytes()));
}

void test_staging() {
  const auto held = std::make_shared<std::atomic<int64_t>>(0);
  auto staging = std::make_shared<Staging>(held);
  std::shared_ptr<Buffer> first = staging->take(4 * kMiB), second = staging->take(8 * kMiB);
  CHECK(*held == 12 * kMiB, std::to_string(*held));
  const std::byte* memory = first->data();
  first.reset();
  second.reset();
  CHECK(*held == 12 * kMiB, "both wait");
  first = staging->take(3 * kMiB);
  CHECK(first->data() == memory, "the smaller one is enough");
  second = staging->take(kMiB);
  CHECK(*held == 13 * kMiB, "the other is too large for that");
  staging->end();
  CHECK(*held == 5 * kMiB, "what waited is freed");
  second.reset();
  CHECK(*held == 4 * kMiB, "what comes back later too");
  staging.reset();
  first.reset();
  CHECK(*held == 0, "a buffer may outlive all");
  staging = std::make_shared<Staging>(held);
  for (int i = 0; i < 40; ++i) staging->take(i * kMiB);
  staging->take(200 * kMiB).reset();
  CHECK(*held <= 128 * kMiB, "so much waits at most");
  staging->end();
  CHECK(*held == 0, std::to_string(*held));
}

}  // namespace

int main() {
  test_staging();
  test_pieces_lie_together();
  test_a_large_piece_leaves_the_chunk_to_small_ones();
  test_no_room();
  test_a_matrix_takes_memory_when_it_is_told();
  return finish();
}
