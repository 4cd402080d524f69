// nm_gemm, nm_mlp, nm_conv and nm_attention, called by torch without going through Python: for a layer with few tokens,
// the interpreter would take longer than the kernel. Anything unusual (another dtype, strides, sizes that do not match,
// a gradient) goes to the operator of the same name with the suffix _general, which operators.py and attention.py
// implement. build.py compiles this file against the headers of the installed torch.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstring>

#include "../layouts.h"
#include "dispatch.h"
#include "tokens.h"

namespace {

constexpr int64_t MAX_M = 32;
constexpr int ACTIVATIONS = 5;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The index of an epilogue in packed.EPILOGUES, or -1.
int epilogue_number(StringView name) {
  constexpr const char* names[ACTIVATIONS] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  const bool after_residual = name.substr(0, 4) == "add_";
  if (after_residual) name = name.substr(4);
  for (int i = 0; i < ACTIVATIONS; i++)
    if (name == names[i]) return i + ACTIVATIONS * after_residual;
  return -1;
}

// A packed weight as an operator receives it. It does not own the tensors.
struct WeightArgs {
  const Tensor& values;
  const Tensor& index;
  const OptionalTensor& bias;
  int64_t outputs, inputs, n, m, layout;
};

// True if `values` and `index` have the sizes that the kernels rely on; checks.held makes the same check in Python.
bool storage_matches(const WeightArgs& w) {
  constexpr int64_t most = INT_MAX - 1024;  // the kernels' counters are int, and run a few rows past the last
  if (w.n < 1 || w.m < w.n || w.m > MAX_M) return false;
  if (w.outputs < 1 || w.inputs < 1 || w.outputs > most || w.inputs > most) return false;
  const int n = (int)w.n, m = (int)w.m, layout = (int)w.layout;
  if ((int)w.inputs % m) return false;
  const int64_t width = block_columns(layout, m), blocks = ceil_div(w.inputs, width);
  const int64_t values = w.values.numel(), indices = w.index.numel();
  if (layout == LAYOUT_PANELS)
    return !indices && values == ceil_div(w.outputs, PANEL_OUTPUTS) * PANEL_OUTPUTS * w.inputs;
  const uint8_t* const index_end = (const uint8_t*)w.index.const_data_ptr() + indices;
  if (layout == LAYOUT_RING) {
    const int64_t table = 4 * (blocks * ceil_div(w.outputs, RING_ROWS) + 1);
    if (indices - values / 2 != table) return false;
    int32_t total_entries;  // the last element of the table; the kernel reads that many entries
    memcpy(&total_entries, (const uint8_t*)w.index.const_data_ptr() + table - 4, 4);
    return total_entries >= 0 && total_entries <= values / 2;
  }
  const int64_t entries_per_row =
      w.inputs / width * block_entries(layout, (int)width, n, m) + block_entries(layout, (int)(w.inputs % width), n, m);
  if (indices != w.outputs * entries_per_row || values != indices * (layout == LAYOUT_ROWS ? 1 : 2)) return false;
  if (layout != LAYOUT_ROWS) return true;
  // A slightly different number of inputs can give the same sizes, but not the same column numbers in the last row.
  const int64_t columns = (w.inputs - 1) % width + 1, kept = columns / m * n;
  const int64_t last_row = block_entries(LAYOUT_ROWS, (int)columns, n, m);
  const uint8_t* const row = index_end - last_row;
  return row[kept - 1] >= columns - m && std::all_of(row + kept, index_end, [](uint8_t column) { return !column; });
}

bool is_plain(const Tensor& t, c10::ScalarType type, at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return t.is_cpu() && t.scalar_type() == type && t.is_contiguous(format);
}

// True if there is no residual, or if it has the dtype, shape and memory format of the output.
bool residual_matches(const OptionalTensor& residual, const Tensor& y,
                      at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return !residual || (is_plain(*residual, y.scalar_type(), format) && residual->sizes() == y.sizes());
}

// An empty output for tokens x (..., inputs).
Tensor empty_output(const Tensor& x, int64_t outputs) {
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  return at::empty(sizes, x.options());
}

// True if the kernels can multiply x by the weight without any conversion.
bool kernels_accept(const Kernels& kernels, const Tensor& x, const WeightArgs& w) {
  const auto type = x.scalar_type();
  if (!x.is_cpu() || (type != at::kFloat && type != at::kBFloat16)) return false;
  if (w.layout == LAYOUT_PANELS) {
    if (type != at::kFloat) return false;
  } else if (w.layout != LAYOUT_ROWS) {
    if (w.layout < LAYOUT_ROWS || w.layout > LAYOUT_OCTS || type != at::kBFloat16 || !kernels.pairs) return false;
  }
  if (w.bias && !(is_plain(*w.bias, type) && w.bias->dim() == 1 && w.bias->numel() == w.outputs)) return false;
  return is_plain(w.values, type) && is_plain(w.index, at::kByte) && storage_matches(w);
}

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// The weight as the kernels take it; only for a weight that kernels_accept has accepted.
NmWeight to_abi(const WeightArgs& w) {
  return {
      .values = w.values.const_data_ptr(),
      .index = w.index.const_data_ptr(),
      .bias = data_or_null(w.bias),
      .inputs = (int32_t)w.inputs,
      .outputs = (int32_t)w.outputs,
      .n = (int32_t)w.n,
      .m = (int32_t)w.m,
      .layout = (int32_t)w.layout,
  };
}

// The operators' parameters are those of kernels/schema.py.
using GemmSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             int64_t, int64_t, int64_t, int64_t, StringView);

Tensor gemm(const Tensor& x, const Tensor& values, const Tensor& index, const OptionalTensor& bias,
            const OptionalTensor& residual, int64_t out, int64_t n, int64_t m, int64_t layout, StringView activation) {
  const Kernels* const kernels = current_kernels.load();
  const int epilogue = epilogue_number(activation);
  if (kernels && epilogue >= 0 && x.dim() && x.is_contiguous()) {
    const WeightArgs weight{values, index, bias, out, x.size(-1), n, m, layout};
    if (kernels_accept(*kernels, x, weight)) {
      Tensor y = empty_output(x, out);
      if (!y.numel()) return y;
      if (residual_matches(residual, y)) {
        const NmLinear args{
            .x = x.const_data_ptr(),
            .residual = data_or_null(residual),
            .y = y.data_ptr(),
            .weight = to_abi(weight),
            .tokens = y.numel() / out,
            .pixels = 1,
            .bf16 = x.scalar_type() == at::kBFloat16,
            .format = FORMAT_TOKENS,
            .activation = epilogue,
            .threads = at::get_num_threads(),
        };
        if (!kernels->linear(&args)) return y;
      }
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // autograd of the general operator would lead back here
  static const auto general = find_operator<GemmSignature>("mpcompile::nm_gemm_general");
  return general.call(x, values, index, bias, residual, out, n, m, layout, activation);
}

using MlpSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                            const Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, StringView);

Tensor mlp(const Tensor& x, const Tensor& values1, const Tensor& index1, const OptionalTensor& bias1,
           const Tensor& values2, const Tensor& index2, const OptionalTensor& bias2, const OptionalTensor& residual,
           int64_t hidden, int64_t out, int64_t n1, int64_t m1, int64_t n2, int64_t m2, int64_t layout1,
           int64_t layout2, StringView activation) {
  const Kernels* const kernels = current_kernels.load();
  const int between = epilogue_number(activation), threads = at::get_num_threads();
  const int64_t inputs = x.dim() ? x.size(-1) : 0, tokens = inputs ? x.numel() / inputs : 0;
  const bool known = between >= 0 && between < ACTIVATIONS;
  if (known &&
      ((layout1 == LAYOUT_ROWS) != (layout2 == LAYOUT_ROWS) || layout1 == LAYOUT_PANELS || layout2 == LAYOUT_PANELS)) {
    const Tensor h = gemm(x, values1, index1, bias1, std::nullopt, hidden, n1, m1, layout1, activation);
    return gemm(h, values2, index2, bias2, residual, out, n2, m2, layout2, "none");
  }
  if (kernels && known && x.dim() && x.is_contiguous()) {
    const WeightArgs first{values1, index1, bias1, hidden, inputs, n1, m1, layout1};
    const WeightArgs second{values2, index2, bias2, out, hidden, n2, m2, layout2};
    if (kernels_accept(*kernels, x, first) && kernels_accept(*kernels, x, second)) {
      Tensor y = empty_output(x, out);
      if (!y.numel()) return y;
      if (residual_matches(residual, y)) {
        const NmMlp args{
            .x = x.const_data_ptr(),
            .residual = data_or_null(residual),
            .y = y.data_ptr(),
            .first = to_abi(first),
            .second = to_abi(second),
            .tokens = tokens,
            .bf16 = x.scalar_type() == at::kBFloat16,
            .activation = between,
            .threads = threads,
        };
        if (!kernels->mlp(&args)) return y;
      }
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // autograd of the general operator would lead back here
  static const auto general = find_operator<MlpSignature>("mpcompile::nm_mlp_general");
  return general.call(x, values1, index1, bias1, values2, index2, bias2, residual, hidden, out, n1, m1, n2, m2, layout1,
                      layout2, activation);
}

using ConvSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             IntList, IntList, IntList, int64_t, int64_t, IntList, int64_t, StringView);

// Output positions along an axis of a convolution; 0 if its numbers are unusual, such as padding that enlarges the
// image. These are left to the general operator.
int64_t usual_outputs(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  constexpr int64_t most = 64;
  if (kernel < 1 || stride < 1 || padding < 0 || dilation < 1) return 0;
  if (kernel > most || stride > most || padding > most * most || dilation > most) return 0;
  const int64_t reach = dilation * (kernel - 1) + 1, padded = size + 2 * padding;
  return 2 * padding < reach && padded >= std::max(reach, stride) ? (padded - reach) / stride + 1 : 0;
}

// The same as storage_matches, for a convolution of several taps.
bool conv_storage_matches(const WeightArgs& w, int64_t taps) {
  constexpr int64_t most = 1 << 20;
  if (w.n < 1 || w.m < w.n || w.m > MAX_M || w.layout != LAYOUT_ROWS) return false;
  if (w.outputs < 1 || w.inputs < 1 || w.outputs > most || w.inputs > most || w.inputs % w.m) return false;
  const ConvBlocks full = ConvBlocks::of((int)taps, (int)w.m);
  int64_t entries = 0;
  for (int64_t c = 0; c < w.inputs; c += full.channels)
    for (int64_t t = 0; t < taps; t += full.taps) {
      const int64_t columns = std::min<int64_t>(full.channels, w.inputs - c) * std::min<int64_t>(full.taps, taps - t);
      entries += block_entries(LAYOUT_ROWS, (int)columns, (int)w.n, (int)w.m);
    }
  return w.values.numel() == w.outputs * entries && w.index.numel() == w.outputs * entries;
}

// A convolution of several taps in fp32; nothing if it is left to the general operator.
std::optional<Tensor> spatial_conv(const Kernels& kernels, const Tensor& x, const WeightArgs& w,
                                   const OptionalTensor& residual, IntList shape, IntList stride, IntList padding,
                                   IntList dilation, int epilogue) {
  if (shape.size() != 4 || stride.size() != 2 || padding.size() != 2 || dilation.size() != 2) return {};
  const int64_t out_h = usual_outputs(x.size(2), shape[2], stride[0], padding[0], dilation[0]);
  const int64_t out_w = usual_outputs(x.size(3), shape[3], stride[1], padding[1], dilation[1]);
  if (!out_h || !out_w || shape[2] * shape[3] < 2) return {};
  if (w.inputs < 1 || x.size(1) < w.inputs || x.size(1) % w.inputs) return {};
  const int64_t groups = x.size(1) / w.inputs;
  if (w.outputs % groups || x.size(1) > INT_MAX) return {};
  const bool channels_last = !x.is_contiguous();
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  if (!is_plain(x, at::kFloat, format) || !is_plain(w.values, at::kFloat) || !is_plain(w.index, at::kByte)) return {};
  if (w.bias && !(is_plain(*w.bias, at::kFloat) && w.bias->dim() == 1 && w.bias->numel() == w.outputs)) return {};
  if (!conv_storage_matches(w, shape[2] * shape[3])) return {};
  Tensor y = at::empty({x.size(0), shape[0], out_h, out_w}, x.options().memory_format(format));
  if (!y.numel()) return y;
  if (!residual_matches(residual, y, format)) return {};
  const NmConv args{
      .x = x.const_data_ptr(),
      .residual = data_or_null(residual),
      .y = y.data_ptr(),
      .weight = to_abi(w),
      .images = x.size(0),
      .height = x.size(2),
      .width = x.size(3),
      .kernel_h = (int32_t)shape[2],
      .kernel_w = (int32_t)shape[3],
      .stride_h = (int32_t)stride[0],
      .stride_w = (int32_t)stride[1],
      .pad_h = (int32_t)padding[0],
      .pad_w = (int32_t)padding[1],
      .dilation_h = (int32_t)dilation[0],
      .dilation_w = (int32_t)dilation[1],
      .groups = (int32_t)groups,
      .activation = epilogue,
      .channels_last = channels_last,
      .threads = at::get_num_threads(),
  };
  if (kernels.conv(&args)) return {};
  return y;
}

// True for a 1x1 convolution without stride, padding or dilation: a matrix product over pixels.
bool is_pointwise(IntList shape, IntList stride, IntList padding, IntList dilation) {
  return shape.size() == 4 && shape[2] == 1 && shape[3] == 1 && stride == IntList{1, 1} && padding == IntList{0, 0} &&
         dilation == IntList{1, 1};
}

Tensor conv(const Tensor& x, const Tensor& values, const Tensor& index, const OptionalTensor& bias,
            const OptionalTensor& residual, IntList stride, IntList padding, IntList dilation, int64_t n, int64_t m,
            IntList shape, int64_t layout, StringView activation) {
  const Kernels* const kernels = current_kernels.load();
  const int epilogue = epilogue_number(activation);
  const bool pointwise = is_pointwise(shape, stride, padding, dilation);
  if (kernels && pointwise && epilogue >= 0 && x.dim() == 4 && x.size(1) == shape[1] && layout != LAYOUT_PANELS) {
    // A tensor that is contiguous in both formats counts as channels first.
    const bool channels_last = !x.is_contiguous();
    const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const WeightArgs weight{values, index, bias, shape[0], shape[1], n, m, layout};
    if (x.is_contiguous(format) && kernels_accept(*kernels, x, weight)) {
      Tensor y = at::empty({x.size(0), shape[0], x.size(2), x.size(3)}, x.options().memory_format(format));
      if (!y.numel()) return y;
      const int64_t pixels = x.size(2) * x.size(3);
      if (residual_matches(residual, y, format)) {
        const NmLinear args{
            .x = x.const_data_ptr(),
            .residual = data_or_null(residual),
            .y = y.data_ptr(),
            .weight = to_abi(weight),
            .tokens = x.size(0) * pixels,
            .pixels = pixels,
            .bf16 = x.scalar_type() == at::kBFloat16,
            .format = channels_last ? FORMAT_TOKENS : FORMAT_PLANES,
            .activation = epilogue,
            .threads = at::get_num_threads(),
        };
        if (!kernels->linear(&args)) return y;
      }
    }
  } else if (kernels && epilogue >= 0 && shape.size() == 4 && x.dim() == 4) {
    const WeightArgs weight{values, index, bias, shape[0], shape[1], n, m, layout};
    auto y = spatial_conv(*kernels, x, weight, residual, shape, stride, padding, dilation, epilogue);
    if (y) return *y;
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // autograd of the general operator would lead back here
  static const auto general = find_operator<ConvSignature>("mpcompile::nm_conv_general");
  return general.call(x, values, index, bias, residual, stride, padding, dilation, n, m, shape, layout, activation);
}

using AttentionSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                  std::optional<double>);

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
                 std::optional<double> scale) {
  const Kernels* const kernels = current_kernels.load();
  if (kernels && query.dim() == 4 && key.dim() == 4 && value.dim() == 4) {
    const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), keys = key.size(2);
    const int64_t dim = query.size(3), value_dim = value.size(3);
    const bool alike = key.size(0) == batch && key.size(1) == heads && key.size(3) == dim && value.size(0) == batch &&
                       value.size(1) == heads && value.size(2) == keys;
    const auto q = to_heads(query, {batch, heads, queries, dim}), k = to_heads(key, {batch, heads, keys, dim});
    const auto v = to_heads(value, {batch, heads, keys, value_dim});
    const auto b = bias ? to_heads(*bias, {batch, heads, queries, keys}) : NmHeads{};
    constexpr int64_t most = 1 << 14;  // expanded tensors can have any size, and the kernel packs a head's keys
    const bool sane = dim <= most && value_dim <= most && keys <= most;
    if (alike && sane && q && k && v && b && query.numel() && key.numel() && value.numel()) {
      const Tensor y =
          at::empty_strided({batch, heads, queries, value_dim},
                            {queries * heads * value_dim, value_dim, heads * value_dim, 1}, query.options());
      const NmAttention args{
          .query = *q,
          .key = *k,
          .value = *v,
          .bias = *b,
          .y = y.data_ptr(),
          .batch = batch,
          .heads = heads,
          .queries = queries,
          .keys = keys,
          .dim = (int32_t)dim,
          .value_dim = (int32_t)value_dim,
          .scale = (float)scale.value_or(1 / std::sqrt((double)dim)),
          .threads = at::get_num_threads(),
      };
      if (!kernels->attention(&args)) return y;
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // autograd of the general operator would lead back here
  static const auto general = find_operator<AttentionSignature>("mpcompile::nm_attention_general");
  return general.call(query, key, value, bias, scale);
}

using GemmAutograd = AutogradKernel<GemmSignature, gemm>;
using MlpAutograd = AutogradKernel<MlpSignature, mlp>;
using ConvAutograd = AutogradKernel<ConvSignature, conv>;
using AttentionAutograd = AutogradKernel<AttentionSignature, attention>;
using MergeAutograd = AutogradKernel<MergeSignature, token_merge>;
template <> const char* GemmAutograd::name = "mpcompile::nm_gemm";
template <> const char* MlpAutograd::name = "mpcompile::nm_mlp";
template <> const char* ConvAutograd::name = "mpcompile::nm_conv";
template <> const char* AttentionAutograd::name = "mpcompile::nm_attention";
template <> const char* MergeAutograd::name = "mpcompile::nm_token_merge";

}  // namespace

TORCH_LIBRARY_IMPL(mpcompile, CPU, m) {
  m.impl("nm_gemm", TORCH_FN(gemm));
  m.impl("nm_mlp", TORCH_FN(mlp));
  m.impl("nm_conv", TORCH_FN(conv));
  m.impl("nm_attention", TORCH_FN(attention));
  m.impl("nm_token_merge", TORCH_FN(token_merge));
}

TORCH_LIBRARY_IMPL(mpcompile, AutogradCPU, m) {
  m.impl("nm_gemm", TORCH_FN(GemmAutograd::call));
  m.impl("nm_mlp", TORCH_FN(MlpAutograd::call));
  m.impl("nm_conv", TORCH_FN(ConvAutograd::call));
  m.impl("nm_attention", TORCH_FN(AttentionAutograd::call));
  m.impl("nm_token_merge", TORCH_FN(MergeAutograd::call));
}

// Sets the kernels that the operators call from now on, and whether these support the layouts of bf16 pairs. If
// `linear` is null, every call goes to the general operators.
extern "C" void nm_use(LinearKernel* linear, MlpKernel* mlp, ConvKernel* conv, AttentionKernel* attention,
                       MergeKernel* merge, int pairs) {
  current_kernels = linear ? new Kernels{linear, mlp, conv, attention, merge, pairs != 0} : nullptr;
}
