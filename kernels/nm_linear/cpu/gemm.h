// The matrix product of a packed weight with panels of tokens.
#pragma once

#include <omp.h>

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

constexpr int WIDEST = 4;       // vectors in a panel
constexpr int MOST_ROWS = 768;  // output rows of a task: their sums stay in the second-level cache
constexpr int FEWEST_ROWS = 128;
constexpr int MANY_TASKS = 16;  // for each thread: with more than that, how they are cut makes no difference

// Memory that a thread keeps from call to call.
template <class T> class Scratch {
 public:
  ~Scratch() { free(data_); }
  // `clean`: zeros where nothing has been written since.
  T* need(size_t count, bool clean = false) {
#ifdef __SANITIZE_ADDRESS__  // so much and no more, that what is read or written behind is seen
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
      if (clean) memset(data_, 0, bytes);
      size_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

struct ThreadScratch {
  Scratch<float> sums, tile, start, panel;
  Scratch<uint32_t> pairs;
  Scratch<uint16_t> channels, hidden;
  Scratch<unsigned char> joined;
};
static ThreadScratch& scratch() {
  static thread_local ThreadScratch own;
  return own;
}

// X: float or bf16, the type of activations, values and bias.
template <class X> struct Weight {
  const X* values;
  const uint8_t* index;
  const X* bias;
  int inputs, outputs, n, m, layout;

  int entries(int count) const { return block_entries(layout, count, n, m); }
  int block() const { return block_columns(layout, m); }
  int widest() const { return layout == LAYOUT_RING || layout == LAYOUT_OCTS ? 2 : WIDEST; }

  // As many rows take the time of filling a tile: the fewer entries a row has, the more.
  int fill() const { return layout == LAYOUT_ROWS ? 32 * m / n : 64; }

  // The bias as floats, zeros where there is none and behind it.
  const float* start() const {
    float* s = scratch().start.need(outputs + RING_ROWS);
    for (int n = 0; n < outputs + RING_ROWS; n++) s[n] = bias && n < outputs ? to_float(bias[n]) : 0.0f;
    return s;
  }
};

template <class X> struct Input {
  const X* x;
  Format format;
  int64_t tokens, pixels;  // pixels of an image, for PLANES
};

// Tokens cut into panels, as even as they come.
struct Panels {
  int64_t vectors;
  int64_t count;

  int width(int64_t p) const { return (int)(vectors / count + (p < vectors % count)); }
  int64_t first(int64_t p) const { return (vectors / count * p + std::min<int64_t>(p, vectors % count)) * W; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t vectors_of(int64_t tokens) { return ceil_div(tokens, W); }

// As few panels of up to `widest` vectors as there are for every thread as many.
inline Panels even_panels(int64_t tokens, int widest, int threads) {
  const int64_t vectors = vectors_of(tokens), least = ceil_div(vectors, widest);
  return {vectors, least > threads ? std::min(vectors, ceil_div(least, threads) * threads) : least};
}

// What a product is cut into: panels of tokens, and chunks of that many output rows. A task is one of each.
struct Split {
  Panels panels;
  int rows;
};

// When threads that take the next task as they get free are all done. A row of a task takes its vectors and the reading
// of its weights; filling the tiles takes as long as `fill` more rows.
inline double makespan(const Split& s, int outputs, int fill, int threads) {
  std::vector<double> busy(threads, 0.0);  // a heap, the thread that is free first in front
  for (int n = 0; n < outputs; n += s.rows)
    for (int64_t p = 0; p < s.panels.count; p++) {
      std::pop_heap(busy.begin(), busy.end(), std::greater<>());
      busy.back() += (s.panels.width(p) + 0.3) * (std::min(s.rows, outputs - n) + fill);
      std::push_heap(busy.begin(), busy.end(), std::greater<>());
    }
  return *std::max_element(busy.begin(), busy.end());
}

// The cut that keeps all threads at work with as little repeated as possible.
inline Split best_split(int64_t tokens, int widest, int outputs, int fill, int threads) {
  const int64_t vectors = vectors_of(tokens);
  const int least = (int)ceil_div(outputs, MOST_ROWS), most = std::max(least, outputs / FEWEST_ROWS);
  auto cut = [&](Panels panels, int chunks) { return Split{panels, (int)ceil_div(ceil_div(outputs, chunks), 16) * 16}; };
  const Split even = cut(even_panels(tokens, widest, threads), least);
  if (threads == 1 || even.panels.count * least > MANY_TASKS * threads) return even;
  Split best = even;
  double done = makespan(even, outputs, fill, threads);
  for (Panels panels : {even.panels, Panels{vectors, ceil_div(vectors, widest)}})
    for (int chunks = least; chunks <= most && panels.count * (chunks - 1) < MANY_TASKS * threads; chunks++) {
      const Split other = cut(panels, chunks);
      const double end = makespan(other, outputs, fill, threads);
      if (end < done) best = other, done = end;
    }
  return best;
}

// The same, remembered: a model asks again and again for a few shapes.
static Split split(int64_t tokens, int widest, int outputs, int fill, int threads) {
  static thread_local std::map<std::tuple<int64_t, int, int, int, int>, Split> known;
  const auto key = std::make_tuple(tokens, widest, outputs, fill, threads);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() > 1000) known.clear();
  return known[key] = best_split(tokens, widest, outputs, fill, threads);
}

// Whether of a panel of V vectors the last is used in its lower half alone.
template <int V> static bool half_used(int64_t first, int64_t tokens) {
  return HALVES && first + V * W - tokens >= W / 2;
}

template <class F> static void with_width(int v, F f) {
  switch (v) {
    case 1: f(std::integral_constant<int, 1>()); break;
    case 2: f(std::integral_constant<int, 2>()); break;
    case 3: f(std::integral_constant<int, 3>()); break;
    default: f(std::integral_constant<int, 4>()); break;
  }
}

template <class X> static void foresee_block(const Weight<X>& w, const Input<X>& in, int64_t first, int lanes, int k0) {
  if (in.format == ROWS) foresee(in.x, first, in.tokens, lanes, w.inputs, k0, std::min(w.block(), w.inputs - k0));
}

#if NM_PAIRS
template <int V>
static void fill_pairs(const Weight<bf16>& w, const Input<bf16>& in, const std::vector<Segment>& where, int64_t first, int k0,
                       int count, Pair* tile) {
  constexpr int P = V * W;
  __m512i* a = (__m512i*)scratch().joined.need((OCTS_BLOCK / 2 + 4) * V * 64);
  memset(a + (size_t)(count / 2) * V, 0, (size_t)4 * V * 64);  // columns behind the last
  if (in.format == ROWS) {
    for (int v = 0; v < V; v++) {
      int tokens = (int)std::max<int64_t>(0, std::min<int64_t>(W, in.tokens - first - v * W));
      if (tokens) read_channel_pairs(in.x + (first + v * W) * w.inputs + k0, w.inputs, tokens, count, a + v, V);
    }
  } else {
    const uint16_t* rows = (const uint16_t*)in.x + (size_t)k0 * P;
    if (in.format == PLANES) {
      uint16_t* copy = scratch().channels.need((size_t)OCTS_BLOCK * P);
      memset(copy, 0, (size_t)count * P * 2);
      for (int k = 0; k < count; k++)
        for (const Segment& s : where)
          memcpy(copy + (size_t)k * P + s.lane, in.x + (s.image * w.inputs + k0 + k) * in.pixels + s.pixel, s.length * 2);
      rows = copy;
    }
    for (int v = 0; v < V; v++)
      join_channel_pairs([&](int k) { return _mm256_loadu_si256((const __m256i*)(rows + (size_t)k * P + v * W)); }, count,
                         a + v, V);
  }
  auto spread = w.layout == LAYOUT_QUADS ? spread_quads : w.layout == LAYOUT_OCTS ? spread_octs : spread_ring;
  for (int v = 0; v < V; v++) spread(a + v, V, count, tile + v * W, P);
}

template <int V>
static void accumulate_pairs(const Weight<bf16>& w, const Input<bf16>& in, const std::vector<Segment>& where, int64_t first,
                             int n0, int n1, float* c) {
  constexpr int P = V * W;
  const bool half = half_used<V>(first, in.tokens);
  const float* start = w.start();
  Pair* tile = scratch().pairs.need((size_t)TILE_ROWS * P, true);
  const Pair* values = (const Pair*)w.values;
  const int fours = (w.outputs + RING_ROWS - 1) / RING_ROWS, wide = w.block(), blocks = (w.inputs + wide - 1) / wide;
  const uint8_t* index = w.index + (w.layout == LAYOUT_RING ? ((size_t)blocks * fours + 1) * 4 : 0);
  int32_t held = 0;  // entries of RING: the caller has compared their number with what there is
  if (w.layout == LAYOUT_RING) memcpy(&held, w.index + (size_t)blocks * fours * 4, 4);
  size_t offset = 0;
  for (int b = 0; b < blocks; b++) {
    const int k0 = b * wide, count = std::min(wide, w.inputs - k0);
    fill_pairs<V>(w, in, where, first, k0, count, tile);
    foresee_block(w, in, first, P, k0 + count);
    const float* from = b ? nullptr : start;
    if (w.layout == LAYOUT_RING) {
      const uint8_t* begin = w.index + (size_t)b * fours * 4;
      (half ? sweep_ring<V, HALVES> : sweep_ring<V, false>)(tile, values, index, begin, held, n0, n1, c, from);
      continue;
    }
    const int entries = w.entries(count);
    auto sweep = half ? sweep_rows<V, HALVES, Pair, Pair> : sweep_rows<V, false, Pair, Pair>;
    sweep(tile, values + offset, index + offset, entries, n0, n1, c, from);
    offset += (size_t)w.outputs * entries;
  }
}
#endif

// Output rows [n0, n1) of the panel that begins with token `first` -> c (n1 - n0, P), before activation. `panel`, if
// given, holds the inputs as floats (K, P).
template <int V, class X>
static void accumulate(const Weight<X>& w, const Input<X>& in, const float* panel, const std::vector<Segment>& where,
                       int64_t first, int n0, int n1, float* c) {
  constexpr int P = V * W;
#if NM_PAIRS
  if constexpr (std::is_same<X, bf16>::value) {
    if (w.layout != LAYOUT_ROWS && w.inputs) return accumulate_pairs<V>(w, in, where, first, n0, n1, c);
  }
#endif
  auto sweep = half_used<V>(first, in.tokens) ? sweep_rows<V, HALVES, float, X> : sweep_rows<V, false, float, X>;
  const float* start = w.start();
  if (!w.inputs)  // no block, so nothing below begins the sums
    for (int n = n0; n < n1; n++) std::fill_n(c + (size_t)(n - n0) * P, P, start[n]);
  float* own = panel ? nullptr : scratch().tile.need((size_t)TILE_ROWS * P, true);
  size_t offset = 0;
  for (int k0 = 0; k0 < w.inputs; k0 += w.block()) {
    const int count = std::min(w.block(), w.inputs - k0), entries = w.entries(count);
    if (!panel) fill_tile<V>(in.x, in.format, where, first, in.tokens, in.pixels, w.inputs, k0, count, own);
    if (!panel) foresee_block(w, in, first, P, k0 + count);
    const float* tile = panel ? panel + (size_t)k0 * P : own;
    sweep(tile, w.values + offset, w.index + offset, entries, n0, n1, c, k0 ? nullptr : start);
    offset += (size_t)w.outputs * entries;
  }
}

template <class X> struct Output {
  const X* residual;
  X* y;
  Format format;
};

// Sums of a panel -> y.
template <class X>
static void finish(const Output<X>& out, const float* c, int lanes, int64_t first, const Input<X>& in,
                   const std::vector<Segment>& where, int n0, int n1, int outputs, int activation) {
  if (out.format == PLANES) return write_planes(c, lanes, n0, n1, activation, where, out.residual, out.y, outputs, in.pixels);
  int64_t place[WIDEST * W];
  for (int i = 0; i < lanes; i++) place[i] = first + i < in.tokens ? first + i : -1;
  write_rows(c, lanes, n0, n1, activation, place, out.residual, out.y, outputs);
}

template <class X>
static void gemm(const Weight<X>& w, const Input<X>& in, const Output<X>& out, int activation, int threads) {
  const Split cut = split(in.tokens, w.widest(), w.outputs, w.fill(), threads);
  const Panels panels = cut.panels;
  const int rows = cut.rows;
  const int64_t tasks = panels.count * ceil_div(w.outputs, rows);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && tasks > 1)
  for (int64_t task = 0; task < tasks; task++) {
    // Panel after panel over the same rows: their weights stay in the cache.
    const int64_t p = task % panels.count, first = panels.first(p);
    const int n0 = (int)(task / panels.count) * rows, n1 = std::min(w.outputs, n0 + rows);
    with_width(panels.width(p), [&](auto v) {
      constexpr int V = decltype(v)::value;
      std::vector<Segment> where;
      if (in.format == PLANES) where = segments(first, in.tokens, in.pixels, V * W);
      float* c = scratch().sums.need((size_t)(rows + RING_ROWS) * V * W);
      accumulate<V>(w, in, nullptr, where, first, n0, n1, c);
      finish(out, c, V * W, first, in, where, n0, n1, w.outputs, activation);
    });
  }
}

// Two products with an activation between them, panel by panel: what lies between never leaves the thread's caches.
template <class X>
static void mlp(const Weight<X>& one, const Weight<X>& two, const Input<X>& in, const Output<X>& out, int activation,
                int threads) {
  const Panels panels = even_panels(in.tokens, std::min(one.widest(), two.widest()), threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && panels.count > 1)
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t first = panels.first(p);
    with_width(panels.width(p), [&](auto v) {
      constexpr int V = decltype(v)::value, P = V * W;
      const std::vector<Segment> nowhere;
      const int hidden = one.outputs;
      float* panel = nullptr;
      X* half = nullptr;
      if (two.layout == LAYOUT_ROWS) panel = scratch().panel.need((size_t)(hidden + TILE_ROWS) * P, true);
      else half = (X*)scratch().hidden.need((size_t)hidden * P);
      for (int n0 = 0; n0 < hidden; n0 += MOST_ROWS) {
        const int n1 = std::min(hidden, n0 + MOST_ROWS);
        float* c = panel ? panel + (size_t)n0 * P : scratch().sums.need((size_t)(MOST_ROWS + RING_ROWS) * P);
        accumulate<V>(one, in, nullptr, nowhere, first, n0, n1, c);
        for (size_t i = 0; i < (size_t)(n1 - n0) * P; i += W) {
          vf h = activate(load(c + i), activation);
          if (panel) store(c + i, h);
          else store(half + (size_t)n0 * P + i, h);
        }
      }
      const Input<X> middle{half, PANEL, in.tokens, 1};
      for (int n0 = 0; n0 < two.outputs; n0 += MOST_ROWS) {
        const int n1 = std::min(two.outputs, n0 + MOST_ROWS);
        float* c = scratch().sums.need((size_t)(MOST_ROWS + RING_ROWS) * P);
        accumulate<V>(two, middle, panel, nowhere, first, n0, n1, c);
        finish(out, c, P, first, in, nowhere, n0, n1, two.outputs, NONE);
      }
    });
  }
}
