// What happens to activations between products, row by row.

void to_bf16(const float* x, int64_t size, uint16_t* out) {
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    // Rounding up the payload of a NaN could make it an infinity.
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out[i] = static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
  }
}

void to_bf16_pairs(const float* x, int64_t size, uint16_t* high, uint16_t* low) {
  constexpr int64_t kPart = 256;
  float rest[kPart];
  to_bf16(x, size, high);
  for (int64_t begin = 0; begin < size; begin += kPart) {
    const int64_t part = std::min(kPart, size - begin);
    for (int64_t i = 0; i < part; ++i) {
      const uint32_t bits = static_cast<uint32_t>(high[begin + i]) << 16;
      float rounded;
      std::memcpy(&rounded, &bits, 4);
      rest[i] = x[begin + i] - rounded;
    }
    to_bf16(rest, part, low + begin);
  }
}

void to_i8(const float* x, int64_t size, int8_t* out, float* scales, int32_t* sums) {
  for (int64_t group = 0; group < size / kGroup; ++group, x += kGroup, out += kGroup) {
    VF peak = VF{};
    for (int i = 0; i < kGroup; i += kWidth) peak = max(peak, magnitude(load(x + i)));
    const float most = largest(peak);
    const float inverse = most > 0 ? 127.0f / most : 0;
    int32_t total = 0;
    for (int i = 0; i < kGroup; i += kWidth) {
      const VI rounded = as_bits(load(x + i) * inverse + kRounder) - kRounderBits;
      for (int j = 0; j < kWidth; ++j) {
        out[i + j] = static_cast<int8_t>(rounded[j]);
        total += rounded[j];
      }
    }
    scales[group] = most / 127.0f;
    sums[group] = total;
  }
}

// Levels of 15 bits, 127 * 128 either way, as a high byte of at most 127 and a low one of at most 64.
void to_i8_pairs(const float* x, int64_t size, int8_t* out, float* scales, int32_t* sums) {
  constexpr float kMost = 127 * 128;
  for (int64_t group = 0; group < size / kGroup; ++group, x += kGroup, out += 2 * kGroup) {
    VF peak = VF{};
    for (int i = 0; i < kGroup; i += kWidth) peak = max(peak, magnitude(load(x + i)));
    const float most = largest(peak);
    const float inverse = most > 0 ? kMost / most : 0;
    int32_t total = 0;
    for (int i = 0; i < kGroup; i += kWidth) {
      const VI rounded = as_bits(load(x + i) * inverse + kRounder) - kRounderBits;
      const VI high = (rounded + 64) >> 7, low = rounded - (high << 7);
      for (int j = 0; j < kWidth; ++j) {
        out[i + j] = static_cast<int8_t>(high[j]);
        out[kGroup + i + j] = static_cast<int8_t>(low[j]);
        total += rounded[j];
      }
    }
    scales[group] = most / kMost;
    sums[group] = total;
  }
}

// Call body(position, vector in, lanes) over `size` floats; the last vector may be partly filled.
template <class Body>
INFINILM_INLINE void map(const float* x, const float* y, int64_t size, float* out, const Body& body) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) store(out + i, body(load(x + i), load(y + i)));
  if (i == size) return;
  float rest_x[kWidth] = {}, rest_y[kWidth] = {};
  std::memcpy(rest_x, x + i, (size - i) * 4);
  std::memcpy(rest_y, y + i, (size - i) * 4);
  store(rest_x, body(load(rest_x), load(rest_y)));
  std::memcpy(out + i, rest_x, (size - i) * 4);
}

INFINILM_INLINE float sum_of_squares(const float* x, int64_t size, float mean) {
  VF total[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
    const VF first = load(x + i) - mean, second = load(x + i + kWidth) - mean;
    total[0] += first * first;
    total[1] += second * second;
  }
  float rest = 0;
  for (; i < size; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return sum(total[0] + total[1]) + rest;
}

INFINILM_INLINE float sum_of(const float* x, int64_t size) {
  VF total = {};
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) total += load(x + i);
  float rest = 0;
  for (; i < size; ++i) rest += x[i];
  return sum(total) + rest;
}

INFINILM_INLINE void apply_norm(const float* x, int64_t size, float mean, float factor, const float* weight,
                                const float* bias, float* out) {
  map(x, weight, size, out, [=](VF value, VF w) { return (value - mean) * factor * w; });
  if (bias != nullptr) map(out, bias, size, out, [](VF value, VF b) { return value + b; });
}

void rms_norm(const float* x, int64_t size, const float* weight, const float* bias, float eps, float* out) {
  const float mean_square = sum_of_squares(x, size, 0) / static_cast<float>(size);
  apply_norm(x, size, 0, 1 / std::sqrt(mean_square + eps), weight, bias, out);
}

void layer_norm(const float* x, int64_t size, const float* weight, const float* bias, float eps, float* out) {
  const float mean = sum_of(x, size) / static_cast<float>(size);
  const float variance = sum_of_squares(x, size, mean) / static_cast<float>(size);
  apply_norm(x, size, mean, 1 / std::sqrt(variance + eps), weight, bias, out);
}

INFINILM_INLINE VF silu(VF x) { return x / (1.0f + exp(-x)); }
INFINILM_INLINE VF gelu(VF x) { return 0.5f * x * (1.0f + erf(x * 0.707106781f)); }
INFINILM_INLINE VF gelu_tanh(VF x) { return 0.5f * x * (1.0f + tanh(0.797884561f * (x + 0.044715f * x * x * x))); }
INFINILM_INLINE VF relu(VF x) { return max(x, VF{}); }

// Call body(function) with the function an activation stands for.
template <class Body>
INFINILM_INLINE void with_function(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kSilu: return body([](VF x) { return silu(x); });
    case Activation::kGelu: return body([](VF x) { return gelu(x); });
    case Activation::kGeluTanh: return body([](VF x) { return gelu_tanh(x); });
    case Activation::kRelu: return body([](VF x) { return relu(x); });
  }
}

void activate(Activation activation, const float* x, int64_t size, float* out) {
  with_function(activation, [=](auto function) { map(x, x, size, out, [=](VF value, VF) { return function(value); }); });
}

void activate_pairs(Activation activation, const float* pairs, int64_t num_pairs, float* out) {
  with_function(activation, [=](auto function) {
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      for (int64_t i = 0; i < kBlock; i += kWidth) {
        const float* gate = pairs + pair * 2 * kBlock + i;
        store(out + pair * kBlock + i, function(load(gate)) * load(gate + kBlock));
      }
    }
  });
}

void softcap(float* x, int64_t size, float scale, float cap) {
  const float inner = scale / cap;
  map(x, x, size, x, [=](VF value, VF) { return tanh(value * inner) * cap; });
}

void rotate(float* head, int64_t head_dim, const float* cosines, const float* sines) {
  const int64_t half = head_dim / 2;
  float *first = head, *second = head + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = first[i], b = second[i];
    first[i] = a * cosines[i] - b * sines[i];
    second[i] = b * cosines[i] + a * sines[i];
  }
}

void add(float* x, const float* y, int64_t size, float factor) {
  map(x, y, size, x, [=](VF a, VF b) { return a + b * factor; });
}
