// Keeps the tokens of the greatest scores: rank, gather and, if asked, fuse the others, in one pass over the tokens.
//
//   x [B, N, C] by its batch and token strides, channel stride 1; its first `prefix` tokens are kept as they are
//   score [B, N - prefix] by its strides
//   index [B, keep] contiguous: positions after the prefix, by decreasing score; of equal scores the lower position
//     first; a NaN comes last
//   tokens [B, prefix + keep (+ 1), C] by its batch and token strides, channel stride 1: the prefix, the tokens of
//     index, then, if `fuse`, the sum over the tokens left out of score * x, in float32
// Either output may be a null pointer.
//
// The place of a token is the number of tokens that go before it: counting needs no sort, no branch, and vectorises.
#ifndef COMPILED_ATTN_CPP_SELECT_TOKENS_H
#define COMPILED_ATTN_CPP_SELECT_TOKENS_H

#include <algorithm>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace compiled_attn_cpp {
namespace {

struct SelectShape {
  int64_t batch, tokens, channels, prefix, keep;  // tokens: N
  int64_t x[2], score[2], out[2];                 // strides in elements
  bool fuse;
};

// An integer in the order of the scores: both zeros alike, a NaN below all.
COMPILED_ATTN_INLINE int32_t order_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return std::numeric_limits<int32_t>::min();
  return bits >> 31 ? -int32_t(size) : int32_t(size);
}

// place[j] = how many of the `count` tokens go before j.
COMPILED_ATTN_INLINE void count_places(const int32_t* order, int64_t count, int32_t* place) {
  for (int64_t j = 0; j < count; ++j) {
    const int32_t mine = order[j];
    int32_t before = 0;
    for (int64_t i = 0; i < j; ++i) before += order[i] >= mine;
    for (int64_t i = j + 1; i < count; ++i) before += order[i] > mine;
    place[j] = before;
  }
}

// The channels [begin, begin + count) of one picture; `sum` has room for count floats.
template <class T, class Score>
COMPILED_ATTN_INLINE void move_tokens(const SelectShape& s, const T* x, const Score* score, const int32_t* place,
                                      T* tokens, int64_t begin, int64_t count, float* sum) {
  x += begin;
  tokens += begin;
  for (int64_t j = 0; j < s.prefix; ++j) std::memcpy(tokens + j * s.out[1], x + j * s.x[1], count * sizeof(T));
  x += s.prefix * s.x[1];
  tokens += s.prefix * s.out[1];
  if (s.fuse) std::fill(sum, sum + count, 0.f);
  for (int64_t j = 0; j < s.tokens - s.prefix; ++j) {
    const T* from = x + j * s.x[1];
    if (place[j] < s.keep) {
      std::memcpy(tokens + place[j] * s.out[1], from, count * sizeof(T));
    } else if (s.fuse) {
      const Vec weight = vset(to_float(score[j * s.score[1]]));
      int64_t c = 0;
      for (; c + kWidth <= count; c += kWidth) vstore(sum + c, vfma(weight, vload(from + c), vload(sum + c)));
      if (c < count) vstore(sum + c, vfma(weight, vload(from + c, count - c), vload(sum + c, count - c)), count - c);
    }
  }
  if (!s.fuse) return;
  T* last = tokens + s.keep * s.out[1];
  for (int64_t c = 0; c < count; c += kWidth) {
    const int64_t lanes = std::min<int64_t>(kWidth, count - c);
    vstore(last + c, vload(sum + c, lanes), lanes);
  }
}

template <class T, class Score>
void select_tokens(const SelectShape& s, const T* x, const Score* score, T* tokens, int64_t* index) {
  const int64_t count = s.tokens - s.prefix;
  int64_t threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  // A picture's channels are shared out only where there are fewer pictures than threads.
  const int64_t wanted = s.batch ? (threads + s.batch - 1) / s.batch : 1;
  const int64_t pieces = std::max<int64_t>(1, std::min(wanted, s.channels / 64));
  const int64_t size = ((s.channels + pieces - 1) / pieces + 15) / 16 * 16;
  std::unique_ptr<int32_t[]> memory(new int32_t[std::max<int64_t>(1, 2 * s.batch * count)]);
#pragma omp parallel if (s.batch * pieces > 1)
  {
    std::unique_ptr<float[]> sum(new float[size]);
#pragma omp for
    for (int64_t b = 0; b < s.batch; ++b) {
      int32_t* order = memory.get() + 2 * b * count;
      int32_t* place = order + count;
      for (int64_t j = 0; j < count; ++j) order[j] = order_of(to_float(score[b * s.score[0] + j * s.score[1]]));
      count_places(order, count, place);
      for (int64_t j = 0; j < count; ++j) {
        if (index && place[j] < s.keep) index[b * s.keep + place[j]] = j;
      }
    }
#pragma omp for
    for (int64_t task = 0; task < (tokens ? s.batch * pieces : 0); ++task) {
      const int64_t b = task / pieces, begin = task % pieces * size;
      const int64_t channels = std::min(size, s.channels - begin);
      if (channels <= 0) continue;
      move_tokens(s, x + b * s.x[0], score + b * s.score[0], memory.get() + (2 * b + 1) * count, tokens + b * s.out[0],
                  begin, channels, sum.get());
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
