// Configs and batches that a seeded generator has spoiled: whatever a host hands over, nothing comes of it but an error
// with a code of its own, and no model is the worse for it. For AddressSanitizer and UBSan. An argument says how many
// rounds.
#include <cctype>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "check.h"
#include "decoders.h"
#include "infinilm/config.hpp"

using namespace decoders;
using infinilm::Error;

namespace {

std::mt19937 generator(11);

int64_t below(int64_t count) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(count)); }

// Run, and check that what is thrown is an Error that says whose fault it is.
bool succeeds(const std::function<void()>& body, const std::string& what) {
  try {
    body();
    return true;
  } catch (const Error& error) {
    const int32_t code = error.code();
    CHECK(code == INFINILM_INVALID || code == INFINILM_UNSUPPORTED || code == INFINILM_OUT_OF_MEMORY,
          what + ": code " + std::to_string(code) + ", " + error.what());
    CHECK(*error.what() != '\0', what + ": no words");
  }
  return false;
}

// ---------------------------------------------------------------- texts

const char* const kNumbers[] = {"0", "-1", "1", "2", "3", "5", "7", "16", "33", "64", "-0.0", "0.5", "1e-300", "1e308", "-1e308",
                                "32767", "65536", "2147483647", "2147483648", "-2147483648", "4294967297",
                                "1152921504606846976", "9223372036854775807", "-9223372036854775808"};
const char* const kOthers[] = {
    "null", "true", "false", "[]", "{}", "[{}]", "\"\"", "\"rms\"", "\"layer\"", "\"moe\"", "\"gelu\"", "\"\\ud800\"",
    "\"\\u0000\"", "1e999", "9223372036854775808",
    "{\"kind\": \"yarn\", \"factor\": 0.0, \"original_max_position_embeddings\": 1, \"attention_factor\": 0.0}",
    "{\"kind\": \"dynamic\", \"factor\": -2.0, \"original_max_position_embeddings\": 3}",
    "{\"kind\": \"llama3\", \"factor\": 1.0, \"original_max_position_embeddings\": 8, \"low_freq_factor\": 2.0, "
    "\"high_freq_factor\": 2.0}"};

std::string any_number_word() { return kNumbers[below(std::size(kNumbers))]; }
std::string any_word() { return below(2) ? any_number_word() : kOthers[below(std::size(kOthers))]; }

// Put a word in the place of one of the text's values.
std::string with_another_value(const std::string& text) {
  std::vector<size_t> starts;
  for (size_t at = text.find(": "); at != std::string::npos; at = text.find(": ", at + 1)) starts.push_back(at + 2);
  if (starts.empty()) return any_word();
  const size_t start = starts[below(static_cast<int64_t>(starts.size()))];
  size_t end = start, depth = 0;
  for (; end < text.size(); ++end) {
    if (depth == 0 && (text[end] == ',' || text[end] == '}' || text[end] == ']')) break;
    if (text[end] == '{' || text[end] == '[') ++depth;
    if (text[end] == '}' || text[end] == ']') --depth;
  }
  const bool is_number = std::isdigit(static_cast<unsigned char>(text[start]));
  return text.substr(0, start) + (is_number && below(8) ? any_number_word() : any_word()) + text.substr(end);
}

std::string with_other_bytes(std::string text) {
  if (text.empty()) return any_word();
  const size_t at = below(static_cast<int64_t>(text.size())), size = below(20) + 1;
  switch (below(5)) {
    case 0: text[at] = static_cast<char>(below(256)); break;
    case 1: text.erase(at, size); break;
    case 2: text.insert(at, text.substr(at, size)); break;
    case 3: text.insert(at, any_word()); break;
    case 4: text.resize(at); break;
  }
  return text;
}

void test_texts(int num_rounds) {
  const auto configs = all_configs();
  int num_parsed = 0;
  for (int round = 0; round < num_rounds; ++round) {
    std::string text = configs[below(static_cast<int64_t>(configs.size()))].second;
    for (int64_t count = below(4) + 1; count > 0; --count) text = with_other_bytes(text);
    num_parsed += succeeds([&] { infinilm::parse_json(text); }, "JSON");
    succeeds([&] { infinilm::cpu::parse_decoder_config(text); }, "a config");
  }
  CHECK(num_parsed > num_rounds / 100 && num_parsed < num_rounds, std::to_string(num_parsed) + " were JSON");
}

int64_t num_elements(const Model& model) {
  int64_t total = 0;
  for (const Given& given : model.parameters()) total += given.num_elements();
  return total;
}

// A model that is taken can be made, and, where it is small, run.
void test_configs(int num_rounds) {
  const Backend backend(2);
  const auto configs = all_configs();
  const char* const quantizations[] = {nullptr, "int8", "int4", "int4-g128"};
  int num_made = 0, num_run = 0;
  for (int round = 0; round < num_rounds; ++round) {
    std::string text = configs[below(static_cast<int64_t>(configs.size()))].second;
    for (int64_t count = below(2) + 1; count > 0; --count) text = with_another_value(text);
    const char* dtype = below(2) ? "float32" : "bfloat16";
    succeeds([&] {
      Model model(backend, text, dtype, quantizations[below(4)]);
      ++num_made;
      const auto config = infinilm::cpu::parse_decoder_config(text);
      if (num_elements(model) > 200'000) return;
      load(model);
      model.create_cache(4);
      Sequence sequence = random_sequence(20, 1, 0);
      for (int32_t& token : sequence.tokens) token %= config.vocab_size;
      for (int64_t count : {17, 1}) {
        Batch batch(4);
        batch.add(sequence, count);
        model.forward(batch, config.vocab_size);
      }
      ++num_run;
    }, text);
  }
  CHECK(num_run > num_rounds / 20, std::to_string(num_made) + " were made, " + std::to_string(num_run) + " run");
}

// ---------------------------------------------------------------- batches

int32_t any_number() {
  constexpr int32_t kEdges[] = {INT32_MIN, -65536, -16, -1, 0, 1, 15, 16, 17, 31, 40, 63, 64, 255, 256, 65536, INT32_MAX};
  return kEdges[below(std::size(kEdges))];
}

void spoil(Batch* batch) {
  std::vector<int32_t>* const arrays[] = {&batch->token_ids,    &batch->positions,    &batch->query_starts,
                                          &batch->context_lengths, &batch->block_tables, &batch->slot_mapping,
                                          &batch->slots,        &batch->logits_indices, &batch->prompt_lengths};
  std::vector<int32_t>& array = *arrays[below(std::size(arrays))];
  int32_t& value = array[below(static_cast<int64_t>(array.size()))];
  const int64_t moved = static_cast<int64_t>(value) + below(5) - 2;
  value = below(2) ? any_number() : static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(moved, INT32_MIN), INT32_MAX));
}

void test_batches(int num_rounds) {
  const Backend backend(2);
  for (const char* name : {"window", "dynamic", "gpt2", "few experts"}) {
    const auto configs = all_configs();
    const auto found = std::find_if(configs.begin(), configs.end(), [&](const auto& its) { return its.first == name; });
    Model model(backend, found->second, "float32");
    load(model);
    model.create_cache(16);
    Sequence one = random_sequence(40, 1, 0), two = random_sequence(30, 2, 8);
    Batch whole(4);
    whole.add(one, 40);
    whole.add(two, 30);
    const Logits wanted = model.forward(whole, kVocabSize);
    int num_run = 0;
    for (int round = 0; round < num_rounds; ++round) {
      Batch batch = whole;
      for (int64_t count = below(3) + 1; count > 0; --count) spoil(&batch);
      num_run += succeeds([&] { model.forward(batch, kVocabSize); }, std::string("a batch of ") + name);
    }
    CHECK(num_run > 0 && num_run < num_rounds, std::to_string(num_run) + " were run");
    CHECK(model.forward(whole, kVocabSize) == wanted, "the model is as it was");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int num_rounds = argc > 1 ? std::atoi(argv[1]) : 400;
  test_texts(10 * num_rounds);
  test_configs(5 * num_rounds);
  test_batches(num_rounds);
  return finish();
}
