// y = activation(x w^T + b) + r on weights packed by blocks of columns.
//
//   x [M, K] rows of stride `x`, channel stride 1.  packed [ceil(N / W), ceil(K / P), W, P] contiguous, zeros beyond N:
//   P is 1 for float32 and 2 for bfloat16 (pairs along K, K even); W = NV * kWidth.  b [N], r [M, N], y [M, N].
//
// A register tile holds R rows of NV vectors of y; those of the last block that lie beyond N are left out. Tasks are (chunk of rows, block of columns): a block of w stays in the
// second-level cache while the rows pass by it, and the next block is fetched meanwhile. Sums are float32 throughout.
#ifndef COMPILED_ATTN_CPP_GEMM_H
#define COMPILED_ATTN_CPP_GEMM_H

#include "activations.h"
#include "attention.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace compiled_attn_cpp {
namespace {

struct GemmShape {
  int64_t rows, inner, outer;
  int64_t x, residual, out;  // strides of rows, in elements
};

constexpr int64_t kChunkBytes = 2048 * 1024;  // of x, read again for each block of columns
constexpr int64_t kTasksAThread = 4;
constexpr int64_t kWorthThreads = 200 * 1000;  // multiply-adds from which a parallel region pays

// Rows of the register tile beside NV vectors of columns.
template <int NV>
constexpr int gemm_rows() {
  if constexpr (kMaxVectors == 4) return NV == 4 ? 6 : 8;  // 32 registers
  return NV == 1 ? 8 : kWidth == 8 ? 6 : 4;            // 16 registers
}

// Memory that is read soon: lines of 64 bytes, a few at a time, so that they arrive while a tile computes.
struct Ahead {
  const char* line;
  const char* end;
  int64_t each;  // lines every kAheadSteps steps

  COMPILED_ATTN_INLINE void fetch() {
    for (int64_t i = 0; i < each && line < end; ++i, line += 64) __builtin_prefetch(line, 0, 2);
  }
};
constexpr int64_t kAheadSteps = 8;

// sum[r][j] += over t of x(r, t) * block[t][j], with x(r, t) the four bytes at x + r * row + 4 * t; rows of W columns.
template <class Step, int W, int R, int NV>
COMPILED_ATTN_INLINE void gemm_steps(const char* x, int64_t row, const float* block, int64_t steps, Ahead& ahead,
                                     Vec (&sum)[R][NV]) {
  for (int64_t begin = 0; begin < steps; begin += kAheadSteps) {
    ahead.fetch();
    const int64_t end = std::min(steps, begin + kAheadSteps);
    for (int64_t t = begin; t < end; ++t) {
      Vec column[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) column[j] = vload(block + j * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float bits;
        std::memcpy(&bits, x + r * row + 4 * t, 4);
        const Vec value = vset(bits);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[r][j] = Step::step(value, column[j], sum[r][j]);
      }
      block += W;
    }
  }
}

// One register tile: R rows from x and y, the columns [first, first + NV * kWidth) of one block of W.
template <class T, Activation A, int W, int R, int NV>
COMPILED_ATTN_INLINE void gemm_tile(const GemmShape& s, const T* x, const float* block, const T* bias, const T* residual,
                                    T* out, int64_t first, Ahead& ahead) {
  using Step = StepOf<T>;
  Vec sum[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[r][j] = vset(0.f);
  const char* rows = reinterpret_cast<const char*>(x);
  gemm_steps<Step, W>(rows, s.x * int64_t(sizeof(T)), block, s.inner / Step::kPerStep, ahead, sum);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const int64_t column = first + j * kWidth;
    const int64_t count = std::min<int64_t>(kWidth, s.outer - column);
    if (count <= 0) break;
    const bool whole = count == kWidth;
    Vec shift = vset(0.f);
    if (bias) shift = whole ? vload(bias + column) : vload(bias + column, count);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec y = activate<A>(vadd(sum[r][j], shift));
      if (residual) {
        const T* from = residual + r * s.residual + column;
        y = vadd(y, whole ? vload(from) : vload(from, count));
      }
      T* to = out + r * s.out + column;
      if (whole) {
        vstore(to, y);
      } else {
        vstore(to, y, count);
      }
    }
  }
}

inline int64_t threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Vectors of the last block of W columns that hold some of the N.
constexpr int last_vectors(int64_t outer, int64_t W) {
  return int((outer - (outer - 1) / W * W + kWidth - 1) / kWidth);
}

// `bias` and `residual` may be null. Last: last_vectors(N, W). Threads: OpenMP's, one task a chunk of rows and a block
// of columns.
template <class T, Activation A, int NV, int Last = NV>
void gemm(const GemmShape& s, const T* x, const T* packed, const T* bias, const T* residual, T* out) {
  constexpr int64_t W = NV * kWidth;
  constexpr int R = gemm_rows<NV>();
  const int64_t blocks = (s.outer + W - 1) / W;
  const int64_t most = std::max<int64_t>(4 * R, kChunkBytes / (s.inner * int64_t(sizeof(T))));
  const int64_t wanted = threads() > 1 ? (kTasksAThread * threads() + blocks - 1) / blocks : 1;
  const int64_t useful = std::min(wanted, (s.rows + 2 * R - 1) / (2 * R));
  const int64_t pieces = std::max<int64_t>(std::max<int64_t>(1, useful), (s.rows + most - 1) / most);
  const int64_t size = std::max<int64_t>(1, ((s.rows + pieces - 1) / pieces + R - 1) / R) * R;
  const int64_t chunks = (s.rows + size - 1) / size;  // fewer than pieces where rounding up to R leaves none to some
  const float* weights = reinterpret_cast<const float*>(packed);
  const int64_t steps = s.inner / StepOf<T>::kPerStep;
#pragma omp parallel for schedule(static) if (s.rows * s.inner * s.outer > kWorthThreads)
  for (int64_t task = 0; task < chunks * blocks; ++task) {
    const int64_t block = task % blocks, begin = task / blocks * size, rows = std::min(size, s.rows - begin);
    // The weights of a network do not stay in the caches: the next block is fetched while this one is multiplied.
    const char* next = reinterpret_cast<const char*>(weights + (block + 1) * steps * W);
    const int64_t lines = block + 1 < blocks ? steps * W * 4 / 64 : 0;
    const int64_t turns = (rows + R - 1) / R * ((steps + kAheadSteps - 1) / kAheadSteps);
    Ahead ahead{next, next + lines * 64, (lines + turns - 1) / turns};
    const auto by_vectors = [&](auto vectors) __attribute__((always_inline)) {
      constexpr int V = decltype(vectors)::value;
      by_tiles<gemm_rows<V>()>(rows, [&](int64_t row, auto count) __attribute__((always_inline)) {
        const int64_t at = begin + row;
        gemm_tile<T, A, W, decltype(count)::value, V>(s, x + at * s.x, weights + block * steps * W, bias,
                                                      residual ? residual + at * s.residual : nullptr, out + at * s.out,
                                                      block * W, ahead);
      });
    };
    if (Last == NV || block + 1 < blocks) {
      by_vectors(std::integral_constant<int, NV>());
    } else {
      by_vectors(std::integral_constant<int, Last>());
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
