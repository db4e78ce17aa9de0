// The table from end to end: small decoders that between them have every part, on every level and in every format,
// against a plain one in double precision. Also for the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "check.h"
#include "decoders.h"
#include "isa.h"
#include "kernels/kernels.h"
#include "reference.h"

using namespace decoders;
using infinilm::cpu::available_isas;
using infinilm::cpu::isa_name;

namespace {

struct Format {
  const char *name, *dtype, *quantization;
  infinilm::cpu::Packing packing;  // of matrices that are quantized
  double bound;                    // of the median of rows' errors
};

using infinilm::cpu::WeightFormat;
const Format kFormats[] = {{"float32", "float32", nullptr, {}, 2e-6},
                           {"bfloat16", "bfloat16", nullptr, {}, 0.02},
                           {"int8", "float32", "int8", {WeightFormat::kI8, 32}, 0.05},
                           {"int4", "bfloat16", "int4", {WeightFormat::kI4, 32}, 0.05},
                           {"int4-g128", "float32", "int4-g128", {WeightFormat::kI4, 128}, 0.05}};

// ---------------------------------------------------------------- weights

// A matrix as it is once groups of its rows are levels.
void round_to_levels(const infinilm::cpu::Packing& packing, int64_t columns, std::vector<float>* matrix) {
  using namespace infinilm::cpu;
  const int64_t num_rows = static_cast<int64_t>(matrix->size()) / columns;
  Arena arena;
  PackedMatrix packed(kernels_for(Isa::kScalar), packing, (num_rows + kBlock - 1) / kBlock, columns, arena);
  packed.take_memory();
  const SourceMatrix source{reinterpret_cast<const std::byte*>(matrix->data()), false};
  for (int64_t block = 0; block < packed.num_blocks(); ++block) packed.pack_block(source, num_rows, block, block);
  for (int64_t row = 0; row < num_rows; ++row) packed.unpack_row(row, matrix->data() + row * columns);
}

// What the model computes with: rounded as the format rounds it.
reference::Weights weights_of(const std::vector<Given>& parameters, const Format& format, bool is_tied) {
  reference::Weights weights;
  for (size_t index = 0; index < parameters.size(); ++index) {
    const Given& given = parameters[index];
    if (!given.tied_to.empty()) continue;
    std::vector<float> values = random_weights(static_cast<int64_t>(index), given);
    if (std::string(format.dtype) == "bfloat16") {
      for (float& value : values) value = infinilm::cpu::bf16_to_float(infinilm::cpu::float_to_bf16(value));
    }
    const bool is_head = given.name == (is_tied ? "model.embed_tokens.weight" : "lm_head.weight");
    const bool is_projection = given.shape.size() == 2 && given.name.find("_proj.weight") != std::string::npos;
    if (format.packing.group && is_head) round_to_levels({WeightFormat::kI8, 32}, given.shape[1], &values);
    if (format.packing.group && is_projection) round_to_levels(format.packing, given.shape[1], &values);
    weights[given.name] = reference::Row(values.begin(), values.end());
  }
  return weights;
}

double row_error(const std::vector<float>& got, const reference::Row& wanted) {
  double difference = 0, size = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(got[i] - wanted[i], 2);
    size += std::pow(wanted[i], 2);
  }
  return std::sqrt(difference / size);
}

// ---------------------------------------------------------------- steps

using Wanted = std::vector<reference::Row>;

// Both sequences' logits, by the oracle.
std::pair<Wanted, Wanted> expected(const std::string& config, const Model& model, const Format& format) {
  const auto parsed = infinilm::cpu::parse_decoder_config(config);
  const reference::Weights weights = weights_of(model.parameters(), format, parsed.is_tied);
  const auto of = [&](const Sequence& its) { return reference::logits(parsed, weights, its.tokens, its.prompt_length); };
  return {of(random_sequence(kLong, 1, 0)), of(random_sequence(kShort, 2, 8))};
}

void check_rows(const Logits& got, const Wanted& wanted, double bound, const std::string& what) {
  std::vector<double> errors;
  for (size_t row = 0; row < got.size(); ++row) errors.push_back(row_error(got[row], wanted[row]));
  std::sort(errors.begin(), errors.end());
  const double median = errors[errors.size() / 2], most = errors.back();
  // Not all rows: where two experts are nearly as likely, rounding decides which one a token gets.
  CHECK(median <= bound, what + ": " + std::to_string(median));
  if (bound < 1e-4) CHECK(most <= 20 * bound, what + ", worst: " + std::to_string(most));
  CHECK(std::isfinite(most), what);
}

void test_every_part(const std::vector<std::pair<std::string, std::string>>& configs) {
  for (const auto& [name, config] : configs) {
    for (const Format& format : kFormats) {
      std::pair<Wanted, Wanted> wanted;
      for (infinilm::cpu::Isa isa : available_isas()) {
        setenv("INFINILM_CPU_ISA", isa_name(isa), 1);
        const Backend backend(3);
        Model model(backend, config, format.dtype, format.quantization);
        load(model);
        model.create_cache(16);
        if (wanted.first.empty()) wanted = expected(config, model, format);
        const auto got = run_ragged(model);
        const std::string what = name + ", " + format.name + ", " + isa_name(isa);
        check_rows(got.first, wanted.first, format.bound, what);
        check_rows(got.second, wanted.second, format.bound, what);
      }
    }
  }
  unsetenv("INFINILM_CPU_ISA");
}

// A context that is cut into parts, which several threads attend and one of them joins.
void test_a_long_context(const std::vector<std::pair<std::string, std::string>>& configs) {
  constexpr int64_t kLength = 620;
  for (const auto& [name, config] : configs) {
    if (name != "llama" && name != "windows of some layers") continue;
    const Backend backend(4);
    Model model(backend, config);
    load(model);
    model.create_cache(48);
    Sequence sequence = random_sequence(kLength, 3, 4);
    const auto parsed = infinilm::cpu::parse_decoder_config(config);
    const Wanted wanted = reference::logits(parsed, weights_of(model.parameters(), kFormats[0], false), sequence.tokens, kLength);
    Logits got;
    for (int64_t count : {590, 1, 1, 10, 1, 17}) {
      Batch batch(48);
      batch.add(sequence, count);
      const Logits rows = model.forward(batch, kVocabSize);
      got.insert(got.end(), rows.begin(), rows.end());
    }
    const std::string what = name + ", a long context";
    check_rows(Logits(got.begin(), got.begin() + 590), wanted, 5e-6, what);
    check_rows(Logits(got.begin() + 590, got.end()), Wanted(wanted.begin() + 590, wanted.end()), 5e-6, what + ", cut");
  }
}

}  // namespace

int main() {
  const auto configs = all_configs();
  test_a_long_context(configs);
  test_every_part(configs);
  return finish();
}
