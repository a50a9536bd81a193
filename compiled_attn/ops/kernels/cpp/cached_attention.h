// Attention of few queries over a cache in slots, and the attention that each slot got.
//
//   q [B, H, T, D], k [B, G, S, D], v [B, G, S, Dv], read in place by their strides, channel stride 1; H = G * share.
//   positions [B, G, S]: what a slot holds, negative where it is free; queries [B, T]: negative where there is none.
//   A query sees the slots of positions up to its own, within `window` of it where that is not 0.
//   out [B, H, T, Dv] is written by its strides; mass [B, G, S], contiguous float32, is the sum of the probabilities
//   over the heads of a group and the queries, or those of the last `tail` positions. Either may be null.
//
// A task is one key head: its keys and values are read once for all query heads that share them. Slots that a query
// does not see are left out before the first product, so that a cache costs what it holds. Memory plan of a task
// (floats): share * S probabilities, and S numbers of slots. Where one query a text makes fewer tasks than would keep
// all threads at work, the slots that it sees are divided among several, whose parts are then put together: beside the
// same of all tasks, a peak and a total a part and head, and its share of `out`. A cache that is read in a few
// microseconds is left to one thread.
#ifndef COMPILED_ATTN_CPP_CACHED_ATTENTION_H
#define COMPILED_ATTN_CPP_CACHED_ATTENTION_H

#include <numeric>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "class_row.h"

namespace compiled_attn_cpp {
namespace {

// Sizes, and strides in elements in the order batch, head, token (queries: batch, token).
struct CacheShape {
  int64_t batch, groups, share, queries, slots, width, value_width;
  int64_t q[3], k[3], v[3], out[3], positions[3], at[2];
  float scale;
  int64_t window, tail;
};

// to[r * slots + i] = log2(e) * scale * q_r . k_seen[i] for R queries, four keys at a time.
template <int R, class T>
COMPILED_ATTN_INLINE void slot_scores(const CacheShape& s, const T* q, const T* k, const int64_t* seen, int64_t count,
                                      float* to) {
  const float unit = s.scale * kLog2e;
  for (int64_t i = 0; i < count; i += 4) {
    const T* rows[4];
    for (int64_t j = 0; j < 4; ++j) rows[j] = k + seen[std::min(i + j, count - 1)] * s.k[2];
    Vec sum[R][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = vset(0.f);
    }
    for (int64_t d = 0; d < s.width; d += kWidth) {
      const int64_t lanes = std::min<int64_t>(kWidth, s.width - d);
      const bool whole = lanes == kWidth;
      Vec key[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) key[j] = whole ? vload(rows[j] + d) : vload(rows[j] + d, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec a = whole ? vload(q + r * s.q[1] + d) : vload(q + r * s.q[1] + d, lanes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[r][j] = vfma(a, key[j], sum[r][j]);
      }
    }
    const int64_t left = std::min<int64_t>(4, count - i);
    for (int r = 0; r < R; ++r) {
      for (int64_t j = 0; j < left; ++j) to[r * s.slots + i + j] = vsum(sum[r][j]) * unit;
    }
  }
}

// out_r [Dv], `stride` apart, = sum over i of p[r * slots + i] * v_seen[i] for R queries, NV vectors of channels at a
// time.
template <int R, int NV, class T, class Out>
COMPILED_ATTN_INLINE void slot_values(const CacheShape& s, const T* v, const int64_t* seen, int64_t count,
                                      const float* p, int64_t channel, Out* out, int64_t stride) {
  Vec sum[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[r][j] = vset(0.f);
  }
  const int64_t last = std::min<int64_t>(kWidth, s.value_width - channel - (NV - 1) * kWidth);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = v + seen[i] * s.v[2] + channel;
    Vec value[NV];
#pragma GCC unroll 4
    for (int j = 0; j + 1 < NV; ++j) value[j] = vload(row + j * kWidth);
    value[NV - 1] = last == kWidth ? vload(row + (NV - 1) * kWidth) : vload(row + (NV - 1) * kWidth, last);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight = vset(p[r * s.slots + i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] = vfma(weight, value[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    Out* to = out + r * stride + channel;
    for (int j = 0; j + 1 < NV; ++j) vstore(to + j * kWidth, sum[r][j]);
    vstore(to + (NV - 1) * kWidth, sum[r][NV - 1], last);
  }
}

template <int R, class T, class Out>
COMPILED_ATTN_INLINE void slot_outputs(const CacheShape& s, const T* v, const int64_t* seen, int64_t count,
                                       const float* p, Out* out, int64_t stride) {
  constexpr int most = kMaxVectors == 4 ? 4 : 2;
  for (int64_t channel = 0; channel < s.value_width;) {
    const int64_t vectors = (s.value_width - channel + kWidth - 1) / kWidth;
    if (vectors >= most) {
      slot_values<R, most>(s, v, seen, count, p, channel, out, stride);
      channel += most * kWidth;
    } else {
      slot_values<R, 1>(s, v, seen, count, p, channel, out, stride);
      channel += kWidth;
    }
  }
}

// The same two for all heads of a group: scores of the slots seen, and the values that `p` weighs, `stride` apart.
template <class T>
COMPILED_ATTN_INLINE void group_scores(const CacheShape& s, const T* q, const T* k, const int64_t* seen, int64_t count,
                                       float* p) {
  int64_t r = 0;
  for (; r + 2 <= s.share; r += 2) slot_scores<2>(s, q + r * s.q[1], k, seen, count, p + r * s.slots);
  if (r < s.share) slot_scores<1>(s, q + r * s.q[1], k, seen, count, p + r * s.slots);
}

template <class T, class Out>
COMPILED_ATTN_INLINE void group_outputs(const CacheShape& s, const T* v, const int64_t* seen, int64_t count,
                                        const float* p, Out* out, int64_t stride) {
  int64_t r = 0;
  for (; r + 4 <= s.share; r += 4) slot_outputs<4>(s, v, seen, count, p + r * s.slots, out + r * stride, stride);
  for (; r < s.share; ++r) slot_outputs<1>(s, v, seen, count, p + r * s.slots, out + r * stride, stride);
}

// The numbers of the slots that a query at position `at` sees; returns how many.
COMPILED_ATTN_INLINE int64_t seen_slots(const CacheShape& s, const int64_t* held, int64_t at, int64_t* seen) {
  int64_t count = 0;
  for (int64_t i = 0; i < s.slots; ++i) {
    const int64_t position = held[i * s.positions[2]];
    seen[count] = i;
    count += position >= 0 && position <= at && (s.window == 0 || at - position < s.window);
  }
  return count;
}

// Fewest bytes of keys and values, once a query, from which threads are worth their start: some 10 us of reading.
constexpr int64_t kBytesWorthThreads = 256 * 1024;
// Fewest slots of a part.
constexpr int64_t kSlotsOfAPart = 128;

// Parts of each task's slots, as many as divide the tasks evenly among the threads.
inline int64_t cache_parts(const CacheShape& s, int64_t tasks) {
#ifdef _OPENMP
  const int64_t threads = omp_get_max_threads();
  if (s.queries == 1 && tasks > 0 && tasks < 2 * threads)
    return std::max<int64_t>(1, std::min(s.slots / kSlotsOfAPart, threads / std::gcd(tasks, threads)));
#endif
  return 1;
}

// A task is one key head of a text; its slots are not shared out. shared: whether the tasks are, among threads.
template <class T>
void cached_attention_whole(const CacheShape& s, const T* q, const T* k, const T* v, const int64_t* positions,
                            const int64_t* queries, T* out, float* mass, int64_t tasks, bool shared) {
#pragma omp parallel for if (shared && tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t g = task % s.groups, b = task / s.groups;
    std::vector<int64_t> seen(s.slots);
    std::vector<float> probabilities(s.share * s.slots);
    const int64_t* held = positions + b * s.positions[0] + g * s.positions[1];
    const int64_t* asked = queries + b * s.at[0];
    const T *keys = k + b * s.k[0] + g * s.k[1], *values = v + b * s.v[0] + g * s.v[1];
    float* got = mass ? mass + task * s.slots : nullptr;
    if (got) std::fill(got, got + s.slots, 0.f);
    int64_t newest = -1;
    for (int64_t t = 0; t < s.queries; ++t) newest = std::max(newest, asked[t * s.at[1]]);
    for (int64_t t = 0; t < s.queries; ++t) {
      const int64_t at = asked[t * s.at[1]], count = seen_slots(s, held, at, seen.data());
      float* p = probabilities.data();
      group_scores(s, q + b * s.q[0] + g * s.share * s.q[1] + t * s.q[2], keys, seen.data(), count, p);
      for (int64_t r = 0; r < s.share; ++r) row_softmax(p + r * s.slots, count, 1.f);
      if (out) {
        T* to = out + b * s.out[0] + g * s.share * s.out[1] + t * s.out[2];
        group_outputs(s, values, seen.data(), count, p, to, s.out[1]);
      }
      if (got && at >= 0 && (s.tail == 0 || at > newest - s.tail)) {
        for (int64_t r = 0; r < s.share; ++r) {
          for (int64_t i = 0; i < count; ++i) got[seen[i]] += p[r * s.slots + i];
        }
      }
    }
  }
}

// One query a text; the slots that each task sees are shared out in `parts`.
template <class T>
void cached_attention_parts(const CacheShape& s, const T* q, const T* k, const T* v, const int64_t* positions,
                            const int64_t* queries, T* out, float* mass, int64_t tasks, int64_t parts) {
  const int64_t rows = tasks * s.share, width = s.value_width;
  std::vector<int64_t> seen(tasks * s.slots), counts(tasks);
  std::vector<float> powers(rows * s.slots), peaks(rows * parts), totals(rows * parts);
  std::vector<float> sums(out ? rows * parts * width : 0);  // [tasks, parts, share, Dv]
#pragma omp parallel
  {
#pragma omp for
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t g = task % s.groups, b = task / s.groups;
      const int64_t* held = positions + b * s.positions[0] + g * s.positions[1];
      counts[task] = seen_slots(s, held, queries[b * s.at[0]], seen.data() + task * s.slots);
      if (mass) std::fill(mass + task * s.slots, mass + (task + 1) * s.slots, 0.f);
    }
#pragma omp for
    for (int64_t i = 0; i < tasks * parts; ++i) {
      const int64_t task = i / parts, part = i % parts, g = task % s.groups, b = task / s.groups;
      const int64_t begin = counts[task] * part / parts, count = counts[task] * (part + 1) / parts - begin;
      const int64_t* mine = seen.data() + task * s.slots + begin;
      float* p = powers.data() + task * s.share * s.slots + begin;
      group_scores(s, q + b * s.q[0] + g * s.share * s.q[1], k + b * s.k[0] + g * s.k[1], mine, count, p);
      for (int64_t r = 0; r < s.share; ++r) {
        const int64_t at = (task * s.share + r) * parts + part;
        totals[at] = row_powers(p + r * s.slots, count, peaks[at]);
      }
      const T* values = v + b * s.v[0] + g * s.v[1];
      if (out) group_outputs(s, values, mine, count, p, sums.data() + i * s.share * width, width);
    }
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {  // each part's share of the whole, in place of its peak
      float* factor = peaks.data() + row * parts;
      const float peak = *std::max_element(factor, factor + parts);
      float total = 0.f;
      for (int64_t j = 0; j < parts; ++j) {
        factor[j] = std::exp2(factor[j] - (peak == kMinusInfinity ? 0.f : peak));
        total += factor[j] * totals[row * parts + j];
      }
      for (int64_t j = 0; j < parts; ++j) factor[j] = total == 0.f ? 0.f : factor[j] / total;
      if (!out) continue;
      const int64_t task = row / s.share, r = row % s.share, head = task % s.groups * s.share + r;
      T* to = out + task / s.groups * s.out[0] + head * s.out[1];
      for (int64_t c = 0; c < width; ++c) {
        float sum = 0.f;
        for (int64_t j = 0; j < parts; ++j) sum += factor[j] * sums[((task * parts + j) * s.share + r) * width + c];
        from_float(sum, to + c);
      }
    }
#pragma omp for
    for (int64_t i = 0; i < (mass ? tasks * parts : 0); ++i) {
      const int64_t task = i / parts, part = i % parts;
      const int64_t begin = counts[task] * part / parts, end = counts[task] * (part + 1) / parts;
      for (int64_t r = 0; r < s.share; ++r) {
        const int64_t row = task * s.share + r;
        const float factor = peaks[row * parts + part];
        for (int64_t j = begin; j < end; ++j)
          mass[task * s.slots + seen[task * s.slots + j]] += factor * powers[row * s.slots + j];
      }
    }
  }
}

template <class T>
void cached_attention(const CacheShape& s, const T* q, const T* k, const T* v, const int64_t* positions,
                      const int64_t* queries, T* out, float* mass) {
  const int64_t tasks = s.batch * s.groups, rows = tasks * s.queries * s.slots;
  const bool shared = rows * (s.width + s.value_width) * int64_t(sizeof(T)) >= kBytesWorthThreads;
  const int64_t parts = shared ? cache_parts(s, tasks) : 1;
  if (parts == 1) {
    cached_attention_whole(s, q, k, v, positions, queries, out, mass, tasks, shared);
  } else {
    cached_attention_parts(s, q, k, v, positions, queries, out, mass, tasks, parts);
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
