// Two products with an activation in between. Hidden activations stay in panels, in the caches.
#pragma once

#include "gemm.h"

constexpr int MANY_PANELS = 4;  // panels per thread from which the products are not split over their rows

template <class X> struct Mlp {
  PackedWeight<X> first, second;
  int activation;

  int hidden() const { return first.outputs; }
  int max_panel_vectors() const { return std::min(first.max_panel_vectors(), second.max_panel_vectors()); }
  // LAYOUT_ROWS reads its input as a tile of floats, and may read rows past the last channel.
  bool floats() const { return second.layout == LAYOUT_ROWS; }
  size_t panel_rows() const { return (size_t)hidden() + (floats() ? TILE_ROWS : 0); }
};

// Hidden activations of a panel, (channels, P): `floats` or `halves`.
template <class X> struct Hidden {
  float* floats;
  X* halves;

  // Room for panels of `lanes` lanes together, in memory that the calling thread keeps.
  static Hidden room(const Mlp<X>& layers, int64_t lanes) {
    const size_t count = layers.panel_rows() * lanes;
    if (layers.floats()) return {scratch().float_panel.get(count, true), nullptr};
    return {nullptr, (X*)scratch().half_panel.get(count)};
  }
  Hidden from(size_t at) const { return {floats ? floats + at : nullptr, halves ? halves + at : nullptr}; }
};

// Computes hidden channels `rows` of a panel.
template <int V, class X>
static void mlp_first(const Mlp<X>& layers, const Activations<X>& in, const Panel& panel, RowRange rows,
                      Hidden<X> hidden) {
  constexpr int P = V * W;
  const size_t at = (size_t)rows.begin * P, count = (size_t)(rows.end - rows.begin) * P;
  float* const sums = hidden.floats ? hidden.floats + at : scratch().sums.get(count + (size_t)RING_ROWS * P);
  accumulate<V>(layers.first, in, panel, rows, sums);
  for (size_t i = 0; i < count; i += W) {
    const vf h = activate(load(sums + i), layers.activation);
    if (hidden.floats)
      store(sums + i, h);
    else
      store(hidden.halves + at + i, h);
  }
}

// Computes output rows `rows` of a panel from its hidden activations.
template <int V, class X>
static void mlp_second(const Mlp<X>& layers, const Hidden<X>& hidden, const Panel& panel, RowRange rows,
                       const Output<X>& out) {
  constexpr int P = V * W;
  const Activations<X> in{hidden.halves, FORMAT_PANEL, out.tokens, 1, layers.hidden(), hidden.floats};
  float* const sums = scratch().sums.get((size_t)(rows.end - rows.begin + RING_ROWS) * P);
  accumulate<V>(layers.second, in, panel, rows, sums);
  write_panel({sums, P, rows}, panel, out);
}

// Many panels: each passes through both products before the next one.
template <class X>
static void mlp_by_panel(const Mlp<X>& layers, const Panels& panels, const Activations<X>& in, const Output<X>& out,
                         int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && panels.count > 1)
  for (int64_t p = 0; p < panels.count; p++) {
    const Panel panel{panels.first(p), {}};
    with_panel_width<PackedWeight<X>::most_vectors()>(panels.width(p), [&](auto v) {
      constexpr int V = decltype(v)::value;
      const Hidden<X> hidden = Hidden<X>::room(layers, V * W);
      for (int n = 0; n < layers.hidden(); n += MAX_TASK_ROWS)
        mlp_first<V>(layers, in, panel, {n, std::min(layers.hidden(), n + MAX_TASK_ROWS)}, hidden);
      for (int n = 0; n < layers.second.outputs; n += MAX_TASK_ROWS)
        mlp_second<V>(layers, hidden, panel, {n, std::min(layers.second.outputs, n + MAX_TASK_ROWS)}, out);
    });
  }
}

// Few panels: each product is split over its rows, too, so that no thread waits for one whose panel is wider.
template <class X>
static void mlp_by_product(const Mlp<X>& layers, const Activations<X>& in, const Output<X>& out, int threads) {
  const int most = layers.max_panel_vectors();
  const Split first = find_split({in.tokens, most, layers.hidden(), layers.first.fill_cost(), threads, true});
  const Split second = find_split({in.tokens, most, layers.second.outputs, 0, threads, true});
  const Panels& panels = first.panels;
  const Hidden<X> hidden = Hidden<X>::room(layers, panels.vectors * W);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < first.tasks(layers.hidden()); task++) {
      const int64_t p = first.panel(task), begin = panels.first(p);
      with_panel_width<PackedWeight<X>::most_vectors()>(panels.width(p), [&](auto v) {
        mlp_first<decltype(v)::value>(layers, in, {begin, {}}, first.chunk(task, layers.hidden()),
                                      hidden.from(begin * layers.panel_rows()));
      });
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < second.tasks(layers.second.outputs); task++) {
      const int64_t p = second.panel(task), begin = panels.first(p);
      with_panel_width<PackedWeight<X>::most_vectors()>(panels.width(p), [&](auto v) {
        mlp_second<decltype(v)::value>(layers, hidden.from(begin * layers.panel_rows()), {begin, {}},
                                       second.chunk(task, layers.second.outputs), out);
      });
    }
  }
}

template <class X> static void mlp(const Mlp<X>& layers, const Activations<X>& in, const Output<X>& out, int threads) {
  const Panels panels = even_panels(in.tokens, layers.max_panel_vectors(), threads);
  if (threads > 1 && panels.count > 0 && panels.count < MANY_PANELS * threads)
    mlp_by_product(layers, in, out, threads);
  else
    mlp_by_panel(layers, panels, in, out, threads);
}
