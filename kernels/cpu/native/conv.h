// Direct convolution, with output pixels in the lanes: no im2col matrix is written to memory.
//
// The image is copied once into padded planes, one per channel; for stride s, each plane is stored as s * s phases, the
// planes of every s-th row and column. The pixels that a kernel tap reads for a row of output pixels are then
// contiguous in one phase. Blocks of (tap, channel) columns are copied from there into the tile, and sweep.h computes
// the product.
#pragma once

#include "gemm.h"

constexpr int CONV_COLUMNS = 96, CONV_CHANNELS = 10;  // maximum per block, as in layouts.py

struct Convolution {
  int64_t images, channels, height, width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  int taps() const { return kernel_h * kernel_w; }
  int64_t out_h() const { return (height + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int64_t out_w() const { return (width + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  int64_t phase_rows() const { return (height + 2 * pad_h + stride_h - 1) / stride_h; }
  int64_t phase_columns() const { return (width + 2 * pad_w + stride_w - 1) / stride_w; }
  int64_t phase_size() const { return phase_rows() * phase_columns(); }
  int64_t plane_size() const { return phase_size() * stride_h * stride_w; }  // all phases of a channel

  // Distance from an output pixel's position in a phase (row * phase_columns() + column) to the input pixel that a tap
  // reads for it.
  int64_t tap_offset(int tap) const {
    const int64_t dy = tap / kernel_w * dilation_h, dx = tap % kernel_w * dilation_w;
    const int64_t phase = dy % stride_h * stride_w + dx % stride_w;
    return phase * phase_size() + dy / stride_h * phase_columns() + dx / stride_w;
  }
  // Position of input pixel (y, x) in its channel's plane: row_offset(y) + column_offset(x).
  int64_t row_offset(int64_t y) const {
    y += pad_h;
    return y % stride_h * stride_w * phase_size() + y / stride_h * phase_columns();
  }
  int64_t column_offset(int64_t x) const {
    x += pad_w;
    return x % stride_w * phase_size() + x / stride_w;
  }
};

// How the columns of a convolution are cut into blocks: `channels` channels at `taps` taps.
struct ConvBlocks {
  int channels, taps;

  static ConvBlocks of(int taps, int m) {
    const int channels = m * std::max(1, CONV_CHANNELS / m);
    const int parts = (taps * channels + CONV_COLUMNS - 1) / CONV_COLUMNS;
    return {channels, (taps + parts - 1) / parts};
  }
};

// Copies `count` pixels of row y of the image, from column x on, into their plane.
NM_INLINE void copy_row(const Convolution& g, const float* pixels, int64_t count, int64_t y, int64_t x, float* plane) {
  float* row = plane + g.row_offset(y);
  if (g.stride_w == 1) {
    memcpy(row + g.column_offset(x), pixels, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; i++) row[g.column_offset(x + i)] = pixels[i];
}

// Copies channels of one image, (C, H, W) or channels-last (H, W, C), into their padded planes.
static void fill_planes(const Convolution& g, const float* image, bool channels_last, ChannelRange channels,
                        float* planes) {
  const int64_t plane_size = g.plane_size();
  const int count = channels.count;
  memset(planes, 0, count * plane_size * sizeof(float));
  for (int64_t y = 0; y < g.height; y++) {
    if (!channels_last) {
      for (int j = 0; j < count; j++) {
        const float* row = image + ((channels.begin + j) * g.height + y) * g.width;
        copy_row(g, row, g.width, y, 0, planes + j * plane_size);
      }
      continue;
    }
    for (int64_t x = 0; x < g.width; x += W) {
      const int pixels = (int)std::min<int64_t>(W, g.width - x);
      vf r[W];
      read_block(image + (y * g.width + x) * g.channels + channels.begin, g.channels, pixels, count, r);
      for (int j = 0; j < count; j++) {
        float channel[W];
        store(channel, r[j]);
        copy_row(g, channel, pixels, y, x, planes + j * plane_size);
      }
    }
  }
}

// Output pixels of a panel that are consecutive in a phase.
struct Run {
  int lane, length;
  int64_t position;  // in the planes, for the image's first channel and a tap offset of 0
};

static std::vector<Run> find_runs(const Convolution& g, int64_t first, int64_t tokens, int lanes) {
  const int64_t out_w = g.out_w(), pixels = g.out_h() * out_w, plane_size = g.plane_size(), columns = g.phase_columns();
  std::vector<Run> runs;
  for (int64_t t = first, end = std::min(tokens, first + lanes); t < end;) {
    const int64_t image = t / pixels, y = t % pixels / out_w, x = t % out_w;
    const int64_t length = std::min(end - t, out_w - x);
    runs.push_back({(int)(t - first), (int)length, image * g.channels * plane_size + y * columns + x});
    t += length;
  }
  return runs;
}

// Copies the (tap, channel) columns of a block into the tile. `planes` begins at the block's first channel.
template <int V>
static void fill_conv_tile(const Convolution& g, const std::vector<Run>& runs, const float* planes, int first_tap,
                           ConvBlocks block, float* tile) {
  constexpr int P = V * W;
  const int64_t plane_size = g.plane_size();
  memset(tile, 0, (size_t)block.taps * block.channels * P * sizeof(float));
  for (int t = 0; t < block.taps; t++) {
    const float* const shifted = planes + g.tap_offset(first_tap + t);
    for (int k = 0; k < block.channels; k++) {
      // Whole vectors: pixels copied past the end of a run are overwritten by the next run or the next tile row.
      const float* from = shifted + k * plane_size;
      float* row = tile + (size_t)(t * block.channels + k) * P;
      for (const Run& run : runs)
        for (int i = 0; i < run.length; i += W) store(row + run.lane + i, load(from + run.position + i));
    }
  }
}

// Computes output rows `rows` of the panel that starts at output pixel `first`, before the epilogue: sums (rows, P).
template <int V>
static void accumulate_conv(const Convolution& g, const PackedWeight<float>& w, const float* planes, int64_t first,
                            RowRange rows, float* sums) {
  constexpr int P = V * W;
  const int64_t plane_size = g.plane_size(), tokens = g.images * g.out_h() * g.out_w();
  const int taps = g.taps();
  const ConvBlocks full = ConvBlocks::of(taps, w.m);
  const std::vector<Run> runs = find_runs(g, first, tokens, P);
  const bool half = last_vector_half_used<V>(first, tokens);
  auto sweep = half ? sweep_rows<V, HALVES, float, float> : sweep_rows<V, false, float, float>;
  const float* initial = w.initial_sums();
  float* tile = scratch().tile.get((size_t)TILE_ROWS * P + W, true);  // W more: the last vector is stored whole
  size_t offset = 0;
  for (int c0 = 0; c0 < w.inputs; c0 += full.channels)
    for (int t0 = 0; t0 < taps; t0 += full.taps) {
      const ConvBlocks block{std::min(full.channels, w.inputs - c0), std::min(full.taps, taps - t0)};
      fill_conv_tile<V>(g, runs, planes + c0 * plane_size, t0, block, tile);
      const int entries = w.entries_per_row(block.taps * block.channels);
      sweep(tile, {w.values + offset, w.index + offset, entries}, rows, sums, initial);
      initial = nullptr;
      offset += (size_t)w.outputs * entries;
    }
}

// Input and output are (images, channels, height, width), in FORMAT_PLANES or, channels last, in FORMAT_TOKENS.
static void convolve(const Convolution& g, const PackedWeight<float>& w, const Activations<float>& in,
                     const Output<float>& out, int threads) {
  static thread_local Scratch<float> plane_scratch;
  const int64_t plane_size = g.plane_size(), sets = (g.channels + W - 1) / W;
  // W floats more than the planes: tiles are filled by whole vectors, which read past the last run.
  float* planes = plane_scratch.get(g.images * g.channels * plane_size + W);
  memset(planes + g.images * g.channels * plane_size, 0, W * sizeof(float));
  const Split split = find_split({out.tokens, MAX_PANEL_VECTORS, w.outputs, w.fill_cost(), threads});
  const int64_t tasks = split.tasks(w.outputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g.images * sets; i++) {
      const int64_t image = i / sets, c = i % sets * W;
      const ChannelRange channels{(int)c, (int)std::min<int64_t>(W, g.channels - c)};
      fill_planes(g, in.data + image * g.channels * g.height * g.width, in.format == FORMAT_TOKENS, channels,
                  planes + (image * g.channels + c) * plane_size);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t p = split.panel(task), first = split.panels.first(p);
      const RowRange rows = split.chunk(task, w.outputs);
      with_panel_width(split.panels.width(p), [&](auto v) {
        constexpr int V = decltype(v)::value, P = V * W;
        float* sums = scratch().sums.get((size_t)split.rows * P);
        accumulate_conv<V>(g, w, planes, first, rows, sums);
        write_panel({sums, P, rows}, {first, find_segments(out, first, P)}, out);
      });
    }
  }
}
