// The backend's table as a host drives it: what is made is destroyed, what fails is thrown as an infinilm::Error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "infinilm/backend.hpp"
#include "packed_matrix.h"

namespace driver {

inline const infinilm_backend_table& table() { return *infinilm_backend_entry(INFINILM_ABI_MAJOR, INFINILM_ABI_MINOR); }

// Run call(error), a call of the table, and throw what it says.
template <typename Call>
void checked(const Call& call) {
  auto error = infinilm::make_struct<infinilm_error>();
  const int32_t code = call(&error);
  if (code != INFINILM_OK) throw infinilm::Error(code, error.message);
}

inline const infinilm_host& lonely_host() {
  static const infinilm_host host = [] {
    auto made = infinilm::make_struct<infinilm_host>();
    made.abi_major = INFINILM_ABI_MAJOR;
    made.world_size = 1;
    return made;
  }();
  return host;
}

class Backend {
 public:
  explicit Backend(const std::string& options, const infinilm_host& host = lonely_host()) {
    checked([&](infinilm_error* error) { return table().create(&host, options.c_str(), &backend_, error); });
  }
  explicit Backend(int num_threads) : Backend("{\"num_threads\": " + std::to_string(num_threads) + "}") {}
  ~Backend() { table().destroy(backend_); }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  infinilm_backend* get() const { return backend_; }
  infinilm_memory memory() const {
    auto memory = infinilm::make_struct<infinilm_memory>();
    checked([&](infinilm_error* error) { return table().memory(backend_, &memory, error); });
    return memory;
  }

 private:
  infinilm_backend* backend_ = nullptr;
};

struct Sequence {
  std::vector<int32_t> tokens, blocks;
  int64_t prompt_length;
  int64_t num_computed = 0;
};

// A step's arrays; they may be spoiled before they are run.
struct Batch {
  std::vector<int32_t> token_ids, positions, query_starts{0}, context_lengths, block_tables, slot_mapping, slots,
      logits_indices, prompt_lengths;
  int64_t max_blocks;

  explicit Batch(int64_t the_max_blocks) : max_blocks(the_max_blocks) {}

  // The next `count` tokens of a sequence, and the logits of all of them.
  void add(Sequence& sequence, int64_t count) {
    using infinilm::cpu::kBlock;
    for (int64_t position = sequence.num_computed; position < sequence.num_computed + count; ++position) {
      logits_indices.push_back(static_cast<int32_t>(token_ids.size()));
      token_ids.push_back(sequence.tokens[position]);
      positions.push_back(static_cast<int32_t>(position));
      slot_mapping.push_back(static_cast<int32_t>(sequence.blocks[position / kBlock] * kBlock + position % kBlock));
    }
    sequence.num_computed += count;
    slots.push_back(static_cast<int32_t>(slots.size()));
    query_starts.push_back(static_cast<int32_t>(token_ids.size()));
    context_lengths.push_back(static_cast<int32_t>(sequence.num_computed));
    prompt_lengths.push_back(static_cast<int32_t>(sequence.prompt_length));
    std::vector<int32_t> row(sequence.blocks);
    row.resize(max_blocks, -1);
    block_tables.insert(block_tables.end(), row.begin(), row.end());
  }

  infinilm_batch view() const {
    auto view = infinilm::make_struct<infinilm_batch>();
    view.num_tokens = static_cast<int64_t>(token_ids.size());
    view.num_sequences = static_cast<int64_t>(context_lengths.size());
    view.max_blocks = max_blocks;
    view.num_rows = static_cast<int64_t>(logits_indices.size());
    view.token_ids = token_ids.data();
    view.positions = positions.data();
    view.query_starts = query_starts.data();
    view.context_lengths = context_lengths.data();
    view.block_tables = block_tables.data();
    view.slot_mapping = slot_mapping.data();
    view.slots = slots.data();
    view.logits_indices = logits_indices.data();
    view.prompt_lengths = prompt_lengths.data();
    return view;
  }
};

using Logits = std::vector<std::vector<float>>;  // (rows, vocab_size)

struct Given {
  std::string name, tied_to;
  std::vector<int64_t> shape;

  int64_t num_elements() const {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    return count;
  }
};

struct Loan {
  void operator()(DLManagedTensorVersioned* tensor) const { tensor->deleter(tensor); }
};
using Buffer = std::unique_ptr<DLManagedTensorVersioned, Loan>;

inline void write_floats(const DLManagedTensorVersioned& buffer, bool is_bf16, const std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (is_bf16) {
      static_cast<uint16_t*>(buffer.dl_tensor.data)[i] = infinilm::cpu::float_to_bf16(values[i]);
    } else {
      static_cast<float*>(buffer.dl_tensor.data)[i] = values[i];
    }
  }
}

class Model {
 public:
  Model(const Backend& backend, const std::string& config, const char* dtype = "float32",
        const char* quantization = nullptr, int64_t max_model_len = 0)
      : is_bf16_(std::string(dtype) == "bfloat16") {
    auto request = infinilm::make_struct<infinilm_model_request>();
    request.config = config.c_str();
    request.dtype = dtype;
    request.device = "cpu";
    request.quantization = quantization;
    request.max_model_len = max_model_len;
    checked([&](infinilm_error* error) { return table().supports_model(backend.get(), &request, error); });
    checked([&](infinilm_error* error) { return table().model_create(backend.get(), &request, &model_, error); });
  }
  ~Model() {
    if (cache_ != nullptr) table().cache_destroy(cache_);
    table().model_destroy(model_);
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  infinilm_model* get() const { return model_; }
  infinilm_cache* cache() const { return cache_; }

  std::vector<Given> parameters() const {
    std::vector<Given> all;
    for (int64_t index = 0; index < table().num_parameters(model_); ++index) {
      auto parameter = infinilm::make_struct<infinilm_parameter>();
      checked([&](infinilm_error* error) { return table().parameter(model_, index, &parameter, error); });
      all.push_back({parameter.name, parameter.tied_to == nullptr ? "" : parameter.tied_to,
                     {parameter.shape, parameter.shape + parameter.num_dims}});
    }
    return all;
  }

  Buffer open(int64_t index) {
    DLManagedTensorVersioned* buffer = nullptr;
    checked([&](infinilm_error* error) { return table().open_parameter(model_, index, &buffer, error); });
    return Buffer(buffer);
  }
  void close(int64_t index) {
    checked([&](infinilm_error* error) { return table().close_parameter(model_, index, error); });
  }
  void loading_done() {
    checked([&](infinilm_error* error) { return table().loading_done(model_, error); });
  }

  void fill(int64_t index, const std::vector<float>& values) {
    const Buffer buffer = open(index);
    write_floats(*buffer, is_bf16_, values);
    close(index);
  }

  void create_cache(int64_t num_blocks) {
    if (cache_ != nullptr) table().cache_destroy(std::exchange(cache_, nullptr));
    checked([&](infinilm_error* error) { return table().cache_create(model_, num_blocks, 8, &cache_, error); });
  }
  void copy_blocks(const std::vector<int32_t>& pairs) {
    const int64_t count = static_cast<int64_t>(pairs.size()) / 2;
    checked([&](infinilm_error* error) { return table().cache_copy_blocks(cache_, pairs.data(), count, error); });
  }

  Logits forward(const Batch& batch, int64_t vocab_size) {
    return forward(batch.view(), vocab_size);
  }
  Logits forward(const infinilm_batch& view, int64_t vocab_size) {
    const int64_t num_rows = std::max<int64_t>(view.num_rows, 0);
    std::vector<float> all(num_rows * vocab_size, std::numeric_limits<float>::quiet_NaN());
    int64_t shape[] = {num_rows, vocab_size}, strides[] = {vocab_size, 1};
    const DLTensor logits{all.data(), {kDLCPU, 0}, 2, {kDLFloat, 32, 1}, shape, strides, 0};
    checked([&](infinilm_error* error) { return table().forward(model_, cache_, &view, &logits, error); });
    Logits rows;
    for (int64_t row = 0; row < num_rows; ++row) {
      rows.emplace_back(all.begin() + row * vocab_size, all.begin() + (row + 1) * vocab_size);
    }
    return rows;
  }
  void cancel() { table().cancel(model_); }

 private:
  const bool is_bf16_;
  infinilm_model* model_ = nullptr;
  infinilm_cache* cache_ = nullptr;
};

}  // namespace driver
