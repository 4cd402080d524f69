// Direct convolution: output pixels in the lanes, nothing unfolded in memory.
//
// The image is laid out once, padded, as one plane a channel (and, for stride s, as s * s planes of every s-th row and
// column). What a kernel tap reads for a row of output pixels is then a run of one plane. A block of (tap, channel)
// columns is copied from there into the tile, and the sparse product of sweep.h follows.
#pragma once

#include "gemm.h"

constexpr int CONV_COLUMNS = 96, CONV_CHANNELS = 10;  // of a block: as in layouts.py

struct Convolution {
  int64_t images, channels, height, width, outputs;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  int64_t out_h() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int64_t out_w() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  int64_t rows() const { return (height + 2 * pad_h + stride_h - 1) / stride_h; }  // of a phase
  int64_t columns() const { return (width + 2 * pad_w + stride_w - 1) / stride_w; }
  int64_t plane() const { return rows() * columns() * stride_h * stride_w; }  // floats of a channel

  // From an output pixel's place in a plane (row * columns + column) to what a tap reads for it.
  int64_t distance(int tap) const {
    const int64_t dy = tap / kernel_w * dilation_h, dx = tap % kernel_w * dilation_w;
    const int64_t phase = dy % stride_h * stride_w + dx % stride_w;
    return phase * rows() * columns() + dy / stride_h * columns() + dx / stride_w;
  }
  // Where row y of the image begins in its plane; `x` columns on, for stride 1.
  int64_t row_at(int64_t y) const {
    y += pad_h;
    return y % stride_h * stride_w * rows() * columns() + y / stride_h * columns();
  }
  int64_t column_at(int64_t x) const {
    x += pad_w;
    return x % stride_w * rows() * columns() + x / stride_w;
  }
};

// A row of `count` pixels of the image, from column x on, into its plane.
NM_INLINE void lay_run(const Convolution& g, const float* pixels, int64_t count, int64_t y, int64_t x, float* plane) {
  float* row = plane + g.row_at(y);
  if (g.stride_w == 1) memcpy(row + g.column_at(x), pixels, count * sizeof(float));
  else for (int64_t i = 0; i < count; i++) row[g.column_at(x + i)] = pixels[i];
}

// Channels [c, c + count) of one image -> their padded planes. `x` is the image, (C, H, W) or, `last`, (H, W, C).
static void lay_planes(const Convolution& g, const float* x, bool last, int64_t c, int count, float* planes) {
  memset(planes, 0, count * g.plane() * sizeof(float));
  for (int64_t y = 0; y < g.height; y++) {
    if (!last) {
      for (int j = 0; j < count; j++)
        lay_run(g, x + ((c + j) * g.height + y) * g.width, g.width, y, 0, planes + j * g.plane());
      continue;
    }
    for (int64_t left = 0; left < g.width; left += W) {
      const int here = (int)std::min<int64_t>(W, g.width - left);
      vf r[W];
      read_block(x + (y * g.width + left) * g.channels + c, g.channels, here, count, r);
      for (int j = 0; j < count; j++) {
        float pixels[W];
        store(pixels, r[j]);
        lay_run(g, pixels, here, y, left, planes + j * g.plane());
      }
    }
  }
}

// Output pixels of a panel that follow one another in a plane.
struct Run {
  int lane, length;
  int64_t place;  // in the planes of the image's first channel
};

static std::vector<Run> runs(const Convolution& g, int64_t first, int64_t tokens, int lanes) {
  const int64_t pixels = g.out_h() * g.out_w(), wide = g.out_w();
  std::vector<Run> found;
  for (int64_t t = first, end = std::min(tokens, first + lanes); t < end;) {
    const int64_t image = t / pixels, y = t % pixels / wide, x = t % wide, length = std::min(end - t, wide - x);
    found.push_back({(int)(t - first), (int)length, image * g.channels * g.plane() + y * g.columns() + x});
    t += length;
  }
  return found;
}

// x (images, channels, height, width), or channels last with `last`; residual and y likewise.
static void convolve(const Convolution& g, const Weight<float>& w, const float* x, bool last, const float* residual, float* y,
                     int activation, int threads) {
  static thread_local Scratch<float> laid;
  const int64_t plane = g.plane(), pixels = g.out_h() * g.out_w(), tokens = g.images * pixels, sets = (g.channels + W - 1) / W;
  float* planes = laid.need(g.images * g.channels * plane + W);  // copies into a tile read up to W floats past a run
  memset(planes + g.images * g.channels * plane, 0, W * sizeof(float));
  const int taps = g.kernel_h * g.kernel_w, wide = w.m * std::max(1, CONV_CHANNELS / w.m);
  const int parts = (taps * wide + CONV_COLUMNS - 1) / CONV_COLUMNS, some = (taps + parts - 1) / parts;
  const Split cut = split(tokens, WIDEST, w.outputs, w.fill(), threads);
  const Panels panels = cut.panels;
  const int rows = cut.rows;
  const int64_t tasks = panels.count * ceil_div(w.outputs, rows);
  const Input<float> in{x, last ? ROWS : PLANES, tokens, pixels};
  const Output<float> out{residual, y, in.format};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.images * sets; i++) {
      const int64_t image = i / sets, c = i % sets * W, count = std::min<int64_t>(W, g.channels - c);
      lay_planes(g, x + image * g.channels * g.height * g.width, last, c, (int)count, planes + (image * g.channels + c) * plane);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t p = task % panels.count, first = panels.first(p);
      const int n0 = (int)(task / panels.count) * rows, n1 = std::min(w.outputs, n0 + rows);
      with_width(panels.width(p), [&](auto v) {
        constexpr int V = decltype(v)::value, P = V * W;
        const std::vector<Run> pieces = runs(g, first, tokens, P);
        auto sweep = half_used<V>(first, tokens) ? sweep_rows<V, HALVES, float, float> : sweep_rows<V, false, float, float>;
        const float* start = w.start();
        float* c = scratch().sums.need((size_t)rows * P);
        float* tile = scratch().tile.need((size_t)TILE_ROWS * P + W, true);  // whole vectors are copied, and the last may begin late
        size_t offset = 0;
        bool begun = false;
        for (int c0 = 0; c0 < w.inputs; c0 += wide) {
          const int count = std::min(wide, w.inputs - c0);
          for (int t0 = 0; t0 < taps; t0 += some) {
            const int here = std::min(some, taps - t0);
            memset(tile, 0, (size_t)here * count * P * sizeof(float));
            for (int t = 0; t < here; t++)
              for (int k = 0; k < count; k++) {
                // Whole vectors: what is copied past a run is overwritten by the next run or the next row of the tile.
                const float* from = planes + (c0 + k) * plane + g.distance(t0 + t);
                float* row = tile + (size_t)(t * count + k) * P;
                for (const Run& piece : pieces)
                  for (int i = 0; i < piece.length; i += W) store(row + piece.lane + i, load(from + piece.place + i));
              }
            const int entries = w.entries(here * count);
            sweep(tile, w.values + offset, w.index + offset, entries, n0, n1, c, begun ? nullptr : start);
            begun = true;
            offset += (size_t)w.outputs * entries;
          }
        }
        std::vector<Segment> where;
        if (!last) where = segments(first, tokens, pixels, P);
        finish(out, c, P, first, in, where, n0, n1, w.outputs, activation);
      });
    }
  }
}
