// Packing: rows of weights as a checkpoint has them into blocks as gemm.inl reads them. A lane is an output feature all
// the way: squares of 16 rows by 16 words are transposed as they are read, and what follows has no sums across lanes.

typedef uint32_t VU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kWidth * 2)));

constexpr int kSections = kBlock / kWidth;  // vectors that hold a word of every row
constexpr int64_t kSquareBytes = 64;        // of a row in a square
constexpr int64_t kFetchAhead = 256;        // bytes of every row

// Lanes with bit kStep set are those of b that lie kStep before, the others those of a.
template <int kStep, int... kLane>
INFINILM_INLINE VI lower_lanes(VI a, VI b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane & kStep ? kWidth + kLane - kStep : kLane)...);
}

// Lanes with bit kStep set are those of b, the others those of a that lie kStep behind.
template <int kStep, int... kLane>
INFINILM_INLINE VI upper_lanes(VI a, VI b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane & kStep ? kWidth + kLane : kLane + kStep)...);
}

// Transpose kWidth vectors, by halves, quarters and so on.
template <int kStep = kWidth / 2>
INFINILM_INLINE void transpose(VI* rows) {
  constexpr auto kLanes = std::make_integer_sequence<int, kWidth>();
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    const VI a = rows[i], b = rows[i + kStep];
    rows[i] = lower_lanes<kStep>(a, b, kLanes);
    rows[i + kStep] = upper_lanes<kStep>(a, b, kLanes);
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(rows);
}

// The 64 bytes of each row from `begin` on, as [section][word]; what is not there is zero.
INFINILM_INLINE void read_square(const SourceRows& source, int64_t begin, VI (*square)[kBlock]) {
  const int64_t row_bytes = source.row_bytes();
  const std::byte* rows = source.data + begin;
  int64_t stride = row_bytes;
  // Sixteen rows at a time are more than the processor foresees, above all where they end.
  const int64_t ahead = begin + kFetchAhead;
  const std::byte* next = source.data + (ahead < row_bytes ? ahead : ahead + (kBlock - 1) * row_bytes);
#pragma GCC unroll 16
  for (int n = 0; n < kBlock; ++n) __builtin_prefetch(next + n * row_bytes);
  alignas(64) std::byte copy[kBlock * kSquareBytes];
  if (source.num_rows < kBlock || begin + kSquareBytes > row_bytes || row_bytes % 4) {
    std::memset(copy, 0, sizeof(copy));
    const int64_t size = std::min(kSquareBytes, row_bytes - begin);
    for (int64_t n = 0; n < source.num_rows && size > 0; ++n) {
      std::memcpy(copy + n * kSquareBytes, rows + n * row_bytes, size);
    }
    rows = copy;
    stride = kSquareBytes;
  }
  for (int section = 0; section < kSections; ++section) {
    for (int word = 0; word < kBlock; word += kWidth) {
      VI* tile = square[section] + word;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) tile[i] = load_bits(rows + (section * kWidth + i) * stride + word * 4);
      transpose(tile);
    }
  }
}

// f32 elements and pairs of bf16 are both words.
void pack_floats(const SourceRows& source, std::byte* out) {
  VI square[kSections][kBlock];
  const int64_t num_words = (source.row_bytes() + 3) / 4;
  for (int64_t first = 0; first < num_words; first += kBlock) {
    read_square(source, first * 4, square);
    const int64_t count = std::min(kBlock, num_words - first);
    for (int64_t word = 0; word < count; ++word) {
      for (int section = 0; section < kSections; ++section) {
        store(out + (first + word) * 64 + section * kWidth * 4, as_floats(square[section][word]));
      }
    }
  }
}

// `group` weights of every row from the feature `first` on, as [section][feature].
INFINILM_INLINE void read_group(const SourceRows& source, int64_t first, int64_t group, VF (*values)[kMaxGroup]) {
  VI square[kSections][kBlock];
  const int64_t element = source.is_bf16 ? 2 : 4;
  for (int64_t k = 0; k < group; k += kSquareBytes / element) {
    read_square(source, (first + k) * element, square);
    for (int section = 0; section < kSections; ++section) {
      for (int64_t word = 0; word < kBlock; ++word) {
        const VI bits = square[section][word];
        if (source.is_bf16) {
          values[section][k + 2 * word] = as_floats(bits << 16);
          values[section][k + 2 * word + 1] = as_floats(bits & static_cast<int32_t>(0xffff0000));
        } else {
          values[section][k + word] = as_floats(bits);
        }
      }
    }
  }
}

// To the nearest that fp16 has, within its limits. Below 2^-14 it has steps of 2^-24.
INFINILM_INLINE VF rounded_to_half(VF x) {
  const VU bits = reinterpret_cast<VU>(x);
  const VF normal = reinterpret_cast<VF>((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
  const VF small = (x * 0x1p24f + kRounder - kRounder) * 0x1p-24f;
  return min(max(magnitude(x) < 0x1p-14f ? small : normal, all(-65504.0f)), all(65504.0f));
}

// The bits of numbers that fp16 has.
INFINILM_INLINE void store_half(std::byte* out, VF x) {
  const VU bits = reinterpret_cast<VU>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  const VU normal = (rest >> 13) - (112 << 10);
  const VU small = reinterpret_cast<VU>(magnitude(x) * 0x1p24f + kRounder) - kRounderBits;
  const VU half = sign | (magnitude(x) < 0x1p-14f ? small : normal);
  const HalfBits narrow = __builtin_convertvector(half, HalfBits);
  std::memcpy(out, &narrow, sizeof(narrow));
}

INFINILM_INLINE VF inverse_of(VF scale) { return magnitude(scale) > 1e-30f ? 1.0f / scale : VF{}; }

// The bits of round(x), kept within [low, high], and something that words subtract.
INFINILM_INLINE VU level_bits(VF x, float low, float high) {
  return reinterpret_cast<VU>(min(max(x, all(low)), all(high)) + kRounder);
}

// 127 levels either way: the largest weight is one of them.
struct ToInt8 {
  static constexpr int64_t kWordFeatures = 4;

  static VF scale_of(const VF* x, int64_t group) {
    VF peak = {};
    for (int64_t k = 0; k < group; k += 4) {
      peak = max(max(max(magnitude(x[k]), magnitude(x[k + 1])), max(magnitude(x[k + 2]), magnitude(x[k + 3]))), peak);
    }
    return rounded_to_half(peak / 127.0f);
  }

  // One byte each: w + 128.
  static VU word_of(const VF* x, VF inverse) {
    VU word = {};
    for (int i = 0; i < 4; ++i) word += level_bits(x[i] * inverse, -127, 127) << (8 * i);
    return word - (kRounderBits - 128u) * 0x01010101u;
  }
};

// Sixteen levels are few: what the largest weight becomes is tried at three places, each time with the scale that then
// has the least squared error, which is sum(x * level) / sum(level^2). Levels are -8 to 7, so the sign of a scale says on
// which side there is one more.
struct ToInt4 {
  static constexpr int64_t kWordFeatures = 8;

  static VF scale_of(const VF* x, int64_t group) {
    constexpr float kPlaces[] = {-8.0f, -9.0f, 7.5f};
    constexpr int kNumPlaces = 3;
    VF most = {}, least = {};
    for (int64_t k = 0; k < group; k += 4) {  // pairs first: one result waits for the other
      most = max(max(max(x[k], x[k + 1]), max(x[k + 2], x[k + 3])), most);
      least = min(min(min(x[k], x[k + 1]), min(x[k + 2], x[k + 3])), least);
    }
    const VF per_peak = inverse_of(most > -least ? most : least);
    VF products[kNumPlaces] = {}, squares[kNumPlaces] = {};
    for (int64_t k = 0; k < group; ++k) {
#pragma GCC unroll 3
      for (int place = 0; place < kNumPlaces; ++place) {
        // Between product and sum, so that no level of Isa makes one rounding of both.
        VF clipped = min(x[k] * (per_peak * kPlaces[place]), all(7));
        if (kPlaces[place] < -8) clipped = max(clipped, all(-8));
        const VF level = clipped + kRounder - kRounder;
        products[place] += x[k] * level;
        squares[place] += level * level;
      }
    }
    // How much of sum(x^2) is no error is product^2 / square: compared without dividing.
    VF product = products[0], square = squares[0];
    for (int place = 1; place < kNumPlaces; ++place) {
      const VF other = products[place], other_square = squares[place];
      const auto is_better = other * other * square > product * product * other_square;
      product = is_better ? other : product;
      square = is_better ? other_square : square;
    }
    return rounded_to_half(product * inverse_of(square));
  }

  // Four bits each, w + 8: features 0 to 3 low in their bytes, 4 to 7 high.
  static VU word_of(const VF* x, VF inverse) {
    VU word = {};
    for (int i = 0; i < 8; ++i) word += level_bits(x[i] * inverse, -8, 7) << (i % 4 * 8 + i / 4 * 4);
    return word - (kRounderBits - 8u) * 0x11111111u;
  }
};

template <class Format>
void pack_integers(const SourceRows& source, int64_t depth, int64_t group, std::byte* out) {
  VF values[kSections][kMaxGroup];
  std::byte* words = out + scale_bytes(depth, group);
  for (int64_t first = 0; first < depth; first += group) {
    read_group(source, first, group, values);
    for (int section = 0; section < kSections; ++section) {
      const VF* x = values[section];
      const VF scale = Format::scale_of(x, group), inverse = inverse_of(scale);
      store_half(out + (first / group * kBlock + section * kWidth) * 2, scale);
      for (int64_t k = 0; k < group; k += Format::kWordFeatures) {
        const VU word = Format::word_of(x + k, inverse);
        store(words + (first + k) / Format::kWordFeatures * 64 + section * kWidth * 4, reinterpret_cast<VF>(word));
      }
    }
  }
}
