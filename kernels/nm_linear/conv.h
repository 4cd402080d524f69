// Direct convolution: output pixels in the lanes, nothing unfolded.
//
// The image is laid out once, padded, as one plane a channel (and, for stride s, as s * s planes of every s-th row and
// column). With pixels numbered through the padded rows, a kernel tap reads the same plane at a fixed distance: the
// product is the sparse one of sweep.h, with a table of distances in place of tile rows. Lanes that fall on padding
// are computed and dropped.
#pragma once

#include "gemm.h"

struct Convolution {
  int64_t images, channels, height, width, outputs;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  int64_t out_h() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int64_t out_w() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  int64_t rows() const { return (height + 2 * pad_h + stride_h - 1) / stride_h; }     // of a phase
  int64_t columns() const { return (width + 2 * pad_w + stride_w - 1) / stride_w; }
  int64_t phases() const { return (int64_t)stride_h * stride_w; }
  int64_t plane() const {  // floats from one channel to the next; never a multiple of a cache way
    int64_t floats = (rows() * columns() * phases() + W - 1) / W * W;
    return floats % 512 == 0 ? floats + W : floats;
  }
  int64_t lanes() const { return (out_h() - 1) * columns() + out_w(); }
  int64_t slack() const { return WIDEST * W + 16; }  // the last lanes read past the last plane

  // Distance of what a tap reads from the pixel it contributes to.
  int64_t distance(int y, int x) const {
    int64_t dy = y * dilation_h, dx = x * dilation_w;
    int64_t phase = dy % stride_h * stride_w + dx % stride_w;
    return phase * rows() * columns() + dy / stride_h * columns() + dx / stride_w;
  }
};

// One channel of one image -> its padded plane.
static void lay_plane(const Convolution& g, const float* x, int64_t step, float* plane) {
  const int64_t rows = g.rows(), columns = g.columns();
  memset(plane, 0, g.plane() * sizeof(float));
  for (int64_t y = 0; y < g.height; y++) {
    const int64_t py = y + g.pad_h;
    float* row = plane + (py % g.stride_h * g.stride_w) * rows * columns + py / g.stride_h * columns;
    const float* from = x + y * g.width * step;
    if (g.stride_w == 1 && step == 1) {
      memcpy(row + g.pad_w, from, g.width * sizeof(float));
    } else {
      for (int64_t c = 0; c < g.width; c++) {
        const int64_t px = c + g.pad_w;
        row[px % g.stride_w * rows * columns + px / g.stride_w] = from[c * step];
      }
    }
  }
}

// x (images, channels, height, width), or channels last with `last`; y likewise.
static void convolve(const Convolution& g, const Weight<float>& w, const float* x, bool last, const float* residual, float* y,
                     int activation, int threads) {
  static thread_local Scratch<float> laid;
  const int64_t size = g.height * g.width, plane = g.plane(), columns = g.columns(), pixels = g.out_h() * g.out_w();
  float* planes = laid.need(g.images * g.channels * plane + g.slack());
  memset(planes + g.images * g.channels * plane, 0, g.slack() * sizeof(float));
  const Panels panels(g.lanes(), WIDEST, 1);
  const int taps = g.kernel_h * g.kernel_w, wide = std::max(w.m, 28 / w.m * w.m), some = 256 / wide;
  const int rows = rows_per_task(w.outputs, g.images * panels.count, threads), chunks = (w.outputs + rows - 1) / rows;
  const int64_t tasks = g.images * panels.count * chunks;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.images * g.channels; i++) {
      const int64_t image = i / g.channels, channel = i % g.channels;
      lay_plane(g, last ? x + image * g.channels * size + channel : x + i * size, last ? g.channels : 1, planes + i * plane);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t image = task / (panels.count * chunks), p = task / chunks % panels.count, first = panels.first(p);
      const int n0 = (int)(task % chunks) * rows, n1 = std::min(w.outputs, n0 + rows);
      with_width(panels.width(p), [&](auto v) {
        constexpr int V = decltype(v)::value, P = V * W;
        const float* start = w.start();
        float* c = scratch().sums.need((size_t)rows * P);
        size_t offset = 0;
        bool begun = false;
        for (int c0 = 0; c0 < w.inputs; c0 += wide) {
          const int count = std::min(wide, w.inputs - c0);
          for (int t0 = 0; t0 < taps; t0 += some) {
            int32_t table[256];
            const int here = std::min(some, taps - t0);
            for (int t = 0; t < here; t++)
              for (int k = 0; k < count; k++)
                table[t * count + k] = (int32_t)(k * plane + g.distance((t0 + t) / g.kernel_w, (t0 + t) % g.kernel_w));
            const Scattered tile{planes + (image * g.channels + c0) * plane + first, table};
            const int entries = w.entries(here * count);
            sweep_rows<V>(tile, w.values + offset, w.index + offset, entries, n0, n1, c, begun ? nullptr : start);
            begun = true;
            offset += (size_t)w.outputs * entries;
          }
        }
        std::vector<Segment> where;
        int64_t place[P];
        for (int i = 0; i < P; i++) {
          const int64_t lane = first + i, oy = lane / columns, ox = lane % columns;
          const bool valid = oy < g.out_h() && ox < g.out_w();
          place[i] = valid ? image * pixels + oy * g.out_w() + ox : -1;
          if (!valid) continue;
          if (!where.empty() && where.back().lane + where.back().length == i) where.back().length++;
          else where.push_back({i, 1, image, oy * g.out_w() + ox});
        }
        if (last) write_rows(c, P, n0, n1, activation, place, residual, y, w.outputs);
        else write_planes(c, P, n0, n1, activation, where, residual, y, w.outputs, pixels);
      });
    }
  }
}
