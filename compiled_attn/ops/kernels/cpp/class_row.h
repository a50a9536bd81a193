// The attention of one query, averaged over the heads: row[b, m] = mean over h of softmax over m of
// (scale * q[b, h, at] . k[b, h, m] + bias[b, h, at, m]). O(H * M * D) work and O(B * H * M) memory; no N x M.
//
// A row of a head whose scores are all minus infinity counts as zeros.
#ifndef COMPILED_ATTN_CPP_CLASS_ROW_H
#define COMPILED_ATTN_CPP_CLASS_ROW_H

#include "attention.h"

namespace compiled_attn_cpp {
namespace {

// log2(e) * scale * q . k for four keys at a time, so that four sums are under way.
template <class T>
COMPILED_ATTN_INLINE void row_scores(const AttentionShape& s, const T* q, const T* k, float* to) {
  for (int64_t key = 0; key < s.keys; key += 4) {
    const int64_t count = std::min<int64_t>(4, s.keys - key);
    const T* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = k + std::min(key + i, s.keys - 1) * s.k[2];
    Vec sum[4] = {vset(0.f), vset(0.f), vset(0.f), vset(0.f)};
    int64_t d = 0;
    for (; d + kWidth <= s.width; d += kWidth) {
      const Vec a = vload(q + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = vfma(a, vload(rows[i] + d), sum[i]);
    }
    if (d < s.width) {
      const Vec a = vload(q + d, s.width - d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] = vfma(a, vload(rows[i] + d, s.width - d), sum[i]);
    }
    float each[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) each[i] = vsum(sum[i]) * s.scale * kLog2e;
    std::copy(each, each + count, to + key);
  }
}

// x[0 .. count) -> 2^(x - peak), the greatest of them being `peak`; returns their sum.
COMPILED_ATTN_INLINE float row_powers(float* x, int64_t count, float& peak) {
  peak = kMinusInfinity;
  for (int64_t i = 0; i < count; ++i) peak = x[i] > peak ? x[i] : peak;
  const Vec shift = vset(peak == kMinusInfinity ? 0.f : peak);
  Vec part = vset(0.f);
  float total = 0.f;
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t lanes = std::min<int64_t>(kWidth, count - i);
    const Vec p = vexp2(vsub(vload(x + i, lanes), shift));
    vstore(x + i, p, lanes);
    if (lanes == kWidth) {
      part = vadd(part, p);
    } else {
      for (int64_t j = i; j < count; ++j) total += x[j];
    }
  }
  return total + vsum(part);
}

// x[0 .. count) -> 2^x over their sum, times `weight`.
COMPILED_ATTN_INLINE void row_softmax(float* x, int64_t count, float weight) {
  float peak;
  const float total = row_powers(x, count, peak), factor = total == 0.f ? 0.f : weight / total;
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

// row [B, M] contiguous float32; `at` is the query's number; `bias` is null where there is none.
template <class T, class Bias>
void class_row(const AttentionShape& s, const T* q, const T* k, const Bias* bias, float* row, int64_t at) {
  const int64_t tasks = s.batch * s.heads;
  std::unique_ptr<float[]> memory(new float[std::max<int64_t>(1, tasks * s.keys)]);
  float* probabilities = memory.get();  // [B, H, M]
#pragma omp parallel for if (tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t head = task % s.heads, b = task / s.heads;
    float* to = probabilities + task * s.keys;
    row_scores(s, q + b * s.q[0] + head * s.q[1] + at * s.q[2], k + b * s.k[0] + head * s.k[1], to);
    if (bias) {
      const Bias* from = bias + b * s.bias[0] + head * s.bias[1] + at * s.bias[2];
      for (int64_t m = 0; m < s.keys; ++m) to[m] += to_float(from[m * s.bias[3]]) * kLog2e;
    }
    row_softmax(to, s.keys, 1.f / float(s.heads));
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    float* to = row + b * s.keys;
    std::fill(to, to + s.keys, 0.f);
    for (int64_t head = 0; head < s.heads; ++head) {
      const float* from = probabilities + (b * s.heads + head) * s.keys;
      for (int64_t m = 0; m < s.keys; ++m) to[m] += from[m];
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
