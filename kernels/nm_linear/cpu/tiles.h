// Activations on their way in and out of a panel: P = V * W tokens side by side in the lanes, one row a channel.
#pragma once

#include <algorithm>
#include <vector>

#include "vec.h"

// Where activations lie. ROWS: token-major (T, K). PLANES: (images, K, pixels), a token being a pixel. PANEL: as
// the kernel itself leaves them, (K, P).
enum Format { ROWS = 0, PLANES = 1, PANEL = 2 };

// A run of a panel's lanes that lies in one piece in memory: `length` pixels of image `image` from `pixel` on.
struct Segment {
  int lane, length;
  int64_t image, pixel;
};

inline std::vector<Segment> segments(int64_t first, int64_t tokens, int64_t pixels, int lanes) {
  std::vector<Segment> found;
  for (int64_t t = first, end = std::min(tokens, first + lanes); t < end;) {
    int64_t image = t / pixels, pixel = t % pixels, length = std::min(end - t, pixels - pixel);
    found.push_back({(int)(t - first), (int)length, image, pixel});
    t += length;
  }
  return found;
}

// W tokens x W channels of a token-major matrix -> W channel vectors; zeros where there is no token or channel.
template <class X> NM_INLINE void read_block(const X* x, size_t stride, int tokens, int channels, vf* r) {
  if (tokens >= W && channels >= W) {
    for (int i = 0; i < W; i++) r[i] = load(x + i * stride);
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

// Asks for channels [k0, k0 + count) of a token-major panel ahead of their use. Each token's are elsewhere in memory, and
// the processor doesn't guess that.
template <class X> static void foresee(const X* x, int64_t first, int64_t tokens, int lanes, int64_t stride, int k0, int count) {
  constexpr int line = 64 / sizeof(X);
  for (int64_t t = first, end = std::min(tokens, first + lanes); t < end; t++)
    for (int k = 0; k < count; k += line) __builtin_prefetch(x + t * stride + k0 + k, 0, 2);
}

// Channels [k0, k0 + count) of a panel -> tile (count, V * W) of floats.
template <int V, class X>
static void fill_tile(const X* x, Format format, const std::vector<Segment>& where, int64_t first, int64_t tokens,
                      int64_t pixels, int channels, int k0, int count, float* tile) {
  constexpr int P = V * W;
  if (format == ROWS) {
    for (int v = 0; v < V; v++) {
      int here = (int)std::max<int64_t>(0, std::min<int64_t>(W, tokens - first - v * W));
      for (int k = 0; k < count; k += W) {
        vf r[W];
        read_block(x + (first + v * W) * channels + k0 + k, channels, here, count - k, r);
        for (int j = 0; j < std::min(W, count - k); j++) store(tile + (size_t)(k + j) * P + v * W, r[j]);
      }
    }
    return;
  }
  for (int k = 0; k < count; k++) {
    float* row = tile + (size_t)k * P;
    int filled = 0;
    for (const Segment& s : where) {
      const X* from = x + (s.image * channels + k0 + k) * pixels + s.pixel;
      int i = 0;
      for (; i + W <= s.length; i += W) store(row + s.lane + i, load(from + i));
      for (; i < s.length; i++) row[s.lane + i] = to_float(from[i]);
      filled = s.lane + s.length;
    }
    for (; filled < P; filled++) row[filled] = 0;
  }
}

// `count` sums -> y, with the residual (null: none) and the activation behind it.
template <class X> NM_INLINE void put(vf sums, int count, const X* residual, int after, X* y) {
  if (count == W) {
    store(y, activate(residual ? sums + load(residual) : sums, after));
    return;
  }
  if (residual)
    for (int j = 0; j < count; j++) sums[j] += to_float(residual[j]);
  sums = activate(sums, after);
  for (int j = 0; j < count; j++) from_float(sums[j], y + j);
}

// Outputs [n0, n1) of a panel, c (n1 - n0, lanes), -> y with activation and residual. Token-major: lane i goes to row
// place[i] of (., stride), or nowhere where that is negative.
template <class X>
static void write_rows(const float* c, int lanes, int n0, int n1, int activation, const int64_t* place, const X* residual,
                       X* y, int64_t stride) {
  const int before = ahead(activation), after = behind(activation);
  for (int v = 0; v < lanes; v += W)
    for (int n = n0; n < n1; n += W) {
      int count = std::min(W, n1 - n);
      vf r[W];
      for (int j = 0; j < W; j++) r[j] = j < count ? activate(load(c + (size_t)(n - n0 + j) * lanes + v), before) : (vf){};
      transpose(r);
      for (int i = 0; i < W; i++) {
        if (place[v + i] < 0) continue;
        size_t at = place[v + i] * stride + n;
        put(r[i], count, residual ? residual + at : nullptr, after, y + at);
      }
    }
}

// The same into planes: y (images, outputs, pixels).
template <class X>
static void write_planes(const float* c, int lanes, int n0, int n1, int activation, const std::vector<Segment>& where,
                         const X* residual, X* y, int outputs, int64_t pixels) {
  alignas(64) float row[64 * W];
  const int before = ahead(activation), after = behind(activation);
  for (int n = n0; n < n1; n++) {
    const float* from = c + (size_t)(n - n0) * lanes;
    for (int v = 0; v < lanes; v += W) store(row + v, activate(load(from + v), before));
    for (const Segment& s : where) {
      int64_t at = (s.image * outputs + n) * pixels + s.pixel;
      for (int i = 0; i < s.length; i += W)
        put(load(row + s.lane + i), std::min(W, s.length - i), residual ? residual + at + i : nullptr, after, y + at + i);
    }
  }
}
