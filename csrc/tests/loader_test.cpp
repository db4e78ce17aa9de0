// The loader without Python, for the sanitizers: many threads, every way to fail, and the end with models alive.
//
//   loader_test good.so concurrent.so waits.so refused.so late.so
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "library.hpp"
#include "model.hpp"

using namespace infinilm::host;

namespace {

void require(bool is_so, const char *what) {
  if (is_so) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::_Exit(1);
}

template <class Body>
void in_threads(int count, Body body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread &thread : threads) thread.join();
}

infinilm_model_request request() {
  infinilm_model_request made{};
  made.struct_size = sizeof made;
  made.config = "{\"vocab_size\": 7}";
  made.dtype = "float32";
  made.device = "cpu";
  return made;
}

float step(Model &model, int32_t token) {
  const int32_t zero[] = {0, 0}, one[] = {1}, starts[] = {0, 1};
  infinilm_batch batch{};
  batch.struct_size = sizeof batch;
  batch.num_tokens = batch.num_sequences = batch.max_blocks = batch.num_rows = 1;
  batch.token_ids = &token;
  batch.positions = batch.block_tables = batch.slot_mapping = batch.slots = batch.logits_indices = zero;
  batch.query_starts = starts;
  batch.context_lengths = batch.prompt_lengths = one;
  std::vector<float> row(7);
  int64_t shape[] = {1, 7}, strides[] = {7, 1};
  DLTensor logits{row.data(), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, shape, strides, 0};
  model.forward(batch, logits);
  return row[0];
}

// What the host offers: memory of any alignment, and every index of a loop exactly once.
void try_host() {
  const HostTable made("test");
  const infinilm_host &host = made.table;
  for (const uint64_t alignment : {1, 8, 64, 4096, 1 << 21}) {
    void *memory = host.allocate(host.context, 100, alignment);
    require(memory != nullptr && reinterpret_cast<uintptr_t>(memory) % alignment == 0, "aligned memory");
    std::memset(memory, 1, 100);
    host.deallocate(host.context, memory);
  }
  require(host.allocate(host.context, 100, 3) == nullptr, "3 is no alignment");
  require(host.allocate(host.context, UINT64_MAX, 64) == nullptr, "there is not so much memory");
  host.deallocate(host.context, nullptr);
  for (const int64_t count : {0, 1, 2, 7, 1000}) {
    std::vector<std::atomic<int>> times(static_cast<std::size_t>(count));
    host.parallel_for(
        host.context, count,
        [](void *argument, int64_t begin, int64_t end) {
          auto &its = *static_cast<std::vector<std::atomic<int>> *>(argument);
          for (int64_t i = begin; i < end; ++i) ++its[static_cast<std::size_t>(i)];
        },
        &times);
    for (const auto &number : times) require(number == 1, "every index once");
  }
  require(host.is_aborted(host.context) == 0, "nothing is aborted");
  require(host.rank == 0 && host.world_size == 1 && host.all_reduce == nullptr, "a world of one");
}

// A whole life, with a buffer that outlives the model.
void live(const std::shared_ptr<Library> &library, int number) {
  const auto model = Model::create(library, request());
  require(model->parameters().size() == 2, "two parameters");
  Buffer kept;
  for (int round = 0; round < 3; ++round) {
    Buffer buffer = model->open(0);
    static_cast<float *>(buffer->dl_tensor.data)[0] = static_cast<float>(number);
    model->close(0);
    kept = std::move(buffer);
  }
  model->loading_done();
  require(model->cache_spec().block_size == 4, "blocks of four");
  model->create_cache(4, 1);
  model->create_cache(8, 1);
  for (int token = 0; token < 50; ++token) {
    require(step(*model, token) == static_cast<float>(number + token), "logits");
  }
  const int32_t pairs[] = {0, 1}, wrong[] = {0, 8}, slots[] = {0};
  model->copy_blocks(pairs, 1);
  model->release_slots(slots, 1);
  try {
    model->copy_blocks(wrong, 1);
    require(false, "a wrong block is an error");
  } catch (const Failure &failure) {
    require(failure.code() == INFINILM_INVALID, "its code");
  }
  model->destroy();
  model->destroy();
  require(static_cast<float *>(kept->dl_tensor.data)[0] == static_cast<float>(number), "a kept buffer");
}

void live_shortly(const std::shared_ptr<Library> &library) {
  const auto model = Model::create(library, request());
  model->create_cache(4, 1);
  const Buffer kept = model->open(0);
  model->close(0);
  model->loading_done();
  require(step(*model, 3) == 3, "logits of a short life");
}

void refuse(const std::string &path, const char *stage) {
  try {
    load_library(path);
    require(false, path.c_str());
  } catch (const Refused &refused) {
    require(refused.refusal().stage == stage, refused.what());
  }
}

void cancel_a_step(const std::shared_ptr<Library> &library) {
  const auto model = Model::create(library, request());
  model->create_cache(1, 1);
  std::atomic<bool> is_over{false};
  std::thread runner([&] {
    try {
      (void)step(*model, 1);
      require(false, "a cancelled step is an error");
    } catch (const Failure &failure) {
      require(failure.code() == INFINILM_CANCELLED, "its code");
    }
    is_over = true;
  });
  while (!is_over) model->cancel();
  runner.join();
}

std::atomic<int> num_logged{0};

// What is asked and said by some threads while others run models: of one library, whose calls are kept apart, and of one
// whose calls may overlap.
void ask_meanwhile(const std::shared_ptr<Library> &library, const std::string &missing) {
  const auto model = Model::create(library, request());
  model->create_cache(1, 1);
  const Buffer kept = model->open(0);
  model->close(0);
  in_threads(8, [&](int role) {
    for (int round = 0; round < 50; ++round) {
      switch (role) {
        case 0: require(step(*model, round) == static_cast<float>(round), "logits beside others"); break;
        case 1: live_shortly(library); break;
        case 2: require(library->query("models") >= 1 && library->memory().parameters >= 1, "what is there"); break;
        case 3: library->require_support(request()); break;
        case 4: require(load_library(library->path) == library && !loaded_libraries().empty(), "the same library"); break;
        case 5: refuse(missing, "find"); break;
        case 6: require(!refusals().empty() && model->parameters().size() == 2, "what is remembered"); break;
        default:
          set_log_sink([](const char *, int32_t, const char *) { ++num_logged; });
          library->host->table.log(library->host->table.context, INFINILM_LOG_INFO, "said by any thread");
      }
    }
  });
}

// A model that is cancelled by another thread, and destroyed by a third, whenever that is.
void destroy_meanwhile(const std::shared_ptr<Library> &library) {
  for (int round = 0; round < 20; ++round) {
    const auto model = Model::create(library, request());
    model->create_cache(1, 1);
    in_threads(3, [&](int role) {
      if (role == 0) {
        try {
          (void)step(*model, 1);
        } catch (const Failure &failure) {
          require(failure.code() == INFINILM_INVALID, "not loaded, or closed");
        }
      }
      for (int times = 0; role == 1 && times < 20; ++times) model->cancel();
      if (role == 2) model->destroy();
    });
  }
}

}  // namespace

int main(int, char **paths) {
  set_log_sink([](const char *, int32_t, const char *) {});
  const std::string good = paths[1], concurrent = paths[2], waits = paths[3], refused = paths[4], late = paths[5];
  try_host();
  in_threads(16, [&](int) { require(load_library(good)->query("creates") == 1, "created once"); });
  in_threads(8, [&](int i) { live(load_library(i % 2 == 0 ? good : concurrent), i); });
  in_threads(8, [&](int i) { refuse(i % 2 == 0 ? refused : "/no/such/file.so", i % 2 == 0 ? "create" : "find"); });
  require(load_library(good)->query("deleters") == 12, "every buffer is deleted once");
  require(load_library(good)->query("models") == 0 && load_library(good)->query("caches") == 0, "nothing is left");
  for (const std::string &path : {good, concurrent}) {
    ask_meanwhile(load_library(path), "/no/such/file.so");
    destroy_meanwhile(load_library(path));
    require(load_library(path)->query("models") == 0 && load_library(path)->query("caches") == 0, "nothing is left");
  }
  require(num_logged == 100, "every word is heard");
  cancel_a_step(load_library(waits));
  require(loaded_libraries().size() == 3 && refusals().size() == 2, "what is remembered");

  // The end, while one model runs and another is idle.
  const auto idle = Model::create(load_library(good), request());
  const auto running = Model::create(load_library(waits), request());
  running->create_cache(1, 1);
  std::thread runner([&] {
    try {
      (void)step(*running, 1);
    } catch (const Failure &) {
      // cancelled, or closed before it began
    }
  });
  shut_down(2000);
  runner.join();
  require(is_aborted(), "libraries are told");
  require(load_library(good)->backend == nullptr && load_library(waits)->backend == nullptr, "all are destroyed");
  try {
    (void)Model::create(load_library(good), request());
    require(false, "nothing is made after the end");
  } catch (const Failure &failure) {
    require(failure.code() == INFINILM_UNAVAILABLE, "its code");
  }
  refuse(late, "open");
  std::puts("ok");
  return 0;
}
