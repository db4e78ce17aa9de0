#include "rope.h"

#include <algorithm>
#include <cmath>

namespace infinilm::cpu {

namespace {

constexpr double kPi = 3.14159265358979323846;

// How much of a frequency is kept, the rest divided by the factor (1: all).
float blended(float frequency, double kept, double factor) {
  return frequency * static_cast<float>(kept + (1 - kept) / factor);
}

// Between which two pairs yarn blends: arXiv:2309.00071, section 3.2.
void yarn_range(const RopeConfig& rope, int64_t head_dim, double* first, double* last) {
  const auto pair = [&](double turns) {
    const double wavelength = rope.original_max_position_embeddings / (2 * kPi * turns);
    return head_dim * std::log(wavelength) / (2 * std::log(rope.theta));
  };
  *first = pair(rope.beta_fast);
  *last = pair(rope.beta_slow);
  if (rope.truncate) {
    *first = std::floor(*first);
    *last = std::ceil(*last);
  }
  *first = std::max(*first, 0.0);
  *last = std::min(*last, static_cast<double>(head_dim - 1));
  if (*first == *last) *last += 0.001;
}

}  // namespace

Rotary::Rotary(const RopeConfig& config, int64_t head_dim)
    : config_(config), head_dim_(head_dim), exponents_(head_dim / 2), frequencies_(head_dim / 2) {
  double first = 0, last = 0;
  if (config.scaling == RopeScaling::kYarn) yarn_range(config, head_dim, &first, &last);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    exponents_[i] = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    float& frequency = frequencies_[i];
    frequency = 1.0f / std::pow(static_cast<float>(config.theta), exponents_[i]);
    if (config.scaling == RopeScaling::kLinear) frequency /= static_cast<float>(config.factor);
    if (config.scaling == RopeScaling::kLlama3) {
      const double turns = config.original_max_position_embeddings * static_cast<double>(frequency) / (2 * kPi);
      const double low = config.low_freq_factor, high = config.high_freq_factor;
      frequency = blended(frequency, std::clamp((turns - low) / (high - low), 0.0, 1.0), config.factor);
    }
    if (config.scaling == RopeScaling::kYarn) {
      const double kept = 1 - std::clamp((static_cast<double>(i) - first) / (last - first), 0.0, 1.0);
      frequency = blended(frequency, kept, config.factor);
    }
  }
}

void Rotary::rotation(int64_t position, int64_t length, float* cosines, float* sines) const {
  const bool is_dynamic =
      config_.scaling == RopeScaling::kDynamic && length > config_.original_max_position_embeddings;
  const float base = is_dynamic ? dynamic_base(length) : 0;
  const float magnitude = config_.scaling == RopeScaling::kYarn ? static_cast<float>(config_.attention_factor) : 1.0f;
  for (size_t i = 0; i < frequencies_.size(); ++i) {
    const float frequency = is_dynamic ? 1.0f / std::pow(base, exponents_[i]) : frequencies_[i];
    const float angle = static_cast<float>(position) * frequency;
    cosines[i] = std::cos(angle) * magnitude;
    sines[i] = std::sin(angle) * magnitude;
  }
}

// The base grows with the sequence: DynamicRopeScaling of the contract.
float Rotary::dynamic_base(int64_t length) const {
  const double growth = config_.factor * length / config_.original_max_position_embeddings - (config_.factor - 1);
  const double exponent = static_cast<double>(head_dim_) / static_cast<double>(head_dim_ - 2);
  return static_cast<float>(config_.theta * std::pow(growth, exponent));
}

}  // namespace infinilm::cpu
