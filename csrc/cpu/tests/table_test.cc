// The table where it is about lives and mistakes: orders of making and destroying, several threads, steps that are
// cancelled, and everything that a host may get wrong. Also for the sanitizers.
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <thread>

#include "check.h"
#include "decoders.h"
#include "isa.h"

using namespace decoders;
using infinilm::Error;

namespace {

const std::string kPlain = config_of({});

std::unique_ptr<Model> loaded(const Backend& backend, const std::string& config, const char* dtype = "float32",
                              const char* quantization = nullptr) {
  auto model = std::make_unique<Model>(backend, config, dtype, quantization);
  load(*model);
  model->create_cache(16);
  return model;
}

std::string with_experts() {
  Parts parts;
  parts.mlp = "\"kind\": \"moe\", \"num_experts\": 5, \"experts_per_token\": 2, \"intermediate_size\": 19";
  return config_of(parts);
}

// ---------------------------------------------------------------- steps

// Whoever takes which piece of work, and whatever was in the cache: the same steps have the same bits.
void test_steps_are_repeated_to_the_bit() {
  for (const char* quantization : {static_cast<const char*>(nullptr), "int8"}) {
    const Backend backend(4);
    const auto model = loaded(backend, with_experts(), "float32", quantization);
    const auto first = run_ragged(*model);
    for (int round = 0; round < 3; ++round) CHECK(run_ragged(*model) == first, "again");
    CHECK(run_ragged(*loaded(backend, with_experts(), "float32", quantization)) == first, "another model of the same kind");
  }
}

Logits continued(Model& model, Sequence sequence, int64_t count) {
  Batch batch(8);
  batch.add(sequence, count);
  return model.forward(batch, kVocabSize);
}

void test_blocks_are_copied() {
  const Backend backend(2);
  const auto model = loaded(backend, kPlain, "bfloat16");
  Sequence one = random_sequence(48, 1, 0), two = random_sequence(48, 2, 3);
  for (Sequence* its : {&one, &two}) {
    Batch batch(8);
    batch.add(*its, 40);
    model->forward(batch, kVocabSize);
  }
  const Logits after_one = continued(*model, one, 8), after_two = continued(*model, two, 8);
  model->copy_blocks({0, 8, 1, 9, 2, 10});
  Sequence copy = one;
  copy.blocks = {10, 9, 8};
  CHECK(continued(*model, copy, 8) == after_one, "a copy goes on as what it was copied from");
  model->copy_blocks({0, 3, 3, 0, 1, 4, 4, 1, 2, 5, 5, 2});
  std::swap(one.blocks, two.blocks);
  CHECK(continued(*model, one, 8) == after_one, "exchanged blocks");
  CHECK(continued(*model, two, 8) == after_two, "exchanged blocks");
  model->copy_blocks({});
}

void test_no_logits_are_wanted() {
  const Backend backend(2);
  const auto model = loaded(backend, kPlain);
  Sequence one = random_sequence(20, 1, 0);
  Batch batch(8);
  batch.add(one, 20);
  batch.logits_indices.clear();
  CHECK(model->forward(batch, kVocabSize).empty(), "no rows");
}

// ---------------------------------------------------------------- threads

int32_t code_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.code();
  }
  return INFINILM_OK;
}

void test_a_step_is_cancelled_from_another_thread() {
  const Backend backend(3);
  Parts deep;
  deep.num_layers = 40;
  const auto model = loaded(backend, config_of(deep));
  std::atomic<bool> is_over{false};
  std::thread canceller([&] {
    while (!is_over) model->cancel();
  });
  Sequence one = random_sequence(75, 1, 0);
  Batch batch(8);
  batch.add(one, 75);
  // A step may be over before the other thread's turn comes.
  int32_t code = INFINILM_OK;
  for (int i = 0; i < 1000 && code == INFINILM_OK; ++i) code = code_of([&] { model->forward(batch, kVocabSize); });
  CHECK(code == INFINILM_CANCELLED, "a step");
  is_over = true;
  canceller.join();
  for (const auto& row : model->forward(batch, kVocabSize)) CHECK(std::isfinite(row[0]), "the next step runs");
}

std::atomic<int> num_asked{0}, num_logged{0};

void test_the_host_aborts() {
  infinilm_host host = lonely_host();
  host.is_aborted = [](void*) -> int32_t { return ++num_asked > 1; };
  host.log = [](void*, int32_t, const char*) { ++num_logged; };
  const Backend backend("{\"num_threads\": 3}", host);
  CHECK(num_logged == 1, "it says what it is");
  const auto model = loaded(backend, kPlain);
  CHECK(code_of([&] { run_ragged(*model); }) == INFINILM_CANCELLED, "aborted at the second layer");
  CHECK(num_asked == 2, std::to_string(num_asked));
}

// Each backend has threads of its own; `memory`, `query` and deleters may be called meanwhile.
void test_two_backends_at_once() {
  const Backend backends[] = {Backend(2), Backend(3)};
  const auto one = loaded(backends[0], kPlain), two = loaded(backends[1], with_experts(), "bfloat16", "int8");
  Buffer kept = one->open(0);
  const auto wanted_one = run_ragged(*one), wanted_two = run_ragged(*two);
  std::atomic<bool> is_over{false};
  std::thread asking([&] {
    while (!is_over) {
      int64_t value = -1;
      auto error = infinilm::make_struct<infinilm_error>();
      CHECK(table().query(backends[0].get(), INFINILM_QUERY_CONCURRENT, &value, &error) == INFINILM_OK && value == 0,
            "query");
      CHECK(backends[0].memory().parameters > 0 && backends[1].memory().caches > 0, "memory");
      kept.reset();
    }
  });
  std::thread other([&] {
    for (int round = 0; round < 3; ++round) CHECK(run_ragged(*two) == wanted_two, "in another thread");
  });
  for (int round = 0; round < 3; ++round) CHECK(run_ragged(*one) == wanted_one, "beside another");
  other.join();
  is_over = true;
  asking.join();
}

// ---------------------------------------------------------------- lives

void check_empty(const Backend& backend, const char* when) {
  const infinilm_memory memory = backend.memory();
  CHECK(memory.parameters == 0 && memory.buffers == 0 && memory.caches == 0 && memory.scratch == 0, when);
}

void test_models_are_destroyed_at_any_time_in_any_order() {
  const Backend backend(2);
  { const Model never_loaded(backend, kPlain); }
  {
    Model half_loaded(backend, kPlain);
    half_loaded.create_cache(2);
    half_loaded.fill(0, random_weights(0, half_loaded.parameters()[0]));
    half_loaded.create_cache(3);
  }
  check_empty(backend, "after models that were never loaded");
  for (bool is_first_first : {true, false}) {
    auto one = loaded(backend, kPlain), two = loaded(backend, with_experts());
    const auto wanted_one = run_ragged(*one), wanted_two = run_ragged(*two);
    if (is_first_first) {
      one.reset();
      CHECK(run_ragged(*two) == wanted_two, "the other is still there");
    } else {
      two.reset();
      CHECK(run_ragged(*one) == wanted_one, "the other is still there");
    }
  }
  check_empty(backend, "after two models");
}

void test_buffers_outlive_everything() {
  std::vector<Buffer> kept;
  {
    const Backend backend(2);
    {
      Model model(backend, with_experts());
      for (int64_t index : {0, 3, 4}) kept.push_back(model.open(index));
    }
    CHECK(backend.memory().buffers > 0, "they are counted");
    kept.pop_back();
  }
  for (const Buffer& buffer : kept) static_cast<float*>(buffer->dl_tensor.data)[0] = 1;
  std::thread([&] { kept.clear(); }).join();
}

void test_parameters_are_updated_while_a_model_serves() {
  const Backend backend(2);
  const auto model = loaded(backend, kPlain);
  const auto before = run_ragged(*model);
  const std::vector<Given> parameters = model->parameters();
  const int64_t last = static_cast<int64_t>(parameters.size()) - 1;
  { const Buffer given_up = model->open(last); }
  CHECK(run_ragged(*model) == before, "a buffer that is given up changes nothing");
  model->fill(last, random_weights(77, parameters[last]));
  CHECK(run_ragged(*model) != before, "new weights");
  model->fill(last, random_weights(last, parameters[last]));
  model->loading_done();
  CHECK(run_ragged(*model) == before, "the first weights again");
}

// ---------------------------------------------------------------- mistakes of the host

void check_error(int32_t code, const std::string& words, const std::function<void()>& body) {
  try {
    body();
    CHECK(false, "no error: " + words);
  } catch (const Error& error) {
    CHECK(error.code() == code, words + ": code " + std::to_string(error.code()) + ", " + error.what());
    CHECK(std::string(error.what()).find(words) != std::string::npos, words + ": " + error.what());
  }
}

void test_backends_that_cannot_be_made() {
  check_error(INFINILM_UNSUPPORTED, "'threads'", [] { Backend("{\"threads\": 2}"); });
  check_error(INFINILM_INVALID, "num_threads is 0", [] { Backend("{\"num_threads\": 0}"); });
  check_error(INFINILM_INVALID, "num_threads is 4097", [] { Backend("{\"num_threads\": 4097}"); });
  check_error(INFINILM_UNSUPPORTED, "num_threads is not an integer", [] { Backend("{\"num_threads\": 1.5}"); });
  check_error(INFINILM_INVALID, "no JSON", [] { Backend("{"); });
  infinilm_host pair = lonely_host();
  pair.world_size = 2;
  check_error(INFINILM_UNSUPPORTED, "world_size is 2", [&] { Backend("{}", pair); });
  setenv("INFINILM_CPU_ISA", "mmx", 1);
  check_error(INFINILM_INVALID, "'mmx'", [] { Backend("{}"); });
  auto error = infinilm::make_struct<infinilm_error>();
  CHECK(table().probe(&lonely_host(), &error) == INFINILM_INVALID, "probe says so too");
  unsetenv("INFINILM_CPU_ISA");
  int64_t value = 7;
  CHECK(table().query(nullptr, "acme", &value, &error) == INFINILM_UNSUPPORTED && value == 7, "an unknown question");
  CHECK(infinilm_backend_entry(INFINILM_ABI_MAJOR + 1, 0) == nullptr, "another major version gets no table");
}

void test_models_that_cannot_be_made() {
  const Backend backend(1);
  check_error(INFINILM_UNSUPPORTED, "'float16'", [&] { Model(backend, kPlain, "float16"); });
  check_error(INFINILM_UNSUPPORTED, "'fp8'", [&] { Model(backend, kPlain, "float32", "fp8"); });
  check_error(INFINILM_INVALID, "no JSON", [&] { Model(backend, "{"); });
  Parts strange;
  strange.mixer += ", \"surprise\": 1";
  check_error(INFINILM_UNSUPPORTED, "'surprise'", [&] { Model(backend, config_of(strange)); });
  Parts learned;
  learned.embedding = "\"num_positions\": 512";
  check_error(INFINILM_UNSUPPORTED, "513", [&] { Model(backend, config_of(learned), "float32", nullptr, 513); });
}

void test_loading_that_goes_wrong() {
  const Backend backend(2);
  Parts tied;
  tied.embedding = "\"tied\": true";
  Model model(backend, config_of(tied));
  const std::vector<Given> parameters = model.parameters();
  const int64_t count = static_cast<int64_t>(parameters.size());
  for (int64_t index : {int64_t{-1}, count, INT64_MAX, INT64_MIN}) {
    check_error(INFINILM_INVALID, "there is no parameter", [&] { model.open(index); });
    check_error(INFINILM_INVALID, "there is no parameter", [&] { model.close(index); });
  }
  check_error(INFINILM_INVALID, "tied to model.embed_tokens.weight", [&] { model.open(count - 1); });
  check_error(INFINILM_INVALID, "is not open", [&] { model.close(0); });
  const Buffer open = model.open(0);
  check_error(INFINILM_INVALID, "is open already", [&] { model.open(0); });
  model.close(0);
  check_error(INFINILM_INVALID, "is not open", [&] { model.close(0); });
  check_error(INFINILM_INVALID, "parameters were not loaded: model.layers.0.input_layernorm.weight",
              [&] { model.loading_done(); });
}

void test_caches_that_cannot_be() {
  const Backend backend(2);
  const auto model = loaded(backend, kPlain);
  for (int64_t num_blocks : {int64_t{0}, int64_t{-1}, int64_t{INT32_MAX}, INT64_MAX, INT64_MIN}) {
    check_error(INFINILM_INVALID, "blocks was asked for", [&] { model->create_cache(num_blocks); });
  }
  check_error(INFINILM_OUT_OF_MEMORY, "are available", [&] { model->create_cache(100'000'000); });
  CHECK(backend.memory().caches == 0, "nothing is left of them");
  model->create_cache(4);
  for (int32_t block : {-1, 4, INT32_MAX, INT32_MIN}) {
    check_error(INFINILM_INVALID, "is to be copied", [&] { model->copy_blocks({0, block}); });
    check_error(INFINILM_INVALID, "is to be copied", [&] { model->copy_blocks({block, 0}); });
  }
}

void test_steps_that_cannot_be_run() {
  const Backend backend(2);
  Parts learned;
  learned.embedding = "\"num_positions\": 64";
  const auto model = loaded(backend, config_of(learned));
  const auto wanted = [&] {
    Sequence one = random_sequence(40, 1, 0), two = random_sequence(30, 2, 8);
    Batch batch(4);
    batch.add(one, 40);
    batch.add(two, 30);
    return batch;
  }();
  const Logits before = model->forward(wanted, kVocabSize);
  const auto refused = [&](const char* what, const std::function<void(Batch&)>& spoil) {
    Batch batch = wanted;
    spoil(batch);
    check_error(INFINILM_INVALID, "this batch cannot be run", [&] { model->forward(batch, kVocabSize); });
    CHECK(code_of([&] { model->forward(batch, kVocabSize); }) == INFINILM_INVALID, what);
  };
  refused("token", [](Batch& batch) { batch.token_ids[69] = kVocabSize; });
  refused("token", [](Batch& batch) { batch.token_ids[0] = -1; });
  refused("position", [](Batch& batch) { batch.positions[1] = 2; });
  refused("position", [](Batch& batch) { batch.positions[0] = INT32_MIN; });
  refused("slot", [](Batch& batch) { batch.slot_mapping[5] = 16 * 16; });
  refused("slot", [](Batch& batch) { batch.slot_mapping[5] = -1; });
  refused("block", [](Batch& batch) { batch.block_tables[2] = 16; });
  refused("block", [](Batch& batch) { batch.block_tables[5] = -1; });
  refused("context", [](Batch& batch) { batch.context_lengths[1] = 65; });
  refused("context", [](Batch& batch) { batch.context_lengths[0] = INT32_MAX; });
  refused("context", [](Batch& batch) { batch.context_lengths[0] = 0; });
  refused("query start", [](Batch& batch) { batch.query_starts[1] = 0; });
  refused("query start", [](Batch& batch) { batch.query_starts[1] = 71; });
  refused("query start", [](Batch& batch) { batch.query_starts[0] = 1; });
  refused("query start", [](Batch& batch) { batch.query_starts[2] = 69; });
  refused("row", [](Batch& batch) { batch.logits_indices[0] = 70; });
  refused("row", [](Batch& batch) { batch.logits_indices[69] = -1; });
  const auto refused_sizes = [&](const std::function<void(infinilm_batch&)>& spoil) {
    infinilm_batch view = wanted.view();
    spoil(view);
    check_error(INFINILM_INVALID, "this batch cannot be run", [&] { model->forward(view, kVocabSize); });
  };
  refused_sizes([](infinilm_batch& view) { view.num_tokens = 0; });
  refused_sizes([](infinilm_batch& view) { view.num_tokens = -1; });
  refused_sizes([](infinilm_batch& view) { view.num_sequences = 0; });
  refused_sizes([](infinilm_batch& view) { view.num_sequences = -1; });
  refused_sizes([](infinilm_batch& view) { view.num_rows = -1; });
  refused_sizes([](infinilm_batch& view) { view.max_blocks = 0; });
  refused_sizes([](infinilm_batch& view) { view.max_blocks = INT64_MIN; });
  CHECK(model->forward(wanted, kVocabSize) == before, "nothing was spoiled by what was refused");
}

}  // namespace

int main() {
  test_steps_are_repeated_to_the_bit();
  test_blocks_are_copied();
  test_no_logits_are_wanted();
  test_a_step_is_cancelled_from_another_thread();
  test_the_host_aborts();
  test_two_backends_at_once();
  test_models_are_destroyed_at_any_time_in_any_order();
  test_buffers_outlive_everything();
  test_parameters_are_updated_while_a_model_serves();
  test_backends_that_cannot_be_made();
  test_models_that_cannot_be_made();
  test_loading_that_goes_wrong();
  test_caches_that_cannot_be();
  test_steps_that_cannot_be_run();
  return finish();
}
