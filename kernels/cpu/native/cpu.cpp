// Sparse products on the CPU for any N:M, with the C interface of abi.h. Uses no torch headers; build.py compiles it on
// the machine it runs on.

#include "attention.h"
#include "conv.h"
#include "dense.h"
#include "merge.h"
#include "mlp.h"

namespace {

template <class X> PackedWeight<X> unwrap(const NmWeight& w) {
  return {(const X*)w.values, (const uint8_t*)w.index, (const X*)w.bias, w.inputs, w.outputs, w.n, w.m, w.layout};
}

// Exceptions must not leave a C function. Inside a parallel region only the allocation of scratch memory can throw, if
// memory runs out, and that terminates the process. The callers check that sizes are sane.
template <class F> int guarded(F f) {
  try {
    f();
    return 0;
  } catch (...) {
    return 1;
  }
}

template <class X> void linear(const NmLinear& a) {
  const Format format = (Format)a.format;
  const Activations<X> in{(const X*)a.x, format, a.tokens, a.pixels, a.weight.inputs};
  const Output<X> out{(X*)a.y, (const X*)a.residual, format, a.tokens, a.pixels, a.weight.outputs, a.activation};
  if constexpr (std::is_same<X, float>::value) {
    const NmWeight& w = a.weight;
    if (w.layout == LAYOUT_PANELS)
      return dense({(const float*)w.values, (const float*)w.bias, w.inputs, w.outputs}, in, out, a.threads);
  }
  gemm(unwrap<X>(a.weight), in, out, a.threads);
}

template <class X> void two_linears(const NmMlp& a) {
  const Activations<X> in{(const X*)a.x, FORMAT_TOKENS, a.tokens, 1, a.first.inputs};
  const Output<X> out{(X*)a.y, (const X*)a.residual, FORMAT_TOKENS, a.tokens, 1, a.second.outputs, NONE};
  mlp<X>({unwrap<X>(a.first), unwrap<X>(a.second), a.activation}, in, out, a.threads);
}

void convolution(const NmConv& a) {
  const int channels = a.weight.inputs * a.groups;
  const Convolution g{a.images,   channels,   a.height, a.width, a.kernel_h,   a.kernel_w,
                      a.stride_h, a.stride_w, a.pad_h,  a.pad_w, a.dilation_h, a.dilation_w};
  const Format format = a.channels_last ? FORMAT_TOKENS : FORMAT_PLANES;
  const int64_t pixels = g.out_h() * g.out_w(), tokens = g.images * pixels;
  const int64_t in_pixels = g.height * g.width;
  Activations<float> in{(const float*)a.x, format, g.images * in_pixels, in_pixels, channels};
  Output<float> out{(float*)a.y, (const float*)a.residual, format, tokens, pixels, a.weight.outputs, a.activation};
  convolve(g, unwrap<float>(a.weight), a.groups, in, out, a.threads);
}

}  // namespace

extern "C" {

int nm_lanes() { return W; }
int nm_pairs() { return NM_PAIRS; }

int nm_linear(const NmLinear* args) {
  return guarded([&] { args->bf16 ? linear<bf16>(*args) : linear<float>(*args); });
}

int nm_mlp(const NmMlp* args) {
  return guarded([&] { args->bf16 ? two_linears<bf16>(*args) : two_linears<float>(*args); });
}

int nm_conv(const NmConv* args) {
  return guarded([&] { convolution(*args); });
}

int nm_attention(const NmAttention* args) {
  return guarded([&] { attention(*args); });
}

int nm_token_merge(const NmMerge* args) {
  return guarded([&] { merge(*args); });
}

}  // extern "C"
