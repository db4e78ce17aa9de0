// Vectors of kWidth floats in the compiler's own terms, which it turns into the instructions of the level that includes
// this, and the few functions of them that models need. No include guard: every level has its own copy.

typedef float VF __attribute__((vector_size(kWidth * 4)));
typedef int32_t VI __attribute__((vector_size(kWidth * 4)));
typedef float UnalignedVF __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef int32_t UnalignedVI __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

#define INFINILM_INLINE static inline __attribute__((always_inline))

INFINILM_INLINE VF load(const void* p) { return *static_cast<const UnalignedVF*>(p); }
INFINILM_INLINE VI load_bits(const void* p) { return *static_cast<const UnalignedVI*>(p); }
INFINILM_INLINE float load_float(const void* p) {
  float x;
  std::memcpy(&x, p, 4);
  return x;
}
INFINILM_INLINE int32_t load_int(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
INFINILM_INLINE void store(void* p, VF x) { *static_cast<UnalignedVF*>(p) = x; }
// Less zero, not plus: that changes no x, so nothing is left of it but a broadcast.
INFINILM_INLINE VF all(float x) { return x - VF{}; }
INFINILM_INLINE VI all_bits(int32_t x) { return VI{} + x; }
INFINILM_INLINE VF as_floats(VI x) { return reinterpret_cast<VF>(x); }
INFINILM_INLINE VI as_bits(VF x) { return reinterpret_cast<VI>(x); }
INFINILM_INLINE VF max(VF x, VF y) { return x > y ? x : y; }
INFINILM_INLINE VF min(VF x, VF y) { return x < y ? x : y; }
INFINILM_INLINE VF magnitude(VF x) { return as_floats(as_bits(x) & 0x7fffffff); }

INFINILM_INLINE float sum(VF x) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

INFINILM_INLINE float largest(VF x) {
  float found = x[0];
  for (int i = 1; i < kWidth; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

// Adding this to a float below 2^22 rounds it to an integer, which is then in the low bits.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4b400000;

// e^x, within 2 units in the last place; 0 below the smallest normal float.
INFINILM_INLINE VF exp(VF x) {
  const VF clamped = min(max(x, all(-87.3f)), all(88.0f));
  const VF shifted = clamped * 1.44269504f + kRounder;
  const VF n = shifted - kRounder;
  const VF r = clamped - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
  // Cephes' polynomial for |r| <= ln(2) / 2.
  VF p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const VF power = as_floats((as_bits(shifted) - kRounderBits + 127) << 23);
  return x < all(-87.3f) ? VF{} : p * power;
}

INFINILM_INLINE VF tanh(VF x) {
  const VF t = exp(magnitude(x) * -2.0f);
  const VF result = (1.0f - t) / (1.0f + t);
  return x < VF{} ? -result : result;
}

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
INFINILM_INLINE VF erf(VF x) {
  const VF a = magnitude(x);
  const VF t = 1.0f / (1.0f + 0.3275911f * a);
  VF p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const VF result = 1.0f - p * t * exp(-a * a);
  return x < VF{} ? -result : result;
}
