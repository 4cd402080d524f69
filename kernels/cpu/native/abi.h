// The C interface of the kernel library (cpu.cpp): parameter structs and functions. ops.cpp calls it from C++,
// operators.py through ctypes. abi.py mirrors every struct field by field; test_cpu_abi.py compares the two.
#pragma once

#include <cstdint>

// Memory format of activations. In FORMAT_TOKENS a token's channels are contiguous: (tokens, channels). In
// FORMAT_PLANES a token is a pixel of an image: (images, channels, pixels). FORMAT_PANEL is internal to the kernels
// (tiles.h).
enum Format { FORMAT_TOKENS = 0, FORMAT_PLANES = 1, FORMAT_PANEL = 2 };

// A packed weight and its bias (null: none). `layout` is a value of enum Layout in layouts.h. `values` and `bias` have
// the dtype of the activations.
struct NmWeight {
  const void* values;
  const void* index;
  const void* bias;
  int32_t inputs;
  int32_t outputs;
  int32_t n;
  int32_t m;
  int32_t layout;
};

// y = epilogue(x W^T + bias). `x`, `residual` (null: none) and `y` have the same format; with FORMAT_PLANES, tokens =
// images * pixels. Dtype: bfloat16 if `bf16` is nonzero, else float32.
struct NmLinear {
  const void* x;
  const void* residual;
  void* y;
  NmWeight weight;
  int64_t tokens;
  int64_t pixels;
  int32_t bf16;
  int32_t format;
  int32_t activation;
  int32_t threads;
};

// y = second(activation(first(x))) + residual, token-major.
struct NmMlp {
  const void* x;
  const void* residual;
  void* y;
  NmWeight first;
  NmWeight second;
  int64_t tokens;
  int32_t bf16;
  int32_t activation;
  int32_t threads;
};

// A float32 convolution. Activations are (images, channels, height, width), in channels-last memory if `channels_last`
// is nonzero, else contiguous. Channels and outputs are in `groups` groups of equal size; an output reads the channels
// of its group, which the weight's `inputs` count. The weight's layout is LAYOUT_ROWS, in blocks of (tap, channel)
// columns.
struct NmConv {
  const void* x;
  const void* residual;
  void* y;
  NmWeight weight;
  int64_t images;
  int64_t height;
  int64_t width;
  int32_t kernel_h;
  int32_t kernel_w;
  int32_t stride_h;
  int32_t stride_w;
  int32_t pad_h;
  int32_t pad_w;
  int32_t dilation_h;
  int32_t dilation_w;
  int32_t groups;
  int32_t activation;
  int32_t channels_last;
  int32_t threads;
};

extern "C" {
int nm_lanes();  // floats in a vector
int nm_pairs();  // 1 if the kernels take the layouts of bf16 pairs (QUADS, RING, OCTS), else 0

// Each returns 0, or 1 if memory ran out. Sizes and pointers are the caller's responsibility.
int nm_linear(const NmLinear* args);
int nm_mlp(const NmMlp* args);
int nm_conv(const NmConv* args);
}
