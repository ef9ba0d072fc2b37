// All kernels over the vocabulary that was included before, and the table of them. Included by isa_*.cpp inside their
// target regions.
#pragma once

// clang-format off: order matters
#include "device/cpu/kernels/impl_math.h"
#include "device/cpu/kernels/impl_row_ops.h"
#include "device/cpu/kernels/impl_mul_mat.h"
#include "device/cpu/kernels/impl_attention.h"
// clang-format on

template <Isa kIsa>
constexpr Kernels make_kernels() {
  return {.isa = kIsa,
          .quantize_row = quantize_row,
          .mul_mat = mul_mat,
          .rms_norm = rms_norm,
          .layer_norm = layer_norm,
          .l2_norm = l2_norm,
          .add = row_add,
          .sub = row_sub,
          .mul = row_mul,
          .div = row_div,
          .scale = row_scale,
          .add_scaled = row_add_scaled,
          .silu = row_silu,
          .gelu = row_gelu,
          .gelu_erf = row_gelu_erf,
          .gelu_quick = row_gelu_quick,
          .relu = row_relu,
          .sigmoid = row_sigmoid,
          .tanh = row_tanh,
          .exp = row_exp,
          .softcap = row_softcap,
          .silu_mul = row_silu_mul,
          .gelu_mul = row_gelu_mul,
          .softmax = softmax,
          .sum = row_sum,
          .dot = row_dot,
          .rope = rope,
          .kv_store = kv_store,
          .kv_load = kv_load,
          .attention = attention,
          .attention_dense = attention_dense,
          .argmax = argmax,
          .top_k = top_k,
          .log_sum_exp = log_sum_exp};
}
