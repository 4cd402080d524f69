// Dense products: y = epilogue(x W^T + bias), for weights in LAYOUT_PANELS, token-major, fp32.
//
// Output channels are in the lanes, so that y is written as it is computed: no transposition, and bias, activation and
// residual are applied in registers. A register tile is up to MAX_TILE_ROWS tokens x TILE_VECTORS vectors of outputs.
// Tokens are copied once into blocks of as many rows, channel by channel, from which the loop broadcasts.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "gemm.h"

constexpr int TILE_VECTORS = 2, TILE_OUTPUTS = TILE_VECTORS * W;
// Accumulators, weights and a broadcast value fill the registers.
constexpr int MAX_TILE_ROWS = W == 16 ? 14 : W == 8 ? 6 : 4;
// Channels of a block: the tokens and the weights of a register tile stay in the inner caches.
constexpr int DENSE_CHANNELS = 384;
// Copied tokens of a task: they stay in the L2 cache.
constexpr int64_t CHUNK_BYTES = 1 << 20;
constexpr int RANGES_PER_THREAD = 4;
constexpr int FETCH_EVERY = 4;  // channels between two prefetches of a register tile
constexpr int TILE_PANELS = TILE_OUTPUTS > PANEL_OUTPUTS ? TILE_OUTPUTS / PANEL_OUTPUTS : 1;

static_assert(MAX_TILE_ROWS <= W, "copy_rows transposes a vector of tokens");
static_assert(PANEL_OUTPUTS * sizeof(float) == 64, "a panel has one cache line per channel");
static_assert(PANEL_OUTPUTS % W == 0, "a vector of outputs lies in one panel");

// A dense weight in LAYOUT_PANELS.
struct DenseWeight {
  const float* values;
  const float* bias;
  int inputs, outputs;

  // W outputs, from output n on, of input channel k; PANEL_OUTPUTS floats on from there are those of channel k + 1.
  const float* at(int n, int k) const {
    return values + ((size_t)(n / PANEL_OUTPUTS) * inputs + k) * PANEL_OUTPUTS + n % PANEL_OUTPUTS;
  }
};

// Cuts `size` into parts of at most `most`, as even as possible.
struct EvenCut {
  int64_t size, parts;

  static EvenCut of(int64_t size, int64_t most) { return {size, ceil_div(size, most)}; }
  int64_t begin(int64_t part) const { return size / parts * part + std::min(part, size % parts); }
  int64_t length(int64_t part) const { return begin(part + 1) - begin(part); }
};

// Copies `rows` tokens into (channels, rows). Whole vectors are stored: the next channel, or the next block, overwrites
// what is too much.
NM_INLINE void copy_rows(const float* x, size_t stride, int rows, int channels, float* to) {
  int k = 0;
  for (; k + W <= channels; k += W) {
    vf r[W];
    for (int i = 0; i < W; i++) r[i] = i < rows ? load(x + i * stride + k) : (vf){};
    transpose(r);
    for (int j = 0; j < W; j++) store(to + (size_t)(k + j) * rows, r[j]);
  }
  for (; k < channels; k++)
    for (int i = 0; i < rows; i++) to[(size_t)k * rows + i] = x[i * stride + k];
}

// The sums of ROWS tokens x VECTORS vectors of outputs.
template <int ROWS, int VECTORS> struct RegisterTile {
  vf sums[ROWS][VECTORS];

  // Adds the products of `count` channels. `x` is (count, ROWS); vector v of the weights is (count, PANEL_OUTPUTS).
  // On the way, the cache lines of `lines` channels of the panels `ahead` are fetched.
  inline __attribute__((always_inline)) void multiply(const float* x, const float* const* weights, int count,
                                                      const float* const* ahead, int lines) {
    const float* w[VECTORS];
    for (int v = 0; v < VECTORS; v++) w[v] = weights[v];
    for (int k = 0, line = 0; k < count; k++, x += ROWS) {
      if (line < lines && k % FETCH_EVERY == 0) {
#pragma GCC unroll 4
        for (int p = 0; p < TILE_PANELS; p++) __builtin_prefetch(ahead[p] + (size_t)line * PANEL_OUTPUTS, 0, 2);
        line++;
      }
      vf b[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) b[v] = load(w[v] + (size_t)k * PANEL_OUTPUTS);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const vf a = splat(x[i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[i][v] = fma(a, b[v], sums[i][v]);
      }
    }
  }
};

// One register tile at one block of channels.
struct TileJob {
  const float* x;  // copied tokens (count, rows)
  const float* weights[TILE_VECTORS];
  int count;
  const float* ahead[TILE_PANELS];  // panels that later tiles read, and of how many channels to fetch them
  int lines;
  const float* initial;  // outputs' biases for the first block of channels; null: the sums continue from `partial`
  float* partial;        // (rows, TILE_OUTPUTS)
  bool last;             // whether this is the last block: the epilogue follows
  int64_t token;
  int output;
};

template <int ROWS, int VECTORS> static void run_tile(const TileJob& job, const Output<float>& out) {
  RegisterTile<ROWS, VECTORS> tile;
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
      tile.sums[i][v] = load(job.initial ? job.initial + v * W : job.partial + i * TILE_OUTPUTS + v * W);
  tile.multiply(job.x, job.weights, job.count, job.ahead, job.lines);
  if (!job.last) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) store(job.partial + i * TILE_OUTPUTS + v * W, tile.sums[i][v]);
    return;
  }
  const int before = activation_before_residual(out.epilogue), after = activation_after_residual(out.epilogue);
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) {
      const int n = job.output + v * W;
      const size_t at = (size_t)(job.token + i) * out.channels + n;
      write_lanes(activate(tile.sums[i][v], before), std::min(W, out.channels - n),
                  out.residual ? out.residual + at : nullptr, after, out.y + at);
    }
}

using TileFunction = void (*)(const TileJob&, const Output<float>&);
template <int VECTORS, int... ROWS>
constexpr std::array<TileFunction, sizeof...(ROWS)> tile_functions(std::integer_sequence<int, ROWS...>) {
  return {run_tile<ROWS + 1, VECTORS>...};
}
static_assert(TILE_VECTORS == 2, "the table below has tiles of one and of two vectors");
constexpr auto ONE_VECTOR = tile_functions<1>(std::make_integer_sequence<int, MAX_TILE_ROWS>());
constexpr auto TWO_VECTORS = tile_functions<2>(std::make_integer_sequence<int, MAX_TILE_ROWS>());

// Tokens [first, first + blocks.size), copied: for each part of the channels, for each block of rows, (channels, rows).
struct CopiedTokens {
  int64_t first;
  EvenCut blocks, parts;
  const float* data;

  const float* at(int64_t part, int64_t block) const {
    return data + parts.begin(part) * blocks.size + blocks.begin(block) * parts.length(part);
  }
};

static CopiedTokens copy_tokens(const Activations<float>& in, int64_t first, int64_t count) {
  const EvenCut blocks = EvenCut::of(count, MAX_TILE_ROWS), parts = EvenCut::of(in.channels, DENSE_CHANNELS);
  float* const data = scratch().tokens.get((size_t)count * in.channels + W);  // W more: whole vectors are stored
  const CopiedTokens copied{first, blocks, parts, data};
  for (int64_t p = 0; p < parts.parts; p++)
    for (int64_t b = 0; b < blocks.parts; b++)
      copy_rows(in.data + (first + blocks.begin(b)) * in.channels + parts.begin(p), in.channels, (int)blocks.length(b),
                (int)parts.length(p), data + (copied.at(p, b) - data));
  return copied;
}

// Outputs `range` of copied tokens. `biases` holds a value for every lane that the register tiles compute.
static void multiply_tokens(const DenseWeight& w, const CopiedTokens& x, RowRange range, const float* biases,
                            const Output<float>& out) {
  const int64_t parts = x.parts.parts, blocks = x.blocks.parts;
  float* const partial = scratch().sums.get((size_t)x.blocks.size * TILE_OUTPUTS);
  for (int n = range.begin; n < range.end; n += TILE_OUTPUTS) {
    const bool two = n + W < range.end;
    for (int64_t p = 0; p < parts; p++) {
      const int k = (int)x.parts.begin(p), count = (int)x.parts.length(p);
      // The weights that follow are fetched meanwhile, each block's share of them.
      const bool last = p == parts - 1;
      const int next_n = last ? n + TILE_OUTPUTS : n, next_k = last ? 0 : k + count;
      const int64_t next_count = next_n < range.end ? x.parts.length(last ? 0 : p + 1) : 0;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t row = x.blocks.begin(b), fetched = next_count * b / blocks;
        TileJob job;
        job.x = x.at(p, b);
        job.weights[0] = w.at(n, k);
        job.weights[1] = w.at(two ? n + W : n, k);
        job.count = count;
        job.lines = (int)(next_count * (b + 1) / blocks - fetched);
        for (int i = 0; i < TILE_PANELS && job.lines; i++)
          job.ahead[i] = w.at(std::min(next_n + i * PANEL_OUTPUTS, w.outputs - 1), next_k) + fetched * PANEL_OUTPUTS;
        job.initial = p ? nullptr : biases + n;
        job.partial = partial + row * TILE_OUTPUTS;
        job.last = last;
        job.token = x.first + row;
        job.output = n;
        (two ? TWO_VECTORS : ONE_VECTOR)[x.blocks.length(b) - 1](job, out);
      }
    }
  }
}

// A product split into tasks: each computes one range of the register tiles' outputs for one chunk of the tokens.
struct DenseSplit {
  EvenCut tokens, tiles;

  // The split with the shortest time for the thread that is busiest. Copying a token costs as much as COPY outputs.
  static DenseSplit of(int64_t tokens, int inputs, int outputs, int threads) {
    constexpr int COPY = 12;
    const int64_t tiles = ceil_div(outputs, TILE_OUTPUTS), most_chunks = ceil_div(tokens, MAX_TILE_ROWS);
    const int64_t fewest = std::min(most_chunks, ceil_div(tokens * inputs * (int64_t)sizeof(float), CHUNK_BYTES));
    DenseSplit best{{tokens, fewest}, {tiles, 1}};
    double best_time = -1;
    for (int64_t ranges = 1; ranges <= std::min<int64_t>(tiles, 2 * threads); ranges++)
      for (int64_t chunks : {fewest, ceil_div(fewest * ranges, threads) * threads / ranges}) {
        if (chunks < fewest || chunks > most_chunks) continue;
        const double rows = ceil_div(tokens, chunks), width = ceil_div(tiles, ranges) * TILE_OUTPUTS + COPY;
        const double time = rows * width * ceil_div(chunks * ranges, threads);
        if (best_time < 0 || time < best_time) best = {{tokens, chunks}, {tiles, ranges}}, best_time = time;
      }
    // Several ranges for each thread: one that is interrupted leaves the rest of its work to the others.
    if (threads > 1) best.tiles.parts = std::min(tiles, best.tiles.parts * RANGES_PER_THREAD);
    return best;
  }
};

static void dense(const DenseWeight& w, const Activations<float>& in, const Output<float>& out, int threads) {
  const DenseSplit split = DenseSplit::of(in.tokens, w.inputs, w.outputs, threads);
  const int64_t chunks = split.tokens.parts, ranges = split.tiles.parts;
  const int64_t lanes = ceil_div(w.outputs, TILE_OUTPUTS) * TILE_OUTPUTS;
  static thread_local Scratch<float> bias_scratch;
  float* const biases = bias_scratch.get(lanes);
  for (int64_t n = 0; n < lanes; n++) biases[n] = w.bias && n < w.outputs ? w.bias[n] : 0.0f;
  const std::unique_ptr<std::atomic<int64_t>[]> taken(new std::atomic<int64_t>[chunks]());  // ranges of each chunk
#pragma omp parallel num_threads(threads) if (threads > 1 && chunks * ranges > 1)
  {
    // A thread begins with the chunk that it has in successive products too, and so in its caches; then it helps
    // others.
    const int64_t first = omp_get_thread_num() * chunks / omp_get_num_threads();
    for (int64_t i = 0; i < chunks; i++) {
      const int64_t chunk = (first + i) % chunks;
      int64_t range = taken[chunk]++;
      if (range >= ranges) continue;
      const CopiedTokens copied = copy_tokens(in, split.tokens.begin(chunk), split.tokens.length(chunk));
      for (; range < ranges; range = taken[chunk]++) {
        const int begin = (int)split.tiles.begin(range) * TILE_OUTPUTS;
        const int end = (int)std::min<int64_t>(w.outputs, split.tiles.begin(range + 1) * TILE_OUTPUTS);
        multiply_tokens(w, copied, {begin, end}, biases, out);
      }
    }
  }
}
