// A decoder in float32: parameters by index, a paged cache, and one step over a batch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "config.hpp"
#include "infinilm/backend.h"

namespace plain {

constexpr int64_t kBlockSize = 16;

struct Parameter {
  std::string name, tied_to;
  std::vector<int64_t> shape;
  std::shared_ptr<std::vector<float>> values;  // made when it is first opened
  bool is_loaded = false;
};

// Keys and values of every layer, [slot][num_kv_heads * head_dim].
struct Cache {
  Cache(const Config &config, int64_t num_blocks);
  void copy_blocks(const int32_t *pairs, int64_t num_pairs);

  int64_t num_blocks;
  std::vector<int64_t> widths;
  std::vector<std::vector<float>> keys, values;
};

int64_t bytes_per_block(const Config &config);

class Model {
 public:
  Model(Config config, const infinilm_host *host);

  const Config &config() const { return config_; }
  Parameter &parameter(int64_t index);
  int64_t num_parameters() const { return static_cast<int64_t>(parameters_.size()); }
  std::shared_ptr<std::vector<float>> open(int64_t index);
  void close(int64_t index);
  void require_all() const;

  void forward(Cache &cache, const infinilm_batch &batch, float *logits);
  void cancel() { is_cancelled_ = true; }

 private:
  struct Step;
  const float *weights(const std::string &name) const;
  void attend(Step &step, std::size_t index);
  void mix(Step &step, std::size_t index);
  void require_running() const;

  Config config_;
  const infinilm_host *host_;
  std::vector<Parameter> parameters_;
  std::atomic<bool> is_cancelled_{false};
};

}  // namespace plain
