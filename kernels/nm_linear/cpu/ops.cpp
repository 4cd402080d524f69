// nm_gemm, nm_mlp and pointwise nm_conv as torch calls them, with no Python between torch and the kernels: a layer of
// few tokens takes less time than an interpreter's way to it. Whatever is out of the ordinary (another dtype, strides, a
// gradient that is asked for, tensors that don't fit) goes to the operator of the same name with _general behind it, which
// native.py defines. Built by build.py against the headers of the torch that is installed.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "layouts.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Text = c10::string_view;
using Ints = at::IntArrayRef;

// The functions of cpu.cpp, by address: which instruction set they are for is build.py's choice.
using Linear = int(int, const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int, int, int,
                   int, int, int, int, int);
using Mlp = int(int, const void*, const void*, const void*, const void*, const void*, const void*, const void*, const void*,
                void*, int64_t, int, int, int, int, int, int, int, int, int, int, int);
struct Kernels {
  Linear* linear;
  Mlp* mlp;
  bool pairs;
};
std::atomic<const Kernels*> in_use{nullptr};  // never freed: a call may still be reading it

constexpr int64_t MAX_M = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The number of an epilogue in packed.EPILOGUES, or -1.
int number(Text name) {
  constexpr const char* names[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  const bool behind = name.substr(0, 4) == "add_";
  if (behind) name = name.substr(4);
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return i + 5 * behind;
  return -1;
}

// checks.held for a matrix: whether the kernels find in both tensors what they will read.
bool fits(const Tensor& values, const Tensor& index, int64_t outputs, int64_t inputs, int64_t n, int64_t m, int64_t layout) {
  constexpr int64_t most = INT_MAX - 1024;  // the kernels count in int, a few rows further
  if (n < 1 || m < n || m > MAX_M || outputs < 1 || inputs < 1 || outputs > most || inputs > most || (int)inputs % (int)m) return false;
  const int64_t wide = block_columns((int)layout, (int)m), blocks = ceil_div(inputs, wide);
  const int64_t held = values.numel(), named = index.numel();
  if (layout == LAYOUT_RING) {
    const int64_t end = 4 * (blocks * ceil_div(outputs, RING_ROWS) + 1);
    if (named - held / 2 != end) return false;
    int32_t entries;  // where the table ends: the kernel reads as many
    memcpy(&entries, (const uint8_t*)index.const_data_ptr() + end - 4, 4);
    return entries >= 0 && entries <= held / 2;
  }
  const int64_t entries = inputs / wide * block_entries((int)layout, (int)wide, (int)n, (int)m) +
                          block_entries((int)layout, (int)(inputs % wide), (int)n, (int)m);
  if (named != outputs * entries || held != named * (layout == LAYOUT_ROWS ? 1 : 2)) return false;
  if (layout != LAYOUT_ROWS) return true;
  // A few inputs more or less leave the sizes as they are, but not the last row's places.
  const int64_t width = (inputs - 1) % wide + 1, kept = width / m * n;
  const int64_t last = block_entries(LAYOUT_ROWS, (int)width, (int)n, (int)m);
  const uint8_t* const end = (const uint8_t*)index.const_data_ptr() + named - last;
  return end[kept - 1] >= width - m && std::all_of(end + kept, end + last, [](uint8_t place) { return !place; });
}

bool held(const Tensor& t, c10::ScalarType type, at::MemoryFormat order = at::MemoryFormat::Contiguous) {
  return t.is_cpu() && t.scalar_type() == type && t.is_contiguous(order);
}

// Whether a residual lies as the outputs do.
bool alike(const Maybe& residual, const Tensor& y, at::MemoryFormat order = at::MemoryFormat::Contiguous) {
  return !residual || (held(*residual, y.scalar_type(), order) && residual->sizes() == y.sizes());
}

// Outputs for tokens x (..., inputs).
Tensor outputs_for(const Tensor& x, int64_t out) {
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  return at::empty(sizes, x.options());
}

// Whether the kernels take activations and a weight as they are.
bool ready(const Tensor& x, const Tensor& values, const Tensor& index, const Maybe& bias, int64_t outputs, int64_t inputs,
           int64_t n, int64_t m, int64_t layout, bool pairs) {
  const auto type = x.scalar_type();
  if (!x.is_cpu() || (type != at::kFloat && type != at::kBFloat16)) return false;
  if (layout != LAYOUT_ROWS && (layout < LAYOUT_ROWS || layout > LAYOUT_OCTS || type != at::kBFloat16 || !pairs)) return false;
  if (bias && !(held(*bias, type) && bias->dim() == 1 && bias->numel() == outputs)) return false;
  return held(values, type) && held(index, at::kByte) && fits(values, index, outputs, inputs, n, m, layout);
}

const void* at(const Maybe& t) { return t ? t->const_data_ptr() : nullptr; }

template <class Signature> auto general(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using Gemm = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, int64_t, int64_t, int64_t, int64_t, Text);

Tensor gemm(const Tensor& x, const Tensor& values, const Tensor& index, const Maybe& bias, const Maybe& residual, int64_t out,
            int64_t n, int64_t m, int64_t layout, Text activation) {
  const Kernels* const run = in_use.load();
  const int epilogue = number(activation);
  if (run && epilogue >= 0 && x.dim() && x.is_contiguous() && ready(x, values, index, bias, out, x.size(-1), n, m, layout, run->pairs)) {
    Tensor y = outputs_for(x, out);
    if (!y.numel()) return y;
    if (alike(residual, y) &&
        !run->linear(x.scalar_type() == at::kBFloat16, x.const_data_ptr(), values.const_data_ptr(), index.const_data_ptr(), at(bias),
               at(residual), y.data_ptr(), y.numel() / out, 1, (int)x.size(-1), (int)out, (int)n, (int)m, (int)layout, epilogue,
               /*format, tokens*/ 0, at::get_num_threads()))
        return y;
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // whose autograd leads back here
  static const auto otherwise = general<Gemm>("mpcompile::nm_gemm_general");
  return otherwise.call(x, values, index, bias, residual, out, n, m, layout, activation);
}

using Two = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Maybe&,
                   const Maybe&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, Text);

Tensor two(const Tensor& x, const Tensor& values1, const Tensor& index1, const Maybe& bias1, const Tensor& values2,
           const Tensor& index2, const Maybe& bias2, const Maybe& residual, int64_t hidden, int64_t out, int64_t n1, int64_t m1,
           int64_t n2, int64_t m2, int64_t layout1, int64_t layout2, Text activation) {
  const Kernels* const run = in_use.load();
  const int between = number(activation), threads = at::get_num_threads();
  const int64_t tokens = x.dim() && x.size(-1) ? x.numel() / x.size(-1) : 0;
  // One thread takes a whole panel through both products, which few panels would leave idle threads.
  const bool known = between >= 0 && between < 5;
  if (known && ((tokens < 64 * 4 * threads && threads > 1) || (layout1 == LAYOUT_ROWS) != (layout2 == LAYOUT_ROWS))) {
    const Tensor h = gemm(x, values1, index1, bias1, std::nullopt, hidden, n1, m1, layout1, activation);
    return gemm(h, values2, index2, bias2, residual, out, n2, m2, layout2, "none");
  }
  if (run && known && x.dim() && x.is_contiguous() &&
      ready(x, values1, index1, bias1, hidden, x.size(-1), n1, m1, layout1, run->pairs) &&
      ready(x, values2, index2, bias2, out, hidden, n2, m2, layout2, run->pairs)) {
    Tensor y = outputs_for(x, out);
    if (!y.numel()) return y;
    if (alike(residual, y) &&
        !run->mlp(x.scalar_type() == at::kBFloat16, x.const_data_ptr(), values1.const_data_ptr(), index1.const_data_ptr(), at(bias1),
               values2.const_data_ptr(), index2.const_data_ptr(), at(bias2), at(residual), y.data_ptr(), tokens, (int)x.size(-1),
               (int)hidden, (int)out, (int)n1, (int)m1, (int)layout1, (int)n2, (int)m2, (int)layout2, between, threads))
        return y;
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // whose autograd leads back here
  static const auto otherwise = general<Two>("mpcompile::nm_mlp_general");
  return otherwise.call(x, values1, index1, bias1, values2, index2, bias2, residual, hidden, out, n1, m1, n2, m2, layout1, layout2,
                        activation);
}

using Conv = Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, Ints, Ints, Ints, int64_t, int64_t,
                    Ints, int64_t, Text);

Tensor conv(const Tensor& x, const Tensor& values, const Tensor& index, const Maybe& bias, const Maybe& residual, Ints stride,
            Ints padding, Ints dilation, int64_t n, int64_t m, Ints shape, int64_t layout, Text activation) {
  const Kernels* const run = in_use.load();
  const int epilogue = number(activation);
  const bool flat = shape.size() == 4 && shape[2] == 1 && shape[3] == 1 && stride == Ints{1, 1} && padding == Ints{0, 0} &&
                    dilation == Ints{1, 1};
  if (run && flat && epilogue >= 0 && x.dim() == 4 && x.size(1) == shape[1]) {
    // Where both orders fit, the plain one counts.
    const bool last = !x.is_contiguous();
    const auto order = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    if (x.is_contiguous(order) && ready(x, values, index, bias, shape[0], shape[1], n, m, layout, run->pairs)) {
      Tensor y = at::empty({x.size(0), shape[0], x.size(2), x.size(3)}, x.options().memory_format(order));
      if (!y.numel()) return y;
      const int64_t pixels = x.size(2) * x.size(3);
      if (alike(residual, y, order) &&
          !run->linear(x.scalar_type() == at::kBFloat16, x.const_data_ptr(), values.const_data_ptr(), index.const_data_ptr(), at(bias),
                 at(residual), y.data_ptr(), x.size(0) * pixels, pixels, (int)shape[1], (int)shape[0], (int)n, (int)m, (int)layout,
                 epilogue, /*format, tokens or planes*/ last ? 0 : 1, at::get_num_threads()))
          return y;
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // whose autograd leads back here
  static const auto otherwise = general<Conv>("mpcompile::nm_conv_general");
  return otherwise.call(x, values, index, bias, residual, stride, padding, dilation, n, m, shape, layout, activation);
}

bool wants_gradient(const Tensor& t) { return t.requires_grad(); }
bool wants_gradient(const Maybe& t) { return t && t->requires_grad(); }
template <class T> bool wants_gradient(const T&) { return false; }

// What stands between autograd and the kernels: the way with a formula where a gradient is asked for, straight to the
// kernel where the tensors are plain, and else (tracing, functionalization, modes of Python) on as the dispatcher goes.
template <class Signature, Signature& kernel> struct Above;
template <class... Args, Tensor (&kernel)(Args...)> struct Above<Tensor(Args...), kernel> {
  static const char* name;
  static Tensor call(c10::DispatchKeySet keys, Args... args) {
    if (c10::GradMode::is_enabled() && (wants_gradient(args) || ...)) {
      static const auto formula = general<Tensor(Args...)>((std::string(name) + "_general").c_str());
      return formula.call(args...);
    }
    const auto below = keys & c10::after_ADInplaceOrView_keyset;
    if (below.highestPriorityTypeId() == c10::DispatchKey::CPU) return kernel(args...);
    static const auto self = general<Tensor(Args...)>(name);
    return self.redispatch(below, args...);
  }
};
using AboveGemm = Above<Gemm, gemm>;
using AboveTwo = Above<Two, two>;
using AboveConv = Above<Conv, conv>;
template <> const char* AboveGemm::name = "mpcompile::nm_gemm";
template <> const char* AboveTwo::name = "mpcompile::nm_mlp";
template <> const char* AboveConv::name = "mpcompile::nm_conv";

}  // namespace

TORCH_LIBRARY_IMPL(mpcompile, CPU, m) {
  m.impl("nm_gemm", TORCH_FN(gemm));
  m.impl("nm_mlp", TORCH_FN(two));
  m.impl("nm_conv", TORCH_FN(conv));
}

TORCH_LIBRARY_IMPL(mpcompile, AutogradCPU, m) {
  m.impl("nm_gemm", TORCH_FN(AboveGemm::call));
  m.impl("nm_mlp", TORCH_FN(AboveTwo::call));
  m.impl("nm_conv", TORCH_FN(AboveConv::call));
}

// The kernels to call from now on, and whether they multiply pairs; null for none: all goes the general way.
extern "C" void nm_use(Linear* one, Mlp* both, int pairs) {
  in_use = one ? new Kernels{one, both, pairs != 0} : nullptr;
}
