// Attention of some rows over a run of cache blocks, in chunks: scores, a softmax that is corrected as larger scores
// turn up (Milakov & Gimelshein 2018, arXiv:1805.02867), values.

// Far below any score, and finite: the difference of two of these is 0, not NaN.
constexpr float kHidden = -1e30f;

template <class Format, int R>
void score_tile(const Rows& queries, const std::byte* keys, int64_t num_steps, float* scores, int64_t stride) {
  Sums<R, 1> sums;
  clear(sums);
  accumulate<Format, R, 1>(sums, queries.data, queries.stride, keys, 0, num_steps);
  store_sums(sums, scores, stride);
}

// out (R rows, B blocks of the head) += weights (R rows, positions of the chunk) * values
template <class Format, int R, int B>
void value_tile(const std::byte* weights, int64_t weight_stride, const std::byte* const* values, int64_t num_blocks,
                int64_t offset, float* out, int64_t out_stride) {
  constexpr int64_t kSteps = kBlock / Format::kStepDepth;
  Sums<R, B> sums;
  load_sums(sums, out, out_stride);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const std::byte* x = weights + block * kSteps * Format::kStepBytes;
    const std::byte* w = values[block] + offset;
    for (int64_t step = 0; step < kSteps; ++step) {
      Format::template step<R, B>(sums, x + step * Format::kStepBytes, weight_stride, w + step * 64, kSteps * 64);
    }
  }
  store_sums(sums, out, out_stride);
}

using ScoreFunction = void (*)(const Rows&, const std::byte*, int64_t, float*, int64_t);
using ValueFunction = void (*)(const std::byte*, int64_t, const std::byte* const*, int64_t, int64_t, float*, int64_t);

template <class Format, int... R>
constexpr std::array<ScoreFunction, sizeof...(R)> score_tiles(std::integer_sequence<int, R...>) {
  return {score_tile<Format, R + 1>...};
}

template <class Format, int B, int... R>
constexpr std::array<ValueFunction, sizeof...(R)> value_tiles(std::integer_sequence<int, R...>) {
  return {value_tile<Format, R + 1, B>...};
}

// Turn one row's scores of a chunk into weights, and return what all that was summed before is to be multiplied by.
INFINILM_INLINE float soften(const AttentionTile& tile, int64_t row, int64_t first_position, int64_t size,
                             float* scores) {
  if (tile.softcap > 0) {
    softcap(scores, size, tile.scale, tile.softcap);
  } else {
    for (int64_t i = 0; i < size; i += kWidth) store(scores + i, load(scores + i) * tile.scale);
  }
  const int64_t begin = std::max<int64_t>(tile.begins[row] - first_position, 0);
  const int64_t end = std::min<int64_t>(tile.ends[row] - first_position, size);
  for (int64_t i = 0; i < std::min(begin, size); ++i) scores[i] = kHidden;
  for (int64_t i = std::max<int64_t>(end, 0); i < size; ++i) scores[i] = kHidden;
  VF peak = load(scores);
  for (int64_t i = kWidth; i < size; i += kWidth) peak = max(peak, load(scores + i));
  const float before = tile.maxima[row];
  const float after = std::max(before, largest(peak));
  VF total = {};
  for (int64_t i = 0; i < size; i += kWidth) {
    const VF weight = exp(load(scores + i) - after);
    store(scores + i, weight);
    total += weight;
  }
  const float factor = before == after ? 1.0f : exp(all(before - after))[0];
  tile.maxima[row] = after;
  tile.sums[row] = tile.sums[row] * factor + sum(total);
  return factor;
}

// Copy a block of values, with zeros in place of positions outside of [begin, end): whoever had the block before may
// have left what is no number, and that times a weight of 0 is none either.
template <class Format>
void copy_values(const std::byte* values, int64_t num_blocks, int64_t begin, int64_t end, std::byte* out) {
  constexpr int64_t kElement = 4 / Format::kStepDepth;  // bytes
  std::memcpy(out, values, num_blocks * kBlock * kBlock * kElement);
  for (int64_t position = 0; position < kBlock; ++position) {
    if (position >= begin && position < end) continue;
    const int64_t step = position / Format::kStepDepth, lane = position % Format::kStepDepth;
    for (int64_t n = 0; n < num_blocks * kBlock; ++n) {
      const int64_t block = n / kBlock * (kBlock / Format::kStepDepth) + step;
      std::memset(out + block * 64 + (n % kBlock * Format::kStepDepth + lane) * kElement, 0, kElement);
    }
  }
}

// KeyFormat multiplies queries and keys, Format weights and values. Queries are not rounded: what a score is off by, a
// weight is off by in proportion.
template <class KeyFormat, class Format>
void attend(const AttentionTile& tile) {
  constexpr int64_t kPositions = kAttentionChunk * kBlock;
  constexpr int64_t kElement = 4 / Format::kStepDepth;  // bytes of a key or value
  static constexpr auto kScores = score_tiles<KeyFormat>(std::make_integer_sequence<int, kFloatRows>());
  static constexpr auto kValues = value_tiles<Format, 1>(std::make_integer_sequence<int, kFloatRows>());
  static constexpr auto kWideValues =
      value_tiles<Format, kWideBlocks>(std::make_integer_sequence<int, kWideFloatRows>());

  const int64_t key_steps = (tile.head_dim + KeyFormat::kStepDepth - 1) / KeyFormat::kStepDepth;
  const int64_t num_value_blocks = (tile.head_dim + kBlock - 1) / kBlock;
  const int64_t value_block_bytes = kBlock * kBlock * kElement;
  float* scores = reinterpret_cast<float*>(tile.scratch);
  std::byte* weights = tile.scratch + tile.num_rows * kPositions * 4;
  std::byte* edges[2];
  edges[0] = weights + tile.num_rows * kPositions * 4;
  edges[1] = edges[0] + num_value_blocks * kBlock * kBlock * 4;
  constexpr int64_t kWeightStride = kPositions * (Format::kRows == RowFormat::kBf16 ? 2 : 4);
  int64_t first_seen = tile.begins[0];
  for (int64_t row = 1; row < tile.num_rows; ++row) first_seen = std::min<int64_t>(first_seen, tile.begins[row]);

  for (int64_t chunk = tile.first_block; chunk < tile.last_block; chunk += kAttentionChunk) {
    const int64_t num_blocks = std::min(kAttentionChunk, tile.last_block - chunk);
    const int64_t size = num_blocks * kBlock;
    const std::byte* values[kAttentionChunk];
    int num_edges = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const std::byte* keys = tile.cache + tile.block_table[chunk + b] * tile.block_stride;
      values[b] = keys + tile.value_offset;
      if (chunk + b + 1 < tile.last_block) {  // blocks lie anywhere: the processor does not guess where the next one does
        const std::byte* next = tile.cache + tile.block_table[chunk + b + 1] * tile.block_stride;
        for (int64_t line = 0; line < tile.value_offset; line += 64) __builtin_prefetch(next + line);
      }
      const int64_t start = (chunk + b) * kBlock;
      if (start < first_seen || start + kBlock > tile.context_length) {
        copy_values<Format>(values[b], num_value_blocks, first_seen - start, tile.context_length - start,
                            edges[num_edges]);
        values[b] = edges[num_edges++];
      }
      for (int64_t row = 0; row < tile.num_rows; row += kFloatRows) {
        const int64_t height = std::min<int64_t>(kFloatRows, tile.num_rows - row);
        kScores[height - 1](tile.queries.from(row), keys, key_steps, scores + row * kPositions + b * kBlock,
                            kPositions);
      }
    }
    for (int64_t row = 0; row < tile.num_rows; ++row) {
      const float factor = soften(tile, row, chunk * kBlock, size, scores + row * kPositions);
      if (factor != 1) {
        float* out = tile.out + row * tile.out_stride;
        for (int64_t i = 0; i < num_value_blocks * kBlock; i += kWidth) store(out + i, load(out + i) * factor);
      }
      std::byte* row_weights = weights + row * kWeightStride;
      if constexpr (Format::kRows == RowFormat::kBf16) {
        to_bf16(scores + row * kPositions, size, reinterpret_cast<uint16_t*>(row_weights));
      } else {
        std::memcpy(row_weights, scores + row * kPositions, size * 4);
      }
    }
    for (int64_t block = 0; block < num_value_blocks;) {
      const bool is_wide = num_value_blocks - block >= kWideBlocks;
      const int64_t most = is_wide ? kWideFloatRows : kFloatRows;
      for (int64_t row = 0; row < tile.num_rows; row += most) {
        const int64_t height = std::min(most, tile.num_rows - row);
        (is_wide ? kWideValues[height - 1] : kValues[height - 1])(
            weights + row * kWeightStride, kWeightStride, values, num_blocks, block * value_block_bytes,
            tile.out + row * tile.out_stride + block * kBlock, tile.out_stride);
      }
      block += is_wide ? kWideBlocks : 1;
    }
  }
}
