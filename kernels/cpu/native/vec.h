// A float vector for the target instruction set: AVX-512 (16 lanes), AVX2 (8), or 4 lanes through the compiler's vector
// extensions (SSE2, NEON). All other kernel code is written once, in terms of this header.
// -DMPCOMPILE_LANES=4, 8 or 16 fixes the lane count and uses vector extensions only, so that the tile sizes of every
// target can be tested on any processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(MPCOMPILE_LANES)
static_assert(MPCOMPILE_LANES == 4 || MPCOMPILE_LANES == 8 || MPCOMPILE_LANES == 16, "MPCOMPILE_LANES: 4, 8 or 16");
constexpr int W = MPCOMPILE_LANES;
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define NM_AVX512 1
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define NM_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if NM_AVX512 || NM_AVX2
#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13  // GCC PR 105593: false positives inside the header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// W is the number of lanes. The kernels compute on panels of V vectors, that is P = V * W tokens.

#define NM_INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

NM_INLINE vf splat(float x) { return x - (vf){}; }
NM_INLINE vf load(const float* p) { return *(const vf_mem*)p; }
NM_INLINE void store(float* p, vf v) { *(vf_mem*)p = v; }
NM_INLINE vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh_mem*)p, vu) << 16); }

// Rounds to nearest even; NaN stays NaN.
NM_INLINE void store(bf16* p, vf v) {
#if NM_AVX512 && defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
  return;
#endif
  vu x = (vu)v;
  vu rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  vu nan = (vu)(v != v);
  *(vh_mem*)p = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh);
}

NM_INLINE float to_float(float x) { return x; }
NM_INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
NM_INLINE void from_float(float x, float* p) { *p = x; }
NM_INLINE void from_float(float x, bf16* p) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

NM_INLINE vf fma(vf a, vf b, vf c) {
#if NM_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif NM_AVX2
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Keeps the compiler from loading a value again for each of its uses.
NM_INLINE vf in_register(vf x) {
#if NM_AVX512
  asm("" : "+v"(x));
#elif NM_AVX2
  asm("" : "+x"(x));
#endif
  return x;
}

NM_INLINE vf maximum(vf a, vf b) {
#if NM_AVX512
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif NM_AVX2
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 0, 1, 2, ...
NM_INLINE vf lane_numbers() {
  vf x;
  for (int i = 0; i < W; i++) x[i] = (float)i;
  return x;
}

NM_INLINE float largest_lane(vf x) {
#if NM_AVX512
  return _mm512_reduce_max_ps((__m512)x);
#else
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
#endif
}
NM_INLINE float sum_of_lanes(vf x) {
#if NM_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
#endif
}

// Loads the lanes whose bits are set; the others are zero, and their memory is not read.
NM_INLINE vf load_lanes(const float* p, uint32_t lanes) {
#if NM_AVX512 && !defined(__SANITIZE_ADDRESS__)  // AddressSanitizer does not check masked loads
  return (vf)_mm512_maskz_loadu_ps((__mmask16)lanes, p);
#elif NM_AVX2 && !defined(__SANITIZE_ADDRESS__)
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return (vf)_mm256_maskload_ps(p, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)lanes), bit), bit));
#else
  if (lanes == (1u << W) - 1) return load(p);
  vf x = {};
  for (int i = 0; i < W; i++)
    if (lanes >> i & 1) x[i] = p[i];
  return x;
#endif
}

// Stores the first `count` lanes.
NM_INLINE void store_lanes(float* p, vf v, int count) {
#if NM_AVX512 && !defined(__SANITIZE_ADDRESS__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  if (count == W) return store(p, v);
  for (int i = 0; i < count; i++) p[i] = v[i];
#endif
}

// Half a vector, for a panel whose last vector is at most half full. Used only where half a vector is cheaper than a
// whole one: with 16 lanes, on processors that execute such a vector as two halves.
#if NM_AVX512
constexpr bool HALVES = true;
typedef float vl __attribute__((vector_size(W * 2)));
typedef float vl_mem __attribute__((vector_size(W * 2), aligned(4), may_alias));
NM_INLINE vl low_half(vf x) { return (vl)_mm512_castps512_ps256((__m512)x); }
NM_INLINE vl fma(vl a, vl b, vl c) { return (vl)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(MPCOMPILE_LANES) && MPCOMPILE_LANES == 16
constexpr bool HALVES = true;
typedef float vl __attribute__((vector_size(W * 2)));
typedef float vl_mem __attribute__((vector_size(W * 2), aligned(4), may_alias));
NM_INLINE vl low_half(vf x) {
  vl half;
  memcpy(&half, &x, sizeof half);
  return half;
}
NM_INLINE vl fma(vl a, vl b, vl c) { return a * b + c; }
#else
constexpr bool HALVES = false;
typedef vf vl;
typedef vf_mem vl_mem;
NM_INLINE vl low_half(vf x) { return x; }
#endif
NM_INLINE vl load_low(const float* p) { return *(const vl_mem*)p; }
NM_INLINE void store_low(float* p, vl v) { *(vl_mem*)p = v; }

// Propagates NaN in x, as torch's activations do.
NM_INLINE vf clamp(vf x, float low, float high) {
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}

// Four consecutive weights, loaded once and broadcast one at a time by a permutation. Four broadcast loads would
// compete with the activations for load ports.
#if NM_AVX512
typedef __m512 Weights4;
NM_INLINE Weights4 repeat128(__m128 w) { return _mm512_broadcast_f32x4(w); }
template <int Q> NM_INLINE vf broadcast_weight(Weights4 w) { return (vf)_mm512_permute_ps(w, Q * 0x55); }
#elif NM_AVX2
typedef __m256 Weights4;
NM_INLINE Weights4 repeat128(__m128 w) { return _mm256_insertf128_ps(_mm256_castps128_ps256(w), w, 1); }
template <int Q> NM_INLINE vf broadcast_weight(Weights4 w) { return (vf)_mm256_permute_ps(w, Q * 0x55); }
#endif
#if NM_AVX512 || NM_AVX2
NM_INLINE Weights4 load_weights4(const float* p) { return repeat128(_mm_loadu_ps(p)); }
NM_INLINE Weights4 load_weights4(const bf16* p) {
  return repeat128(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)), 16)));
}
#else
typedef float Weights4 __attribute__((vector_size(16)));
typedef float Weights4_mem __attribute__((vector_size(16), aligned(4), may_alias));
NM_INLINE Weights4 load_weights4(const float* p) { return *(const Weights4_mem*)p; }
NM_INLINE Weights4 load_weights4(const bf16* p) {
  return Weights4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <int Q> NM_INLINE vf broadcast_weight(Weights4 w) { return splat(w[Q]); }
#endif

// The weight p[Q] of four, broadcast. In fp32 by a load, for loops that leave load ports idle but no other ports.
template <int Q> NM_INLINE vf weight_of_four(const float* p) { return splat(p[Q]); }
template <int Q> NM_INLINE vf weight_of_four(const bf16* p) { return broadcast_weight<Q>(load_weights4(p)); }

// Transposes a W x W matrix in place: r[i][j] <-> r[j][i].
NM_INLINE void transpose(vf* r) {
#if NM_AVX512
  __m512 a[16], b[16];
  for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++)
    for (int h = 0; h < 2; h++) {
      __m512d x = _mm512_castps_pd(a[4 * i + h]), y = _mm512_castps_pd(a[4 * i + 2 + h]);
      b[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = (vf)_mm512_shuffle_f32x4(a[i], a[8 + i], 0x88);
    r[8 + i] = (vf)_mm512_shuffle_f32x4(a[i], a[8 + i], 0xdd);
    r[4 + i] = (vf)_mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0x88);
    r[12 + i] = (vf)_mm512_shuffle_f32x4(a[4 + i], a[12 + i], 0xdd);
  }
#elif NM_AVX2
  __m256 a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++)
    for (int h = 0; h < 2; h++) {
      b[4 * i + 2 * h] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + 2 + h], 0x44);
      b[4 * i + 2 * h + 1] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + 2 + h], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = (vf)_mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
    r[4 + i] = (vf)_mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
  }
#else
  for (int i = 0; i < W; i++)
    for (int j = 0; j < i; j++) {
      float t = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = t;
    }
#endif
}

// exp with relative error 1e-7 on [-87, 88]; the argument is clamped to that range.
NM_INLINE vf exp(vf x) {
  x = clamp(x, -87.0f, 88.0f);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = fma(x, splat(1.44269504088896341f), magic);
  vf k = shifted - magic;
  vf r = fma(k, splat(-0.693359375f), x);
  r = fma(k, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  vu power = ((vu)shifted + 127u) << 23;  // the low bits of `shifted` are the integer k
  return p * (vf)power;
}

// Rational approximation of erf, |error| < 2e-7. Exactly +-1 where erf rounds to +-1 in float, so that GELU is exactly
// 0 for large negative arguments.
NM_INLINE vf erf(vf x) {
  const float saturation = 3.832506856900711f;
  const vf unclamped = x;
  x = clamp(x, -saturation, saturation);
  vf z = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = fma(p, z, splat(2.77068142495902e-08f));
  p = fma(p, z, splat(-2.10102402082508e-06f));
  p = fma(p, z, splat(-5.69250639462346e-05f));
  p = fma(p, z, splat(-7.34990630326855e-04f));
  p = fma(p, z, splat(-2.95459980854025e-03f));
  p = fma(p, z, splat(-1.60960333262415e-02f));
  vf q = splat(-1.45660718464996e-05f);
  q = fma(q, z, splat(-2.13374055278905e-04f));
  q = fma(q, z, splat(-1.68282697438203e-03f));
  q = fma(q, z, splat(-7.37332916720468e-03f));
  q = fma(q, z, splat(-1.42647390514189e-02f));
  vf y = p * x / q;
  y = unclamped >= splat(saturation) ? splat(1.0f) : y;
  return unclamped <= splat(-saturation) ? splat(-1.0f) : y;
}

// Epilogues, numbered as in packed.EPILOGUES: an activation applied before the residual is added or, with
// AFTER_RESIDUAL added to its number, after.
enum Activation { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3, SILU = 4, AFTER_RESIDUAL = 5 };
inline int activation_before_residual(int epilogue) { return epilogue < AFTER_RESIDUAL ? epilogue : NONE; }
inline int activation_after_residual(int epilogue) {
  return epilogue < AFTER_RESIDUAL ? NONE : epilogue - AFTER_RESIDUAL;
}

NM_INLINE vf activate(vf x, int activation) {
  switch (activation) {
    case RELU: return x < splat(0.0f) ? splat(0.0f) : x;
    case GELU: return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f));
    case GELU_TANH: {  // 0.5 x (1 + tanh u) = x / (1 + exp(-2u))
      vf u = 0.7978845608028654f * fma(x * x * x, splat(0.044715f), x);
      return x / (1.0f + exp(-2.0f * u));
    }
    case SILU: return x / (1.0f + exp(-x));
    default: return x;
  }
}
