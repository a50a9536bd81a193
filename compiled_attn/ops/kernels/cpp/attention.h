// softmax(scale * q k^T + bias) v by online softmax, the N x M scores never stored.
//
//   q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv] are read in place by their strides, channel stride 1; any D and Dv.
//   scaled scores s become softcap * tanh(s / softcap) where softcap is not 0.
//   bias, if any, is added to them, read by four strides (0 where it is broadcast).
//   out [B, H, N, Dv] is written by its strides, channel stride 1.
//
// Queries lie in the lanes of the vectors, keys and channels in the rows of the register tile. So the keys and values
// need no packing, a softmax has no sum across lanes, and no width of the head wastes a lane. One task is one block of
// at most kMaxVectors * kWidth queries of one head; its memory plan (floats, W = lanes of the block):
//
//   queries [D, W]   the block transposed, times scale * log2(e)
//   scores  [K, W]   of one block of keys; turned into probabilities where they lie
//   sums    [Dv, W]  the output transposed, rescaled when a later block of keys holds a greater score
//
// bfloat16 is multiplied in pairs along the reduction (AVX512-BF16), summed in float32; without that instruction it is
// widened to float32 block by block. A row whose scores are all minus infinity gives zeros, as torch's SDPA does.
#ifndef COMPILED_ATTN_CPP_ATTENTION_H
#define COMPILED_ATTN_CPP_ATTENTION_H

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "simd.h"

namespace compiled_attn_cpp {
namespace {

// Sizes, and strides in elements in the order batch, head, token (bias: batch, head, query, key).
struct AttentionShape {
  int64_t batch, heads, queries, keys, width, value_width;
  int64_t q[3], k[3], v[3], out[3], bias[4];
  float scale;
  bool causal;  // query i sees the keys 0 to i
  float softcap;
};

#if defined(COMPILED_ATTN_AVX512) || defined(__aarch64__)
constexpr int kMaxVectors = 4;  // of queries in a block: 32 registers
#else
constexpr int kMaxVectors = 2;  // 16 registers
#endif
constexpr int64_t kMaxKeys = 128;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Rows of the register tile beside `NV` vectors of queries.
template <int NV>
constexpr int tile_rows() {
  return kMaxVectors == 4 ? (NV == 4 ? 6 : 8) : (NV == 2 && kWidth == 8 ? 6 : 4);
}

// How one step of the reduction is made of four bytes of a row and a vector of the block.
struct Single {  // one float32
  static constexpr int kPerStep = 1;
  static COMPILED_ATTN_INLINE Vec step(Vec a, Vec b, Vec sum) { return vfma(a, b, sum); }
};
#if defined(COMPILED_ATTN_BF16_DOT)
struct Pair {  // two bfloat16
  static constexpr int kPerStep = 2;
  static COMPILED_ATTN_INLINE Vec step(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};
template <class T>
using StepOf = std::conditional_t<std::is_same<T, Bf16>::value, Pair, Single>;
#else
template <class T>
using StepOf = Single;
#endif

// sum[r][j] += over t of a(r, t) * b[t][j], with a(r, t) the four bytes at a + r * row + t * next.
template <class Step, int R, int NV>
COMPILED_ATTN_INLINE void tile(const char* a, int64_t row, int64_t next, const float* b, int64_t steps,
                               Vec (&sum)[R][NV]) {
  // Every third row has a pointer of its own: the two rows behind it are reached by the addressing mode.
  const char* thirds[(R + 2) / 3];
#pragma GCC unroll 3
  for (int i = 0; i < (R + 2) / 3; ++i) thirds[i] = a + 3 * i * row;
  for (const float* end = b + steps * NV * kWidth; b != end; b += NV * kWidth) {
    Vec column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      column[j] = vload(b + j * kWidth);
      COMPILED_ATTN_KEEP(column[j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float bits;
      std::memcpy(&bits, thirds[r / 3] + r % 3 * row, 4);
      const Vec value = vset(bits);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[r][j] = Step::step(value, column[j], sum[r][j]);
    }
#pragma GCC unroll 3
    for (int i = 0; i < (R + 2) / 3; ++i) thirds[i] += next;
  }
}

// Calls f(first row, rows as a constant) over [0, count), in tiles of R rows, the rest in fours and ones.
template <int R, class F>
COMPILED_ATTN_INLINE void by_tiles(int64_t count, const F& f) {
  int64_t r = 0;
  for (; r + R <= count; r += R) f(r, std::integral_constant<int, R>());
  for (; r + 4 <= count; r += 4) f(r, std::integral_constant<int, 4>());
  for (; r < count; ++r) f(r, std::integral_constant<int, 1>());
}

// A head's bias: its first element, null where there is none. `ready`: of this block, as `load_bias` makes it.
struct BiasRows {
  const void* data;
  bool bf16;
  bool ready = false;
};

// to [D, W], or [ceil(D / 2), W] of pairs: a block of `count` queries transposed; float32 times scale * log2(e).
template <class T>
void load_queries(const AttentionShape& s, const T* q, int64_t vectors, int64_t count, float* to) {
  constexpr int64_t pair = StepOf<T>::kPerStep;
  constexpr int64_t per = kWidth * pair;
  const Vec unit = vset(s.scale * kLog2e);
  for (int64_t j = 0; j < vectors; ++j) {
    for (int64_t d = 0; d < s.width; d += per) {
      const int64_t channels = std::min(per, s.width - d);
      Vec r[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const T* from = q + (j * kWidth + i) * s.q[2] + d;
        if (j * kWidth + i >= count) {
          r[i] = vset(0.f);
        } else if constexpr (pair == 2) {
          T pairs[per] = {};
          std::memcpy(pairs, from, channels * sizeof(T));
          std::memcpy(&r[i], pairs, sizeof(Vec));
        } else {
          r[i] = vmul(vload(from, channels), unit);
        }
      }
      vtranspose(r);
      const int64_t steps = (channels + pair - 1) / pair;
      for (int64_t i = 0; i < steps; ++i) vstore(to + ((d / pair + i) * vectors + j) * kWidth, r[i]);
    }
  }
}

// out = sums [Dv, W] / total [W], transposed back, for `count` queries.
template <class T>
void store_block(const AttentionShape& s, const float* sums, const float* total, int64_t vectors, int64_t count,
                 T* out) {
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t rows = std::min<int64_t>(kWidth, count - j * kWidth);
    float factor[kWidth];
    for (int i = 0; i < kWidth; ++i) factor[i] = total[j * kWidth + i] == 0.f ? 0.f : 1.f / total[j * kWidth + i];
    const Vec inverse = vload(factor);
    for (int64_t d = 0; d < s.value_width; d += kWidth) {
      const int64_t channels = std::min<int64_t>(kWidth, s.value_width - d);
      Vec r[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        r[i] = i < channels ? vmul(vload(sums + ((d + i) * vectors + j) * kWidth), inverse) : vset(0.f);
      }
      vtranspose(r);
      for (int64_t i = 0; i < rows; ++i) vstore(out + (j * kWidth + i) * s.out[2] + d, r[i], channels);
    }
  }
}

// Rows of bfloat16 as rows of float32, packed.
inline const char* widen_rows(const Bf16* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + kWidth <= width; d += kWidth) vstore(to + r * width + d, vload(from + r * stride + d));
    for (; d < width; ++d) to[r * width + d] = to_float(from[r * stride + d]);
  }
  return reinterpret_cast<const char*>(to);
}

// The values of each two keys side by side: [ceil(keys / 2), Dv] of pairs.
inline const char* pair_rows(const Bf16* v, int64_t stride, int64_t keys, int64_t width, float* memory) {
  uint32_t* to = reinterpret_cast<uint32_t*>(memory);
  for (int64_t key = 0; key < keys; key += 2) {
    const Bf16* low = v + key * stride;
    const Bf16* high = low + stride;
    int64_t d = 0;
#if defined(COMPILED_ATTN_BF16_DOT)
    for (; d + kWidth <= width && key + 1 < keys; d += kWidth) {
      const __m512i upper = _mm512_castps_si512(vload(high + d));
      const __m512i lower = _mm512_srli_epi32(_mm512_castps_si512(vload(low + d)), 16);
      _mm512_storeu_si512(to + d, _mm512_or_si512(upper, lower));
    }
#endif
    for (; d < width; ++d) to[d] = low[d].bits | (key + 1 < keys ? uint32_t(high[d].bits) << 16 : 0u);
    to += width;
  }
  return reinterpret_cast<const char*>(memory);
}

// to [keys, W] = bias * log2(e), transposed, for the queries of a block and keys from `from` on; W = vectors * kWidth.
template <class Bias>
void load_bias(const AttentionShape& s, const Bias* from, int64_t vectors, int64_t count, int64_t keys, float* to) {
  const Vec unit = vset(kLog2e);
  for (int64_t j = 0; j < vectors; ++j) {
    for (int64_t key = 0; key < keys; key += kWidth) {
      const int64_t columns = std::min<int64_t>(kWidth, keys - key);
      const Bias* corner = from + j * kWidth * s.bias[2] + key * s.bias[3];
      Vec r[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const Bias* row = corner + i * s.bias[2];
        if (s.bias[2] == 0) {
          r[i] = vset(i < columns ? to_float(corner[i * s.bias[3]]) : 0.f);
        } else if (j * kWidth + i >= count) {
          r[i] = vset(0.f);
        } else if (s.bias[3] == 1) {
          r[i] = vload(row, columns);
        } else {
          float lanes[kWidth] = {};
          for (int64_t c = 0; c < columns; ++c) lanes[c] = to_float(row[c * s.bias[3]]);
          r[i] = vload(lanes);
        }
      }
      if (s.bias[2] != 0) vtranspose(r);
      for (int64_t i = 0; i < columns; ++i) vstore(to + ((key + i) * vectors + j) * kWidth, vmul(r[i], unit));
    }
  }
}

// One block of NV * kWidth queries of one head against all keys.
template <class T, int NV>
class QueryBlock {
  using Step = StepOf<T>;
  static constexpr int W = NV * kWidth;
  static constexpr bool kWiden = std::is_same<T, Bf16>::value && Step::kPerStep == 1;

 public:
  static int64_t floats(const AttentionShape& s) {
    const int64_t copies = std::is_same<T, Bf16>::value ? kMaxKeys * (s.width + s.value_width) : 0;
    return W * (s.width + 1 + s.value_width + 2 * kMaxKeys) + copies;
  }

  QueryBlock(const AttentionShape& shape, float* memory) : s(shape) {
    queries = memory;
    scores = queries + (s.width + 1) * W;
    sums = scores + kMaxKeys * W;
    added = sums + s.value_width * W;
    copies = added + kMaxKeys * W;
  }

  // `q`, `k`, `v`, `out` point at the head, `bias` too; the block is the queries [first, first + count).
  void run(const T* q, const T* k, const T* v, BiasRows bias, T* out, int64_t first, int64_t count) {
    load_queries(s, q + first * s.q[2], NV, count, queries);
    for (int j = 0; j < NV; ++j) {
      greatest[j] = vset(kMinusInfinity);
      total[j] = vset(0.f);
      vstore(before + j * kWidth, greatest[j]);
      for (int lane = 0; lane < kWidth; ++lane) position[j * kWidth + lane] = float(first + j * kWidth + lane);
    }
    std::fill(sums, sums + s.value_width * W, 0.f);
    const int64_t seen = s.causal ? std::min(s.keys, first + count) : s.keys;
    const int64_t blocks = (seen + kMaxKeys - 1) / kMaxKeys;
    constexpr int64_t whole = 2 * tile_rows<NV>();
    const int64_t size = blocks ? ((seen + blocks - 1) / blocks + whole - 1) / whole * whole : 0;
    for (int64_t begin = 0; begin < seen; begin += std::min(size, kMaxKeys)) {
      const int64_t keys = std::min(std::min(size, kMaxKeys), seen - begin);
      const int64_t corner = first * s.bias[2] + begin * s.bias[3];
      const bool biased = bias.data != nullptr;
      const float* biases = biased && bias.ready ? static_cast<const float*>(bias.data) + begin * W : added;
      if (biased && !bias.ready) {
        if (bias.bf16) load_bias(s, static_cast<const Bf16*>(bias.data) + corner, NV, count, keys, added);
        if (!bias.bf16) load_bias(s, static_cast<const float*>(bias.data) + corner, NV, count, keys, added);
      }
      score(k + begin * s.k[2], keys);
      if (s.softcap != 0.f) bend(keys);
      limit(begin, keys, biased ? biases : nullptr, s.causal && begin + keys > first + 1);
      soften(keys);
      gather(v + begin * s.v[2], keys);
    }
    for (int j = 0; j < NV; ++j) vstore(before + j * kWidth, total[j]);
    store_block(s, sums, before, NV, count, out + first * s.out[2]);
  }

 private:
  // scores [keys, W] = log2(e) * scale * k q^T. Not inlined: the tile wants all registers. So does that of `gather`.
  __attribute__((noinline)) void score(const T* k, int64_t keys) {
    int64_t stride = s.k[2] * int64_t(sizeof(T));
    const char* rows = reinterpret_cast<const char*>(k);
    if constexpr (kWiden) {
      rows = widen_rows(k, s.k[2], keys, s.width, copies);
      stride = s.width * 4;
    }
    const int64_t steps = s.width / Step::kPerStep;
    by_tiles<tile_rows<NV>()>(keys, [&](int64_t key, auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      Vec sum[R][NV];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[r][j] = vset(0.f);
      tile<Step>(rows + key * stride, stride, 4, queries, steps, sum);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          const Vec unit = vset(s.scale * kLog2e);
          vstore(scores + (key + r) * W + j * kWidth, Step::kPerStep == 2 ? vmul(sum[r][j], unit) : sum[r][j]);
        }
    });
    if (Step::kPerStep == 2 && s.width & 1) add_odd_channel(k, keys);
  }

  // The last channel of an odd width, which makes no pair: its partner in `queries` is zero.
  void add_odd_channel(const T* k, int64_t keys) {
    const float* last = queries + s.width / 2 * W;
    for (int64_t key = 0; key < keys; ++key) {
      float bits = 0.f;
      std::memcpy(&bits, k + key * s.k[2] + s.width - 1, sizeof(T));
      for (int64_t w = 0; w < W; w += kWidth) {
        float* at = scores + key * W + w;
        const Vec product = Step::step(vset(bits), vload(last + w), vset(0.f));
        vstore(at, vfma(product, vset(s.scale * kLog2e), vload(at)));
      }
    }
  }

  // scores -> cap * tanh(scores / cap) in their own units, by tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|).
  __attribute__((noinline)) void bend(int64_t keys) {
    const Vec cap = vset(s.softcap * kLog2e), inverse = vset(-2.f / s.softcap), one = vset(1.f), zero = vset(0.f);
    for (int64_t at = 0; at < keys * W; at += kWidth) {
      const Vec x = vload(scores + at), e = vexp2(vmul(vmax(x, vsub(zero, x)), inverse));
      const Vec bent = vmul(vsub(one, e) / vadd(one, e), cap);
      vstore(scores + at, vless(x, zero, vsub(zero, bent), bent));
    }
  }

  // Adds the bias, hides the keys from `begin` on that lie behind a query, and keeps the greatest score of each lane.
  void limit(int64_t begin, int64_t keys, const float* biases, bool masked) {
    for (int64_t at = 0; biases && at < keys * W; at += kWidth) {
      vstore(scores + at, vadd(vload(scores + at), vload(biases + at)));
    }
    for (int64_t key = 0; masked && key < keys; ++key) {
      for (int64_t w = 0; w < W; w += kWidth) {
        float* at = scores + key * W + w;
        vstore(at, vless(vload(position + w), vset(float(begin + key)), vset(kMinusInfinity), vload(at)));
      }
    }
    for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) greatest[j] = vmax(vload(scores + key * W + j * kWidth), greatest[j]);
    }
  }

  // scores -> probabilities up to the later division (of pairs: [ceil(keys / 2), W]); total, and the factor for sums.
  __attribute__((noinline)) void soften(int64_t keys) {
    Vec shift[NV];
    Vec part[NV];
    for (int j = 0; j < NV; ++j) {
      shift[j] = vless(greatest[j], vset(std::numeric_limits<float>::lowest()), vset(0.f), greatest[j]);
      factor[j] = vexp2(vsub(vload(before + j * kWidth), shift[j]));
      part[j] = vset(0.f);
    }
    int64_t key = 0;
#if defined(COMPILED_ATTN_BF16_DOT)
    if constexpr (Step::kPerStep == 2) {
      const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      for (; key < keys; key += 2) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          const float* from = scores + key * W + j * kWidth;
          const Vec low = vexp2(vsub(vload(from), shift[j]));
          const Vec high = key + 1 < keys ? vexp2(vsub(vload(from + W), shift[j])) : vset(0.f);
          part[j] = vadd(part[j], vadd(low, high));
          const __m512i both = _mm512_permutexvar_epi16(mixed, (__m512i)_mm512_cvtne2ps_pbh(high, low));
          vstore(scores + key / 2 * W + j * kWidth, _mm512_castsi512_ps(both));
        }
      }
    }
#endif
    for (; key < keys; ++key) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* at = scores + key * W + j * kWidth;
        const Vec p = vexp2(vsub(vload(at), shift[j]));
        part[j] = vadd(part[j], p);
        vstore(at, p);
      }
    }
    for (int j = 0; j < NV; ++j) {
      total[j] = vfma(total[j], factor[j], part[j]);
      vstore(before + j * kWidth, greatest[j]);
    }
  }

  // sums [Dv, W] = factor * sums + v^T probabilities.
  __attribute__((noinline)) void gather(const T* v, int64_t keys) {
    int64_t next = s.v[2] * int64_t(sizeof(T));
    const char* columns = reinterpret_cast<const char*>(v);
    if constexpr (kWiden) {
      columns = widen_rows(v, s.v[2], keys, s.value_width, copies);
      next = s.value_width * 4;
    } else if constexpr (Step::kPerStep == 2) {
      columns = pair_rows(v, s.v[2], keys, s.value_width, copies);
      next = s.value_width * 4;
    }
    const int64_t steps = (keys + Step::kPerStep - 1) / Step::kPerStep;
    by_tiles<tile_rows<NV>()>(s.value_width, [&](int64_t d, auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      Vec sum[R][NV];
      float* at = sums + d * W;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[r][j] = vmul(vload(at + r * W + j * kWidth), factor[j]);
      tile<Step>(columns + d * 4, 4, next, scores, steps, sum);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) vstore(at + r * W + j * kWidth, sum[r][j]);
    });
  }

  const AttentionShape& s;
  float *queries, *scores, *sums, *added, *copies;
  Vec greatest[NV], total[NV], factor[NV];
  float before[W], position[W];
};

template <class T, int NV>
void run_block(const AttentionShape& s, const T* q, const T* k, const T* v, BiasRows bias, T* out, int64_t first,
               float* memory) {
  QueryBlock<T, NV>(s, memory).run(q, k, v, bias, out, first, std::min<int64_t>(NV * kWidth, s.queries - first));
}

// Block number `block` of a head's `blocks`, among which its vectors of queries are dealt evenly: 13 are 4 + 3 + 3 + 3.
template <class T>
void deal_block(const AttentionShape& s, const T* q, const T* k, const T* v, BiasRows bias, T* out, int64_t block,
                int64_t blocks, int64_t vectors, float* memory) {
  const int64_t first = (block * (vectors / blocks) + std::min(block, vectors % blocks)) * kWidth;
  const int64_t count = vectors / blocks + (block < vectors % blocks);
  if (count == 1) run_block<T, 1>(s, q, k, v, bias, out, first, memory);
  if (count == 2) run_block<T, 2>(s, q, k, v, bias, out, first, memory);
  if constexpr (kMaxVectors == 4) {
    if (count == 3) run_block<T, 3>(s, q, k, v, bias, out, first, memory);
    if (count == 4) run_block<T, 4>(s, q, k, v, bias, out, first, memory);
  }
}

// `bias` is null where there is none. Threads: OpenMP's, one task a block of queries.
template <class T, class Bias>
void attention(const AttentionShape& s, const T* q, const T* k, const T* v, const Bias* bias, T* out) {
  const int64_t vectors = (s.queries + kWidth - 1) / kWidth;
  const int64_t blocks = (vectors + kMaxVectors - 1) / kMaxVectors;
  const int64_t tasks = s.batch * s.heads * blocks;
  const int64_t floats = QueryBlock<T, kMaxVectors>::floats(s);
#pragma omp parallel if (tasks > 1)
  {
    constexpr uintptr_t line = 64;  // bytes
    std::unique_ptr<float[]> memory(new float[floats + line / sizeof(float)]);
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + line - 1) / line * line);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t block = task % blocks, head = task / blocks % s.heads, b = task / blocks / s.heads;
      const T* q_head = q + b * s.q[0] + head * s.q[1];
      const T* k_head = k + b * s.k[0] + head * s.k[1];
      const T* v_head = v + b * s.v[0] + head * s.v[1];
      T* out_head = out + b * s.out[0] + head * s.out[1];
      const BiasRows rows = {bias ? bias + b * s.bias[0] + head * s.bias[1] : nullptr, std::is_same<Bias, Bf16>::value};
      deal_block(s, q_head, k_head, v_head, rows, out_head, block, blocks, vectors, aligned);
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
