// A decoder in double precision, written down as plainly as it can be: the oracle of model_test. It knows no cache, no
// threads and no packing, and computes a whole sequence at once.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "decoder_config.h"

namespace reference {

using Row = std::vector<double>;

// Every parameter by its canonical name; matrices are row-major, (out_features, in_features).
using Weights = std::map<std::string, Row>;

// The logits of every token. `prompt_length` is what dynamic rope scaling counts as the length of the first tokens.
std::vector<Row> logits(const infinilm::cpu::DecoderConfig& config, const Weights& weights,
                        const std::vector<int32_t>& tokens, int64_t prompt_length);

}  // namespace reference
