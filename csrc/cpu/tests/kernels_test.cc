// Every kernel of every level this machine has, against the same in double precision, on shapes that fit nothing.
#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "check.h"
#include "kv_cache.h"
#include "matrices.h"
#include "packed_matrix.h"
#include "row_buffer.h"

using namespace infinilm::cpu;

namespace {

std::vector<float> rounded(std::vector<float> values) {
  for (float& value : values) value = bf16_to_float(float_to_bf16(value));
  return values;
}

double worst(const std::vector<float>& got, const std::vector<double>& wanted) {
  double difference = 0, largest = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::fabs(got[i]) < 1e30)) return std::numeric_limits<double>::infinity();
    difference = std::max(difference, std::fabs(got[i] - wanted[i]));
    largest = std::max(largest, std::fabs(wanted[i]));
  }
  return difference / largest;
}

// What a row is once it has been put: rounded to bf16, or to levels of a group.
int64_t rows_depth(int64_t k) { return (k + kGroup - 1) / kGroup * kGroup; }

std::vector<float> as_put(RowFormat format, const Rows& rows, int64_t row, int64_t k) {
  std::vector<float> values(k);
  const std::byte* data = rows.data + row * rows.stride;
  for (int64_t i = 0; i < k; ++i) {
    if (format == RowFormat::kF32) {
      std::memcpy(&values[i], data + i * 4, 4);
    } else if (format == RowFormat::kBf16) {
      uint16_t bits;
      std::memcpy(&bits, data + i * 2, 2);
      values[i] = bf16_to_float(bits);
    } else if (format == RowFormat::kBf16Pair) {
      uint16_t high, low;
      std::memcpy(&high, data + i * 2, 2);
      std::memcpy(&low, data + (rows_depth(k) + i) * 2, 2);
      values[i] = bf16_to_float(high) + bf16_to_float(low);
    } else if (format == RowFormat::kI8) {
      values[i] = static_cast<int8_t>(data[i]) * rows.scales[row * rows.num_groups + i / kGroup];
    } else {
      const std::byte* high = data + i / kGroup * 2 * kGroup + i % kGroup;
      const int level = static_cast<int8_t>(high[0]) * 128 + static_cast<int8_t>(high[kGroup]);
      values[i] = level * rows.scales[row * rows.num_groups + i / kGroup];
    }
  }
  return values;
}

void test_gemm(const Kernels& kernels, const Case& kind, RowFormat format, int64_t m, int64_t n, int64_t k) {
  const std::string what = std::string(isa_name(kernels.isa)) + " " + kind.name + " " + std::to_string(m) + " rows, " +
                           std::to_string(n) + " by " + std::to_string(k);
  std::vector<float> weights = random_floats(n * k), x = random_floats(m * k, 3);
  if (kind.packing.format == WeightFormat::kBf16) weights = rounded(weights);
  Arena arena;
  const PackedMatrix matrix = packed(kernels, kind, weights, n, k, arena);
  std::vector<float> kept(n * k);
  for (int64_t i = 0; i < n; ++i) matrix.unpack_row(i, kept.data() + i * k);
  // int8: half a level of a group whose largest is 127 levels. int4: the largest may be cut from 9 levels to 7.
  const double bound = kind.packing.format == WeightFormat::kI8   ? 0.5 / 127 * 1.01
                       : kind.packing.format == WeightFormat::kI4 ? 2.0 / 9 * 1.01
                                                                  : 0;
  CHECK(worst(kept, std::vector<double>(weights.begin(), weights.end())) <= bound, what + ": packing");

  RowBuffer buffer;
  buffer.reserve(m, matrix.depth());
  const Rows rows = buffer.rows(format, m, matrix.depth());
  std::memset(const_cast<std::byte*>(rows.data), 0xff, m * rows.stride);  // others left what is no number
  std::vector<double> wanted;
  for (int64_t row = 0; row < m; ++row) {
    put_row(kernels, format, rows, row, x.data() + row * k, k, matrix.depth());
    const std::vector<float> values = as_put(format, rows, row, k);
    const std::vector<double> exact(x.begin() + row * k, x.begin() + (row + 1) * k);
    const double loss = format == RowFormat::kF32        ? 0
                        : format == RowFormat::kBf16     ? 1.0 / 256
                        : format == RowFormat::kBf16Pair ? 1.0 / 65536
                                                         : 0.5 / 127 * 1.01;
    CHECK(worst(values, exact) <= loss, what + ": rows");
    for (int64_t column = 0; column < matrix.num_blocks() * kBlock; ++column) {
      double sum = 0;
      for (int64_t i = 0; column < n && i < k; ++i) sum += static_cast<double>(values[i]) * kept[column * k + i];
      wanted.push_back(sum);
    }
  }
  const int64_t stride = matrix.num_blocks() * kBlock;
  std::vector<float> got(m * stride, std::nanf(""));
  kernels.gemm(kind.packing.format, rows.format)(rows, m, matrix.panel(0), matrix.num_blocks(), got.data(), stride);
  CHECK(worst(got, wanted) <= 2e-6 * std::sqrt(static_cast<double>(k)), what + ": " + std::to_string(worst(got, wanted)));
}

// A matrix of random levels, zeros and scales of either sign, written as packed_matrix.h says; `values` is what it is.
std::vector<std::byte> packed_with_zeros(int64_t n, int64_t k, int64_t group, bool is_extreme,
                                         std::vector<double>* values) {
  const int64_t depth = (k + group - 1) / group * group, num_groups = depth / group;
  const int64_t bytes = block_bytes(WeightFormat::kI4Zero, depth, group);
  std::vector<std::byte> memory((n + kBlock - 1) / kBlock * bytes);
  std::uniform_int_distribution<int> levels(0, 15);
  std::normal_distribution<float> normal;
  values->assign(n * k, 0);
  for (int64_t row = 0; row < n; ++row) {
    std::byte* block = memory.data() + row / kBlock * bytes;
    std::byte* data = block + (num_groups * kBlock * 3 + 63) / 64 * 64;
    for (int64_t g = 0; g < num_groups; ++g) {
      const uint16_t half = float_to_half(bf16_to_float(float_to_bf16(normal(generator))));
      std::memcpy(block + (g * kBlock + row % kBlock) * 2, &half, 2);
      const int zero = is_extreme ? row % 2 * 15 : levels(generator);
      block[(2 * num_groups + g) * kBlock + row % kBlock] = static_cast<std::byte>(zero);
      for (int64_t i = g * group; i < std::min(k, (g + 1) * group); ++i) {
        const int level = is_extreme ? 15 - zero : levels(generator);
        data[i / 8 * 64 + row % kBlock * 4 + i % 4] |= static_cast<std::byte>(i % 8 < 4 ? level : level << 4);
        (*values)[row * k + i] = static_cast<double>(half_to_float(half)) * (level - zero);
      }
    }
  }
  return memory;
}

void test_gemm_with_zeros(const Kernels& kernels, int64_t group, int64_t m, int64_t n, int64_t k, bool is_extreme) {
  const std::string what = std::string(isa_name(kernels.isa)) + " int4 with zeros by " + std::to_string(group) + " " +
                           std::to_string(m) + " rows, " + std::to_string(n) + " by " + std::to_string(k);
  const int64_t depth = (k + group - 1) / group * group, num_blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> values;
  const std::vector<std::byte> memory = packed_with_zeros(n, k, group, is_extreme, &values);
  const std::vector<float> x = is_extreme ? std::vector<float>(m * k, -1) : random_floats(m * k, 3);
  RowBuffer buffer;
  buffer.reserve(m, depth);
  const RowFormat format = kernels.row_format(WeightFormat::kI4Zero);
  const Rows rows = buffer.rows(format, m, depth);
  std::vector<double> wanted;
  for (int64_t row = 0; row < m; ++row) {
    put_row(kernels, format, rows, row, x.data() + row * k, k, depth);
    const std::vector<float> put = as_put(format, rows, row, k);
    const std::vector<double> exact(x.begin() + row * k, x.begin() + (row + 1) * k);
    CHECK(worst(put, exact) <= 0.5 / (127 * 128) * 1.01, what + ": rows");
    for (int64_t column = 0; column < num_blocks * kBlock; ++column) {
      double sum = 0;
      for (int64_t i = 0; column < n && i < k; ++i) sum += static_cast<double>(put[i]) * values[column * k + i];
      wanted.push_back(sum);
    }
  }
  const Panel panel{memory.data(), block_bytes(WeightFormat::kI4Zero, depth, group), depth, group};
  std::vector<float> got(m * num_blocks * kBlock, std::nanf(""));
  kernels.gemm(WeightFormat::kI4Zero, rows.format)(rows, m, panel, num_blocks, got.data(), num_blocks * kBlock);
  CHECK(worst(got, wanted) <= 2e-6 * std::sqrt(static_cast<double>(k)), what + ": " + std::to_string(worst(got, wanted)));
}

// Levels at both ends of their range: instructions that saturate in between would show.
void test_extreme_integers(const Kernels& kernels) {
  const int64_t k = 128, n = 16;
  for (const Case& kind : kCases) {
    if (kind.packing.group == 0) continue;
    for (float sign : {1.0f, -1.0f}) {
      std::vector<float> weights(n * k, 1.0f), x(k, sign);
      Arena arena;
    const PackedMatrix matrix = packed(kernels, kind, weights, n, k, arena);
      RowBuffer buffer;
      buffer.reserve(1, k);
      const Rows rows = buffer.rows(RowFormat::kI8, 1, k);
      put_row(kernels, RowFormat::kI8, rows, 0, x.data(), k, k);
      std::vector<float> got(n), kept(k);
      matrix.unpack_row(3, kept.data());
      kernels.gemm(kind.packing.format, rows.format)(rows, 1, matrix.panel(0), 1, got.data(), n);
      double wanted = 0;
      for (float weight : kept) wanted += weight * sign;
      CHECK(std::fabs(got[3] - wanted) < 1e-3, std::string(isa_name(kernels.isa)) + " " + kind.name);
    }
  }
}

using Function = std::function<double(double)>;

void test_activations(const Kernels& kernels) {
  const std::pair<Activation, Function> functions[] = {
      {Activation::kSilu, [](double x) { return x / (1 + std::exp(-x)); }},
      {Activation::kGelu, [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }},
      {Activation::kGeluTanh,
       [](double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }},
      {Activation::kRelu, [](double x) { return std::max(x, 0.0); }}};
  for (const auto& [activation, function] : functions) {
    for (int64_t pairs : {1, 3}) {
      const std::string what = std::string(isa_name(kernels.isa)) + " activation " +
                               std::to_string(static_cast<int>(activation));
      std::vector<float> x = random_floats(pairs * 32, 4), out(pairs * 16), single(pairs * 32 - 3);
      x[0] = 200, x[1] = -200, x[2] = 0, x[3] = 1e-8f;
      kernels.activate_pairs(activation, x.data(), pairs, out.data());
      kernels.activate(activation, x.data(), pairs * 32 - 3, single.data());
      for (size_t i = 0; i < out.size(); ++i) {
        const float gate = x[i / 16 * 32 + i % 16], up = x[i / 16 * 32 + 16 + i % 16];
        const double wanted = function(gate) * up;
        CHECK(std::fabs(out[i] - wanted) <= 5e-7 * (1 + std::fabs(gate)) * (1 + std::fabs(up)),
              what + " of " + std::to_string(gate));
      }
      for (size_t i = 0; i < single.size(); ++i) {
        CHECK(std::fabs(single[i] - function(x[i])) <= 2e-6 * (1 + std::fabs(x[i])), what);
      }
    }
  }
}

void test_rows(const Kernels& kernels) {
  for (int64_t size : {1, 3, 16, 33, 100, 896}) {
    const std::string what = std::string(isa_name(kernels.isa)) + " of " + std::to_string(size);
    const std::vector<float> x = random_floats(size, 2), weight = random_floats(size), bias = random_floats(size);
    double square = 0, mean = 0, variance = 0;
    for (float value : x) square += static_cast<double>(value) * value / size, mean += static_cast<double>(value) / size;
    for (float value : x) variance += (value - mean) * (value - mean) / size;
    std::vector<float> rms(size), layer(size), capped = x, summed = x;
    kernels.rms_norm(x.data(), size, weight.data(), nullptr, 1e-5f, rms.data());
    kernels.layer_norm(x.data(), size, weight.data(), bias.data(), 1e-5f, layer.data());
    kernels.softcap(capped.data(), size, 2, 1.5f);
    kernels.add(summed.data(), bias.data(), size, 0.25f);
    std::vector<double> wanted_rms, wanted_layer, wanted_cap, wanted_sum;
    for (int64_t i = 0; i < size; ++i) {
      wanted_rms.push_back(x[i] / std::sqrt(square + 1e-5) * weight[i]);
      wanted_layer.push_back((x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + bias[i]);
      wanted_cap.push_back(1.5 * std::tanh(2.0 * x[i] / 1.5));
      wanted_sum.push_back(x[i] + 0.25 * bias[i]);
    }
    CHECK(worst(rms, wanted_rms) < 1e-6, what);
    CHECK(worst(layer, wanted_layer) < 1e-6, what);
    CHECK(worst(capped, wanted_cap) < 1e-6, what);
    CHECK(worst(summed, wanted_sum) < 1e-6, what);
  }
}

void test_rounding(const Kernels& kernels) {
  std::vector<float> x = random_floats(100, 1e3f);
  x[0] = std::nanf(""), x[1] = INFINITY, x[2] = -INFINITY, x[3] = 0, x[4] = 3.3961775e38f, x[5] = 1.00390625f;
  const uint32_t loud = 0x7f800001;
  std::memcpy(&x[6], &loud, 4);
  std::vector<uint16_t> got(x.size());
  kernels.to_bf16(x.data(), static_cast<int64_t>(x.size()), got.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const float back = bf16_to_float(got[i]);
    CHECK(got[i] == float_to_bf16(x[i]), isa_name(kernels.isa));
    CHECK(std::isnan(x[i]) == std::isnan(back), isa_name(kernels.isa));
    if (std::isfinite(x[i]) && std::isfinite(back)) {
      CHECK(std::fabs(back - x[i]) <= std::fabs(x[i]) / 256, isa_name(kernels.isa));
    }
  }
}

struct AttentionCase {
  int64_t num_rows, head_dim, context, window;
  float softcap;
  bool is_bf16;
};

// Keys and values go through the cache, in blocks that lie in no order, and one that nobody should look at is NaN.
void test_attention(const Kernels& kernels, const AttentionCase& test) {
  AttentionConfig mixer;
  mixer.num_heads = mixer.num_kv_heads = 1;
  mixer.head_dim = test.head_dim;
  const int64_t num_blocks = (test.context + kBlock - 1) / kBlock, dim = test.head_dim;
  KvCache cache({CacheLayout(mixer, test.is_bf16)}, num_blocks + 1);
  const CacheLayout& layout = cache.layout(0);
  std::memset(cache.head(0, 0), 0xff, layout.block_bytes() * (num_blocks + 1));
  std::vector<int32_t> table(num_blocks);
  for (int64_t i = 0; i < num_blocks; ++i) table[i] = static_cast<int32_t>(num_blocks - i);
  std::vector<float> keys = random_floats(test.context * dim), values = random_floats(test.context * dim);
  std::vector<float> queries = random_floats(test.num_rows * dim);
  if (test.is_bf16) keys = rounded(keys), values = rounded(values), queries = rounded(queries);
  std::vector<int32_t> begins, ends;
  for (int64_t row = 0; row < test.num_rows; ++row) {
    ends.push_back(static_cast<int32_t>(std::max<int64_t>(test.context - row, 1)));
    begins.push_back(test.window ? std::max<int32_t>(ends.back() - static_cast<int32_t>(test.window), 0) : 0);
  }
  const int64_t first_seen = *std::min_element(begins.begin(), begins.end());
  for (int64_t t = first_seen; t < test.context; ++t) {
    const int64_t slot = table[t / kBlock] * kBlock + t % kBlock;
    cache.write_key(0, 0, slot, keys.data() + t * dim);
    cache.write_value(0, 0, slot, values.data() + t * dim);
  }
  const int64_t padded = (dim + kBlock - 1) / kBlock * kBlock;
  const RowFormat format = RowFormat::kF32;
  RowBuffer buffer;
  buffer.reserve(test.num_rows, padded);
  AttentionTile tile;
  tile.queries = buffer.rows(format, test.num_rows, padded);
  for (int64_t row = 0; row < test.num_rows; ++row) {
    put_row(kernels, format, tile.queries, row, queries.data() + row * dim, dim, padded);
  }
  std::vector<float> out(test.num_rows * padded, 0), maxima(test.num_rows, -1e30f), sums(test.num_rows, 0);
  Buffer scratch(attention_scratch_bytes(test.num_rows, dim));
  tile.num_rows = test.num_rows;
  tile.begins = begins.data();
  tile.ends = ends.data();
  tile.cache = cache.head(0, 0);
  tile.block_stride = layout.block_bytes();
  tile.value_offset = layout.key_bytes;
  tile.block_table = table.data();
  tile.context_length = test.context;
  tile.head_dim = dim;
  tile.scale = 0.3f;
  tile.softcap = test.softcap;
  tile.out = out.data();
  tile.out_stride = padded;
  tile.maxima = maxima.data();
  tile.sums = sums.data();
  tile.scratch = scratch.data();
  // In two parts, as when a context is cut.
  const int64_t first = first_seen / kBlock, middle = first + (num_blocks - first) / 2;
  for (const auto& [begin, end] : {std::pair(first, middle), std::pair(middle, num_blocks)}) {
    tile.first_block = begin;
    tile.last_block = end;
    (test.is_bf16 ? kernels.attend_bf16 : kernels.attend_f32)(tile);
  }
  std::vector<float> got;
  std::vector<double> wanted;
  for (int64_t row = 0; row < test.num_rows; ++row) {
    std::vector<double> weights;
    double total = 0;
    for (int64_t t = begins[row]; t < ends[row]; ++t) {
      double score = 0;
      for (int64_t i = 0; i < dim; ++i) score += static_cast<double>(queries[row * dim + i]) * keys[t * dim + i];
      score *= 0.3f;
      if (test.softcap > 0) score = test.softcap * std::tanh(score / test.softcap);
      weights.push_back(std::exp(score));
      total += weights.back();
    }
    for (int64_t i = 0; i < dim; ++i) {
      double sum = 0;
      for (int64_t t = begins[row]; t < ends[row]; ++t) sum += weights[t - begins[row]] / total * values[t * dim + i];
      wanted.push_back(sum);
      got.push_back(out[row * padded + i] / sums[row]);
    }
  }
  // Weights are rounded to bf16 where the processor multiplies that. A sum of values may be much less than each.
  double largest = 0, most = 0;
  for (float value : values) largest = std::max<double>(largest, std::fabs(value));
  for (double value : wanted) most = std::max(most, std::fabs(value));
  const double bound =
      (test.is_bf16 && kernels.bf16_rows == RowFormat::kBf16 ? 1.0 / 256 : 5e-6) * std::max(largest / most, 1.0);
  CHECK(worst(got, wanted) <= bound, std::string(isa_name(kernels.isa)) + (test.is_bf16 ? " bf16 " : " f32 ") +
                                         std::to_string(test.num_rows) + " rows, head " + std::to_string(dim) +
                                         ", context " + std::to_string(test.context) + ", window " +
                                         std::to_string(test.window) + ": " + std::to_string(worst(got, wanted)));
}

}  // namespace

int main() {
  for (Isa isa : available_isas()) {
    const Kernels& kernels = kernels_for(isa);
    for (const Case& kind : kCases) {
      const WeightFormat weights = kind.packing.format;
      for (RowFormat format : {kernels.row_format(weights), kernels.exact_row_format(weights, 1),
                               kernels.exact_row_format(weights, kManyRows)}) {
        for (int64_t m = 1; m <= 9; ++m) {
          test_gemm(kernels, kind, format, m, 16, 32);
          test_gemm(kernels, kind, format, m, 37, 97);
          test_gemm(kernels, kind, format, m, 5, 1);
          test_gemm(kernels, kind, format, m, 48, 131);
        }
        for (int64_t m : {12, 13, 25, 48}) test_gemm(kernels, kind, format, m, 83, 259);
        for (int64_t m : {5, 37}) test_gemm(kernels, kind, format, m, 40, 1501);  // depths that are taken in parts
      }
    }
    test_extreme_integers(kernels);
    test_activations(kernels);
    test_rows(kernels);
    test_rounding(kernels);
    for (bool is_bf16 : {false, true}) {
      for (int64_t head_dim : {2, 5, 16, 40, 64, 96}) {
        for (int64_t context : {1, 15, 16, 33, 300}) {
          test_attention(kernels, {1, head_dim, context, 0, 0, is_bf16});
          test_attention(kernels, {7, head_dim, context, 0, 0, is_bf16});
          test_attention(kernels, {29, head_dim, context, 20, 0, is_bf16});
          test_attention(kernels, {3, head_dim, context, 17, 1.5f, is_bf16});
        }
      }
    }
  }
  for (Isa isa : available_isas()) {
    const Kernels& kernels = kernels_for(isa);
    for (int64_t group : {32, 64, 128}) {
      for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 25, 48}) {
        test_gemm_with_zeros(kernels, group, m, 16, group, false);
        test_gemm_with_zeros(kernels, group, m, 37, 200, false);
        test_gemm_with_zeros(kernels, group, m, 5, 8, false);
        test_gemm_with_zeros(kernels, group, m, 83, 3 * group + 24, false);
        test_gemm_with_zeros(kernels, group, m, 18, 256, true);
      }
    }
  }
  return finish();
}
