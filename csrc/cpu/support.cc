#include "support.h"

#include <string>

#include "infinilm/backend.hpp"

namespace infinilm::cpu {

namespace {

constexpr char kHalf[] = "float16";
constexpr int64_t kInt8Group = 32, kShortInt4Group = 32, kLongInt4Group = 128;

std::string quoted(const char* text) { return "'" + std::string(text) + "'"; }

ModelOptions read_options(const infinilm_model_request& request) {
  ModelOptions options;
  const std::string dtype = request.dtype;
  if (dtype != "float32" && dtype != "bfloat16" && dtype != kHalf) {
    throw Unsupported("the cpu backend computes in float32 or bfloat16, not in " + quoted(request.dtype));
  }
  options.is_bf16 = dtype == "bfloat16";
  options.packing.format = options.is_bf16 ? WeightFormat::kBf16 : WeightFormat::kF32;
  options.head_packing = options.packing;
  if (request.quantization == nullptr) return options;
  const std::string quantization = request.quantization;
  if (quantization == "int8") {
    options.packing = {WeightFormat::kI8, kInt8Group};
  } else if (quantization == "int4" || quantization == "int4-g32") {
    options.packing = {WeightFormat::kI4, kShortInt4Group};
  } else if (quantization == "int4-g128") {
    options.packing = {WeightFormat::kI4, kLongInt4Group};
  } else {
    throw Unsupported("the cpu backend quantizes to int8, int4, int4-g32 or int4-g128, not to " +
                      quoted(request.quantization));
  }
  // The output projection decides between tokens: with sixteen levels it decides otherwise too often.
  options.head_packing = {WeightFormat::kI8, kInt8Group};
  return options;
}

}  // namespace

Request read_request(const infinilm_model_request& request) {
  if (std::string(request.device).compare(0, 3, "cpu") != 0) {
    throw Unsupported("the cpu backend runs on the device 'cpu', not on " + quoted(request.device));
  }
  Request read{{}, read_options(request)};
  // Who asks for a quantization gets that one: what is stored otherwise is dequantized for it.
  if (request.stored_quantization != nullptr && request.quantization == nullptr) {
    read.options.stored = StoredWeights(request.stored_quantization);
  }
  // Integers are multiplied alike whatever the dtype, and the few matrices that are left may be float32. A model that
  // has none would take twice the memory it was stored in.
  if (std::string(request.dtype) == kHalf && request.quantization == nullptr && read.options.stored.is_empty()) {
    throw Unsupported("the cpu backend computes in float32 or bfloat16, and runs a model in 'float16' only where its "
                      "weights are integers; ask for bfloat16, or for a quantization");
  }
  read.config = parse_decoder_config(request.config);
  const int64_t num_positions = read.config.num_positions;
  if (num_positions && request.max_model_len > num_positions) {
    throw Unsupported("the cpu backend finds " + std::to_string(num_positions) +
                      " positions in this model, and max_model_len is " + std::to_string(request.max_model_len));
  }
  return read;
}

}  // namespace infinilm::cpu
