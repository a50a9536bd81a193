// Depthwise convolution in channels last, with what surrounds it:
//
//   out = activation(layer_norm(bias + sum over (i, j) of weight[i, j] * x[y * stride + i * dilation - padding, ...]))
//         * gate + residual
//
//   x [B, Y, X, C], gate, residual, out [B, Y', X', C] by their strides, channel stride 1; weight [I, J, C] contiguous;
//   bias and the norm's weight and bias [C]. What is not there is a null pointer; the norm is there by its flag.
//
// Work goes by a few vectors of channels. A ring of padded input rows of each lies in a thread's own memory as float32,
// so that borders, dilation and bfloat16 cost nothing where the sums are made and every input is read once.
// A register tile holds up to three rows by kTileColumns columns of sums; rows that lie `dilation` apart share inputs.
#ifndef COMPILED_ATTN_CPP_DEPTHWISE_H
#define COMPILED_ATTN_CPP_DEPTHWISE_H

#include <algorithm>
#include <vector>

#include "activations.h"
#include "depthwise_axis.h"
#include "lines.h"

namespace compiled_attn_cpp {
namespace {

// Strides in elements in the order batch, row, column.
struct DepthwiseShape {
  int64_t batch, channels;
  DepthwiseAxis y, x;
  int64_t from[3], gate[3], residual[3], to[3];
  float eps;  // of the norm
};

template <class T>
struct DepthwiseTensors {
  const T *x, *weight, *bias, *gate, *residual, *norm_weight, *norm_bias;
  T* out;
};

#if defined(COMPILED_ATTN_AVX512) || defined(__aarch64__)
constexpr int kTileColumns = 8;  // 32 registers
#else
constexpr int kTileColumns = 4;  // 16 registers
#endif
constexpr int kTileRows = 3;
constexpr int64_t kRingFloats = 64 * 1024 / 4;        // of a ring, where the columns can be cut that small
constexpr int64_t kLargeMap = 1024 * 1024;            // bytes from which rows are asked for ahead
constexpr int kVectorsTogether = 4;                             // vectors of channels that are read together, at most
constexpr int64_t kGroupFloats = 160 * 1024 / 4;      // of their rings
constexpr int64_t kNormFloats = 256 * 1024 / 4;       // of sums that wait for the norm
constexpr int64_t kDepthwiseThreads = 100 * 1000;     // multiply-adds from which a parallel region pays
constexpr int64_t kDepthwiseTasks = 4;                // a thread
constexpr int64_t kLeastBand = 4;                     // rows of a task, in groups that share inputs

// The rows of one batch entry [first, last) and columns [left, right) of the result, all channels or one vector.
struct DepthwisePart {
  int64_t batch, first, last, left, right;
};

// A thread's work. T: elements.  A: activation.  Norm: whether there is a layer norm over channels.  Rows: of a register
// tile, 1 unless both strides are 1.
template <class T, Activation A, bool Norm, int Rows>
class Depthwise {
 public:
  static constexpr bool kPlain = A == Activation::none || A == Activation::relu;  // few instructions behind the sums

  Depthwise(const DepthwiseShape& shape, const DepthwiseTensors<T>& tensors) : s(shape), t(tensors) {
    apart = Rows > 1 ? s.y.dilation : 1;
    ring_rows = (s.y.kernel - 1) * s.y.dilation + (Rows * apart - 1) * s.y.stride + 1;
    rows.resize(s.y.kernel + kTileRows - 1);
    places = s.y.kernel * s.x.kernel;
    large = s.batch * s.y.in * s.x.in * s.channels * int64_t(sizeof(T)) > kLargeMap;
    taps = weights.room(kVectorsTogether * places * kWidth);
  }

  // `vectors` vectors of channels, from c on.
  void run(const DepthwisePart& part, int64_t c, int64_t vectors) {
    Vec bias[kVectorsTogether];
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = c + v * kWidth, lanes = lanes_at(at);
      float* to = taps + v * places * kWidth;
      for (int64_t i = 0; i < places; ++i) vstore(to + i * kWidth, load(t.weight + i * s.channels + at, lanes));
      bias[v] = t.bias ? load(t.bias + at, lanes) : vset(0.f);
    }
    columns = (part.right - part.left - 1) * s.x.stride + (s.x.kernel - 1) * s.x.dilation + 1;
    ring_size = ring_rows * columns * kWidth;
    ring = memory.room(vectors * ring_size);
    const int64_t base = part.first * s.y.stride - s.y.padding, group = Rows * apart;
    int64_t filled = 0;
    for (int64_t y = part.first; y < part.last; y += group) {
      const int64_t begin = y * s.y.stride - s.y.padding - base;
      const int64_t last = std::min(y + group, part.last) - 1;
      const int64_t end = last * s.y.stride - s.y.padding - base + (s.y.kernel - 1) * s.y.dilation + 1;
      for (filled = std::max(filled, begin); filled < end; ++filled) {
        fill(part, c, vectors, filled + base, filled % ring_rows);
      }
      next = end + base;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = c + v * kWidth;
        tap = taps + v * places * kWidth;
        for (int64_t p = 0; p < apart && y + p < part.last; ++p) {
          const int64_t count = std::min<int64_t>(Rows, (part.last - y - p + apart - 1) / apart);
          for (int64_t j = 0; j < s.y.kernel + count - 1; ++j) {
            rows[j] = ring + v * ring_size + (begin + p + j * s.y.dilation) % ring_rows * columns * kWidth;
          }
          row_of_tiles(part, at, lanes_at(at), y + p, int(count), bias[v]);
        }
      }
    }
  }

  // All channels of a part; then their norm, and what follows it.
  void run_with_norm(const DepthwisePart& part, int64_t group) {
    wide = (s.channels + kWidth - 1) / kWidth * kWidth;
    sums = waiting.room((part.last - part.first) * (part.right - part.left) * wide);
    for (int64_t c = 0; c < wide; c += group * kWidth) run(part, c, std::min(group, (wide - c) / kWidth));
    for (int64_t y = part.first; y < part.last; ++y) {
      for (int64_t x = part.left; x < part.right; ++x) normalise(part, y, x);
    }
  }

 private:
  static COMPILED_ATTN_INLINE Vec load(const T* p, int64_t lanes) { return lanes == kWidth ? vload(p) : vload(p, lanes); }

  int64_t lanes_at(int64_t c) const { return std::min<int64_t>(kWidth, s.channels - c); }

  // Row `y` of x with zeros at its ends, to a row of each ring; a row beyond the border is never read there.
  void fill(const DepthwisePart& part, int64_t c, int64_t vectors, int64_t y, int64_t slot) {
    if (y < 0 || y >= s.y.in) return;
    float* to = ring + slot * columns * kWidth;
    const int64_t left = part.left * s.x.stride - s.x.padding;
    const int64_t begin = std::min(columns, std::max<int64_t>(0, -left));
    const int64_t end = std::max(begin, std::min(columns, s.x.in - left));
    for (int64_t v = 0; v < vectors; ++v) {
      float* row = to + v * ring_size;
      if (begin > 0) std::memset(row, 0, begin * kWidth * sizeof(float));
      if (end < columns) std::memset(row + end * kWidth, 0, (columns - end) * kWidth * sizeof(float));
    }
    const T* from = t.x + part.batch * s.from[0] + y * s.from[1] + (left + begin) * s.from[2] + c;
    const int64_t lanes = lanes_at(c + (vectors - 1) * kWidth);
    as_constant<kVectorsTogether>(vectors, [&](auto V) { copy<V()>(from, end - begin, to + begin * kWidth, lanes); });
  }

  // V vectors of `count` pixels, one beside the other, to their rings; the last vector holds `lanes` channels.
  template <int V>
  void copy(const T* from, int64_t count, float* to, int64_t lanes) {
    const int64_t step = s.from[2];
    for (int64_t j = 0; j < count; ++j, from += step, to += kWidth) {
#pragma GCC unroll 4
      for (int v = 0; v < V - 1; ++v) vstore(to + v * ring_size, vload(from + v * kWidth));
      vstore(to + (V - 1) * ring_size, load(from + (V - 1) * kWidth, lanes));
    }
  }

  // The steps [begin, end) of a kernel that starts at input `first` and meets the map there or up to `reach` beyond.
  struct Inside {
    int64_t begin = 0, end = 0;

    Inside() = default;
    Inside(const DepthwiseAxis& a, int64_t first, int64_t reach, int64_t kernel) {
      const int64_t d = a.dilation;
      begin = first + reach >= 0 ? 0 : (-first - reach + d - 1) / d;
      end = first >= a.in ? 0 : std::min(kernel, (a.in - first + d - 1) / d);
      begin = std::min(begin, end);
    }
    bool holds(int64_t j) const { return begin <= j && j < end; }
  };

  // `count` rows of the result from y on, `apart` rows from each other.
  void row_of_tiles(const DepthwisePart& part, int64_t c, int64_t lanes, int64_t y, int count, Vec bias) {
    down = Inside(s.y, y * s.y.stride - s.y.padding, 0, s.y.kernel + count - 1);
    const int64_t size = part.right - part.left, tiles = (size + kTileColumns - 1) / kTileColumns;
    int64_t x = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t width = size / tiles + (i < size % tiles);
      right = Inside(s.x, (part.left + x) * s.x.stride - s.x.padding, (width - 1) * s.x.stride, s.x.kernel);
      if (large) ahead(part, c, x * s.x.stride, width * s.x.stride);
      as_constant<kTileColumns>(width, [&](auto TX) {
        as_constant<Rows>(count, [&](auto TY) { tile<TY(), TX()>(part, c, lanes, y, x, bias); });
      });
      x += width;
    }
  }

  // Asks for `count` columns of the input rows that come next, from `first` on, while sums are made.
  void ahead(const DepthwisePart& part, int64_t c, int64_t first, int64_t count) const {
    const int64_t left = std::max<int64_t>(0, part.left * s.x.stride - s.x.padding + first);
    const int64_t end = std::min(left + count, s.x.in), last = std::min(next + Rows * s.y.stride, s.y.in);
    for (int64_t y = std::max<int64_t>(0, next); y < last; ++y) {
      const T* line = t.x + part.batch * s.from[0] + y * s.from[1] + c;
      for (int64_t x = left; x < end; ++x) __builtin_prefetch(line + x * s.from[2]);
    }
  }

  template <int TY, int TX>
  __attribute__((noinline)) void tile(const DepthwisePart& part, int64_t c, int64_t lanes, int64_t y, int64_t x, Vec bias) {
    Vec sum[TY][TX];
#pragma GCC unroll 3
    for (int r = 0; r < TY; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < TX; ++i) sum[r][i] = bias;
    const int64_t at = x * s.x.stride * kWidth, line = s.x.kernel * kWidth, last = s.y.kernel;
    const float* beyond = tap + last * line;
    if constexpr (TY > 1) {
      if (down.holds(0)) add<TY, TX, 0, 1>(sum, rows[0] + at, tap);
    }
    if constexpr (TY > 2) {
      if (down.holds(1)) add<TY, TX, 0, 2>(sum, rows[1] + at, tap + line);
    }
    const int64_t end = std::min(down.end, last);
    for (int64_t j = std::max<int64_t>(down.begin, TY - 1); j < end; ++j) {
      add<TY, TX, 0, TY>(sum, rows[j] + at, tap + j * line);
    }
    if constexpr (TY > 1) {
      if (down.holds(last)) add<TY, TX, 1, TY>(sum, rows[last] + at, beyond);
    }
    if constexpr (TY > 2) {
      if (down.holds(last + 1)) add<TY, TX, 2, TY>(sum, rows[last + 1] + at, beyond + line);
    }
    float* to = Norm ? sums + ((y - part.first) * (part.right - part.left) + x) * wide + c : kept;
    const int64_t next_row = Norm ? apart * (part.right - part.left) * wide : TX * kWidth;
    const int64_t next = Norm ? wide : kWidth;
    if (kPlain && !Norm && lanes == kWidth && !t.gate && !t.residual) {
#pragma GCC unroll 3
      for (int r = 0; r < TY; ++r) {
        T* out = t.out + offset(s.to, part.batch, y + r * apart, part.left + x) + c;
#pragma GCC unroll 8
        for (int i = 0; i < TX; ++i) vstore(out + i * s.to[2], activate<A>(sum[r][i]));
      }
      return;
    }
#pragma GCC unroll 3
    for (int r = 0; r < TY; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < TX; ++i) vstore(to + r * next_row + i * next, sum[r][i]);
    if constexpr (!Norm) {
      for (int r = 0; r < TY; ++r) finish(kept + r * next_row, TX, part.batch, y + r * apart, part.left + x, c, lanes);
    }
  }

  // sum[r] += one row of inputs times the kernel's row for r, of the rows LOW to HIGH; `row` is the kernel's for r = 0.
  template <int TY, int TX, int LOW, int HIGH>
  COMPILED_ATTN_INLINE void add(Vec (&sum)[TY][TX], const float* inputs, const float* row) {
    const int64_t step = Rows > 1 ? kWidth : s.x.stride * kWidth, line = s.x.kernel * kWidth;
    inputs += right.begin * s.x.dilation * kWidth;
    row += right.begin * kWidth;
    for (int64_t j = right.begin; j < right.end; ++j, inputs += s.x.dilation * kWidth, row += kWidth) {
      Vec weight[HIGH];
#pragma GCC unroll 3
      for (int r = LOW; r < HIGH; ++r) weight[r] = vload(row - r * line);
#pragma GCC unroll 8
      for (int i = 0; i < TX; ++i) {
        Vec value = vload(inputs + i * step);
        if constexpr (HIGH - LOW > 1) COMPILED_ATTN_KEEP(value);
#pragma GCC unroll 3
        for (int r = LOW; r < HIGH; ++r) sum[r][i] = vfma(value, weight[r], sum[r][i]);
      }
    }
  }

  static COMPILED_ATTN_INLINE int64_t offset(const int64_t (&stride)[3], int64_t b, int64_t y, int64_t x) {
    return b * stride[0] + y * stride[1] + x * stride[2];
  }

  // Activation, gate and residual of `count` columns of a row, whose sums lie one after the other.
  __attribute__((noinline)) void finish(const float* from, int64_t count, int64_t b, int64_t y, int64_t x, int64_t c,
                                        int64_t lanes) {
    const T* gate = t.gate ? t.gate + offset(s.gate, b, y, x) + c : nullptr;
    const T* residual = t.residual ? t.residual + offset(s.residual, b, y, x) + c : nullptr;
    T* out = t.out + offset(s.to, b, y, x) + c;
    for (int64_t i = 0; i < count; ++i, from += kWidth, out += s.to[2]) {
      Vec value = activate<A>(vload(from));
      if (gate) value = vmul(value, load(gate + i * s.gate[2], lanes));
      if (residual) value = vadd(value, load(residual + i * s.residual[2], lanes));
      if (lanes == kWidth) {
        vstore(out, value);
      } else {
        vstore(out, value, lanes);
      }
    }
  }

  // The norm of one pixel, and what follows it.
  void normalise(const DepthwisePart& part, int64_t y, int64_t x) {
    const float* from = sums + ((y - part.first) * (part.right - part.left) + x - part.left) * wide;
    const float share = 1.f / float(s.channels);
    const int64_t whole = s.channels / kWidth * kWidth, rest = s.channels - whole;
    Vec total = vset(0.f);
    for (int64_t c = 0; c < wide; c += kWidth) total = vadd(total, vload(from + c));  // zeros beyond the channels
    const Vec mean = vset(vsum(total) * share);
    Vec squares = vset(0.f);
    for (int64_t c = 0; c < whole; c += kWidth) {
      const Vec d = vsub(vload(from + c), mean);
      squares = vfma(d, d, squares);
    }
    float square = vsum(squares);
    for (int64_t c = whole; c < s.channels; ++c) square += (from[c] - mean[0]) * (from[c] - mean[0]);
    const Vec scale = vset(1.f / std::sqrt(square * share + s.eps));
    for (int64_t c = 0; c < wide; c += kWidth) {
      const int64_t lanes = c < whole ? kWidth : rest;
      Vec value = vmul(vsub(vload(from + c), mean), scale);
      if (t.norm_weight) value = vmul(value, load(t.norm_weight + c, lanes));
      if (t.norm_bias) value = vadd(value, load(t.norm_bias + c, lanes));
      vstore(kept, value);
      finish(kept, 1, part.batch, y, x, c, lanes);
    }
  }

  const DepthwiseShape& s;
  const DepthwiseTensors<T>& t;
  int64_t apart, ring_rows;  // distance of a register tile's rows; rows that lie in the ring
  int64_t next = 0;    // input row after those in the ring
  bool large = false;  // whether the map leaves the second-level cache
  int64_t columns = 0, wide = 0, places = 0, ring_size = 0;
  alignas(64) float kept[Rows * kTileColumns * kWidth];  // sums of a tile
  Inside down, right;  // steps of the kernel's rows and columns that meet the map
  Lines memory, weights, waiting;
  float *ring = nullptr, *taps = nullptr, *tap = nullptr, *sums = nullptr;
  std::vector<const float*> rows;
};

// Threads: OpenMP's. A task is a band of rows, a strip of columns and, without a norm, a vector of channels.
template <class T, Activation A, bool Norm, int Rows>
void depthwise_by_rows(const DepthwiseShape& s, const DepthwiseTensors<T>& t) {
  const int64_t group = Rows > 1 ? Rows * s.y.dilation : 1;
  // Strips so narrow that the ring stays in the first-level cache, but no narrower than what the kernel reaches over.
  const int64_t reach = (s.x.kernel - 1) * s.x.dilation, ring = (s.y.kernel - 1) * s.y.dilation + group * s.y.stride;
  const int64_t fit = kRingFloats / (ring * kWidth) - reach;
  const int64_t most = std::max<int64_t>(std::max<int64_t>(4 * kTileColumns, 4 * reach), fit) / s.x.stride + 1;
  const int64_t strips = (s.x.out + most - 1) / most, strip = (s.x.out + strips - 1) / strips;
  // Vectors of channels that are read together, since memory comes in longer pieces than one.
  const int64_t row = (strip - 1) * s.x.stride + reach + 1, vectors = (s.channels + kWidth - 1) / kWidth;
  const int64_t together = std::min<int64_t>(std::max<int64_t>(1, kGroupFloats / (ring * row * kWidth)), kVectorsTogether);
  const int64_t blocks = Norm ? 1 : (vectors + together - 1) / together;
  int64_t bands = 1;
  if (Norm) bands = (s.y.out * strip * s.channels + kNormFloats - 1) / kNormFloats;
  const int64_t tasks_wanted = depthwise_threads() > 1 ? kDepthwiseTasks * depthwise_threads() : 1;
  const int64_t others = std::max<int64_t>(1, s.batch * strips * blocks);
  bands = std::max(bands, std::min((tasks_wanted + others - 1) / others, s.y.out / (kLeastBand * group)));
  const int64_t rows = ((s.y.out + bands - 1) / std::max<int64_t>(bands, 1) + group - 1) / group * group;
  bands = (s.y.out + rows - 1) / rows;
  const int64_t tasks = s.batch * bands * strips * blocks;
  const int64_t work = s.batch * s.channels * s.y.out * s.x.out * s.y.kernel * s.x.kernel;
#pragma omp parallel if (work > kDepthwiseThreads && tasks > 1)
  {
    Depthwise<T, A, Norm, Rows> mine(s, t);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t block = task % blocks, column = task / blocks % strips * strip;
      const int64_t row = task / blocks / strips % bands * rows, b = task / blocks / strips / bands;
      const DepthwisePart part{b, row, std::min(row + rows, s.y.out), column, std::min(column + strip, s.x.out)};
      if (part.left >= part.right) continue;
      if constexpr (Norm) {
        mine.run_with_norm(part, together);
      } else {
        const int64_t first = block * together;
        mine.run(part, first * kWidth, std::min(together, vectors - first));
      }
    }
  }
}

// How many rows a register tile takes.
constexpr int depthwise_rows(int64_t kernel_rows, int64_t stride_y, int64_t stride_x) {
  return stride_y == 1 && stride_x == 1 ? int(std::min<int64_t>(kTileRows, kernel_rows)) : 1;
}

// For a shape of which nothing is known ahead; where strides and kernel are, the call above compiles to less.
template <class T, Activation A, bool Norm>
void depthwise(const DepthwiseShape& s, const DepthwiseTensors<T>& t) {
  as_constant<kTileRows>(depthwise_rows(s.y.kernel, s.y.stride, s.x.stride),
                         [&](auto rows) { depthwise_by_rows<T, A, Norm, rows()>(s, t); });
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
