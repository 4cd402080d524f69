// nm_token_merge, called by torch without going through Python. Whatever the kernel cannot read in place goes to
// nm_token_merge_general, which cpu/merging.py implements.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <tuple>

#include "dispatch.h"

namespace {

using MergeResult = std::tuple<Tensor, Tensor, Tensor>;
using MergeSignature = MergeResult(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t,
                                   const OptionalTensor&, double, double, bool);

// True for floats on the CPU with `dim` axes, the last of them contiguous.
bool readable(const Tensor& t, int64_t dim, bool any_stride = false) {
  if (!t.is_cpu() || t.scalar_type() != at::kFloat || t.layout() != at::kStrided || t.dim() != dim) return false;
  return !t.is_neg() && (any_stride || t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1);
}

MergeResult token_merge(const Tensor& x, const Tensor& keys, const Tensor& size, int64_t r, int64_t prefix,
                        int64_t suffix, const OptionalTensor& saliency, double saliency_weight, double size_weight,
                        bool keep_norm) {
  const Kernels* const kernels = current_kernels.load();
  if (kernels && readable(x, 3) && readable(keys, 4) && readable(size, 3, true) && size.size(2) == 1 &&
      (!saliency || readable(*saliency, 2, true))) {
    const int64_t batch = x.size(0), count = x.size(1), channels = x.size(2), heads = keys.size(1),
                  depth = keys.size(3);
    const bool match = keys.size(0) == batch && keys.size(2) == count && size.size(0) == batch &&
                       size.size(1) == count &&
                       (!saliency || (saliency->size(0) == batch && saliency->size(1) == count));
    // Expanded tensors can have any size; the kernel copies the keys of an image.
    constexpr int64_t most = 1 << 14;
    const bool sane = batch && channels && heads && depth && count <= most && depth <= most && prefix >= 0 &&
                      suffix >= 0 && prefix <= count && suffix <= count - prefix;
    const int64_t merged = sane ? std::min(r, (count - prefix - suffix) / 2) : 0;
    if (match && merged > 0) {
      Tensor y = at::empty({batch, count - merged, channels}, x.options());
      Tensor sizes = at::empty({batch, count - merged, 1}, x.options());
      Tensor places = at::empty({batch, count}, x.options().dtype(at::kLong));
      const NmMerge args{
          .x = x.const_data_ptr(),
          .keys = keys.const_data_ptr(),
          .size = size.const_data_ptr(),
          .saliency = saliency ? saliency->const_data_ptr() : nullptr,
          .y = y.data_ptr(),
          .new_size = sizes.data_ptr(),
          .places = places.data_ptr(),
          .x_image = x.stride(0),
          .x_token = x.stride(1),
          .keys_image = keys.stride(0),
          .keys_head = keys.stride(1),
          .keys_token = keys.stride(2),
          .size_image = size.stride(0),
          .size_token = size.stride(1),
          .saliency_image = saliency ? saliency->stride(0) : 0,
          .saliency_token = saliency ? saliency->stride(1) : 0,
          .batch = batch,
          .tokens = count,
          .channels = channels,
          .heads = heads,
          .depth = depth,
          .r = (int32_t)merged,
          .prefix = (int32_t)prefix,
          .suffix = (int32_t)suffix,
          .saliency_weight = (float)saliency_weight,
          .size_weight = (float)size_weight,
          .keep_norm = keep_norm,
          .threads = at::get_num_threads(),
      };
      if (!kernels->merge(&args)) return {std::move(y), std::move(sizes), std::move(places)};
    }
  }
  const at::AutoDispatchBelowADInplaceOrView below;  // autograd of the general operator would lead back here
  static const auto general = find_operator<MergeSignature>("mpcompile::nm_token_merge_general");
  return general.call(x, keys, size, r, prefix, suffix, saliency, saliency_weight, size_weight, keep_norm);
}

}  // namespace
