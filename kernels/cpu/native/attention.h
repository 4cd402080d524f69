// Attention for up to about a thousand tokens: softmax(q k^T * scale + bias) v. A block of queries computes its scores
// with all keys, so that the softmax sees whole rows. Both products run on the same register tile: the rows of one
// operand are broadcast, the lanes of the other hold keys (in the scores) or channels (in the output). Each thread
// packs keys and values of a head once, so that the tile reads consecutive memory however the heads are interleaved.
#pragma once

#include <omp.h>

#include "gemm.h"

constexpr int HEAD_VECTORS = W == 16 ? 4 : 2;

// Rows of a tile: with 32 registers, as many accumulators as leave room for the operands; else at most 16 registers.
constexpr int tile_rows(int vectors) {
  if (W == 16) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return W == 8 ? (vectors == 2 ? 6 : 12) : 4;
}
// Queries of a block. Its scores, the packed keys of one tile and the packed values of a chunk fit in the L1 cache.
constexpr int QUERY_BLOCK = 24;  // a multiple of every tile's rows: a last, partial tile stays inside the scratch
constexpr int64_t KEY_CHUNK = 96;

// C = A B (`first`) or C += A B, for R rows of A and V vectors of B. `b` is (depth, V * W).
template <int R, int V>
NM_INLINE void multiply_tile(const float* a, size_t a_stride, const float* b, int64_t depth, float* c, size_t c_stride,
                             bool first) {
  vf acc[R][V] = {};
  if (!first)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) acc[r][v] = load(c + r * c_stride + v * W);
  const float* rows[(R + 2) / 3];  // every third: the addresses of the others are a base and a multiple of the stride
  for (int r = 0; r < R; r += 3) rows[r / 3] = a + r * a_stride;
  for (int64_t k = 0; k < depth; k++, b += V * W) {
    vf lanes[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) lanes[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vf x = splat(rows[r / 3][r % 3 * a_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = fma(x, lanes[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * c_stride + v * W, acc[r][v]);
}

// A matrix product of a few rows. `a` and `c` have room for the rows of a last, partial tile.
struct RowProduct {
  const float* a;
  size_t a_stride;
  float* c;
  size_t c_stride;
  int rows;
};

template <int V> static void multiply_rows(const RowProduct& p, const float* b, int64_t depth, bool first) {
  constexpr int R = tile_rows(V);
  for (int r = 0; r < p.rows; r += R)
    multiply_tile<R, V>(p.a + r * p.a_stride, p.a_stride, b, depth, p.c + r * p.c_stride, p.c_stride, first);
}

static void multiply_rows(int vectors, const RowProduct& p, const float* b, int64_t depth, bool first) {
  switch (vectors) {
    case 1: return multiply_rows<1>(p, b, depth, first);
    case 2: return multiply_rows<2>(p, b, depth, first);
    case 3: return multiply_rows<std::min(3, HEAD_VECTORS)>(p, b, depth, first);
    default: return multiply_rows<HEAD_VECTORS>(p, b, depth, first);
  }
}

// The fewest panels of at most HEAD_VECTORS vectors, of nearly equal width.
inline Panels tile_panels(int64_t lanes) {
  const int64_t vectors = vectors_for(lanes);
  return {vectors, ceil_div(vectors, HEAD_VECTORS)};
}

// Packs keys (rows of `dim` channels): for each panel of keys (dim, lanes), the keys side by side.
static void pack_keys(const float* keys, size_t stride, int64_t count, int dim, float* packed) {
  const Panels panels = tile_panels(count);
  for (int64_t p = 0; p < panels.count; p++) {
    const int lanes = panels.width(p) * W;
    float* const panel = packed + panels.first(p) * dim;
    for (int lane = 0; lane < lanes; lane += W)
      for (int d = 0; d < dim; d += W) {
        const int64_t key = panels.first(p) + lane;
        vf r[W];
        read_block(keys + key * stride + d, stride, (int)std::min<int64_t>(W, count - key), dim - d, r);
        for (int j = 0; j < std::min(W, dim - d); j++) store(panel + (size_t)(d + j) * lanes + lane, r[j]);
      }
  }
}

// Packs values: for each panel of channels (keys, lanes).
static void pack_values(const float* values, size_t stride, int64_t count, int dim, float* packed) {
  const Panels panels = tile_panels(dim);
  for (int64_t p = 0; p < panels.count; p++) {
    const int lanes = panels.width(p) * W, first = (int)panels.first(p), used = std::min(lanes, dim - first);
    float* to = packed + panels.first(p) * count;
    const float* from = values + first;
    for (int64_t s = 0; s < count; s++, to += lanes, from += stride) {
      int i = 0;
      for (; i + W <= used; i += W) store(to + i, load(from + i));
      for (; i < lanes; i++) to[i] = i < used ? from[i] : 0.0f;
    }
  }
}

// exp(x) for x <= 0, with relative error 2e-7 + 7e-8 |x|; exactly 0 below -87, where the result would be denormal. NaN
// stays NaN.
NM_INLINE vf exp_of_nonpositive(vf x) {
  const vf log2e = splat(1.44269504088896341f);
  const vf magic = splat(12582912.0f + 127.0f);  // adding 1.5 * 2^23 rounds to an integer; 127 is the exponent's bias
  const vf shifted = fma(x, log2e, magic);
  const vf f = fma(x, log2e, magic - shifted);  // in [-0.5, 0.5]
  vf p = splat(1.3264727247e-3f);
  p = fma(p, f, splat(9.6715126881e-3f));
  p = fma(p, f, splat(5.5507337436e-2f));
  p = fma(p, f, splat(2.4022242085e-1f));
  p = fma(p, f, splat(6.9314697760e-1f));
  p = fma(p, f, splat(1.0f));
  const vf result = p * (vf)((vu)shifted << 23);
  return x < splat(-87.0f) ? vf{} : result;
}

// Replaces R rows of scores by exp(score - largest of its row) and writes the reciprocals of the sums. Several rows at
// a time hide the latency of reductions. The rows are whole vectors; lanes after the last key count as hidden keys.
template <int R> static void exponentiate(float* rows, size_t stride, int64_t keys, float* inverse) {
  const int64_t last = (keys - 1) / W * W;
  const vf hidden = splat(-__builtin_inff());
  vf most[R], sums[R] = {};
  for (int r = 0; r < R; r++) {
    float* const tail = rows + r * stride + last;
    vf x = load(tail);
    store(tail, most[r] = lane_numbers() < splat((float)(keys - last)) ? x : hidden);
  }
  for (int64_t s = 0; s < last; s += W)
    for (int r = 0; r < R; r++) most[r] = maximum(most[r], load(rows + r * stride + s));
  for (int r = 0; r < R; r++) {
    const vf shift = splat(largest_lane(most[r]));
    most[r] = shift == hidden ? vf{} : shift;  // of a row whose keys are all hidden, the sum is zero
  }
  for (int64_t s = 0; s <= last; s += W)
    for (int r = 0; r < R; r++) {
      float* const at = rows + r * stride + s;
      const vf e = exp_of_nonpositive(load(at) - most[r]);
      store(at, e);
      sums[r] = sums[r] + e;
    }
  for (int r = 0; r < R; r++) {
    const float sum = sum_of_lanes(sums[r]);
    inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
  }
}

static void add_bias(float* row, const float* bias, int64_t keys) {
  int64_t s = 0;
  for (; s + W <= keys; s += W) store(row + s, load(row + s) + load(bias + s));
  for (; s < keys; s++) row[s] += bias[s];
}

// Attention of one head; queries are computed a block at a time.
class Head {
 public:
  Head(const NmAttention& a, int64_t number)
      : a_(a),
        batch_(number / a.heads),
        head_(number % a.heads),
        width_(vectors_for(a.value_dim) * W),
        row_(vectors_for(a.keys) * W) {
    keys_ = memory().keys.get((size_t)row_ * a.dim);
    values_ = memory().values.get((size_t)width_ * a.keys);
    pack_keys(at(a.key), a.key.token, a.keys, a.dim, keys_);
    pack_values(at(a.value), a.value.token, a.keys, a.value_dim, values_);
  }

  // Computes up to QUERY_BLOCK queries.
  void compute(int64_t first, int rows) {
    const int dim = a_.dim;
    float* const queries = memory().queries.get((size_t)QUERY_BLOCK * dim, true);
    float* const scores = memory().scores.get((size_t)QUERY_BLOCK * row_, true);
    float* const sums = memory().sums.get((size_t)QUERY_BLOCK * width_, true);
    for (int r = 0; r < rows; r++) {
      const float* const from = at(a_.query) + (first + r) * a_.query.token;
      for (int d = 0; d < dim; d++) queries[r * dim + d] = from[d] * a_.scale;
    }
    const Panels key_panels = tile_panels(a_.keys), channels = tile_panels(a_.value_dim);
    for (int64_t p = 0; p < key_panels.count; p++) {
      const RowProduct product{queries, (size_t)dim, scores + key_panels.first(p), (size_t)row_, rows};
      multiply_rows(key_panels.width(p), product, keys_ + key_panels.first(p) * dim, dim, true);
    }
    float inverse[QUERY_BLOCK];
    if (a_.bias.data)
      for (int r = 0; r < rows; r++) add_bias(scores + r * row_, at(a_.bias) + (first + r) * a_.bias.token, a_.keys);
    for (int r = 0; r < rows; r += 4) exponentiate<4>(scores + r * row_, row_, a_.keys, inverse + r);
    for (int64_t s = 0; s < a_.keys; s += KEY_CHUNK)
      for (int64_t p = 0; p < channels.count; p++) {
        const RowProduct product{scores + s, (size_t)row_, sums + channels.first(p), (size_t)width_, rows};
        const float* const values = values_ + channels.first(p) * a_.keys + s * channels.width(p) * W;
        multiply_rows(channels.width(p), product, values, std::min(KEY_CHUNK, a_.keys - s), s == 0);
      }
    for (int r = 0; r < rows; r++) {
      float* const y = (float*)a_.y + ((batch_ * a_.queries + first + r) * a_.heads + head_) * a_.value_dim;
      for (int d = 0; d < a_.value_dim; d++) y[d] = sums[r * width_ + d] * inverse[r];
    }
  }

 private:
  const float* at(const NmHeads& x) const { return (const float*)x.data + batch_ * x.batch + head_ * x.head; }

  struct Memory {
    Scratch<float> keys, values, queries, scores, sums;
  };
  static Memory& memory() {
    static thread_local Memory instance;
    return instance;
  }

  const NmAttention& a_;
  const int64_t batch_, head_;
  const int64_t width_, row_;  // channels of a value and keys, rounded up to whole vectors
  float *keys_, *values_;      // packed
};

// The query at which the part of a thread begins, counted over all heads. A head is cut between whole tiles.
inline int64_t part_begin(const NmAttention& a, int part, int parts) {
  const int64_t begin = a.batch * a.heads * a.queries * part / parts, query = begin % a.queries;
  constexpr int rows = QUERY_BLOCK / 2;
  return begin - query + std::min(a.queries, (query + rows / 2) / rows * rows);
}

static void attention(const NmAttention& a) {
  const int64_t blocks = a.batch * a.heads * ceil_div(a.queries, QUERY_BLOCK);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && blocks > 1)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    const int64_t end = part_begin(a, part + 1, parts);
    for (int64_t i = part_begin(a, part, parts); i < end;) {
      Head head(a, i / a.queries);
      for (const int64_t stop = std::min(end, (i / a.queries + 1) * a.queries); i < stop;) {
        const int rows = (int)std::min<int64_t>(QUERY_BLOCK, stop - i);
        head.compute(i % a.queries, rows);
        i += rows;
      }
    }
  }
}
