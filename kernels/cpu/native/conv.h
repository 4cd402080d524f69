// Direct convolution, with output pixels in the lanes: no im2col matrix is written to memory.
//
// Every channel of an image is a plane. For stride s, planes are stored as s * s phases, the planes of every s-th row
// and column. The pixels that a kernel tap reads for a row of output pixels are then contiguous in one phase; where a
// phase is as wide as the output, as with "same" padding, they are contiguous across rows, too. Lanes whose pixel lies
// in the padding are masked. Blocks of (tap, channel) columns are copied from the planes into the tile, and sweep.h
// computes the product.
#pragma once

#include "gemm.h"

// One axis of a convolution. Output position i reads input position i * stride + k * dilation - pad at kernel position
// k: element i + shift(k) of phase(k).
struct Axis {
  int64_t size;
  int kernel, stride, pad, dilation;

  int64_t outputs() const { return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1; }
  int64_t phase_length() const { return (size + stride - 1) / stride; }
  int64_t phase(int k) const { return (first(k) % stride + stride) % stride; }
  int64_t shift(int k) const { return (first(k) - phase(k)) / stride; }
  bool reads_phase(int64_t p) const {
    for (int k = 0; k < kernel; k++)
      if (phase(k) == p) return true;
    return false;
  }
  // The output positions in [begin, end) that read inside the image.
  std::pair<int64_t, int64_t> inside(int k, int64_t begin, int64_t end) const {
    const int64_t length = (size - phase(k) + stride - 1) / stride;
    begin = std::max(begin, -shift(k));
    return {begin, std::max(begin, std::min(end, length - shift(k)))};
  }

 private:
  int64_t first(int k) const { return (int64_t)k * dilation - pad; }
};

struct Convolution {
  int64_t images, channels, height, width;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  Axis y_axis() const { return {height, kernel_h, stride_h, pad_h, dilation_h}; }
  Axis x_axis() const { return {width, kernel_w, stride_w, pad_w, dilation_w}; }
  int taps() const { return kernel_h * kernel_w; }
  int64_t out_h() const { return y_axis().outputs(); }
  int64_t out_w() const { return x_axis().outputs(); }
  int64_t phase_size() const { return y_axis().phase_length() * x_axis().phase_length(); }
  int64_t plane_size() const { return phase_size() * stride_h * stride_w; }  // all phases of a channel

  // Distance in a plane from element (row, column) of a phase to the pixel that a tap reads for output (row, column).
  int64_t tap_offset(int tap) const {
    const Axis y = y_axis(), x = x_axis();
    const int dy = tap / kernel_w, dx = tap % kernel_w;
    const int64_t phase = y.phase(dy) * stride_w + x.phase(dx);
    return phase * phase_size() + y.shift(dy) * x.phase_length() + x.shift(dx);
  }
};

// Copies every `stride`-th of the pixels.
NM_INLINE void copy_pixels(const float* from, int stride, int64_t count, float* to) {
  if (stride == 1)
    memcpy(to, from, count * sizeof(float));
  else if (stride == 2)  // a constant that lets the compiler use vectors
    for (int64_t i = 0; i < count; i++) to[i] = from[2 * i];
  else
    for (int64_t i = 0; i < count; i++) to[i] = from[stride * i];
}

// Rows of pixels to be copied into one phase of the planes.
struct PixelRow {
  int64_t first;  // in the image
  int stride;
  int64_t count;
};

// Copies a row of pixels of some channels of an image, (C, H, W) or channels-last (H, W, C).
static void copy_row(const Convolution& g, const float* image, bool channels_last, ChannelRange channels, PixelRow row,
                     float* to) {
  const int64_t plane_size = g.plane_size();
  if (!channels_last) {
    for (int j = 0; j < channels.count; j++) {
      const float* from = image + (channels.begin + j) * g.height * g.width + row.first;
      copy_pixels(from, row.stride, row.count, to + j * plane_size);
    }
    return;
  }
  for (int64_t i = 0; i < row.count; i += W) {
    const int pixels = (int)std::min<int64_t>(W, row.count - i);
    vf r[W];
    const float* from = image + (row.first + i * row.stride) * g.channels + channels.begin;
    read_block(from, row.stride * g.channels, pixels, channels.count, r);
    for (int j = 0; j < channels.count; j++) store_lanes(to + j * plane_size + i, r[j], pixels);
  }
}

// Copies channels of one image into their planes; phases that no tap reads are left out.
static void fill_planes(const Convolution& g, const float* image, bool channels_last, ChannelRange channels,
                        float* planes) {
  const Axis y = g.y_axis(), x = g.x_axis();
  if (g.stride_h == 1 && g.stride_w == 1)  // the rows follow each other
    return copy_row(g, image, channels_last, channels, {0, 1, g.height * g.width}, planes);
  for (int py = 0; py < g.stride_h; py++)
    for (int px = 0; px < g.stride_w; px++) {
      if (!y.reads_phase(py) || !x.reads_phase(px)) continue;
      const int64_t count = (g.width - px + g.stride_w - 1) / g.stride_w;
      float* to = planes + (py * g.stride_w + px) * g.phase_size();
      for (int64_t row = py; row < g.height; row += g.stride_h, to += x.phase_length())
        copy_row(g, image, channels_last, channels, {row * g.width + px, g.stride_w, count}, to);
    }
}

// How the vectors of a tile row are read from a plane. Read r fills lanes of vector[r] from position[r] on (a position
// in the planes, for a tap offset of 0); at tap t, those lanes are the bits of lanes[r * taps + t]. A vector has
// several reads where it spans images, or rows of a phase that is wider than the output.
struct Reads {
  std::vector<int> vector;
  std::vector<int64_t> position;
  std::vector<uint32_t> lanes;

  int count() const { return (int)vector.size(); }
  bool starts_vector(int r) const { return r == 0 || vector[r] != vector[r - 1]; }
};

// Output pixels of one row in consecutive lanes of a vector.
struct Run {
  int vector, lane, length;
  int64_t image, y, x;
};

NM_INLINE void add_run(const Convolution& g, const Run& run, Reads& reads) {
  const Axis y = g.y_axis(), x = g.x_axis();
  const int64_t position = run.image * g.channels * g.plane_size() + run.y * x.phase_length() + run.x - run.lane;
  if (!reads.count() || reads.vector.back() != run.vector || reads.position.back() != position) {
    reads.vector.push_back(run.vector);
    reads.position.push_back(position);
    reads.lanes.resize(reads.lanes.size() + g.taps());
  }
  uint32_t* lanes = &reads.lanes[reads.lanes.size() - g.taps()];
  for (int dx = 0; dx < g.kernel_w; dx++) {
    const auto [begin, end] = x.inside(dx, run.x, run.x + run.length);
    if (begin == end) continue;
    const uint32_t bits = ((1u << (end - begin)) - 1) << (begin - run.x + run.lane);
    for (int dy = 0; dy < g.kernel_h; dy++) {
      const auto [above, below] = y.inside(dy, run.y, run.y + 1);
      if (below > above) lanes[dy * g.kernel_w + dx] |= bits;
    }
  }
}

// The reads of the panel that starts at output pixel `first`.
static Reads find_reads(const Convolution& g, int64_t first, int64_t tokens, int lanes) {
  const int64_t out_w = g.out_w(), pixels = g.out_h() * out_w;
  Reads reads;
  for (int64_t t = first, end = std::min(tokens, first + lanes); t < end;) {
    const int64_t image = t / pixels, y = t % pixels / out_w, x = t % out_w;
    const int vector = (int)(t - first) / W, lane = (int)(t - first) % W;
    const int length = (int)std::min({end - t, out_w - x, (int64_t)W - lane});
    add_run(g, {vector, lane, length, image, y, x}, reads);
    t += length;
  }
  return reads;
}

// Copies the (tap, channel) columns of a block into the tile. `planes` begins at the block's first channel.
template <int V>
static void fill_conv_tile(const Convolution& g, const Reads& reads, const float* planes, int first_tap,
                           ConvBlocks block, float* tile) {
  constexpr int P = V * W;
  const int64_t plane_size = g.plane_size();
  const int count = reads.count();
  const int taps = g.taps();
  for (int t = first_tap; t < first_tap + block.taps; t++) {
    const float* from = planes + g.tap_offset(t);
    if (count == V) {  // one read per vector
      int64_t position[V];
      uint32_t lanes[V];
      for (int v = 0; v < V; v++) position[v] = reads.position[v], lanes[v] = reads.lanes[v * taps + t];
      for (int k = 0; k < block.channels; k++, from += plane_size, tile += P)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(tile + v * W, load_lanes(from + position[v], lanes[v]));
      continue;
    }
    for (int k = 0; k < block.channels; k++, from += plane_size, tile += P)
      for (int r = 0; r < count; r++) {
        float* to = tile + reads.vector[r] * W;
        const vf x = load_lanes(from + reads.position[r], reads.lanes[r * taps + t]);
        store(to, reads.starts_vector(r) ? x : load(to) + x);  // the other lanes are zero
      }
  }
}

// Computes output rows `rows` of the panel that starts at output pixel `first`, before the epilogue: sums (rows, P).
// `planes` begins at the first channel that these rows read.
template <int V>
static void accumulate_conv(const Convolution& g, const PackedWeight<float>& w, const float* planes, int64_t first,
                            RowRange rows, float* sums) {
  constexpr int P = V * W;
  const int64_t plane_size = g.plane_size(), tokens = g.images * g.out_h() * g.out_w();
  const int taps = g.taps();
  const ConvBlocks full = ConvBlocks::of(taps, w.m);
  const Reads reads = find_reads(g, first, tokens, P);
  const bool half = last_vector_half_used<V>(first, tokens);
  auto sweep = half ? sweep_rows<V, HALVES, float, float> : sweep_rows<V, false, float, float>;
  const float* initial = w.initial_sums();
  float* tile = scratch().tile.get((size_t)TILE_ROWS * P, true);
  size_t offset = 0;
  for (int c0 = 0; c0 < w.inputs; c0 += full.channels)
    for (int t0 = 0; t0 < taps; t0 += full.taps) {
      const ConvBlocks block{std::min(full.channels, w.inputs - c0), std::min(full.taps, taps - t0)};
      fill_conv_tile<V>(g, reads, planes + c0 * plane_size, t0, block, tile);
      const int entries = w.entries_per_row(block.taps * block.channels);
      sweep(tile, {w.values + offset, w.index + offset, entries}, rows, sums, initial);
      initial = nullptr;
      offset += (size_t)w.outputs * entries;
    }
}

// Cost of filling the tiles of a panel, in the unit of PackedWeight::fill_cost. Nothing is transposed here.
inline int conv_fill_cost(const PackedWeight<float>& w) { return 4 * w.m / w.n; }

// The rows of the weight are in `groups` groups of equal size, each with channels of its own; a group is a product of
// its own, on the same packed blocks. Input and output are (images, channels, height, width), in FORMAT_PLANES or,
// channels last, in FORMAT_TOKENS.
static void convolve(const Convolution& g, const PackedWeight<float>& w, int groups, const Activations<float>& in,
                     const Output<float>& out, int threads) {
  static thread_local Scratch<float> plane_scratch;
  const int64_t plane_size = g.plane_size(), sets = (g.channels + W - 1) / W;
  const bool in_planes = in.format == FORMAT_PLANES && g.stride_h == 1 && g.stride_w == 1;
  float* filled = in_planes ? nullptr : plane_scratch.get(g.images * g.channels * plane_size);
  const float* planes = in_planes ? in.data : filled;
  const int outputs = w.outputs / groups;
  const Split split = find_split({out.tokens, MAX_PANEL_VECTORS, outputs, conv_fill_cost(w), threads});
  const int64_t tasks = split.tasks(outputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (!in_planes) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < g.images * sets; i++) {
        const int64_t image = i / sets, c = i % sets * W;
        const ChannelRange channels{(int)c, (int)std::min<int64_t>(W, g.channels - c)};
        fill_planes(g, in.data + image * g.channels * g.height * g.width, in.format == FORMAT_TOKENS, channels,
                    filled + (image * g.channels + c) * plane_size);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks * groups; i++) {
      const int64_t group = i / tasks, task = i % tasks, p = split.panel(task), first = split.panels.first(p);
      const RowRange chunk = split.chunk(task, outputs);
      const RowRange rows{(int)group * outputs + chunk.begin, (int)group * outputs + chunk.end};
      with_panel_width(split.panels.width(p), [&](auto v) {
        constexpr int V = decltype(v)::value, P = V * W;
        float* sums = scratch().sums.get((size_t)split.rows * P);
        accumulate_conv<V>(g, w, planes + group * w.inputs * plane_size, first, rows, sums);
        write_panel({sums, P, rows}, {first, find_segments(out, first, P)}, out);
      });
    }
  }
}
