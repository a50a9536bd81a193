// The gradient of a depthwise convolution's weight, in channels last:
//
//   out[i, j] = sum over (b, y, x) of grad[b, y, x] * x[b, y * stride + i * dilation - padding, ...]    by channel
//
//   x [B, Y, X, C], grad [B, Y', X', C] by their strides, channel stride 1; out [I, J, C] contiguous.
//
// Work goes by one vector of channels and some pictures of the batch. A ring of padded input rows and one row of the
// gradient lie in a thread's own memory as float32. A register tile holds up to three rows by kPlaceColumns columns of
// the kernel's places, to which a whole row of the map is added; the sums of some pictures are added up in order, so
// that the result depends on the number of threads alone.
#ifndef COMPILED_ATTN_CPP_DEPTHWISE_GRADIENT_H
#define COMPILED_ATTN_CPP_DEPTHWISE_GRADIENT_H

#include <algorithm>
#include <vector>

#include "depthwise_axis.h"
#include "lines.h"

namespace compiled_attn_cpp {
namespace {

// Strides in elements in the order batch, row, column.
struct DepthwiseGradientShape {
  int64_t batch, channels;
  DepthwiseAxis y, x;
  int64_t from[3], grad[3];
};

constexpr int kPlaceRows = 3;
#if defined(COMPILED_ATTN_AVX512) || defined(__aarch64__)
constexpr int kPlaceColumns = 8;  // 32 registers
#else
constexpr int kPlaceColumns = 4;  // 16 registers
#endif
constexpr int64_t kGradientTasks = 4;  // a thread

// A thread's work on one vector of channels. T: elements.
template <class T>
class DepthwiseGradient {
 public:
  DepthwiseGradient(const DepthwiseGradientShape& shape, const T* x_, const T* grad_) : s(shape), x(x_), grad(grad_) {
    ring_rows = (s.y.kernel - 1) * s.y.dilation + 1;
    columns = (s.x.out - 1) * s.x.stride + (s.x.kernel - 1) * s.x.dilation + 1;
    ring = memory.room(ring_rows * columns * kWidth);
    toward = row.room(s.x.out * kWidth);
    sums = places.room(s.y.kernel * s.x.kernel * kWidth);
    lines.resize(s.y.kernel);
  }

  // Adds up the pictures [first, last) for the channels from c on; to [I, J, kWidth], whose places lie `step` apart.
  void run(int64_t c, int64_t first, int64_t last, float* to, int64_t step) {
    const int64_t count = s.y.kernel * s.x.kernel;
    lanes = std::min<int64_t>(kWidth, s.channels - c);
    places.clear();
    for (int64_t b = first; b < last; ++b) picture(b, c);
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * step, sums + i * kWidth, kWidth * sizeof(float));
  }

 private:
  static COMPILED_ATTN_INLINE Vec load(const T* p, int64_t lanes) { return lanes == kWidth ? vload(p) : vload(p, lanes); }

  void picture(int64_t b, int64_t c) {
    int64_t filled = 0;  // rows from the padding's first on
    for (int64_t y = 0; y < s.y.out; ++y) {
      const int64_t begin = y * s.y.stride, end = begin + ring_rows;
      for (filled = std::max(filled, begin); filled < end; ++filled) fill(b, c, filled);
      const T* from = grad + b * s.grad[0] + y * s.grad[1] + c;
      for (int64_t i = 0; i < s.x.out; ++i) vstore(toward + i * kWidth, load(from + i * s.grad[2], lanes));
      for (int64_t i = 0; i < s.y.kernel; ++i) {
        lines[i] = ring + (begin + i * s.y.dilation) % ring_rows * columns * kWidth;
      }
      for (int64_t i = 0; i < s.y.kernel; i += kPlaceRows) {
        for (int64_t j = 0; j < s.x.kernel; j += kPlaceColumns) {
          as_constant<kPlaceRows>(std::min<int64_t>(kPlaceRows, s.y.kernel - i), [&](auto rows_) {
            as_constant<kPlaceColumns>(std::min<int64_t>(kPlaceColumns, s.x.kernel - j),
                                       [&](auto columns_) { tile<rows_(), columns_()>(i, j); });
          });
        }
      }
    }
  }

  // A row of x with zeros at its ends, or a row of zeros, to the ring; `padded` counts from the padding's first row.
  void fill(int64_t b, int64_t c, int64_t padded) {
    float* to = ring + padded % ring_rows * columns * kWidth;
    const int64_t y = padded - s.y.padding;
    if (y < 0 || y >= s.y.in) {
      std::memset(to, 0, columns * kWidth * sizeof(float));
      return;
    }
    const int64_t begin = std::min(columns, s.x.padding);
    const int64_t end = std::max(begin, std::min(columns, s.x.in + s.x.padding));
    std::memset(to, 0, begin * kWidth * sizeof(float));
    std::memset(to + end * kWidth, 0, (columns - end) * kWidth * sizeof(float));
    const T* from = x + b * s.from[0] + y * s.from[1] + c;
    for (int64_t i = begin; i < end; ++i) vstore(to + i * kWidth, load(from + (i - s.x.padding) * s.from[2], lanes));
  }

  // One row of the map, for I by J of the kernel's places from (i, j) on.
  template <int I, int J>
  __attribute__((noinline)) void tile(int64_t i, int64_t j) {
    Vec sum[I][J];
    const float* line[I];
    float* at = sums + (i * s.x.kernel + j) * kWidth;
    const int64_t next = s.x.kernel * kWidth, apart = s.x.dilation * kWidth, step = s.x.stride * kWidth;
#pragma GCC unroll 3
    for (int r = 0; r < I; ++r) {
      line[r] = lines[i + r] + j * apart;
#pragma GCC unroll 8
      for (int k = 0; k < J; ++k) sum[r][k] = vload(at + r * next + k * kWidth);
    }
    for (int64_t p = 0; p < s.x.out; ++p) {
      const Vec value = vload(toward + p * kWidth);
#pragma GCC unroll 3
      for (int r = 0; r < I; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < J; ++k) sum[r][k] = vfma(value, vload(line[r] + p * step + k * apart), sum[r][k]);
    }
#pragma GCC unroll 3
    for (int r = 0; r < I; ++r)
#pragma GCC unroll 8
      for (int k = 0; k < J; ++k) vstore(at + r * next + k * kWidth, sum[r][k]);
  }

  const DepthwiseGradientShape& s;
  const T *x, *grad;
  int64_t ring_rows, columns, lanes = 0;
  Lines memory, row, places;
  float *ring, *toward, *sums;
  std::vector<const float*> lines;
};

// Threads: OpenMP's. A task is a vector of channels and a share of the batch.
template <class T>
void depthwise_weight_gradient(const DepthwiseGradientShape& s, const T* x, const T* grad, T* out) {
  const int64_t vectors = (s.channels + kWidth - 1) / kWidth, wide = vectors * kWidth;
  const int64_t count = s.y.kernel * s.x.kernel, threads = depthwise_threads();
  const int64_t wanted = threads > 1 ? (kGradientTasks * threads + vectors - 1) / vectors : 1;
  const int64_t share = std::max<int64_t>(1, (s.batch + wanted - 1) / wanted);
  const int64_t shares = std::max<int64_t>(1, (s.batch + share - 1) / share);
  std::vector<float> sums(shares * count * wide);
#pragma omp parallel if (threads > 1 && shares * vectors > 1)
  {
    DepthwiseGradient<T> mine(s, x, grad);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shares * vectors; ++task) {
      const int64_t c = task % vectors * kWidth, part = task / vectors;
      float* to = sums.data() + part * count * wide + c;
      mine.run(c, part * share, std::min(s.batch, (part + 1) * share), to, wide);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < s.channels; c += kWidth) {
      Vec total = vload(sums.data() + i * wide + c);
      for (int64_t part = 1; part < shares; ++part) {
        total = vadd(total, vload(sums.data() + (part * count + i) * wide + c));
      }
      vstore(out + i * s.channels + c, total, std::min<int64_t>(kWidth, s.channels - c));
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
