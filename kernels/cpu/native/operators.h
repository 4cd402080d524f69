// What the operators of ops.cpp share: the kernels that they call, and how they join torch's dispatcher.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <utility>

#include "abi.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using StringView = c10::string_view;
using IntList = at::IntArrayRef;

// Addresses of the functions of cpu.cpp; build.py chooses the instruction set that these are built for.
using LinearKernel = int(const NmLinear*);
using MlpKernel = int(const NmMlp*);
using ConvKernel = int(const NmConv*);
using AttentionKernel = int(const NmAttention*);
struct Kernels {
  LinearKernel* linear;
  MlpKernel* mlp;
  ConvKernel* conv;
  AttentionKernel* attention;
  bool pairs;  // whether they support the layouts of bf16 pairs (QUADS, RING, OCTS)
};
std::atomic<const Kernels*> current_kernels{nullptr};  // never freed: a concurrent call may still be reading it

template <class Signature> auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool needs_gradient(const Tensor& t) { return t.requires_grad(); }
bool needs_gradient(const OptionalTensor& t) { return t && t->requires_grad(); }
template <class T> bool needs_gradient(const T&) { return false; }

// The autograd kernel of an operator. If a gradient is needed, it calls the general operator, which has a backward
// formula; if the next dispatch key is CPU, it calls the CPU kernel directly; otherwise (tracing, functionalization,
// Python modes) it redispatches.
template <class Signature, Signature& kernel> struct AutogradKernel;
template <class... Args, Tensor (&kernel)(Args...)> struct AutogradKernel<Tensor(Args...), kernel> {
  static const char* name;
  static Tensor call(c10::DispatchKeySet keys, Args... args) {
    if (c10::GradMode::is_enabled() && (needs_gradient(args) || ...)) {
      static const auto general = find_operator<Tensor(Args...)>((std::string(name) + "_general").c_str());
      return general.call(args...);
    }
    const auto below = keys & c10::after_ADInplaceOrView_keyset;
    if (below.highestPriorityTypeId() == c10::DispatchKey::CPU) return kernel(args...);
    static const auto self = find_operator<Tensor(Args...)>(name);
    return self.redispatch(below, args...);
  }
};

// The tensor as the kernel reads it, broadcast to `sizes`; nothing if the kernel cannot read it in place.
std::optional<NmHeads> to_heads(const Tensor& t, std::array<int64_t, 4> sizes) {
  if (!t.is_cpu() || t.scalar_type() != at::kFloat || t.layout() != at::kStrided || t.dim() != 4) return std::nullopt;
  int64_t strides[4];
  for (int i = 0; i < 4; i++) {
    if (t.size(i) != sizes[i] && t.size(i) != 1) return std::nullopt;
    strides[i] = t.size(i) == sizes[i] ? t.stride(i) : 0;
  }
  if (sizes[3] > 1 && strides[3] != 1) return std::nullopt;
  return NmHeads{t.const_data_ptr(), strides[0], strides[1], strides[2]};
}

}  // namespace
