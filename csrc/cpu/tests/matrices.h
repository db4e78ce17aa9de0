// Random matrices, and what they are in every format, for the tests of kernels.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/kernels.h"
#include "packed_matrix.h"

namespace infinilm::cpu {

inline std::mt19937 generator(7);

inline std::vector<float> random_floats(int64_t size, float spread = 1) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> values(size);
  for (float& value : values) value = normal(generator);
  return values;
}

struct Case {
  const char* name;
  Packing packing;
};

inline const Case kCases[] = {{"f32", {WeightFormat::kF32, 0}},
                              {"bf16", {WeightFormat::kBf16, 0}},
                              {"int8", {WeightFormat::kI8, 32}},
                              {"int4 by 32", {WeightFormat::kI4, 32}},
                              {"int4 by 128", {WeightFormat::kI4, 128}}};

inline PackedMatrix packed(const Kernels& kernels, const Case& kind, const std::vector<float>& weights, int64_t n,
                           int64_t k, Arena& arena) {
  PackedMatrix matrix(kernels, kind.packing, (n + kBlock - 1) / kBlock, k, arena);
  std::vector<uint16_t> halves(weights.size());
  std::transform(weights.begin(), weights.end(), halves.begin(), float_to_bf16);
  const bool is_bf16 = kind.packing.format == WeightFormat::kBf16;
  const SourceMatrix source{is_bf16 ? reinterpret_cast<const std::byte*>(halves.data())
                                    : reinterpret_cast<const std::byte*>(weights.data()),
                            is_bf16};
  matrix.take_memory();
  for (int64_t block = 0; block < matrix.num_blocks(); ++block) {
    matrix.pack_block(source, n, block, block);
  }
  return matrix;
}

}  // namespace infinilm::cpu
