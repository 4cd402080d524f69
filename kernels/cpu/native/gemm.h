// Products of a packed weight and panels of tokens, and how they are split into tasks for threads.
#pragma once

#include <omp.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <tuple>
#include <type_traits>

#include "layouts.h"
#include "sweep.h"
#include "tiles.h"

constexpr int MAX_PANEL_VECTORS = 4;
// The same for LAYOUT_ROWS in fp32: sums of two rows, which share the registers with a few other vectors.
constexpr int WIDE_PANEL_VECTORS = W == 16 ? 7 : W == 8 ? 6 : 4;
constexpr int MAX_TASK_ROWS = 768;  // output rows of a task: their sums stay in the L2 cache
constexpr int MIN_TASK_ROWS = 128;
constexpr int MANY_TASKS = 16;  // tasks per thread above which the choice of split makes no difference

// A buffer that its thread keeps between calls.
template <class T> class Scratch {
 public:
  ~Scratch() { free(data_); }
  // Room for `count` elements. With `zeroed`, elements that were never written are zero.
  T* get(size_t count, bool zeroed = false) {
#ifdef __SANITIZE_ADDRESS__  // exactly the requested size, so that accesses past the end are reported
    constexpr size_t unit = 64;
    const bool fits = count == size_;
#else
    constexpr size_t unit = 4096;
    const bool fits = count <= size_;
#endif
    if (!fits) {
      free(data_);
      size_ = 0;
      size_t bytes = (count * sizeof(T) + unit - 1) / unit * unit;
      data_ = (T*)aligned_alloc(unit, bytes);
      if (!data_) throw std::bad_alloc();
      if (zeroed) memset(data_, 0, bytes);
      size_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

struct ThreadScratch {
  Scratch<float> sums, tile, initial, float_panel, tokens;
  Scratch<uint32_t> pair_tile;
  Scratch<uint16_t> channels, half_panel;
  Scratch<unsigned char> channel_pairs;
};
static ThreadScratch& scratch() {
  static thread_local ThreadScratch instance;
  return instance;
}

// The widest panel whose tile leaves room in the L1 cache for the weights and sums that pass through.
static int cached_panel_vectors() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  constexpr long bytes = 0;
#endif
  constexpr int vector_bytes = ROWS_BLOCK * W * (int)sizeof(float);
  return std::max(MAX_PANEL_VECTORS, (int)(bytes / 8 * 7 / vector_bytes));
}

// A packed weight. X: float or bf16, the dtype of activations, values and bias.
template <class X> struct PackedWeight {
  const X* values;
  const uint8_t* index;
  const X* bias;
  int inputs, outputs, n, m, layout;

  int entries_per_row(int columns) const { return block_entries(layout, columns, n, m); }
  int block_width() const { return block_columns(layout, m); }
  static constexpr int most_vectors() { return std::is_same<X, float>::value ? WIDE_PANEL_VECTORS : MAX_PANEL_VECTORS; }
  int max_panel_vectors() const {
    if (layout == LAYOUT_RING || layout == LAYOUT_OCTS) return 2;
    return layout == LAYOUT_ROWS ? std::min(most_vectors(), cached_panel_vectors()) : MAX_PANEL_VECTORS;
  }

  // Cost of filling the tiles of a panel, as the number of weight rows whose products would take the same time. The
  // fewer weights a row keeps, the larger this number.
  int fill_cost() const { return layout == LAYOUT_ROWS ? 32 * m / n : 64; }

  // The bias as floats; zeros if there is none, and for the padding rows of LAYOUT_RING.
  const float* initial_sums() const {
    float* sums = scratch().initial.get(outputs + RING_ROWS);
    for (int n = 0; n < outputs + RING_ROWS; n++) sums[n] = bias && n < outputs ? to_float(bias[n]) : 0.0f;
    return sums;
  }
};

// A partition of `vectors` vectors of W tokens into `count` panels whose widths differ by at most one vector.
struct Panels {
  int64_t vectors;
  int64_t count;

  int width(int64_t p) const { return (int)(vectors / count + (p < vectors % count)); }
  int64_t first(int64_t p) const { return (vectors / count * p + std::min<int64_t>(p, vectors % count)) * W; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t vectors_for(int64_t tokens) { return ceil_div(tokens, W); }

// The fewest panels of at most `max_vectors` vectors such that every thread gets the same number. If one panel per
// thread or fewer are enough, no panels are added.
inline Panels even_panels(int64_t tokens, int max_vectors, int threads) {
  const int64_t vectors = vectors_for(tokens), fewest = ceil_div(vectors, max_vectors);
  return {vectors, fewest > threads ? std::min(vectors, ceil_div(fewest, threads) * threads) : fewest};
}

// The parameters that determine the best split of a product. With `even`, its panels are those of even_panels.
struct SplitProblem {
  int64_t tokens;
  int max_panel_vectors, outputs, fill_cost, threads;
  bool even = false;

  bool operator<(const SplitProblem& other) const { return key() < other.key(); }

 private:
  std::tuple<int64_t, int, int, int, int, bool> key() const {
    return {tokens, max_panel_vectors, outputs, fill_cost, threads, even};
  }
};

// A product split into tasks: each computes one panel for one chunk of `rows` output rows.
struct Split {
  Panels panels;
  int rows;

  int64_t tasks(int outputs) const { return panels.count * ceil_div(outputs, rows); }

  // Successive tasks are panels of the same chunk, so that its weights stay in the cache.
  int64_t panel(int64_t task) const { return task % panels.count; }
  RowRange chunk(int64_t task, int outputs) const {
    const int begin = (int)(task / panels.count) * rows;
    return {begin, std::min(outputs, begin + rows)};
  }
};

// Estimated time until all threads are done, if each takes the next task when it becomes free. A weight row costs one
// unit per vector of the panel, and 0.3 for reading its entries; filling the tiles costs as much as `fill_cost` rows.
inline double makespan(const Split& split, const SplitProblem& problem) {
  std::vector<double> busy(problem.threads, 0.0);  // a heap whose front is the thread that becomes free first
  for (int n = 0; n < problem.outputs; n += split.rows)
    for (int64_t p = 0; p < split.panels.count; p++) {
      std::pop_heap(busy.begin(), busy.end(), std::greater<>());
      const int rows = std::min(split.rows, problem.outputs - n);
      busy.back() += (split.panels.width(p) + 0.3) * (rows + problem.fill_cost);
      std::push_heap(busy.begin(), busy.end(), std::greater<>());
    }
  return *std::max_element(busy.begin(), busy.end());
}

// The split with the smallest makespan: it keeps all threads busy without filling the same tiles too often.
inline Split best_split(const SplitProblem& problem) {
  const int64_t vectors = vectors_for(problem.tokens);
  const int outputs = problem.outputs, threads = problem.threads, max_vectors = problem.max_panel_vectors;
  const int fewest = (int)ceil_div(outputs, MAX_TASK_ROWS), most = std::max(fewest, outputs / MIN_TASK_ROWS);
  auto make_split = [&](Panels panels, int chunks) {
    return Split{panels, (int)ceil_div(ceil_div(outputs, chunks), 16) * 16};
  };
  const Split even = make_split(even_panels(problem.tokens, max_vectors, threads), fewest);
  if (threads == 1 || even.panels.count * fewest > MANY_TASKS * threads) return even;
  Split best = even;
  double best_time = makespan(even, problem);
  const Panels fewest_panels{vectors, ceil_div(vectors, max_vectors)};
  for (Panels panels : {even.panels, problem.even ? even.panels : fewest_panels})
    for (int chunks = fewest; chunks <= most && panels.count * (chunks - 1) < MANY_TASKS * threads; chunks++) {
      const Split candidate = make_split(panels, chunks);
      const double time = makespan(candidate, problem);
      if (time < best_time) best = candidate, best_time = time;
    }
  return best;
}

// best_split, memoized: a model repeats a small number of shapes.
static Split find_split(const SplitProblem& problem) {
  static thread_local std::map<SplitProblem, Split> memo;
  const auto entry = memo.find(problem);
  if (entry != memo.end()) return entry->second;
  if (memo.size() > 1000) memo.clear();
  return memo[problem] = best_split(problem);
}

// True if only the lower half of the panel's last vector is used.
template <int V> static bool last_vector_half_used(int64_t first, int64_t tokens) {
  return HALVES && first + V * W - tokens >= W / 2;
}

// Calls f with the number of vectors, at most `MOST`, as a compile-time constant.
template <int MOST = MAX_PANEL_VECTORS, class F> static void with_panel_width(int vectors, F f) {
  if constexpr (MOST > 1) {
    if (vectors < MOST) return with_panel_width<MOST - 1>(vectors, f);
  }
  f(std::integral_constant<int, MOST>());
}

// Prefetches the input channels of the block that starts at column k0.
template <class X>
static void prefetch_block(const PackedWeight<X>& w, const Activations<X>& in, int64_t first, int lanes, int k0) {
  if (in.format != FORMAT_TOKENS) return;
  prefetch_channels(in, first, lanes, {k0, std::min(w.block_width(), w.inputs - k0)});
}

#if NM_PAIRS
// Fills a tile with all column pairs of a block.
template <int V>
static void fill_pairs(int layout, const Activations<bf16>& in, const Panel& panel, ChannelRange channels, Pair* tile) {
  constexpr int P = V * W;
  const int k0 = channels.begin, count = channels.count;
  __m512i* pairs = (__m512i*)scratch().channel_pairs.get((OCTS_BLOCK / 2 + 4) * V * 64);
  memset(pairs + (size_t)(count / 2) * V, 0, (size_t)4 * V * 64);  // zeros after the last channel
  if (in.format == FORMAT_TOKENS) {
    for (int v = 0; v < V; v++) {
      int tokens = (int)std::max<int64_t>(0, std::min<int64_t>(W, in.tokens - panel.first - v * W));
      if (!tokens) continue;
      const bf16* from = in.data + (panel.first + v * W) * in.channels + k0;
      read_channel_pairs(from, in.channels, tokens, count, {pairs + v, V});
    }
  } else {
    const uint16_t* rows = (const uint16_t*)in.data + (size_t)k0 * P;
    if (in.format == FORMAT_PLANES) {
      uint16_t* copy = scratch().channels.get((size_t)OCTS_BLOCK * P);
      memset(copy, 0, (size_t)count * P * 2);
      for (int k = 0; k < count; k++)
        for (const Segment& s : panel.segments) {
          const bf16* from = in.data + (s.image * in.channels + k0 + k) * in.pixels + s.pixel;
          memcpy(copy + (size_t)k * P + s.lane, from, s.length * 2);
        }
      rows = copy;
    }
    for (int v = 0; v < V; v++) {
      auto channel = [&](int k) { return _mm256_loadu_si256((const __m256i*)(rows + (size_t)k * P + v * W)); };
      join_channel_pairs(channel, count, {pairs + v, V});
    }
  }
  auto spread = layout == LAYOUT_QUADS ? spread_quads : layout == LAYOUT_OCTS ? spread_octs : spread_ring;
  for (int v = 0; v < V; v++) spread({pairs + v, V}, count, tile + v * W, P);
}

// The same as `accumulate` below, for the layouts of bf16 pairs.
template <int V>
static void accumulate_pairs(const PackedWeight<bf16>& w, const Activations<bf16>& in, const Panel& panel,
                             RowRange rows, float* sums) {
  constexpr int P = V * W;
  const bool half = last_vector_half_used<V>(panel.first, in.tokens), ring = w.layout == LAYOUT_RING;
  const float* bias = w.initial_sums();
  Pair* tile = scratch().pair_tile.get((size_t)TILE_ROWS * P, true);
  const Pair* values = (const Pair*)w.values;
  const int width = w.block_width(), blocks = (w.inputs + width - 1) / width;
  // The index of LAYOUT_RING begins with a table of entry offsets: for each block, one per RING_ROWS rows, and at the
  // end the total. The caller has compared the total with the size of the weight.
  const int offsets_per_block = (w.outputs + RING_ROWS - 1) / RING_ROWS;
  const size_t table = ring ? ((size_t)blocks * offsets_per_block + 1) * 4 : 0;
  const uint8_t* index = w.index + table;
  int32_t total_entries = 0;
  if (ring) memcpy(&total_entries, index - 4, 4);
  size_t offset = 0;
  for (int b = 0; b < blocks; b++) {
    const int k0 = b * width, count = std::min(width, w.inputs - k0);
    fill_pairs<V>(w.layout, in, panel, {k0, count}, tile);
    prefetch_block(w, in, panel.first, P, k0 + count);
    const float* initial = b ? nullptr : bias;
    if (ring) {
      const RingBlock block{values, index, w.index + (size_t)b * offsets_per_block * 4, total_entries};
      (half ? sweep_ring<V, HALVES> : sweep_ring<V, false>)(tile, block, rows, sums, initial);
      continue;
    }
    const int entries = w.entries_per_row(count);
    auto sweep = half ? sweep_rows<V, HALVES, Pair, Pair> : sweep_rows<V, false, Pair, Pair>;
    sweep(tile, {values + offset, index + offset, entries}, rows, sums, initial);
    offset += (size_t)w.outputs * entries;
  }
}
#endif

// Computes output rows `rows` of a panel of V vectors, before the epilogue: sums (rows, P).
template <int V, class X>
static void accumulate(const PackedWeight<X>& w, const Activations<X>& in, const Panel& panel, RowRange rows,
                       float* sums) {
  constexpr int P = V * W;
#if NM_PAIRS
  if constexpr (std::is_same<X, bf16>::value) {
    if (w.layout != LAYOUT_ROWS && w.inputs) return accumulate_pairs<V>(w, in, panel, rows, sums);
  }
#endif
  const bool half = last_vector_half_used<V>(panel.first, in.tokens);
  auto sweep = half ? sweep_rows<V, HALVES, float, X> : sweep_rows<V, false, float, X>;
  const float* bias = w.initial_sums();
  if (!w.inputs)  // the loop below has no iterations that would initialise the sums
    for (int n = rows.begin; n < rows.end; n++) std::fill_n(sums + (size_t)(n - rows.begin) * P, P, bias[n]);
  float* filled = in.float_panel ? nullptr : scratch().tile.get((size_t)TILE_ROWS * P, true);
  size_t offset = 0;
  for (int k0 = 0; k0 < w.inputs; k0 += w.block_width()) {
    const int count = std::min(w.block_width(), w.inputs - k0), entries = w.entries_per_row(count);
    if (!in.float_panel) {
      fill_tile<V>(in, panel, {k0, count}, filled);
      prefetch_block(w, in, panel.first, P, k0 + count);
    }
    const float* tile = in.float_panel ? in.float_panel + (size_t)k0 * P : filled;
    sweep(tile, {w.values + offset, w.index + offset, entries}, rows, sums, k0 ? nullptr : bias);
    offset += (size_t)w.outputs * entries;
  }
}

// Applies the epilogue to the sums of a panel and writes them to y.
template <class X> static void write_panel(const PanelSums& sums, const Panel& panel, const Output<X>& out) {
  if (out.format == FORMAT_PLANES) return write_planes(sums, panel.segments, out);
  int64_t place[WIDE_PANEL_VECTORS * W];
  for (int i = 0; i < sums.lanes; i++) place[i] = panel.first + i < out.tokens ? panel.first + i : -1;
  write_tokens(sums, place, out);
}

template <class X>
static void gemm(const PackedWeight<X>& w, const Activations<X>& in, const Output<X>& out, int threads) {
  const Split split = find_split({in.tokens, w.max_panel_vectors(), w.outputs, w.fill_cost(), threads});
  const int64_t tasks = split.tasks(w.outputs);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && tasks > 1)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t p = split.panel(task), first = split.panels.first(p);
    const RowRange rows = split.chunk(task, w.outputs);
    with_panel_width<PackedWeight<X>::most_vectors()>(split.panels.width(p), [&](auto v) {
      constexpr int V = decltype(v)::value, P = V * W;
      const Panel panel{first, find_segments(in, first, P)};
      float* sums = scratch().sums.get((size_t)(split.rows + RING_ROWS) * P);
      accumulate<V>(w, in, panel, rows, sums);
      write_panel({sums, P, rows}, panel, out);
    });
  }
}
