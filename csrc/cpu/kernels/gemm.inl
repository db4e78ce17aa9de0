// Matrix products: tiles of a few rows by a few blocks of 16 output features, summed in registers over all input
// features. Every level includes this once, after vector.inl and its own dot4, dot_bf16 and load_half.

constexpr int kVectors = kBlock / kWidth;  // that make a block
constexpr int64_t kPrefetchAhead = 2048;   // bytes of weights, more than the processor does by itself

template <int R, int B>
struct Sums {
  VF at[R][B][kVectors];
};

// How one step of a product reads its operands. A step takes 64 bytes of each block's weights.

struct F32 {
  static constexpr int kStepDepth = 1;                    // input features
  static constexpr int kStepBytes = 4;                    // of a row
  static constexpr RowFormat kRows = RowFormat::kF32;

  template <int R, int B>
  INFINILM_INLINE void step(Sums<R, B>& sums, const std::byte* x, int64_t x_stride, const std::byte* w,
                            int64_t w_stride) {
    VF weights[B][kVectors];
    for (int b = 0; b < B; ++b) {
      for (int v = 0; v < kVectors; ++v) weights[b][v] = load(w + b * w_stride + v * kWidth * 4);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VF value = all(load_float(x + r * x_stride));
      for (int b = 0; b < B; ++b) {
        for (int v = 0; v < kVectors; ++v) sums.at[r][b][v] += weights[b][v] * value;
      }
    }
  }
};

// bf16 weights, [depth / 2][16][2], and f32 rows, for processors that do not multiply bf16.
struct Bf16Widened {
  static constexpr int kStepDepth = 2;
  static constexpr int kStepBytes = 8;
  static constexpr RowFormat kRows = RowFormat::kF32;

  template <int R, int B>
  INFINILM_INLINE void step(Sums<R, B>& sums, const std::byte* x, int64_t x_stride, const std::byte* w,
                            int64_t w_stride) {
    VF even[B][kVectors], odd[B][kVectors];
    for (int b = 0; b < B; ++b) {
      for (int v = 0; v < kVectors; ++v) {
        const VI pairs = load_bits(w + b * w_stride + v * kWidth * 4);
        even[b][v] = as_floats(pairs << 16);
        odd[b][v] = as_floats(pairs & static_cast<int32_t>(0xffff0000));
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VF first = all(load_float(x + r * x_stride)), second = all(load_float(x + r * x_stride + 4));
      for (int b = 0; b < B; ++b) {
        for (int v = 0; v < kVectors; ++v) {
          sums.at[r][b][v] += even[b][v] * first;
          sums.at[r][b][v] += odd[b][v] * second;
        }
      }
    }
  }
};

// bf16 weights and bf16 rows: pairs are multiplied and summed by one instruction.
struct Bf16Dot {
  static constexpr int kStepDepth = 2;
  static constexpr int kStepBytes = 4;
  static constexpr RowFormat kRows = RowFormat::kBf16;

  template <int R, int B>
  INFINILM_INLINE void step(Sums<R, B>& sums, const std::byte* x, int64_t x_stride, const std::byte* w,
                            int64_t w_stride) {
    VI weights[B][kVectors];
    for (int b = 0; b < B; ++b) {
      for (int v = 0; v < kVectors; ++v) weights[b][v] = load_bits(w + b * w_stride + v * kWidth * 4);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const VI pair = all_bits(load_int(x + r * x_stride));
      for (int b = 0; b < B; ++b) {
        for (int v = 0; v < kVectors; ++v) sums.at[r][b][v] = dot_bf16(sums.at[r][b][v], weights[b][v], pair);
      }
    }
  }
};

template <int R, int B>
INFINILM_INLINE void clear(Sums<R, B>& sums) {
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      for (int v = 0; v < kVectors; ++v) sums.at[r][b][v] = VF{};
    }
  }
}

template <int R, int B>
INFINILM_INLINE void load_sums(Sums<R, B>& sums, const float* out, int64_t out_stride) {
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      for (int v = 0; v < kVectors; ++v) sums.at[r][b][v] = load(out + r * out_stride + b * kBlock + v * kWidth);
    }
  }
}

template <int R, int B>
INFINILM_INLINE void store_sums(const Sums<R, B>& sums, float* out, int64_t out_stride) {
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + b * kBlock + v * kWidth, sums.at[r][b][v]);
    }
  }
}

// Add `num_steps` steps to `sums`. Few sums are kept several times, so that an addition need not wait for the last.
template <class Format, int R, int B>
INFINILM_INLINE void accumulate(Sums<R, B>& sums, const std::byte* x, int64_t x_stride, const std::byte* w,
                                int64_t w_stride, int64_t num_steps) {
  constexpr int kCopies = R * B * kVectors >= 6 ? 1 : R * B * kVectors >= 2 ? 2 : 4;
  int64_t step = 0;
  if constexpr (kCopies > 1) {
    Sums<R, B> copies[kCopies];
    for (int c = 0; c < kCopies; ++c) clear(copies[c]);
    for (; step + kCopies <= num_steps; step += kCopies) {
#pragma GCC unroll 4
      for (int c = 0; c < kCopies; ++c) {
        // Several runs of memory, read for few sums, the processor follows better when it is left alone.
        if (B == 1) __builtin_prefetch(w + (step + c) * 64 + kPrefetchAhead);
        Format::template step<R, B>(copies[c], x + (step + c) * Format::kStepBytes, x_stride, w + (step + c) * 64,
                                    w_stride);
      }
    }
    for (int c = 0; c < kCopies; ++c) {
      for (int r = 0; r < R; ++r) {
        for (int b = 0; b < B; ++b) {
          for (int v = 0; v < kVectors; ++v) sums.at[r][b][v] += copies[c].at[r][b][v];
        }
      }
    }
  }
  for (; step < num_steps; ++step) {
    for (int b = 0; b < B; ++b) __builtin_prefetch(w + b * w_stride + step * 64 + kPrefetchAhead);
    Format::template step<R, B>(sums, x + step * Format::kStepBytes, x_stride, w + step * 64, w_stride);
  }
}

// Steps whose rows stay in the first cache while the blocks of a unit pass by.
template <class Format>
constexpr int64_t kStepsAtOnce = 16384 / (12 * Format::kStepBytes);

// `depth` of the weights, of which this is the first part if `is_first`.
template <class Format, int R, int B>
void float_tile(const Rows& rows, const Panel& weights, bool is_first, float* out, int64_t out_stride) {
  Sums<R, B> sums;
  if (is_first) {
    clear(sums);
  } else {
    load_sums(sums, out, out_stride);
  }
  accumulate<Format, R, B>(sums, rows.data, rows.stride, weights.data, weights.stride,
                           weights.depth / Format::kStepDepth);
  store_sums(sums, out, out_stride);
}

// int8 weights w + 128, [depth / 4][16][4], against int8 rows. What 128 adds to a product is 128 times the sum of the
// row's group, so integer sums begin there.
struct Int8 {
  static constexpr int kGroupBytes = kGroup * kBlock;

  template <int R, int B>
  INFINILM_INLINE void group(VI (&sums)[R][B][kVectors], const std::byte* x, int64_t x_stride, const std::byte* w,
                             int64_t w_stride) {
#pragma GCC unroll 8
    for (int step = 0; step < kGroup / 4; ++step) {
      VI weights[B][kVectors];
      for (int b = 0; b < B; ++b) {
        for (int v = 0; v < kVectors; ++v) weights[b][v] = load_bits(w + b * w_stride + step * 64 + v * kWidth * 4);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const int32_t four = load_int(x + r * x_stride + step * 4);
        for (int b = 0; b < B; ++b) {
          for (int v = 0; v < kVectors; ++v) sums[r][b][v] = dot4(sums[r][b][v], weights[b][v], four);
        }
      }
    }
  }
  static constexpr int kOffset = 128;
  static constexpr bool kHasZeros = false;
  static constexpr int kHeaderBytes = 2;  // of a group and an output feature
  static constexpr int kRowBytes = kGroup;
};

// int4 weights w + 8, [depth / 8][16][4 bytes]: the low halves are the first four input features, the high ones the
// four behind them.
struct Int4 {
  static constexpr int kGroupBytes = kGroup * kBlock / 2;

  template <int R, int B>
  INFINILM_INLINE void group(VI (&sums)[R][B][kVectors], const std::byte* x, int64_t x_stride, const std::byte* w,
                             int64_t w_stride) {
#pragma GCC unroll 4
    for (int step = 0; step < kGroup / 8; ++step) {
      VI low[B][kVectors], high[B][kVectors];
      for (int b = 0; b < B; ++b) {
        for (int v = 0; v < kVectors; ++v) {
          const VI both = load_bits(w + b * w_stride + step * 64 + v * kWidth * 4);
          low[b][v] = both & 0x0f0f0f0f;
          high[b][v] = (both >> 4) & 0x0f0f0f0f;
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const int32_t first = load_int(x + r * x_stride + step * 8), second = load_int(x + r * x_stride + step * 8 + 4);
        for (int b = 0; b < B; ++b) {
          for (int v = 0; v < kVectors; ++v) {
            sums[r][b][v] = dot4(sums[r][b][v], low[b][v], first);
            sums[r][b][v] = dot4(sums[r][b][v], high[b][v], second);
          }
        }
      }
    }
  }
  static constexpr int kOffset = 8;
  static constexpr bool kHasZeros = false;
  static constexpr int kHeaderBytes = 2;
  static constexpr int kRowBytes = kGroup;
};

// int4 weights as Int4's, each with a zero that its group and output feature have, against levels of 15 bits: of what
// was quantized by somebody else as little as possible is to be lost, and few rows wait for memory anyway.
struct Int4Zero {
  static constexpr int kGroupBytes = Int4::kGroupBytes;

  template <int R, int B>
  INFINILM_INLINE void group(VI (&sums)[R][B][kVectors], const std::byte* x, int64_t x_stride, const std::byte* w,
                             int64_t w_stride) {
    Int4::group<R, B>(sums, x, x_stride, w, w_stride);
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) {
        for (int v = 0; v < kVectors; ++v) sums[r][b][v] <<= 7;
      }
    }
    Int4::group<R, B>(sums, x + kGroup, x_stride, w, w_stride);
  }
  static constexpr int kOffset = 0;
  static constexpr bool kHasZeros = true;
  static constexpr int kHeaderBytes = 3;
  static constexpr int kRowBytes = 2 * kGroup;
};

typedef uint8_t VB __attribute__((vector_size(kWidth)));
typedef uint8_t UnalignedVB __attribute__((vector_size(kWidth), aligned(1), may_alias));

INFINILM_INLINE VF load_bytes(const std::byte* p) {
  const VB bytes = *reinterpret_cast<const UnalignedVB*>(p);
  return __builtin_convertvector(__builtin_convertvector(bytes, VI), VF);
}

template <class Format, int R, int B>
void int_tile(const Rows& rows, const Panel& weights, bool, float* out, int64_t out_stride) {
  Sums<R, B> total;
  clear(total);
  const int64_t num_scales = weights.depth / weights.group;
  const int64_t header = (num_scales * kBlock * Format::kHeaderBytes + 63) / 64 * 64;
  const int64_t groups_per_scale = weights.group / kGroup;
  for (int64_t g = 0; g < weights.depth / kGroup; ++g) {
    const std::byte* w = weights.data + header + g * Format::kGroupBytes;
    if (R * B <= 4) {
      for (int b = 0; b < B; ++b) {
        for (int line = 0; line < Format::kGroupBytes; line += 64) {
          __builtin_prefetch(w + b * weights.stride + line + kPrefetchAhead);
        }
      }
    }
    VI sums[R][B][kVectors];
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) {
        for (int v = 0; v < kVectors; ++v) {
          sums[r][b][v] = all_bits(-Format::kOffset * rows.sums[r * rows.num_groups + g]);
        }
      }
    }
    Format::template group<R, B>(sums, rows.data + g * Format::kRowBytes, rows.stride, w, weights.stride);
    const std::byte* scales = weights.data + g / groups_per_scale * kBlock * 2;
    for (int b = 0; b < B; ++b) {
      for (int v = 0; v < kVectors; ++v) {
        const VF scale = load_half(scales + b * weights.stride + v * kWidth * 2);
        [[maybe_unused]] VF zero;
        if constexpr (Format::kHasZeros) {
          zero = load_bytes(weights.data + (num_scales * 2 + g / groups_per_scale) * kBlock + b * weights.stride +
                            v * kWidth);
        }
        for (int r = 0; r < R; ++r) {
          VF products = __builtin_convertvector(sums[r][b][v], VF);
          if constexpr (Format::kHasZeros) {  // both are integers below 2^24
            products -= zero * all(static_cast<float>(rows.sums[r * rows.num_groups + g]));
          }
          total.at[r][b][v] += products * (scale * all(rows.scales[r * rows.num_groups + g]));
        }
      }
    }
  }
  store_sums(total, out, out_stride);
}

// ---------------------------------------------------------------- from any number of rows to tiles

using TileFunction = void (*)(const Rows& rows, const Panel& weights, bool is_first, float* out, int64_t out_stride);

template <class Format, int B, int... R>
constexpr std::array<TileFunction, sizeof...(R)> float_tiles(std::integer_sequence<int, R...>) {
  return {float_tile<Format, R + 1, B>...};
}

template <class Format, int B, int... R>
constexpr std::array<TileFunction, sizeof...(R)> int_tiles(std::integer_sequence<int, R...>) {
  return {int_tile<Format, R + 1, B>...};
}

// Rows are cut into tiles of equal height. All blocks meet one tile of rows before the next: its rows stay in the
// first cache, and the blocks, which the caller takes few of, in the second.
//
// With kAloneIsWide a single row meets kWideBlocks at once as well: memory is read in as many runs.
template <bool kAloneIsWide, size_t N, size_t M>
INFINILM_INLINE void tiled(const std::array<TileFunction, N>& single, const std::array<TileFunction, M>& wide,
                           const Rows& rows, int64_t num_rows, const Panel& weights, int64_t num_blocks, bool is_first,
                           float* out, int64_t out_stride) {
  const auto is_widened = [](int64_t rows) { return rows > 4 || (kAloneIsWide && rows == 1); };
  const int64_t most = num_blocks >= kWideBlocks && is_widened(num_rows) ? M : N;
  const int64_t num_tiles = (num_rows + most - 1) / most;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t first = num_rows * tile / num_tiles, height = num_rows * (tile + 1) / num_tiles - first;
    const Rows some = rows.from(first);
    for (int64_t block = 0; block < num_blocks;) {
      const Panel here{weights.data + block * weights.stride, weights.stride, weights.depth, weights.group};
      const bool is_wide = num_blocks - block >= kWideBlocks && is_widened(height) && height <= static_cast<int64_t>(M);
      (is_wide ? wide[height - 1] : single[height - 1])(some, here, is_first, out + first * out_stride + block * kBlock,
                                                        out_stride);
      block += is_wide ? kWideBlocks : 1;
    }
  }
}

template <class Format>
void float_gemm(const Rows& rows, int64_t num_rows, const Panel& weights, int64_t num_blocks, float* out,
                int64_t out_stride) {
  static constexpr auto kSingle = float_tiles<Format, 1>(std::make_integer_sequence<int, kFloatRows>());
  static constexpr auto kWide = float_tiles<Format, kWideBlocks>(std::make_integer_sequence<int, kWideFloatRows>());
  const int64_t num_steps = weights.depth / Format::kStepDepth;
  const int64_t at_once = num_rows > 4 ? kStepsAtOnce<Format> : num_steps;
  for (int64_t step = 0; step < num_steps; step += at_once) {
    Rows some = rows;
    some.data += step * Format::kStepBytes;
    const int64_t depth = std::min(at_once, num_steps - step) * Format::kStepDepth;
    const Panel part{weights.data + step * 64, weights.stride, depth, 0};
    tiled<true>(kSingle, kWide, some, num_rows, part, num_blocks, step == 0, out, out_stride);
  }
}

template <class Format>
void int_gemm(const Rows& rows, int64_t num_rows, const Panel& weights, int64_t num_blocks, float* out,
              int64_t out_stride) {
  static constexpr auto kSingle = int_tiles<Format, 1>(std::make_integer_sequence<int, kIntRows>());
  static constexpr auto kWide = int_tiles<Format, kWideBlocks>(std::make_integer_sequence<int, kWideIntRows>());
  tiled<false>(kSingle, kWide, rows, num_rows, weights, num_blocks, true, out, out_stride);
}
