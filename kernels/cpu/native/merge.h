// Token merging (ToMe) as one call: matching, the choice of the tokens that merge, and weighted averages. The rules,
// ties included, are those of token_merge/reference.py.
//
// Scores are products of unit vectors, with tokens of set B in the lanes. Every result is computed by one thread, in an
// order that does not depend on the number of threads.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"

constexpr float MERGE_TIE = 1.0f / 4096;  // scores that differ by no more count as equal
constexpr float MERGE_TINY = std::numeric_limits<float>::min();
constexpr int MERGE_ROWS = W == 16 ? 6 : 4;     // tokens of A in a tile of scores
constexpr int MERGE_VECTORS = W == 16 ? 4 : 2;  // vectors of tokens of B in it
constexpr int64_t MERGE_SMALL = 1 << 17;        // multiply-adds and copied floats that one thread handles fastest

// A merge as it is called, and which tokens are in which set. Strides are in floats.
struct Merge {
  const NmMerge& a;

  // The tokens up to here take part, or are the prefix.
  int64_t inner() const { return a.tokens - a.suffix; }
  // Tokens of set A have even numbers, those of set B odd ones, from the end of the prefix on.
  int64_t even() const { return a.prefix + a.prefix % 2; }
  int64_t odd() const { return a.prefix + 1 - a.prefix % 2; }
  int64_t count_a() const { return (inner() - even() + 1) / 2; }
  int64_t count_b() const { return (inner() - odd() + 1) / 2; }
  int64_t left() const { return count_a() - a.r; }  // tokens of A that stay
  int64_t padded_b() const { return vectors_for(count_b()) * W; }
  int64_t padded_a() const { return ceil_div(count_a(), MERGE_ROWS) * MERGE_ROWS; }

  const float* x(int64_t image, int64_t token) const {
    return (const float*)a.x + image * a.x_image + token * a.x_token;
  }
  float size(int64_t image, int64_t token) const {
    return ((const float*)a.size)[image * a.size_image + token * a.size_token];
  }
  float* y(int64_t image, int64_t token) const { return (float*)a.y + (image * (a.tokens - a.r) + token) * a.channels; }
  float& new_size(int64_t image, int64_t token) const { return ((float*)a.new_size)[image * (a.tokens - a.r) + token]; }
  int64_t& place(int64_t image, int64_t token) const { return ((int64_t*)a.places)[image * a.tokens + token]; }
};

// What an image's tokens are matched by, in memory that the calling thread keeps.
struct Matching {
  float* keys_a;  // (tokens of A, depth), unit vectors
  float* keys_b;  // (depth, tokens of B), in whole vectors
  float* less_b;  // what the scores with each token of B lose; infinity for the padding
  float* value;   // highest score of each token of A, less what that token loses
  int* target;    // token of B that it is matched with

  explicit Matching(const Merge& m) {
    static thread_local struct {
      Scratch<float> keys_a, keys_b, less_b, value;
      Scratch<int> target;
    } memory;
    keys_a = memory.keys_a.get(m.padded_a() * m.a.depth), keys_b = memory.keys_b.get(m.padded_b() * m.a.depth);
    less_b = memory.less_b.get(m.padded_b());
    value = memory.value.get(m.count_a()), target = memory.target.get(m.count_a());
  }
};

static float squared_norm(const float* x, int64_t count) {
  vf sums = splat(0.0f);
  int64_t c = 0;
  for (; c + W <= count; c += W) sums = fma(load(x + c), load(x + c), sums);
  float sum = sum_of_lanes(sums);
  for (; c < count; c++) sum += x[c] * x[c];
  return sum;
}

// Writes the unit vector of a token's keys, summed over heads; zeros if one of them is not finite.
static void unit_key(const Merge& m, int64_t image, int64_t token, float* to) {
  const NmMerge& a = m.a;
  const float* const keys = (const float*)a.keys + image * a.keys_image + token * a.keys_token;
  std::copy_n(keys, a.depth, to);
  for (int64_t h = 1; h < a.heads; h++)
    for (int64_t d = 0; d < a.depth; d++) to[d] += keys[h * a.keys_head + d];
  const float norm = std::sqrt(squared_norm(to, a.depth)), scale = 1.0f / (norm < 1e-12f ? 1e-12f : norm);
  for (int64_t d = 0; d < a.depth; d++) {
    const float unit = to[d] * scale;
    to[d] = unit == unit ? unit : 0.0f;
  }
}

// What a score loses for the size of a token; sizes below 1 (hidden tokens) count as 1.
static float size_penalty(const Merge& m, int64_t image, int64_t token) {
  const float size = m.size(image, token);
  return m.a.size_weight ? m.a.size_weight * std::log(size < 1.0f ? 1.0f : size) : 0.0f;
}

// What a score loses for the token of A that would go; a saliency that is not finite counts as 0.
static float loss_of_a(const Merge& m, int64_t image, int64_t token) {
  const float lost = size_penalty(m, image, token);
  if (!m.a.saliency || !m.a.saliency_weight) return lost;
  const float known = ((const float*)m.a.saliency)[image * m.a.saliency_image + token * m.a.saliency_token];
  return std::fabs(known) < std::numeric_limits<float>::infinity() ? lost + m.a.saliency_weight * known : lost;
}

// Prepares W tokens of B, from number `first` on.
static void prepare_b(const Merge& m, int64_t image, int64_t first, float* rows, float* keys, float* less) {
  const int64_t depth = m.a.depth, padded = m.padded_b();
  const int count = (int)std::min<int64_t>(W, m.count_b() - first);
  for (int i = 0; i < W; i++) {
    const int64_t token = m.odd() + 2 * (first + i);
    less[first + i] = i < count ? size_penalty(m, image, token) : std::numeric_limits<float>::infinity();
    if (i < count)
      unit_key(m, image, token, rows + i * depth);
    else
      std::fill_n(rows + i * depth, depth, 0.0f);
  }
  int64_t d = 0;
  for (; d + W <= depth; d += W) {
    vf r[W];
    for (int i = 0; i < W; i++) r[i] = load(rows + i * depth + d);
    transpose(r);
    for (int i = 0; i < W; i++) store(keys + (d + i) * padded + first, r[i]);
  }
  for (; d < depth; d++)
    for (int i = 0; i < W; i++) keys[d * padded + first + i] = rows[i * depth + d];
}

// Scores of MERGE_ROWS tokens of A with V vectors of tokens of B.
template <int V>
static void score_tile(const float* a, const float* b, const float* less, int64_t depth, int64_t padded,
                       float* scores) {
  vf sums[MERGE_ROWS][V];
  for (int i = 0; i < MERGE_ROWS; i++)
    for (int v = 0; v < V; v++) sums[i][v] = splat(0.0f);
  for (int64_t d = 0; d < depth; d++) {
    vf keys[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) keys[v] = load(b + d * padded + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < MERGE_ROWS; i++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[i][v] = fma(splat(a[i * depth + d]), keys[v], sums[i][v]);
  }
  for (int i = 0; i < MERGE_ROWS; i++)
    for (int v = 0; v < V; v++) store(scores + i * padded + v * W, sums[i][v] - load(less + v * W));
}

// The highest of a row of scores, and the first that is within MERGE_TIE of it.
struct Match {
  float score;
  int target;
};

static Match best_of(const float* scores, int64_t count, int64_t padded) {
  vf most = load(scores);
  for (int64_t b = W; b < padded; b += W) {
    const vf s = load(scores + b);
    most = s > most ? s : most;
  }
  const float best = largest_lane(most);
  const float enough = best - MERGE_TIE;
  int64_t first = 0;
  while (first < count && !(scores[first] >= enough)) first++;
  return {best, first < count ? (int)first : 0};  // only sizes that are not finite leave no score
}

// Matches the tokens of A from number `row` on, at most MERGE_ROWS.
static void match_rows(const Merge& m, int64_t image, int64_t row, const Matching& to, float* scores) {
  const int64_t depth = m.a.depth, padded = m.padded_b(), vectors = padded / W;
  const float *const a = to.keys_a + row * depth, *const b = to.keys_b, *const less = to.less_b;
  int64_t v = 0;
  for (; v + MERGE_VECTORS <= vectors; v += MERGE_VECTORS)
    score_tile<MERGE_VECTORS>(a, b + v * W, less + v * W, depth, padded, scores + v * W);
  switch (vectors - v) {
    case 3: score_tile<3>(a, b + v * W, less + v * W, depth, padded, scores + v * W); break;
    case 2: score_tile<2>(a, b + v * W, less + v * W, depth, padded, scores + v * W); break;
    case 1: score_tile<1>(a, b + v * W, less + v * W, depth, padded, scores + v * W); break;
  }
  for (int64_t i = 0; i < MERGE_ROWS && row + i < m.count_a(); i++) {
    const Match match = best_of(scores + i * padded, m.count_b(), padded);
    to.value[row + i] = match.score - loss_of_a(m, image, m.even() + 2 * (row + i));
    to.target[row + i] = match.target;
  }
}

// Where the tokens of A go: their new places among those that stay, or -1 if they merge; and those that merge into each
// token of B, as lists in ascending order: the first one, and the next after each, or -1.
struct Moves {
  std::vector<int> place, first, next;

  Moves(const Merge& m, const float* value, const int* target)
      : place(m.count_a()), first(m.count_b(), -1), next(m.count_a(), -1) {
    const int count = (int)m.count_a();
    std::vector<float> known(value, value + count);
    for (float& v : known) v = v == v ? v : -std::numeric_limits<float>::infinity();  // NaN has no order
    std::vector<float> sorted(known);
    std::nth_element(sorted.begin(), sorted.begin() + (m.a.r - 1), sorted.end(), std::greater<float>());
    const float cut = sorted[m.a.r - 1];
    int room = m.a.r;  // for those within MERGE_TIE of the cut
    for (float v : known) room -= v > cut + MERGE_TIE;
    for (int i = 0, stayed = 0; i < count; i++) {
      bool merges = known[i] > cut + MERGE_TIE;
      if (!merges && room && known[i] >= cut - MERGE_TIE) merges = true, room--;
      place[i] = merges ? -1 : stayed++;
    }
    for (int i = count - 1; i >= 0; i--)
      if (place[i] < 0) next[i] = first[target[i]], first[target[i]] = i;
  }
};

// y[c] += weight * x[c]
NM_INLINE void add_row(float* __restrict y, const float* x, float weight, int64_t channels) {
  for (int64_t c = 0; c < channels; c++) y[c] += weight * x[c];
}

// Writes token `b` of B, with those that merge into it.
static void write_b(const Merge& m, int64_t image, int64_t b, const Moves& moves, float* sum) {
  const int64_t token = m.odd() + 2 * b, to = m.a.prefix + m.left() + b, channels = m.a.channels;
  const float* const into = m.x(image, token);
  float* const y = m.y(image, to);
  float received = 0;
  for (int i = moves.first[b]; i >= 0; i = moves.next[i]) received += m.size(image, m.even() + 2 * i);
  const float grown = m.size(image, token) + received, total = grown > MERGE_TINY ? grown : MERGE_TINY;
  m.new_size(image, to) = grown;
  m.place(image, token) = to;
  if (!(received > 0)) {
    std::copy_n(into, channels, y);
    return;
  }
  std::fill_n(sum, channels, 0.0f);
  float norms = 0;
  for (int i = moves.first[b]; i >= 0; i = moves.next[i]) {
    const int64_t from = m.even() + 2 * i;
    add_row(sum, m.x(image, from), m.size(image, from), channels);
    if (m.a.keep_norm) norms += m.size(image, from) * std::sqrt(squared_norm(m.x(image, from), channels));
  }
  for (int64_t c = 0; c < channels; c++) y[c] = into[c] + (sum[c] - received * into[c]) / total;
  if (!m.a.keep_norm) return;
  float norm = std::sqrt(squared_norm(into, channels));
  norm += (norms - received * norm) / total;
  const float now = std::sqrt(squared_norm(y, channels)), scale = norm / (now > MERGE_TINY ? now : MERGE_TINY);
  for (int64_t c = 0; c < channels; c++) y[c] *= scale;
}

static void copy_token(const Merge& m, int64_t image, int64_t token, int64_t to) {
  std::copy_n(m.x(image, token), m.a.channels, m.y(image, to));
  m.new_size(image, to) = m.size(image, token);
  m.place(image, token) = to;
}

// Writes a token where it goes, unless it merges into another.
static void write_token(const Merge& m, int64_t image, int64_t token, const Moves& moves, const int* target,
                        float* sum) {
  if (token < m.a.prefix) return copy_token(m, image, token, token);
  if (token >= m.inner()) return copy_token(m, image, token, token - m.a.r);
  if (token % 2) return write_b(m, image, (token - m.odd()) / 2, moves, sum);
  const int64_t i = (token - m.even()) / 2;
  if (moves.place[i] >= 0)
    copy_token(m, image, token, m.a.prefix + moves.place[i]);
  else
    m.place(image, token) = m.a.prefix + m.left() + target[i];
}

// Merges the tokens of one image as thread `thread` of `threads`, which all call it; `wait` returns when all have.
template <class Wait>
static void merge_image(const Merge& m, int64_t image, const Matching& matching, int thread, int threads, Wait wait) {
  const NmMerge& a = m.a;
  static thread_local Scratch<float> row_scratch;
  float* const rows = row_scratch.get(std::max<int64_t>(W * a.depth, MERGE_ROWS * m.padded_b()));
  for (int64_t i = thread; i < m.padded_b() / W; i += threads)
    prepare_b(m, image, i * W, rows, matching.keys_b, matching.less_b);
  for (int64_t i = thread; i < m.padded_a(); i += threads) {
    if (i < m.count_a())
      unit_key(m, image, m.even() + 2 * i, matching.keys_a + i * a.depth);
    else
      std::fill_n(matching.keys_a + i * a.depth, a.depth, 0.0f);
  }
  wait();
  for (int64_t row = thread * MERGE_ROWS; row < m.count_a(); row += threads * MERGE_ROWS)
    match_rows(m, image, row, matching, rows);
  wait();
  // Every thread computes the moves: it takes less time than waiting once more.
  const Moves moves(m, matching.value, matching.target);
  float* const sum = scratch().sums.get(a.channels);
  for (int64_t token = a.tokens * thread / threads; token < a.tokens * (thread + 1) / threads; token++)
    write_token(m, image, token, moves, matching.target, sum);
  wait();
}

// r >= 1, and at most half of the tokens that take part.
static void merge(const NmMerge& a) {
  const Merge m{a};
  const int64_t work = m.count_a() * m.count_b() * a.depth + a.tokens * a.channels;
  if (a.batch >= a.threads) {
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && a.batch * work > MERGE_SMALL)
    {
      const Matching matching(m);
#pragma omp for schedule(static)
      for (int64_t image = 0; image < a.batch; image++) merge_image(m, image, matching, 0, 1, [] {});
    }
    return;
  }
  const Matching matching(m);
  for (int64_t image = 0; image < a.batch; image++) {
#pragma omp parallel num_threads(a.threads) if (work > MERGE_SMALL)
    merge_image(m, image, matching, omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
  }
}
