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

// A tensor of heads, (batch, heads, tokens, channels), by its strides in elements. Channels are contiguous.
struct NmHeads {
  const void* data;
  int64_t batch;
  int64_t head;
  int64_t token;
};

// y = softmax(query key^T * scale + bias) value, in float32. `bias` (null data: none) is (batch, heads, queries, keys);
// its strides may be zero, except that of the keys, which is one. `y` is contiguous: (batch, queries, heads,
// value_dim).
struct NmAttention {
  NmHeads query;
  NmHeads key;
  NmHeads value;
  NmHeads bias;
  void* y;
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int32_t dim;
  int32_t value_dim;
  float scale;
  int32_t threads;
};

extern "C" {
int nm_lanes();  // floats in a vector
int nm_pairs();  // 1 if the kernels take the layouts of bf16 pairs (QUADS, RING, OCTS), else 0

// Each returns 0, or 1 if memory ran out. Sizes and pointers are the caller's responsibility.
int nm_linear(const NmLinear* args);
int nm_mlp(const NmMlp* args);
int nm_conv(const NmConv* args);
int nm_attention(const NmAttention* args);
}
