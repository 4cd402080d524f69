// Reading activations into tiles and writing sums out. A panel is P = V * W consecutive tokens; a tile holds it with
// the tokens side by side in the lanes and one row per channel.
#pragma once

#include <algorithm>
#include <vector>

#include "abi.h"
#include "vec.h"

// Output rows [begin, end) of a weight, and input channels [begin, begin + count).
struct RowRange {
  int begin, end;
};
struct ChannelRange {
  int begin, count;
};

// Consecutive lanes of a panel that are contiguous in memory in FORMAT_PLANES: `length` pixels of image `image`, from
// `pixel` on.
struct Segment {
  int lane, length;
  int64_t image, pixel;
};

// Input of a product. FORMAT_PANEL is a panel computed by the kernels themselves, (channels, P): `float_panel` for
// LAYOUT_ROWS, which serves as the tile, and `data` for the layouts of pairs.
template <class X> struct Activations {
  const X* data;
  Format format;
  int64_t tokens, pixels;  // `pixels` per image, for FORMAT_PLANES
  int channels;
  const float* float_panel = nullptr;
};

// Output of a product. `residual` (null: none) has the format of `y`.
template <class X> struct Output {
  X* y;
  const X* residual;
  Format format;
  int64_t tokens, pixels;
  int channels;
  int epilogue;
};

// A panel of tokens, from `first` on, with its segments in FORMAT_PLANES.
struct Panel {
  int64_t first;
  std::vector<Segment> segments;
};

// Sums of a panel before the epilogue: (rows.end - rows.begin, lanes).
struct PanelSums {
  const float* data;
  int lanes;
  RowRange rows;
};

// The segments of a panel of an input or output; none in other formats.
template <class X> std::vector<Segment> find_segments(const X& matrix, int64_t first, int lanes) {
  std::vector<Segment> segments;
  if (matrix.format != FORMAT_PLANES) return segments;
  for (int64_t t = first, end = std::min(matrix.tokens, first + lanes); t < end;) {
    const int64_t image = t / matrix.pixels, pixel = t % matrix.pixels;
    const int64_t length = std::min(end - t, matrix.pixels - pixel);
    segments.push_back({(int)(t - first), (int)length, image, pixel});
    t += length;
  }
  return segments;
}

// Reads W tokens x W channels of a token-major matrix into W channel vectors; missing tokens and channels read as zero.
template <class X> NM_INLINE void read_block(const X* x, size_t stride, int tokens, int channels, vf* r) {
  if (channels >= W) {
    for (int i = 0; i < W; i++) r[i] = i < tokens ? load(x + i * stride) : (vf){};
  } else {
    for (int i = 0; i < W; i++) {
      r[i] = (vf){};
      if (i >= tokens) continue;
      alignas(64) float row[W] = {};
      for (int j = 0; j < std::min(channels, W); j++) row[j] = to_float(x[i * stride + j]);
      r[i] = load(row);
    }
  }
  transpose(r);
}

// Prefetches channels of a token-major panel. The tokens are far apart in memory, a pattern that hardware prefetchers
// do not detect.
template <class X>
static void prefetch_channels(const Activations<X>& in, int64_t first, int lanes, ChannelRange channels) {
  constexpr int line = 64 / sizeof(X);
  for (int64_t t = first, end = std::min(in.tokens, first + lanes); t < end; t++)
    for (int k = 0; k < channels.count; k += line)
      __builtin_prefetch(in.data + t * in.channels + channels.begin + k, 0, 2);
}

// Copies channels of a panel into a tile of floats, (channels.count, P), with zeros for missing tokens.
template <int V, class X>
static void fill_tile(const Activations<X>& in, const Panel& panel, ChannelRange channels, float* tile) {
  constexpr int P = V * W;
  const int count = channels.count;
  if (in.format == FORMAT_TOKENS) {
    for (int v = 0; v < V; v++) {
      int tokens = (int)std::max<int64_t>(0, std::min<int64_t>(W, in.tokens - panel.first - v * W));
      for (int k = 0; k < count; k += W) {
        vf r[W];
        const X* from = in.data + (panel.first + v * W) * in.channels + channels.begin + k;
        read_block(from, in.channels, tokens, count - k, r);
        for (int j = 0; j < std::min(W, count - k); j++) store(tile + (size_t)(k + j) * P + v * W, r[j]);
      }
    }
    return;
  }
  for (int k = 0; k < count; k++) {
    float* row = tile + (size_t)k * P;
    int filled = 0;
    for (const Segment& s : panel.segments) {
      const X* from = in.data + (s.image * in.channels + channels.begin + k) * in.pixels + s.pixel;
      int i = 0;
      for (; i + W <= s.length; i += W) store(row + s.lane + i, load(from + i));
      for (; i < s.length; i++) row[s.lane + i] = to_float(from[i]);
      filled = s.lane + s.length;
    }
    for (; filled < P; filled++) row[filled] = 0;
  }
}

// Writes the first `count` lanes: adds the residual (null: none), then applies the activation that follows it.
template <class X> NM_INLINE void write_lanes(vf sums, int count, const X* residual, int activation, X* y) {
  if (count == W) {
    store(y, activate(residual ? sums + load(residual) : sums, activation));
    return;
  }
  if (residual)
    for (int j = 0; j < count; j++) sums[j] += to_float(residual[j]);
  sums = activate(sums, activation);
  for (int j = 0; j < count; j++) from_float(sums[j], y + j);
}

// Applies the epilogue and writes the sums token-major. `place[i]` is the row of y for lane i; -1 skips it.
template <class X> static void write_tokens(const PanelSums& sums, const int64_t* place, const Output<X>& out) {
  const int before = activation_before_residual(out.epilogue), after = activation_after_residual(out.epilogue);
  const int begin = sums.rows.begin, end = sums.rows.end, lanes = sums.lanes;
  const float* const c = sums.data;
  const X* const residual = out.residual;
  X* const y = out.y;
  const int64_t stride = out.channels;
  for (int v = 0; v < lanes; v += W)
    for (int n = begin; n < end; n += W) {
      int count = std::min(W, end - n);
      vf r[W];
      for (int j = 0; j < W; j++)
        r[j] = j < count ? activate(load(c + (size_t)(n - begin + j) * lanes + v), before) : (vf){};
      transpose(r);
      for (int i = 0; i < W; i++) {
        if (place[v + i] < 0) continue;
        size_t at = place[v + i] * stride + n;
        write_lanes(r[i], count, residual ? residual + at : nullptr, after, y + at);
      }
    }
}

// Applies the epilogue and writes the sums into planes, y (images, channels, pixels).
template <class X>
static void write_planes(const PanelSums& sums, const std::vector<Segment>& segments, const Output<X>& out) {
  alignas(64) float row[64 * W];
  const int before = activation_before_residual(out.epilogue), after = activation_after_residual(out.epilogue);
  const X* const residual = out.residual;
  X* const y = out.y;
  for (int n = sums.rows.begin; n < sums.rows.end; n++) {
    const float* from = sums.data + (size_t)(n - sums.rows.begin) * sums.lanes;
    for (int v = 0; v < sums.lanes; v += W) store(row + v, activate(load(from + v), before));
    for (const Segment& s : segments) {
      int64_t at = (s.image * out.channels + n) * out.pixels + s.pixel;
      for (int i = 0; i < s.length; i += W)
        write_lanes(load(row + s.lane + i), std::min(W, s.length - i), residual ? residual + at + i : nullptr, after,
                    y + at + i);
    }
  }
}
