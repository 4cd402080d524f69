// The inner loops. A tile of activations stays in the first-level cache while all output rows sweep over it: each
// entry of a row multiplies one tile row (or pair of rows), which its index names. Nothing is gathered, and the time
// depends only on how many values were kept.
#pragma once

#include <algorithm>

#include "layouts.h"
#include "vec.h"

// --- ROWS layout: a kept value and the number of its column ---

// HALF: of the last of V vectors only the lower half is in use.
template <int V, bool HALF, int R, class Weight>
NM_INLINE void rows_block(const float* tile, const Weight* values, const uint8_t* index, int entries, float* c, const float* start) {
  constexpr int P = V * W, FULL = V - HALF;
  vf acc[R][V];
  vl last[R];
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < FULL; v++) acc[r][v] = start ? splat(start[r]) : load(c + r * P + v * W);
    if (HALF) last[r] = start ? low(splat(start[r])) : load_low(c + r * P + FULL * W);
  }
  for (int e = 0; e < entries; e += 4) {
    Four weights[R];
    uint32_t columns[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      weights[r] = four(values + r * entries + e);
      memcpy(&columns[r], index + r * entries + e, 4);
    }
#define NM_STEP(Q)                                              \
  _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {         \
    vf w = pick<Q>(weights[r]);                                 \
    const float* x = tile + ((columns[r] >> (8 * Q)) & 255) * P; \
    _Pragma("GCC unroll 8") for (int v = 0; v < FULL; v++) acc[r][v] = fma(w, load(x + v * W), acc[r][v]); \
    if (HALF) last[r] = fma(low(w), load_low(x + FULL * W), last[r]); \
  }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a little-endian machine is needed"
#endif
    NM_STEP(0) NM_STEP(1) NM_STEP(2) NM_STEP(3)
#undef NM_STEP
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < FULL; v++) store(c + r * P + v * W, acc[r][v]);
    if (HALF) store_low(c + r * P + FULL * W, last[r]);
  }
}

// How many rows go through a block together: enough independent sums to hide the latency of a multiplication.
constexpr int rows_together(int vectors) { return vectors >= 3 ? 2 : vectors == 2 ? 4 : 8; }

// --- QUADS, OCTS and RING layouts: two kept bf16 values and the number of a pair of columns ---

#if NM_AVX512 && defined(__AVX512BF16__)
#define NM_PAIRS 1

typedef uint32_t Pair;  // bf16 of one column in the low half, of the other in the high half

// Sums of R rows, of whose V vectors the last may be used in its lower half alone.
template <int V, bool HALF, int R> struct PairSums {
  static constexpr int P = V * W, FULL = V - HALF;
  __m512 whole[R][V];
  __m256 half[R];

  inline __attribute__((always_inline)) void begin(const float* c, const float* start) {
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < FULL; v++) whole[r][v] = start ? _mm512_set1_ps(start[r]) : _mm512_loadu_ps(c + r * P + v * W);
      if (HALF) half[r] = start ? _mm256_set1_ps(start[r]) : _mm256_loadu_ps(c + r * P + FULL * W);
    }
  }
  inline __attribute__((always_inline)) void add(int r, __m512 weight, const Pair* x) {
    const __m512bh w = (__m512bh)weight;
#pragma GCC unroll 8
    for (int v = 0; v < FULL; v++) whole[r][v] = _mm512_dpbf16_ps(whole[r][v], w, (__m512bh)_mm512_load_si512(x + v * W));
    if (HALF)
      half[r] = _mm256_dpbf16_ps(half[r], (__m256bh)_mm512_castps512_ps256(weight),
                                 (__m256bh)_mm256_load_si256((const __m256i*)(x + FULL * W)));
  }
  inline __attribute__((always_inline)) void end(float* c) const {
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < FULL; v++) _mm512_storeu_ps(c + r * P + v * W, whole[r][v]);
      if (HALF) _mm256_storeu_ps(c + r * P + FULL * W, half[r]);
    }
  }
};

template <int V, bool HALF, int R>
NM_INLINE void rows_block(const Pair* tile, const Pair* values, const uint8_t* index, int entries, float* c,
                          const float* start) {
  constexpr int P = V * W;
  PairSums<V, HALF, R> sums;
  sums.begin(c, start);
  int e = 0;
  for (; e + 4 <= entries; e += 4) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      __m512 weights = _mm512_castsi512_ps(
          _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(values + r * entries + e))));
      uint32_t numbers;
      memcpy(&numbers, index + r * entries + e, 4);
      sums.add(r, _mm512_permute_ps(weights, 0x00), tile + (numbers & 255) * P);
      sums.add(r, _mm512_permute_ps(weights, 0x55), tile + ((numbers >> 8) & 255) * P);
      sums.add(r, _mm512_permute_ps(weights, 0xaa), tile + ((numbers >> 16) & 255) * P);
      sums.add(r, _mm512_permute_ps(weights, 0xff), tile + (numbers >> 24) * P);
    }
  }
  for (; e < entries; e++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int pair;
      memcpy(&pair, values + r * entries + e, 4);
      sums.add(r, _mm512_castsi512_ps(_mm512_set1_epi32(pair)), tile + index[r * entries + e] * P);
    }
  sums.end(c);
}

// RING: four rows, two entries of each after the other.
template <int V, bool HALF>
NM_INLINE void ring_block(const Pair* tile, const Pair* values, const uint8_t* index, int entries, float* c,
                          const float* start) {
  constexpr int P = V * W, R = RING_ROWS;
  PairSums<V, HALF, R> sums;
  sums.begin(c, start);
  for (int e = 0; e < entries; e += 2, values += 2 * R, index += 2 * R) {
    uint64_t numbers;
    memcpy(&numbers, index, 8);
#pragma GCC unroll 2
    for (int h = 0; h < R; h += 2) {
      __m512 weights = _mm512_castsi512_ps(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(values + 2 * h))));
      sums.add(h, _mm512_permute_ps(weights, 0x00), tile + ((numbers >> (16 * h)) & 255) * P);
      sums.add(h + 1, _mm512_permute_ps(weights, 0xaa), tile + ((numbers >> (16 * h + 16)) & 255) * P);
      sums.add(h, _mm512_permute_ps(weights, 0x55), tile + ((numbers >> (16 * h + 8)) & 255) * P);
      sums.add(h + 1, _mm512_permute_ps(weights, 0xff), tile + ((numbers >> (16 * h + 24)) & 255) * P);
    }
  }
  sums.end(c);
}

// As sweep_rows, for RING: begin[i] tells where the entries of the i-th four rows begin, of `held` in all. Whatever it
// tells, nothing else than those is read.
template <int V, bool HALF>
static void sweep_ring(const Pair* tile, const Pair* values, const uint8_t* index, const uint8_t* begin, int held,
                       int n0, int n1, float* c, const float* start) {
  for (int n = n0; n < n1; n += RING_ROWS, c += RING_ROWS * V * W) {
    int32_t at[2];
    memcpy(at, begin + n / RING_ROWS * 4, 8);
    const int first = std::clamp(at[0], 0, held), last = std::clamp(at[1], first, held);
    const int entries = (last - first) / (2 * RING_ROWS) * 2;  // two of each row at a time
    ring_block<V, HALF>(tile, values + first, index + first, entries, c, start ? start + n : nullptr);
  }
}

// Sixteen tokens of the pairs of channels 0-1, 2-3, ... of `count` channels -> a[0], a[1], ...; zeros behind them.
static void read_channel_pairs(const bf16* x, size_t stride, int tokens, int count, __m512i* a, int step) {
  for (int k = 0; k < count; k += 32) {
    vf r[16];
    for (int i = 0; i < 16; i++) {
      int columns = i < tokens ? std::min(32, count - k) : 0;
      __mmask32 mask = columns == 32 ? ~0u : (1u << columns) - 1;
#ifdef __SANITIZE_ADDRESS__  // which doesn't watch masked loads
      if (columns) (void)*(volatile const uint16_t*)&x[i * stride + k + columns - 1].bits;
#endif
      r[i] = (vf)_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x + (i < tokens ? i : 0) * stride + k));
    }
    transpose(r);
    for (int j = 0; j < std::min(16, (count - k + 1) / 2); j++) a[(size_t)(k / 2 + j) * step] = (__m512i)r[j];
  }
}

// The same from channel-major rows: `row(k)` gives sixteen tokens of channel k.
template <class Row> NM_INLINE void join_channel_pairs(Row row, int count, __m512i* a, int step) {
  for (int k = 0; k < count; k += 2) {
    __m512i low = _mm512_cvtepu16_epi32(row(k));
    __m512i high = k + 1 < count ? _mm512_cvtepu16_epi32(row(k + 1)) : _mm512_setzero_si512();
    a[(size_t)(k / 2) * step] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
}

// Channel pairs a[0 .. count/2], zeros behind -> every pair that the layout numbers. P: pairs a tile row.
NM_INLINE __m512i both(__m512i low, __m512i high) { return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high); }

static void spread_quads(const __m512i* a, int step, int count, Pair* tile, int P) {
  for (int k = 0; k < count; k += 4, tile += 6 * P) {
    __m512i first = a[(size_t)(k / 2) * step], second = a[(size_t)(k / 2 + 1) * step];
    __m512i down = _mm512_srli_epi32(first, 16), up = _mm512_slli_epi32(second, 16);
    _mm512_store_si512(tile, first);                     // 0 1
    _mm512_store_si512(tile + P, both(first, up));       // 0 2
    _mm512_store_si512(tile + 2 * P, both(first, second));  // 0 3
    _mm512_store_si512(tile + 3 * P, both(down, up));    // 1 2
    _mm512_store_si512(tile + 4 * P, both(down, second));   // 1 3
    _mm512_store_si512(tile + 5 * P, second);            // 2 3
  }
}

static void spread_octs(const __m512i* a, int step, int count, Pair* tile, int P) {
  for (int k = 0; k < count; k += 8) {
    const __m512i* from = a + (size_t)(k / 2) * step;
    __m512i one[2] = {from[0], from[step]}, two[2] = {from[2 * step], from[3 * step]};
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++, tile += P)
        _mm512_store_si512(tile, both(i % 2 ? _mm512_srli_epi32(one[i / 2], 16) : one[i / 2],
                                      j % 2 ? two[j / 2] : _mm512_slli_epi32(two[j / 2], 16)));
  }
}

static void spread_ring(const __m512i* a, int step, int count, Pair* tile, int P) {
  for (int k = 0; k < count; k += 2, tile += 6 * P) {
    __m512i here = a[(size_t)(k / 2) * step], next = a[(size_t)(k / 2 + 1) * step], third = a[(size_t)(k / 2 + 2) * step];
    __m512i down = _mm512_srli_epi32(here, 16), up = _mm512_slli_epi32(next, 16);
    _mm512_store_si512(tile, here);                    // k and k + 1
    _mm512_store_si512(tile + P, both(here, up));      // k and k + 2
    _mm512_store_si512(tile + 2 * P, both(here, next));   // k and k + 3
    _mm512_store_si512(tile + 3 * P, both(down, up));  // k + 1 and k + 2
    _mm512_store_si512(tile + 4 * P, both(down, next));   // k + 1 and k + 3
    _mm512_store_si512(tile + 5 * P, both(down, _mm512_slli_epi32(third, 16)));  // k + 1 and k + 4
  }
}
#else
#define NM_PAIRS 0
#endif

// Output rows [n0, n1) of one block: of a tile of floats (ROWS), or of pairs (QUADS, OCTS). `start`: what the sums begin
// with (first block), or null to go on from c.
template <int V, bool HALF, class Tile, class Weight>
static void sweep_rows(const Tile* tile, const Weight* values, const uint8_t* index, int entries, int n0, int n1, float* c,
                       const float* start) {
  constexpr int P = V * W, R = rows_together(V);
  values += (size_t)n0 * entries;
  index += (size_t)n0 * entries;
  int n = n0;
  for (; n + R <= n1; n += R, values += R * entries, index += R * entries, c += R * P)
    rows_block<V, HALF, R>(tile, values, index, entries, c, start ? start + n : nullptr);
  for (; n < n1; n++, values += entries, index += entries, c += P)
    rows_block<V, HALF, 1>(tile, values, index, entries, c, start ? start + n : nullptr);
}
