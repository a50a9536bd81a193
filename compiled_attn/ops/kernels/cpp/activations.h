// Activations on vectors of float32, by name; what they compute is torch's, up to rounding.
#ifndef COMPILED_ATTN_CPP_ACTIVATIONS_H
#define COMPILED_ATTN_CPP_ACTIVATIONS_H

#include "simd.h"

namespace compiled_attn_cpp {
namespace {

enum class Activation { none, relu, relu6, silu, hardswish, gelu, gelu_tanh };

// exp(-|x|), and the logistic function by it.
COMPILED_ATTN_INLINE Vec vabs(Vec x) { return vmax(x, vsub(vset(0.f), x)); }
COMPILED_ATTN_INLINE Vec vdiv(Vec a, Vec b) { return a / b; }
COMPILED_ATTN_INLINE Vec vexp_minus(Vec x) { return vexp2(vmul(x, vset(-kLog2e))); }
COMPILED_ATTN_INLINE Vec vsigmoid(Vec x) {
  const Vec e = vexp_minus(vabs(x));
  const Vec inverse = vdiv(vset(1.f), vadd(vset(1.f), e));
  return vless(x, vset(0.f), vmul(e, inverse), inverse);
}

// The error function: Abramowitz and Stegun 7.1.26, absolute error below 2e-7; a NaN stays one.
COMPILED_ATTN_INLINE Vec verf(Vec x) {
  const Vec z = vabs(x);
  const Vec t = vdiv(vset(1.f), vfma(z, vset(0.3275911f), vset(1.f)));
  Vec p = vset(1.061405429f);
  p = vfma(p, t, vset(-1.453152027f));
  p = vfma(p, t, vset(1.421413741f));
  p = vfma(p, t, vset(-0.284496736f));
  p = vfma(p, t, vset(0.254829592f));
  const Vec y = vsub(vset(1.f), vmul(vmul(p, t), vexp_minus(vmul(z, z))));
  return vless(x, vset(0.f), vsub(vset(0.f), y), y);
}

// Between 0 and 6; a NaN stays one.
COMPILED_ATTN_INLINE Vec vclamp6(Vec x) {
  x = vmax(vset(0.f), x);
  return vless(vset(6.f), x, vset(6.f), x);
}

template <Activation A>
COMPILED_ATTN_INLINE Vec activate(Vec x) {
  if constexpr (A == Activation::relu) return vmax(vset(0.f), x);
  if constexpr (A == Activation::relu6) return vclamp6(x);
  if constexpr (A == Activation::hardswish) return vmul(x, vmul(vclamp6(vadd(x, vset(3.f))), vset(1.f / 6.f)));
  if constexpr (A == Activation::silu) return vmul(x, vsigmoid(x));
  if constexpr (A == Activation::gelu) {
    const Vec half = vmul(x, vset(0.5f));
    return vfma(half, verf(vmul(x, vset(0.70710678118654752f))), half);
  }
  if constexpr (A == Activation::gelu_tanh) {
    const Vec cubic = vfma(vmul(vmul(x, x), x), vset(0.044715f), x);
    return vmul(x, vsigmoid(vmul(cubic, vset(1.5957691216057308f))));
  }
  return x;
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
