// Activations on vectors of float32, by name; what they compute is torch's, up to rounding.
#ifndef COMPILED_ATTN_CPP_ACTIVATIONS_H
#define COMPILED_ATTN_CPP_ACTIVATIONS_H

#include "simd.h"

namespace compiled_attn_cpp {
namespace {

enum class Activation { none, relu, relu6, silu, hardswish, gelu, gelu_tanh };

COMPILED_ATTN_INLINE Vec vabs(Vec x) { return vmax(x, vsub(vset(0.f), x)); }

// x times the logistic function of z: x / (1 + exp(-z)).
COMPILED_ATTN_INLINE Vec vlogistic(Vec x, Vec z) {
  return x / vadd(vset(1.f), vexp2(vmin(vset(128.f), vmul(z, vset(-kLog2e)))));
}

// The error function: z p(t) with t = 2 z^2 / 3.9^2 - 1 in [-1, 1], p of degree 15 fitted to least |error| (2e-8 before
// rounding, below 2e-7 with it), and 1 from 3.9 on; neither division nor exponential. A NaN stays one.
constexpr float kErf[] = {  // of t^0, t^1, ...
    0.362583965f, -0.181011081f, 0.134690821f, -0.10953223f, 0.0906748474f, -0.0738058388f,
    0.0578719489f, -0.0427627116f, 0.0292463209f, -0.0196032189f, 0.0133955972f, -0.00702515198f,
    0.00205675745f, -0.00153940381f, 0.00187435967f, -0.000704749662f,
};
COMPILED_ATTN_INLINE Vec verf(Vec x) {
  const Vec z = vabs(x);
  const Vec t = vfma(vmul(z, z), vset(2.f / (3.9f * 3.9f)), vset(-1.f));
  Vec p[8], power = t;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) p[i] = vfma(vset(kErf[2 * i + 1]), t, vset(kErf[2 * i]));
#pragma GCC unroll 3
  for (int left = 4; left > 0; left /= 2) {  // Estrin's order: short chains
    power = vmul(power, power);
#pragma GCC unroll 4
    for (int i = 0; i < left; i++) p[i] = vfma(p[2 * i + 1], power, p[2 * i]);
  }
  const Vec y = vless(vset(3.9f), z, vset(1.f), vmul(p[0], z));
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
  if constexpr (A == Activation::silu) return vlogistic(x, x);
  if constexpr (A == Activation::gelu) {
    const Vec half = vmul(x, vset(0.5f));
    return vfma(half, verf(vmul(x, vset(0.70710678118654752f))), half);
  }
  if constexpr (A == Activation::gelu_tanh) {
    const Vec cubic = vfma(vmul(vmul(x, x), x), vset(0.044715f), x);
    return vlogistic(x, vmul(cubic, vset(1.5957691216057308f)));
  }
  return x;
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
