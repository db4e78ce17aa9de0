// Small decoders as JSON, that between them have every part there is, and numbers to fill them with. No size is a
// multiple of another.
#pragma once

#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "driver.h"

namespace decoders {

using namespace driver;

struct Parts {
  std::string mixer = "\"num_heads\": 6, \"num_kv_heads\": 2, \"head_dim\": 10, \"rope\": {}";
  std::string mlp = "\"kind\": \"mlp\", \"intermediate_size\": 43";
  std::string norms = "\"before_mixer\": {}, \"before_mlp\": {}";
  std::string embedding, logits, final_norm;
  int num_layers = 2;
};

constexpr int64_t kVocabSize = 31, kHiddenSize = 37;

inline std::string layer_of(const Parts& parts) {
  return "{\"mixer\": {\"kind\": \"attention\", " + parts.mixer + "}, \"norms\": {" + parts.norms + "}" +
         (parts.mlp.empty() ? "" : ", \"mlp\": {" + parts.mlp + "}") + "}";
}

inline std::string config_of(const Parts& parts, const std::string& first_layers = "") {
  std::string layers = first_layers;
  for (int i = 0; i < parts.num_layers; ++i) layers += (layers.empty() ? "" : ", ") + layer_of(parts);
  return "{\"model_type\": \"test\", \"vocab_size\": 31, \"hidden_size\": 37, \"max_position_embeddings\": 1024, "
         "\"embedding\": {" + parts.embedding + "}, \"final_norm\": {" + parts.final_norm + "}, \"logits\": {" +
         parts.logits + "}, \"layers\": [" + layers + "]}";
}

inline std::string heads(const std::string& rest) {
  return "\"num_heads\": 6, \"num_kv_heads\": 2, \"head_dim\": 10" + (rest.empty() ? "" : ", " + rest);
}

inline std::string rope(const std::string& scaling) {
  return heads("\"rope\": {\"theta\": 500.0, \"scaling\": {" + scaling + "}}");
}

inline const std::string kOffset = "{\"offset\": 1.0}", kLayerNorm = "{\"kind\": \"layer\", \"eps\": 1e-05, \"bias\": true}";

inline std::vector<std::pair<std::string, std::string>> all_configs() {
  const Parts plain;
  std::vector<std::pair<std::string, std::string>> all;
  const auto add = [&](const char* name, const std::function<void(Parts&)>& change) {
    Parts parts;
    change(parts);
    all.emplace_back(name, config_of(parts));
  };
  add("llama", [](Parts&) {});
  add("tied", [](Parts& parts) { parts.embedding = "\"tied\": true"; });
  add("window", [](Parts& parts) { parts.mixer = heads("\"rope\": {}, \"sliding_window\": 20"); });
  add("query and key norms", [](Parts& parts) { parts.mixer = heads("\"rope\": {}, \"query_key_norm\": {\"eps\": 1e-05}"); });
  add("odd heads", [](Parts& parts) { parts.mixer = "\"num_heads\": 5, \"num_kv_heads\": 1, \"head_dim\": 7"; });
  add("wide heads", [](Parts& parts) { parts.mixer = "\"num_heads\": 2, \"num_kv_heads\": 1, \"head_dim\": 80, \"rope\": {}"; });
  add("many heads", [](Parts& parts) { parts.mixer = "\"num_heads\": 50, \"num_kv_heads\": 1, \"head_dim\": 4, \"rope\": {}"; });
  add("linear", [](Parts& parts) { parts.mixer = rope("\"kind\": \"linear\", \"factor\": 3.0"); });
  add("dynamic", [](Parts& parts) {
    parts.mixer = rope("\"kind\": \"dynamic\", \"factor\": 2.0, \"original_max_position_embeddings\": 48");
  });
  add("llama3", [](Parts& parts) {
    parts.mixer = rope("\"kind\": \"llama3\", \"factor\": 8.0, \"original_max_position_embeddings\": 64, "
                       "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0");
  });
  add("yarn", [](Parts& parts) {
    parts.mixer = rope("\"kind\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 32, "
                       "\"attention_factor\": 1.14");
  });
  add("yarn untruncated", [](Parts& parts) {
    parts.mixer = rope("\"kind\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 32, "
                       "\"attention_factor\": 0.9, \"beta_fast\": 20.0, \"beta_slow\": 2.0, \"truncate\": false");
  });
  add("yarn over all pairs", [](Parts& parts) {
    parts.mixer = rope("\"kind\": \"yarn\", \"factor\": 4.0, \"original_max_position_embeddings\": 4096, "
                       "\"attention_factor\": 1.0, \"beta_fast\": 600.0");
  });
  add("gpt2", [](Parts& parts) {
    parts.mixer = heads("\"qkv_bias\": true, \"output_bias\": true");
    parts.mlp = "\"kind\": \"mlp\", \"intermediate_size\": 43, \"activation\": \"gelu_tanh\", \"bias\": true, \"gated\": false";
    parts.norms = "\"before_mixer\": " + kLayerNorm + ", \"before_mlp\": " + kLayerNorm;
    parts.final_norm = "\"kind\": \"layer\", \"bias\": true";
    parts.embedding = "\"tied\": true, \"num_positions\": 512";
  });
  add("gemma2", [](Parts& parts) {
    parts.mixer = heads("\"rope\": {}, \"softcap\": 5.0, \"scale\": 0.25");
    parts.mlp = "\"kind\": \"mlp\", \"intermediate_size\": 43, \"activation\": \"gelu_tanh\"";
    parts.norms = "\"before_mixer\": " + kOffset + ", \"after_mixer\": " + kOffset + ", \"before_mlp\": " + kOffset +
                  ", \"after_mlp\": " + kOffset;
    parts.final_norm = "\"offset\": 1.0";
    parts.embedding = "\"tied\": true, \"scale\": 6.0";
    parts.logits = "\"softcap\": 3.0";
  });
  add("biases, norms after, gelu, logits scaled", [](Parts& parts) {
    parts.mixer = heads("\"rope\": {}, \"qkv_bias\": true");
    parts.mlp = "\"kind\": \"mlp\", \"intermediate_size\": 43, \"bias\": true, \"activation\": \"gelu\"";
    parts.norms = "\"after_mixer\": {}, \"after_mlp\": {\"bias\": true}";
    parts.logits = "\"scale\": 0.125";
  });
  add("relu, not gated", [](Parts& parts) {
    parts.mlp = "\"kind\": \"mlp\", \"intermediate_size\": 43, \"activation\": \"relu\", \"gated\": false";
  });
  add("few experts", [](Parts& parts) {
    parts.mlp = "\"kind\": \"moe\", \"num_experts\": 5, \"experts_per_token\": 2, \"intermediate_size\": 19";
  });
  add("many experts, normalised, norm after", [](Parts& parts) {
    parts.mlp = "\"kind\": \"moe\", \"num_experts\": 130, \"experts_per_token\": 3, \"intermediate_size\": 19, \"normalize\": true";
    parts.norms += ", \"after_mlp\": {}";
  });
  add("no MLP", [](Parts& parts) { parts.mlp = ""; });
  add("no layers", [](Parts& parts) { parts.num_layers = 0; });
  Parts windowed;
  windowed.mixer = heads("\"rope\": {}, \"softcap\": 2.0, \"sliding_window\": 21");
  all.emplace_back("windows of some layers",
                   config_of(plain, layer_of(windowed) + ", {\"mixer\": {\"kind\": \"attention\", \"num_heads\": 4, "
                                    "\"num_kv_heads\": 4, \"head_dim\": 18}, \"norms\": {\"before_mixer\": {}}}"));
  return all;
}

inline std::vector<float> random_floats(int64_t size, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0, 0.5f);
  std::vector<float> values(size);
  for (float& value : values) value = normal(generator);
  return values;
}

inline std::vector<float> random_weights(int64_t index, const Given& given) {
  return random_floats(given.num_elements(), static_cast<uint32_t>(index + 1));
}

// Open everything, have several threads fill it, close it.
inline void load(Model& model) {
  const std::vector<Given> parameters = model.parameters();
  std::vector<Buffer> buffers(parameters.size());
  const bool is_bf16 = [&] {
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (parameters[i].tied_to.empty()) buffers[i] = model.open(static_cast<int64_t>(i));
    }
    return buffers[0]->dl_tensor.dtype.bits == 16;
  }();
  std::vector<std::thread> threads;
  for (size_t thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      for (size_t i = thread; i < parameters.size(); i += 3) {
        if (buffers[i] == nullptr) continue;
        const std::vector<float> values = random_weights(static_cast<int64_t>(i), parameters[i]);
        write_floats(*buffers[i], is_bf16, values);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = parameters.size(); i-- > 0;) {
    if (buffers[i] == nullptr) continue;
    model.close(static_cast<int64_t>(i));
    buffers[i].reset();
  }
  model.loading_done();
}

inline Sequence random_sequence(int64_t length, uint32_t seed, int32_t first_block) {
  std::mt19937 generator(seed);
  Sequence sequence;
  sequence.prompt_length = length;
  for (int64_t i = 0; i < length; ++i) sequence.tokens.push_back(static_cast<int32_t>(generator() % kVocabSize));
  for (int64_t block = (length + 15) / 16; block-- > 0;) {
    sequence.blocks.push_back(first_block + static_cast<int32_t>(block));  // backwards
  }
  return sequence;
}

constexpr int64_t kLong = 75, kShort = 39;

// Two sequences through the same steps: a prompt in chunks, single tokens, few and many, one of them waiting at times.
inline std::pair<Logits, Logits> run_ragged(Model& model) {
  Sequence one = random_sequence(kLong, 1, 0), two = random_sequence(kShort, 2, 8);
  std::pair<Logits, Logits> got;
  for (const auto& [first, second] : {std::pair(40, 0), {1, 20}, {2, 1}, {7, 0}, {0, 17}, {25, 1}}) {
    Batch batch(8);
    if (second) batch.add(two, second);
    if (first) batch.add(one, first);
    const auto rows = model.forward(batch, kVocabSize);
    got.second.insert(got.second.end(), rows.begin(), rows.begin() + second);
    got.first.insert(got.first.end(), rows.begin() + second, rows.end());
  }
  return got;
}

}  // namespace decoders
