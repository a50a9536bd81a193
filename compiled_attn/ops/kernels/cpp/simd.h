// Vectors of float32 for the kernels of this folder: AVX-512, AVX2, or the compiler's own 4-lane vectors (SSE2, NEON).
//
// The width is chosen when the translation unit is compiled, by the instruction-set macros. Everything lies in an
// unnamed namespace, so that two libraries built for different machines can live in one process.
#ifndef COMPILED_ATTN_CPP_SIMD_H
#define COMPILED_ATTN_CPP_SIMD_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define COMPILED_ATTN_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define COMPILED_ATTN_AVX2 1
#endif
#if defined(COMPILED_ATTN_AVX512) || defined(COMPILED_ATTN_AVX2)
#include <immintrin.h>
#endif
#if defined(COMPILED_ATTN_AVX512) && defined(__AVX512BF16__)
#define COMPILED_ATTN_BF16_DOT 1
#endif

#define COMPILED_ATTN_INLINE inline __attribute__((always_inline))
// Keeps a loaded vector in a register; the compiler would load it again at each use, as a memory operand.
#if defined(__x86_64__)
#define COMPILED_ATTN_KEEP(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__)
#define COMPILED_ATTN_KEEP(vector) asm("" : "+w"(vector))
#else
#define COMPILED_ATTN_KEEP(vector)
#endif

namespace compiled_attn_cpp {
namespace {

// The bits of a bfloat16: the upper half of a float32.
struct Bf16 {
  uint16_t bits;
};

COMPILED_ATTN_INLINE float to_float(float x) { return x; }
COMPILED_ATTN_INLINE float to_float(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

COMPILED_ATTN_INLINE void from_float(float x, float* out) { *out = x; }
COMPILED_ATTN_INLINE void from_float(float x, Bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = uint16_t((bits >> 16) | 0x40u);  // a NaN stays a NaN
  } else {
    out->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
  }
}

#if defined(COMPILED_ATTN_AVX512)

using Vec = __m512;
using Lanes = __m512i;
constexpr int kWidth = 16;
constexpr float kExp2Floor = -200.f;  // its power of two is below the least denormal

COMPILED_ATTN_INLINE __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1u); }
COMPILED_ATTN_INLINE Vec vset(float x) { return _mm512_set1_ps(x); }
COMPILED_ATTN_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
COMPILED_ATTN_INLINE Vec vload(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
COMPILED_ATTN_INLINE void vstore(float* p, Vec v) { _mm512_storeu_ps(p, v); }
COMPILED_ATTN_INLINE void vstore(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
COMPILED_ATTN_INLINE Vec widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
COMPILED_ATTN_INLINE Vec vload(const Bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
COMPILED_ATTN_INLINE Vec vload(const Bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
COMPILED_ATTN_INLINE __m256i narrow(Vec v) {
#if defined(COMPILED_ATTN_BF16_DOT)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, even, quiet), 16));
#endif
}
COMPILED_ATTN_INLINE void vstore(Bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
COMPILED_ATTN_INLINE void vstore(Bf16* p, Vec v, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v)); }
COMPILED_ATTN_INLINE Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
COMPILED_ATTN_INLINE Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
COMPILED_ATTN_INLINE Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
COMPILED_ATTN_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The greater, and the lesser; where either is a NaN, `b`.
COMPILED_ATTN_INLINE Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
COMPILED_ATTN_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// Lane by lane `x < y ? a : b`.
COMPILED_ATTN_INLINE Vec vless(Vec x, Vec y, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
COMPILED_ATTN_INLINE float vsum(Vec v) { return _mm512_reduce_add_ps(v); }
// Lane i of the result is lane from[i].
COMPILED_ATTN_INLINE Vec vpermute(Vec v, Lanes from) { return _mm512_permutexvar_ps(from, v); }
COMPILED_ATTN_INLINE Vec nearest_whole(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
COMPILED_ATTN_INLINE Vec times_power_of_two(Vec p, Vec whole) { return _mm512_scalef_ps(p, whole); }

// Lane i of row j changes place with lane j of row i.
COMPILED_ATTN_INLINE void vtranspose(Vec (&r)[16]) {
  Vec t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#elif defined(COMPILED_ATTN_AVX2)

using Vec = __m256;
using Lanes = __m256i;
constexpr int kWidth = 8;
constexpr float kExp2Floor = -127.f;  // its exponent field is 0

COMPILED_ATTN_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
COMPILED_ATTN_INLINE Vec vset(float x) { return _mm256_set1_ps(x); }
COMPILED_ATTN_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
COMPILED_ATTN_INLINE Vec vload(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
COMPILED_ATTN_INLINE void vstore(float* p, Vec v) { _mm256_storeu_ps(p, v); }
COMPILED_ATTN_INLINE void vstore(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
COMPILED_ATTN_INLINE Vec vload(const Bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
COMPILED_ATTN_INLINE Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
COMPILED_ATTN_INLINE Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
COMPILED_ATTN_INLINE Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
COMPILED_ATTN_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
COMPILED_ATTN_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
COMPILED_ATTN_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
COMPILED_ATTN_INLINE Vec vless(Vec x, Vec y, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
COMPILED_ATTN_INLINE float vsum(Vec v) {
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}
COMPILED_ATTN_INLINE Vec vpermute(Vec v, Lanes from) { return _mm256_permutevar8x32_ps(v, from); }
COMPILED_ATTN_INLINE Vec nearest_whole(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
COMPILED_ATTN_INLINE Vec times_power_of_two(Vec p, Vec whole) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

COMPILED_ATTN_INLINE void vtranspose(Vec (&r)[8]) {
  Vec t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

#else

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Lanes __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr float kExp2Floor = -127.f;  // its exponent field is 0

COMPILED_ATTN_INLINE Vec vset(float x) { return Vec{x, x, x, x}; }
COMPILED_ATTN_INLINE Vec vload(const float* p) {
  Vec v;
  std::memcpy(&v, p, 16);
  return v;
}
COMPILED_ATTN_INLINE Vec vload(const float* p, int64_t n) {
  Vec v = vset(0.f);
  std::memcpy(&v, p, n * 4);
  return v;
}
COMPILED_ATTN_INLINE void vstore(float* p, Vec v) { std::memcpy(p, &v, 16); }
COMPILED_ATTN_INLINE void vstore(float* p, Vec v, int64_t n) { std::memcpy(p, &v, n * 4); }
COMPILED_ATTN_INLINE Vec vload(const Bf16* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
COMPILED_ATTN_INLINE Vec vadd(Vec a, Vec b) { return a + b; }
COMPILED_ATTN_INLINE Vec vsub(Vec a, Vec b) { return a - b; }
COMPILED_ATTN_INLINE Vec vmul(Vec a, Vec b) { return a * b; }
COMPILED_ATTN_INLINE Vec vless(Vec x, Vec y, Vec a, Vec b) {
  const Lanes less = x < y;
  return (Vec)((less & (Lanes)a) | (~less & (Lanes)b));
}
COMPILED_ATTN_INLINE Vec vmax(Vec a, Vec b) { return vless(b, a, a, b); }
COMPILED_ATTN_INLINE Vec vmin(Vec a, Vec b) { return vless(a, b, a, b); }
COMPILED_ATTN_INLINE float vsum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
COMPILED_ATTN_INLINE Vec vpermute(Vec v, Lanes from) {
  if (from[1] == 1 && from[2] == 2 && from[3] == 3) return v;  // mostly; there is no such instruction everywhere
  return Vec{v[from[0]], v[from[1]], v[from[2]], v[from[3]]};
}
#if defined(__ARM_NEON) && defined(__aarch64__)
}  // namespace
}  // namespace compiled_attn_cpp
#include <arm_neon.h>
namespace compiled_attn_cpp {
namespace {
COMPILED_ATTN_INLINE Vec vfma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
COMPILED_ATTN_INLINE Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
// Halves go away from zero.
COMPILED_ATTN_INLINE Vec nearest_whole(Vec x) {
  const Lanes half = ((Lanes)x & int32_t(0x80000000)) | 0x3f000000;  // 1/2 with the sign of x
  return __builtin_convertvector(__builtin_convertvector(x + (Vec)half, Lanes), Vec);
}
COMPILED_ATTN_INLINE Vec times_power_of_two(Vec p, Vec whole) {
  const Lanes exponent = __builtin_convertvector(whole, Lanes) + 127;
  return p * (Vec)(exponent << 23);
}

COMPILED_ATTN_INLINE void vtranspose(Vec (&r)[4]) {
  Vec t[4];
  for (int i = 0; i < 4; ++i) t[i] = Vec{r[0][i], r[1][i], r[2][i], r[3][i]};
  for (int i = 0; i < 4; ++i) r[i] = t[i];
}

#endif

#if !defined(COMPILED_ATTN_AVX512)
COMPILED_ATTN_INLINE Vec vload(const Bf16* p, int64_t n) {
  float lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return vload(lanes);
}
COMPILED_ATTN_INLINE void vstore(Bf16* p, Vec v, int64_t n) {
  float lanes[kWidth];
  vstore(lanes, v);
  for (int64_t i = 0; i < n; ++i) from_float(lanes[i], p + i);
}
COMPILED_ATTN_INLINE void vstore(Bf16* p, Vec v) { vstore(p, v, kWidth); }
#endif

constexpr float kLog2e = 1.4426950408889634f;

// 2 to the power x up to 128, which gives infinity: relative error below 1e-7; 0 from kExp2Floor down; a NaN stays one.
COMPILED_ATTN_INLINE Vec vexp2(Vec x) {
  x = vmax(vset(kExp2Floor), x);
  const Vec whole = nearest_whole(x);
  const Vec f = vsub(x, whole);  // [-1/2, 1/2]
  Vec p = vset(1.5345810970757157e-4f);
  p = vfma(p, f, vset(1.3399930903688073e-3f));
  p = vfma(p, f, vset(9.618489071726799e-3f));
  p = vfma(p, f, vset(5.550328642129898e-2f));
  p = vfma(p, f, vset(2.4022646248340607e-1f));
  p = vfma(p, f, vset(6.931471824645996e-1f));
  p = vfma(p, f, vset(1.f));
  return times_power_of_two(p, whole);
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
