// N:M sparse products on the CPU, for any N:M. A C interface without torch headers: built once on the machine it runs
// on, by build.py. Layouts of weights: layouts.py. Each function returns 0, or 1 where memory ran out.

#include "conv.h"

namespace {

template <class X>
Weight<X> weight(const void* values, const void* index, const void* bias, int inputs, int outputs, int n, int m, int layout) {
  return {(const X*)values, (const uint8_t*)index, (const X*)bias, inputs, outputs, n, m, layout};
}

// Exceptions must not leave a C function; inside a parallel region the scratch is asked for before the loop can throw
// only by running out of memory, which terminates. The callers check that sizes are sane.
template <class F> int guarded(F f) {
  try {
    f();
    return 0;
  } catch (...) {
    return 1;
  }
}

template <class X>
int linear(const void* x, const void* values, const void* index, const void* bias, const void* residual, void* y, int64_t tokens,
           int64_t pixels, int inputs, int outputs, int n, int m, int layout, int activation, int format, int threads) {
  return guarded([&] {
    gemm<X>(weight<X>(values, index, bias, inputs, outputs, n, m, layout), {(const X*)x, (Format)format, tokens, pixels},
            {(const X*)residual, (X*)y, (Format)format}, activation, threads);
  });
}

template <class X>
int both_linears(const void* x, const void* values1, const void* index1, const void* bias1, const void* values2,
                 const void* index2, const void* bias2, const void* residual, void* y, int64_t tokens, int inputs, int hidden,
                 int outputs, int n1, int m1, int layout1, int n2, int m2, int layout2, int activation, int threads) {
  return guarded([&] {
    mlp<X>(weight<X>(values1, index1, bias1, inputs, hidden, n1, m1, layout1),
           weight<X>(values2, index2, bias2, hidden, outputs, n2, m2, layout2), {(const X*)x, ROWS, tokens, 1},
           {(const X*)residual, (X*)y, ROWS}, activation, threads);
  });
}

}  // namespace

extern "C" {

int nm_lanes() { return W; }
int nm_pairs() { return NM_PAIRS; }

// x, residual and y: token-major (tokens, channels) with format 0; (images, channels, pixels) with format 1, tokens
// being images * pixels.
int nm_linear(int half, const void* x, const void* values, const void* index, const void* bias, const void* residual, void* y,
              int64_t tokens, int64_t pixels, int inputs, int outputs, int n, int m, int layout, int activation, int format,
              int threads) {
  return (half ? linear<bf16> : linear<float>)(x, values, index, bias, residual, y, tokens, pixels, inputs, outputs, n, m,
                                               layout, activation, format, threads);
}

int nm_mlp(int half, const void* x, const void* values1, const void* index1, const void* bias1, const void* values2,
           const void* index2, const void* bias2, const void* residual, void* y, int64_t tokens, int inputs, int hidden,
           int outputs, int n1, int m1, int layout1, int n2, int m2, int layout2, int activation, int threads) {
  return (half ? both_linears<bf16> : both_linears<float>)(x, values1, index1, bias1, values2, index2, bias2, residual, y,
                                                           tokens, inputs, hidden, outputs, n1, m1, layout1, n2, m2, layout2,
                                                           activation, threads);
}

// geometry: images, channels, height, width, outputs, kernel, stride, padding and dilation (two each).
int nm_conv(const void* x, const void* values, const void* index, const void* bias, const void* residual, void* y,
            const int64_t* geometry, int n, int m, int activation, int last, int threads) {
  return guarded([&] {
    const int64_t* g = geometry;
    const Convolution c{g[0], g[1], g[2], g[3], g[4], (int)g[5], (int)g[6], (int)g[7], (int)g[8], (int)g[9], (int)g[10], (int)g[11], (int)g[12]};
    convolve(c, weight<float>(values, index, bias, (int)g[1], (int)g[4], n, m, LAYOUT_ROWS), (const float*)x, last,
             (const float*)residual, (float*)y, activation, threads);
  });
}

}  // extern "C"
