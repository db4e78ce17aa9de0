// What the cpu backend runs, and the words in which it says no.
#pragma once

#include "decoder_config.h"
#include "infinilm/backend.h"
#include "model.h"

namespace infinilm::cpu {

struct Request {
  DecoderConfig config;
  ModelOptions options;
};

// Throws infinilm::Unsupported with the reason a user reads.
Request read_request(const infinilm_model_request& request);

}  // namespace infinilm::cpu
