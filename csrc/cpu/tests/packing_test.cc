// What integers are chosen for weights, on every level this machine has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/kernels.h"
#include "matrices.h"
#include "packed_matrix.h"

using namespace infinilm::cpu;

namespace {

// Of all scales that map the largest weight to a level, the one that is chosen is not worse than the plainest.
void test_int4_error(const Kernels& kernels) {
  for (int64_t group : {32, 128}) {
    double chosen = 0, plain = 0;
    for (int round = 0; round < 50; ++round) {
      const std::vector<float> x = random_floats(group);
      float peak = 0;
      for (float value : x) peak = std::max(peak, std::fabs(value));
      Arena arena;
      const PackedMatrix matrix = packed(kernels, {"", {WeightFormat::kI4, group}}, x, 1, group, arena);
      std::vector<float> kept(group);
      matrix.unpack_row(0, kept.data());
      for (int64_t i = 0; i < group; ++i) {
        chosen += std::pow(x[i] - kept[i], 2);
        plain += std::pow(x[i] - std::nearbyint(x[i] / peak * 7) * peak / 7, 2);
      }
    }
    CHECK(chosen < 0.9 * plain, std::string(isa_name(kernels.isa)) + ": " + std::to_string(chosen / plain));
  }
}

// Scales are numbers that fp16 has, down to its subnormal ones and up to its largest.
void test_scales(const Kernels& kernels) {
  for (float peak : {2e-6f, 2e-5f, 1e-3f, 1.0f, 1e5f, 1e6f, 1e7f, 1e9f}) {
    std::vector<float> x = random_floats(32, peak / 4);
    x[5] = peak;
    for (float& value : x) value = std::clamp(value, -peak, peak);
    for (const Case& kind : kCases) {
      if (kind.packing.group != 32) continue;
      const std::string what = std::string(isa_name(kernels.isa)) + " " + kind.name + " of " + std::to_string(peak);
      Arena arena;
      const PackedMatrix matrix = packed(kernels, kind, x, 1, 32, arena);
      std::vector<float> kept(32);
      matrix.unpack_row(0, kept.data());
      uint16_t half;
      std::memcpy(&half, matrix.panel(0).data, 2);
      const double scale = std::fabs(half_to_float(half));
      if (kind.packing.format == WeightFormat::kI4) {
        CHECK(scale >= std::min(peak / 10, 65504.0f) - 0x1p-25f, what + ": " + std::to_string(scale));
        continue;
      }
      CHECK(std::fabs(scale - std::min(peak / 127, 65504.0f)) <= std::max(0x1p-25, scale * 0x1p-11), what);
      for (int i = 0; i < 32; ++i) {
        const double bound = 0.5001 * scale + std::max(std::fabs(x[i]) - 127.0 * scale, 0.0);
        CHECK(std::fabs(x[i] - static_cast<double>(kept[i])) <= bound, what);
      }
    }
  }
}

// A checkpoint becomes the same bytes whatever packs it: its answers must not depend on the processor. Of int4 that
// holds for bf16 only, whose products with levels are exact.
void test_levels_pack_the_same(const Case& kind, bool is_bf16, int64_t num_rows, int64_t num_features) {
  const std::vector<float> values = random_floats(num_rows * num_features);
  std::vector<uint16_t> halves(values.size());
  std::transform(values.begin(), values.end(), halves.begin(), float_to_bf16);
  const void* data = is_bf16 ? static_cast<const void*>(halves.data()) : values.data();
  std::vector<std::byte> wanted;
  for (Isa isa : available_isas()) {
    Arena arena;
    PackedMatrix matrix(kernels_for(isa), kind.packing, 1, num_features, arena);
    matrix.take_memory();
    matrix.pack_block({static_cast<const std::byte*>(data), is_bf16}, num_rows, 0, 0);
    const Panel panel = matrix.panel(0);
    const std::vector<std::byte> got(panel.data, panel.data + panel.stride);
    if (wanted.empty()) wanted = got;
    CHECK(got == wanted, std::string(isa_name(isa)) + " " + kind.name + (is_bf16 ? " of bf16, " : " of f32, ") +
                             std::to_string(num_rows) + " by " + std::to_string(num_features));
  }
}

}  // namespace

int main() {
  for (Isa isa : available_isas()) {
    test_int4_error(kernels_for(isa));
    test_scales(kernels_for(isa));
  }
  for (const Case& kind : kCases) {
    for (int64_t num_rows : {1, 7, 16}) {
      for (int64_t num_features : {1, 31, 64, 97, 131, 896, 1501}) {
        if (kind.packing.format != WeightFormat::kF32) test_levels_pack_the_same(kind, true, num_rows, num_features);
        if (kind.packing.format == WeightFormat::kBf16 || kind.packing.format == WeightFormat::kI4) continue;
        test_levels_pack_the_same(kind, false, num_rows, num_features);
      }
    }
  }
  return finish();
}
