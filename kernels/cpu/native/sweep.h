// The inner loops. A tile of activations stays in the L1 cache while all output rows sweep over it. Each entry of a
// weight row multiplies the tile row (or pair of rows) that its index selects: there are no gathers, and the time
// depends only on the number of kept values.
#pragma once

#include <algorithm>

#include "layouts.h"
#include "tiles.h"
#include "vec.h"

// One block of columns of consecutive weight rows, row after row.
template <class Value> struct BlockRows {
  const Value* values;
  const uint8_t* index;
  int entries;  // per row
};

// Common parameters of the loops below. V: vectors in a panel. HALF: only the lower half of the panel's last vector is
// used. R: weight rows computed together. `sums`: (rows, P). `initial`: for the first block, the value that the sums of
// each row start from; null for later blocks, which continue from `sums`.

// --- LAYOUT_ROWS: each entry is a kept value and its column number ---
//
// Processors load at most as many vectors as they multiply, so that a load per product is the bottleneck. Where two
// rows keep the same columns, each load serves both. layouts.pack stores the common columns of two rows first.

// True if the next four entries of each pair of rows have the same columns.
template <int R> NM_INLINE bool columns_agree(const uint8_t* index, int entries) {
  for (int r = 0; r + 1 < R; r += 2)
    if (memcmp(index + r * entries, index + (r + 1) * entries, 4)) return false;
  return true;
}

template <int V, bool HALF, int R, class Value>
NM_INLINE void rows_block(const float* tile, BlockRows<Value> block, float* sums, const float* initial) {
  constexpr int P = V * W, FULL = V - HALF;
  const Value* const values = block.values;
  const uint8_t* const index = block.index;
  const int entries = block.entries;
  vf acc[R][V];
  vl last[R];
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < FULL; v++) acc[r][v] = initial ? splat(initial[r]) : load(sums + r * P + v * W);
    if (HALF) last[r] = initial ? low_half(splat(initial[r])) : load_low(sums + r * P + FULL * W);
  }
  int e = 0;
  for (; R > 1 && e < entries && columns_agree<R>(index + e, entries); e += 4) {
#define NM_STEP(Q)                                                   \
  _Pragma("GCC unroll 4") for (int r = 0; r < R - 1; r += 2) {       \
    const vf w0 = weight_of_four<Q>(values + r * entries + e);       \
    const vf w1 = weight_of_four<Q>(values + (r + 1) * entries + e); \
    const float* x = tile + (size_t)index[r * entries + e + Q] * P;  \
    _Pragma("GCC unroll 8") for (int v = 0; v < FULL; v++) {         \
      const vf tokens = in_register(load(x + v * W));                \
      acc[r][v] = fma(w0, tokens, acc[r][v]);                        \
      acc[r + 1][v] = fma(w1, tokens, acc[r + 1][v]);                \
    }                                                                \
    if (HALF) {                                                      \
      const vl tokens = load_low(x + FULL * W);                      \
      last[r] = fma(low_half(w0), tokens, last[r]);                  \
      last[r + 1] = fma(low_half(w1), tokens, last[r + 1]);          \
    }                                                                \
  }
    NM_STEP(0) NM_STEP(1) NM_STEP(2) NM_STEP(3)
#undef NM_STEP
  }
  for (; e < entries; e += 4) {
    Weights4 weights[R];
    uint32_t columns[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      weights[r] = load_weights4(values + r * entries + e);
      memcpy(&columns[r], index + r * entries + e, 4);
    }
#define NM_STEP(Q)                                                                                         \
  _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                    \
    vf w = broadcast_weight<Q>(weights[r]);                                                                \
    const float* x = tile + ((columns[r] >> (8 * Q)) & 255) * P;                                           \
    _Pragma("GCC unroll 8") for (int v = 0; v < FULL; v++) acc[r][v] = fma(w, load(x + v * W), acc[r][v]); \
    if (HALF) last[r] = fma(low_half(w), load_low(x + FULL * W), last[r]);                                 \
  }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a little-endian target is required"
#endif
    NM_STEP(0) NM_STEP(1) NM_STEP(2) NM_STEP(3)
#undef NM_STEP
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < FULL; v++) store(sums + r * P + v * W, acc[r][v]);
    if (HALF) store_low(sums + r * P + FULL * W, last[r]);
  }
}

// Weight rows computed together: enough independent accumulators to hide the latency of an FMA, and no more than the
// registers hold. Always even, because layouts.pack gives pairs of rows their common columns first.
constexpr int rows_together(int vectors) { return vectors >= (W == 16 ? 4 : 3) ? 2 : vectors >= 2 ? 4 : 8; }

// --- LAYOUT_QUADS, LAYOUT_OCTS, LAYOUT_RING: each entry is two kept bf16 values and the number of a column pair ---

#if NM_AVX512 && defined(__AVX512BF16__)
#define NM_PAIRS 1

typedef uint32_t Pair;  // two bf16: one column in the low half, the other in the high half

// Accumulators of R weight rows.
template <int V, bool HALF, int R> struct PairSums {
  static constexpr int P = V * W, FULL = V - HALF;
  __m512 whole[R][V];
  __m256 half[R];

  inline __attribute__((always_inline)) void init(const float* sums, const float* initial) {
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < FULL; v++)
        whole[r][v] = initial ? _mm512_set1_ps(initial[r]) : _mm512_loadu_ps(sums + r * P + v * W);
      if (HALF) half[r] = initial ? _mm256_set1_ps(initial[r]) : _mm256_loadu_ps(sums + r * P + FULL * W);
    }
  }
  inline __attribute__((always_inline)) void add(int r, __m512 weight, const Pair* x) {
    const __m512bh w = (__m512bh)weight;
#pragma GCC unroll 8
    for (int v = 0; v < FULL; v++)
      whole[r][v] = _mm512_dpbf16_ps(whole[r][v], w, (__m512bh)_mm512_load_si512(x + v * W));
    if (HALF)
      half[r] = _mm256_dpbf16_ps(half[r], (__m256bh)_mm512_castps512_ps256(weight),
                                 (__m256bh)_mm256_load_si256((const __m256i*)(x + FULL * W)));
  }
  inline __attribute__((always_inline)) void write(float* sums) const {
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < FULL; v++) _mm512_storeu_ps(sums + r * P + v * W, whole[r][v]);
      if (HALF) _mm256_storeu_ps(sums + r * P + FULL * W, half[r]);
    }
  }
};

template <int V, bool HALF, int R>
NM_INLINE void rows_block(const Pair* tile, BlockRows<Pair> block, float* sums, const float* initial) {
  constexpr int P = V * W;
  const Pair* const values = block.values;
  const uint8_t* const index = block.index;
  const int entries = block.entries;
  PairSums<V, HALF, R> acc;
  acc.init(sums, initial);
  int e = 0;
  for (; e + 4 <= entries; e += 4) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      __m512 weights =
          _mm512_castsi512_ps(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(values + r * entries + e))));
      uint32_t rows4;
      memcpy(&rows4, index + r * entries + e, 4);
      acc.add(r, _mm512_permute_ps(weights, 0x00), tile + (rows4 & 255) * P);
      acc.add(r, _mm512_permute_ps(weights, 0x55), tile + ((rows4 >> 8) & 255) * P);
      acc.add(r, _mm512_permute_ps(weights, 0xaa), tile + ((rows4 >> 16) & 255) * P);
      acc.add(r, _mm512_permute_ps(weights, 0xff), tile + (rows4 >> 24) * P);
    }
  }
  for (; e < entries; e++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int pair;
      memcpy(&pair, values + r * entries + e, 4);
      acc.add(r, _mm512_castsi512_ps(_mm512_set1_epi32(pair)), tile + index[r * entries + e] * P);
    }
  acc.write(sums);
}

// One block of columns in LAYOUT_RING. Each group of RING_ROWS weight rows has its own entry count; the entries of
// group i start at group_offsets[i] (int32, unaligned).
struct RingBlock {
  const Pair* values;
  const uint8_t* index;
  const uint8_t* group_offsets;
  int total_entries;  // in the whole weight
};

// RING_ROWS weight rows whose entries are interleaved, two per row at a time.
template <int V, bool HALF>
NM_INLINE void ring_rows(const Pair* tile, BlockRows<Pair> block, float* sums, const float* initial) {
  constexpr int P = V * W, R = RING_ROWS;
  const Pair* values = block.values;
  const uint8_t* index = block.index;
  const int entries = block.entries;
  PairSums<V, HALF, R> acc;
  acc.init(sums, initial);
  for (int e = 0; e < entries; e += 2, values += 2 * R, index += 2 * R) {
    uint64_t rows8;
    memcpy(&rows8, index, 8);
#pragma GCC unroll 2
    for (int h = 0; h < R; h += 2) {
      __m512 weights = _mm512_castsi512_ps(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(values + 2 * h))));
      acc.add(h, _mm512_permute_ps(weights, 0x00), tile + ((rows8 >> (16 * h)) & 255) * P);
      acc.add(h + 1, _mm512_permute_ps(weights, 0xaa), tile + ((rows8 >> (16 * h + 16)) & 255) * P);
      acc.add(h, _mm512_permute_ps(weights, 0x55), tile + ((rows8 >> (16 * h + 8)) & 255) * P);
      acc.add(h + 1, _mm512_permute_ps(weights, 0xff), tile + ((rows8 >> (16 * h + 24)) & 255) * P);
    }
  }
  acc.write(sums);
}

// The same as `sweep_rows` below, for LAYOUT_RING. Offsets are clamped: whatever the table contains, no entry outside
// the weight is read.
template <int V, bool HALF>
static void sweep_ring(const Pair* tile, const RingBlock& block, RowRange rows, float* sums, const float* initial) {
  const RingBlock b = block;
  for (int n = rows.begin; n < rows.end; n += RING_ROWS, sums += RING_ROWS * V * W) {
    int32_t offsets[2];
    memcpy(offsets, b.group_offsets + n / RING_ROWS * 4, 8);
    const int first = std::clamp(offsets[0], 0, b.total_entries), last = std::clamp(offsets[1], first, b.total_entries);
    const int entries = (last - first) / (2 * RING_ROWS) * 2;  // per row, two at a time
    ring_rows<V, HALF>(tile, {b.values + first, b.index + first, entries}, sums, initial ? initial + n : nullptr);
  }
}

// Vectors of channel pairs: pair j (channels 2j and 2j + 1) of W tokens is data[j * stride].
struct ChannelPairs {
  __m512i* data;
  int stride;
  __m512i& operator[](int j) const { return data[(size_t)j * stride]; }
};

// Reads W token-major tokens of `count` channels as channel pairs, with zeros for missing tokens and channels.
static void read_channel_pairs(const bf16* x, size_t stride, int tokens, int count, ChannelPairs out) {
  for (int k = 0; k < count; k += 32) {
    vf r[16];
    for (int i = 0; i < 16; i++) {
      int columns = i < tokens ? std::min(32, count - k) : 0;
      __mmask32 mask = columns == 32 ? ~0u : (1u << columns) - 1;
#ifdef __SANITIZE_ADDRESS__  // AddressSanitizer does not check masked loads
      if (columns) (void)*(volatile const uint16_t*)&x[i * stride + k + columns - 1].bits;
#endif
      r[i] = (vf)_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x + (i < tokens ? i : 0) * stride + k));
    }
    transpose(r);
    for (int j = 0; j < std::min(16, (count - k + 1) / 2); j++) out[k / 2 + j] = (__m512i)r[j];
  }
}

// The same from channel-major data: `channel(k)` returns channel k of W tokens.
template <class Channel> NM_INLINE void join_channel_pairs(Channel channel, int count, ChannelPairs out) {
  for (int k = 0; k < count; k += 2) {
    __m512i low = _mm512_cvtepu16_epi32(channel(k));
    __m512i high = k + 1 < count ? _mm512_cvtepu16_epi32(channel(k + 1)) : _mm512_setzero_si512();
    out[k / 2] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
}

// In each lane, the low 16 bits of `low` and the high 16 bits of `high`.
NM_INLINE __m512i blend_pairs(__m512i low, __m512i high) { return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high); }

// The spread functions expand the channel pairs of a block into a tile that holds every column pair the layout can
// number, one pair per tile row of P lanes. The channel pairs after the last channel have to be zero.

static void spread_quads(ChannelPairs channels, int count, Pair* tile, int P) {
  for (int k = 0; k < count; k += 4, tile += 6 * P) {
    __m512i first = channels[k / 2], second = channels[k / 2 + 1];
    __m512i down = _mm512_srli_epi32(first, 16), up = _mm512_slli_epi32(second, 16);
    _mm512_store_si512(tile, first);                               // 0 1
    _mm512_store_si512(tile + P, blend_pairs(first, up));          // 0 2
    _mm512_store_si512(tile + 2 * P, blend_pairs(first, second));  // 0 3
    _mm512_store_si512(tile + 3 * P, blend_pairs(down, up));       // 1 2
    _mm512_store_si512(tile + 4 * P, blend_pairs(down, second));   // 1 3
    _mm512_store_si512(tile + 5 * P, second);                      // 2 3
  }
}

// For every eight columns, the 16 pairs of one of the first four columns and one of the last four.
static void spread_octs(ChannelPairs channels, int count, Pair* tile, int P) {
  for (int k = 0; k < count; k += 8) {
    const __m512i* const from = &channels[k / 2];
    __m512i first[2] = {from[0], from[channels.stride]};
    __m512i second[2] = {from[2 * channels.stride], from[3 * channels.stride]};
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++, tile += P)
        _mm512_store_si512(tile, blend_pairs(i % 2 ? _mm512_srli_epi32(first[i / 2], 16) : first[i / 2],
                                             j % 2 ? second[j / 2] : _mm512_slli_epi32(second[j / 2], 16)));
  }
}

static void spread_ring(ChannelPairs channels, int count, Pair* tile, int P) {
  for (int k = 0; k < count; k += 2, tile += 6 * P) {
    __m512i here = channels[k / 2], next = channels[k / 2 + 1], third = channels[k / 2 + 2];
    __m512i down = _mm512_srli_epi32(here, 16), up = _mm512_slli_epi32(next, 16);
    _mm512_store_si512(tile, here);                                                     // k, k + 1
    _mm512_store_si512(tile + P, blend_pairs(here, up));                                // k, k + 2
    _mm512_store_si512(tile + 2 * P, blend_pairs(here, next));                          // k, k + 3
    _mm512_store_si512(tile + 3 * P, blend_pairs(down, up));                            // k + 1, k + 2
    _mm512_store_si512(tile + 4 * P, blend_pairs(down, next));                          // k + 1, k + 3
    _mm512_store_si512(tile + 5 * P, blend_pairs(down, _mm512_slli_epi32(third, 16)));  // k + 1, k + 4
  }
}
#else
#define NM_PAIRS 0
#endif

// Adds one block to the sums of weight rows `rows`. `block` starts at row 0 of the weight; the tile holds floats
// (LAYOUT_ROWS) or pairs (LAYOUT_QUADS, LAYOUT_OCTS).
template <int V, bool HALF, class Tile, class Value>
static void sweep_rows(const Tile* tile, BlockRows<Value> block, RowRange rows, float* sums, const float* initial) {
  constexpr int P = V * W, R = rows_together(V);
  const int entries = block.entries, end = rows.end;
  const Value* values = block.values + (size_t)rows.begin * entries;
  const uint8_t* index = block.index + (size_t)rows.begin * entries;
  int n = rows.begin;
  for (; n + R <= end; n += R, values += R * entries, index += R * entries, sums += R * P)
    rows_block<V, HALF, R>(tile, BlockRows<Value>{values, index, entries}, sums, initial ? initial + n : nullptr);
  for (; n < end; n++, values += entries, index += entries, sums += P)
    rows_block<V, HALF, 1>(tile, BlockRows<Value>{values, index, entries}, sums, initial ? initial + n : nullptr);
}
