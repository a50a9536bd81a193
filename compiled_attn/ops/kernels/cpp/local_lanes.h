// Local attention with neighbouring queries of the last axis in the vectors' lanes, for windows that move by one.
//
// For one distance o along the last axis, lane l of a row of keys is the key of query x0 + l at x0 + l + o: one load of
// the transposed row at an offset. So only the keys of a window are multiplied, where a tile (local_tiles.h) multiplies
// the union of its windows. Lanes near a border see other distances than the rest: the distances of all lanes are
// taken, and what a lane does not see is hidden.
//
// A task is a run of rows of one head; its memory plan (floats, W = lanes of a vector, J = distances of a vector):
//
//   keys    [rows + window - 1, D, columns]    transposed once for the task; the values likewise
//   queries [kGroup, D, W]                     a group of rows, transposed, times scale * log2(e)
//   scores  [kGroup, window of rows, J, W]     turned into probabilities where they lie
//   sums    [kGroup, Dv, W]                    the output transposed
//
// A row of keys meets all rows of the group that see it, so that a loaded vector is used by several of them.
#ifndef COMPILED_ATTN_CPP_LOCAL_LANES_H
#define COMPILED_ATTN_CPP_LOCAL_LANES_H

#include <vector>

#include "attention.h"
#include "local_shape.h"

namespace compiled_attn_cpp {
namespace {

constexpr int64_t kGroup = 6;  // rows of queries
#if defined(COMPILED_ATTN_AVX512) || defined(__aarch64__)
constexpr int kLaneRows = 6, kLaneSlots = 4, kLaneValues = 4;  // register tiles of 32 registers
#else
constexpr int kLaneRows = 3, kLaneSlots = 3, kLaneValues = 2;  // of 16
#endif

// Calls f with n, which is 1 to N, as a constant.
template <int N, class F>
COMPILED_ATTN_INLINE void as_constant(int64_t n, const F& f) {
  if constexpr (N == 1) {
    f(std::integral_constant<int, 1>());
  } else {
    if (n == N) {
      f(std::integral_constant<int, N>());
    } else {
      as_constant<N - 1>(n, f);
    }
  }
}

// The distances that a vector of queries of the last axis needs, and which lanes see which: at or above 0.
struct LaneTile {
  int64_t first, count, low, distances;
  std::vector<float> seen;  // [distances, W]
  std::vector<char> whole;  // whether every lane sees it
};

inline std::vector<LaneTile> lane_tiles(const LocalAxis& a, int64_t size) {
  const int64_t parts = (size + kWidth - 1) / kWidth;
  std::vector<LaneTile> tiles(parts);
  for (int64_t i = 0; i < parts; ++i) {
    LaneTile& t = tiles[i];
    t.first = i * (size / parts) + std::min(i, size % parts);
    t.count = size / parts + (i < size % parts);
    int64_t low[kWidth], high[kWidth];
    for (int64_t lane = 0; lane < t.count; ++lane) {
      const int64_t place = t.first + lane, start = start_of(a, place, size);
      low[lane] = (a.border == kZero ? start : std::max<int64_t>(start, 0)) - place;
      high[lane] = (a.border == kZero ? start + a.window : std::min(start + a.window, size)) - place;
      if (a.causal) high[lane] = std::min<int64_t>(high[lane], 1);
    }
    t.low = *std::min_element(low, low + t.count);
    t.distances = *std::max_element(high, high + t.count) - t.low;
    t.seen.assign(t.distances * kWidth, 0.f);
    t.whole.assign(t.distances, 1);
    for (int64_t j = 0; j < t.distances; ++j) {
      for (int64_t lane = 0; lane < t.count; ++lane) {
        const bool visible = t.low + j >= low[lane] && t.low + j < high[lane];
        t.seen[j * kWidth + lane] = visible ? 0.f : -1.f;
        t.whole[j] = t.whole[j] && visible;
      }
    }
  }
  return tiles;
}

// to [channels, pitch] = rows of `count` positions, transposed, times `unit`; zeros up to a multiple of W positions.
template <class T>
void transpose_rows(const T* from, int64_t step, int64_t count, int64_t width, float unit, float* to, int64_t pitch) {
  for (int64_t at = 0; at < count; at += kWidth) {
    const int64_t rows = std::min<int64_t>(kWidth, count - at);
    for (int64_t d = 0; d < width; d += kWidth) {
      const int64_t channels = std::min<int64_t>(kWidth, width - d);
      Vec r[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const T* row = from + (at + i) * step + d;
        r[i] = i >= rows ? vset(0.f) : channels == kWidth ? vload(row) : vload(row, channels);
      }
      vtranspose(r);
      for (int64_t i = 0; i < channels; ++i) vstore(to + (d + i) * pitch + at, vmul(r[i], vset(unit)));
    }
  }
}

// One thread's work on runs of rows, one after the other.
template <class T>
class LaneRows {
 public:
  LaneRows(const LocalShape& shape, const T* q_, const T* k_, const T* v_, Numbers bias_, T* out_)
      : s(shape), q(q_), k(k_), v(v_), bias(bias_), out(out_) {}

  // One query along the first axis, the run `y` along the second, the class `residue` of the third.
  void run(int64_t b, int64_t head, const Run& z, const Run& y, int64_t residue) {
    const LocalAxis& a = s.axis[2];
    look(s.axis[0], z, view_z);
    look(s.axis[1], y, view_y);
    const int64_t size = (a.queries - residue + a.dilation - 1) / a.dilation;
    if (size != columns) layout(size);
    take_bias(head);
    pack(k + b * s.k[0] + head * s.k[4] + residue * s.k[3], s.k, s.width, keys_t);
    pack(v + b * s.v[0] + head * s.v[4] + residue * s.v[3], s.v, s.value_width, values_t);
    const T* q_head = q + b * s.q[0] + head * s.q[4] + view_z.query[0] * s.q[1] + residue * s.q[3];
    T* out_head = out + b * s.out[0] + head * s.out[4] + view_z.query[0] * s.out[1] + residue * s.out[3];
    for (const LaneTile& tile : tiles) {
      for (int64_t first = 0; first < y.count; first += kGroup) {
        group(tile, first, std::min(kGroup, y.count - first), q_head, out_head);
      }
    }
  }

 private:
  void layout(int64_t size) {
    const LocalAxis& a = s.axis[2];
    columns = size;
    tiles = lane_tiles(a, size);
    margin = (a.window + kWidth - 1) / kWidth * kWidth;
    pitch = margin + (size + kWidth - 1) / kWidth * kWidth + margin + kWidth;
    if (pitch / kWidth % 2 == 0) pitch += kWidth;  // rows of channels then lie in all sets of the cache
    keys_t.clear();
    values_t.clear();
  }

  // The head's table times log2(e); zeros where there is none.
  void take_bias(int64_t head) {
    const int64_t z = s.axis[0].offsets(), y = s.axis[1].offsets(), x = s.axis[2].offsets();
    if (head == bias_head) return;
    bias_head = head;
    table.assign(z * y * x, 0.f);
    for (int64_t i = 0; bias.data && i < z * y * x; ++i) {
      const int64_t at = i / (y * x) * s.bias[1] + i / x % y * s.bias[2] + i % x * s.bias[3];
      table[i] = bias[head * s.bias[0] + at] * kLog2e;
    }
  }

  // Every row of keys that the run sees, transposed, with zeros left and right of it.
  void pack(const T* from, const int64_t (&strides)[5], int64_t width, std::vector<float>& to) {
    const int64_t rows = int64_t(view_z.position.size() * view_y.position.size());
    to.resize(rows * width * pitch + kWidth);
    float* row = to.data();
    const int64_t step = strides[3] * s.axis[2].dilation;
    const int64_t used = margin + (columns + kWidth - 1) / kWidth * kWidth;
    for (int64_t i : view_z.position) {
      for (int64_t j : view_y.position) {
        const bool real = i >= 0 && j >= 0;
        for (int64_t d = 0; d < width; ++d) {
          std::fill(row + d * pitch, row + d * pitch + (real ? margin : pitch), 0.f);
          std::fill(row + d * pitch + used, row + (d + 1) * pitch, 0.f);
        }
        if (real) transpose_rows(from + i * strides[1] + j * strides[2], step, columns, width, 1.f, row + margin, pitch);
        row += width * pitch;
      }
    }
  }

  // Rows `first` to `first + count` of the run, the tile's columns.
  void group(const LaneTile& tile, int64_t first, int64_t count, const T* q_head, T* out_head) {
    const int64_t rows_z = int64_t(view_z.position.size()), rows_y = int64_t(view_y.position.size());
    const int64_t step_q = s.q[3] * s.axis[2].dilation, step_out = s.out[3] * s.axis[2].dilation;
    const int64_t span = tile.distances * kWidth;
    queries.resize(kGroup * s.width * kWidth);
    scores.resize(kGroup * rows_z * rows_y * span);
    sums.assign(kGroup * s.value_width * kWidth, 0.f);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = q_head + view_y.query[first + r] * s.q[2] + tile.first * step_q;
      transpose_rows(row, step_q, tile.count, s.width, s.scale * kLog2e, queries.data() + r * s.width * kWidth, kWidth);
      for (int lane = 0; lane < kWidth; ++lane) peak[r][lane] = kMinusInfinity;
      used[r] = 0;
    }
    meet(tile, first, count, [&](int64_t key_row, int64_t r, int64_t rows) {
      const float* key = keys_t.data() + key_row * s.width * pitch + margin + tile.first + tile.low;
      const int64_t code_z = view_z.code[key_row / rows_y];
      float* to[kGroup];
      const float* biases[kGroup];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t code_y = view_y.code[(first + r + i) * rows_y + key_row % rows_y];
        to[i] = scores.data() + ((r + i) * rows_z * rows_y + used[r + i]++) * span;
        biases[i] = table.data() + (code_z * s.axis[1].offsets() + code_y) * s.axis[2].offsets();
        biases[i] += tile.low + s.axis[2].window - 1;
      }
      const int64_t parts = (tile.distances + kLaneSlots - 1) / kLaneSlots;
      for (int64_t part = 0, j = 0; part < parts; ++part) {
        const int64_t slots = tile.distances / parts + (part < tile.distances % parts);
        as_constant<kLaneRows>(rows, [&](auto R) {
          as_constant<kLaneSlots>(slots, [&](auto J) { score<R(), J()>(tile, key, r, j, to, biases); });
        });
        j += slots;
      }
    });
    for (int64_t r = 0; r < count; ++r) soften(scores.data() + r * rows_z * rows_y * span, used[r] * tile.distances, r);
    std::fill(used, used + count, 0);
    meet(tile, first, count, [&](int64_t key_row, int64_t r, int64_t rows) {
      const float* value = values_t.data() + key_row * s.value_width * pitch + margin + tile.first + tile.low;
      const float* from[kGroup];
      for (int64_t i = 0; i < rows; ++i) {
        from[i] = scores.data() + ((r + i) * rows_z * rows_y + used[r + i]++) * span;
      }
      as_constant<kLaneRows>(rows, [&](auto R) { gather<R()>(tile, value, r, from); });
    });
    for (int64_t r = 0; r < count; ++r) {
      store(r, tile.count, out_head + view_y.query[first + r] * s.out[2] + tile.first * step_out, step_out);
    }
  }

  // Calls f(row of keys, first row of the group, rows) for every row of keys and the rows that see it, few at a time.
  template <class F>
  void meet(const LaneTile&, int64_t first, int64_t count, const F& f) {
    const int64_t rows_y = int64_t(view_y.position.size());
    for (int64_t i = 0; i < int64_t(view_z.position.size()); ++i) {
      if (view_z.code[i] < 0) continue;
      for (int64_t j = 0; j < rows_y; ++j) {
        int64_t begin = 0, end = count;
        while (begin < end && view_y.code[(first + begin) * rows_y + j] < 0) ++begin;
        while (end > begin && view_y.code[(first + end - 1) * rows_y + j] < 0) --end;
        const int64_t parts = (end - begin + kLaneRows - 1) / kLaneRows;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t rows = (end - begin) / parts + (part < (end - begin) % parts);
          f(i * rows_y + j, begin + part * ((end - begin) / parts) + std::min(part, (end - begin) % parts), rows);
        }
      }
    }
  }

  // Scores of R rows of queries, from row r on, at J distances from j on.
  template <int R, int J>
  __attribute__((noinline)) void score(const LaneTile& tile, const float* key, int64_t r, int64_t j, float* const* to,
                                       const float* const* biases) {
    Vec sum[R][J];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int l = 0; l < J; ++l) sum[i][l] = vset(0.f);
    const float* query = queries.data() + r * s.width * kWidth;
    const int64_t next = s.width * kWidth;
    key += j;
    for (int64_t d = 0; d < s.width; ++d, key += pitch, query += kWidth) {
      Vec rows[R];
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) rows[i] = vload(query + i * next);
#pragma GCC unroll 4
      for (int l = 0; l < J; ++l) {
        Vec column = vload(key + l);
        COMPILED_ATTN_KEEP(column);
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) sum[i][l] = vfma(rows[i], column, sum[i][l]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      Vec greatest = vload(peak[r + i]);
#pragma GCC unroll 4
      for (int l = 0; l < J; ++l) {
        Vec value = vadd(sum[i][l], vset(biases[i][j + l]));
        if (!tile.whole[j + l]) {
          value = vless(vload(tile.seen.data() + (j + l) * kWidth), vset(0.f), vset(kMinusInfinity), value);
        }
        vstore(to[i] + (j + l) * kWidth, value);
        greatest = vmax(value, greatest);
      }
      vstore(peak[r + i], greatest);
    }
  }

  // Probabilities up to the later division, and their sum.
  void soften(float* values, int64_t count, int64_t r) {
    const Vec greatest = vload(peak[r]);
    const Vec shift = vless(greatest, vset(std::numeric_limits<float>::lowest()), vset(0.f), greatest);
    Vec part[4] = {vset(0.f), vset(0.f), vset(0.f), vset(0.f)};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec p = vexp2(vsub(vload(values + (i + j) * kWidth), shift));
        part[j] = vadd(part[j], p);
        vstore(values + (i + j) * kWidth, p);
      }
    }
    for (; i < count; ++i) {
      const Vec p = vexp2(vsub(vload(values + i * kWidth), shift));
      part[0] = vadd(part[0], p);
      vstore(values + i * kWidth, p);
    }
    vstore(total[r], vadd(vadd(part[0], part[1]), vadd(part[2], part[3])));
  }

  // sums of R rows, from row r on, += their probabilities times one row of values.
  template <int R>
  void gather(const LaneTile& tile, const float* value, int64_t r, const float* const* from) {
    int64_t d = 0;
    for (; d + kLaneValues <= s.value_width; d += kLaneValues) gather<R, kLaneValues>(tile, value, r, from, d);
    for (; d < s.value_width; ++d) gather<R, 1>(tile, value, r, from, d);
  }

  template <int R, int E>
  __attribute__((noinline)) void gather(const LaneTile& tile, const float* value, int64_t r, const float* const* from,
                                        int64_t d) {
    float* to = sums.data() + (r * s.value_width + d) * kWidth;
    const int64_t next = s.value_width * kWidth;
    const float* p[R];
    Vec sum[R][E];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      p[i] = from[i];
#pragma GCC unroll 4
      for (int e = 0; e < E; ++e) sum[i][e] = vload(to + i * next + e * kWidth);
    }
    value += d * pitch;
    for (int64_t j = 0; j < tile.distances; ++j) {
      Vec column[E];
#pragma GCC unroll 4
      for (int e = 0; e < E; ++e) {
        column[e] = vload(value + e * pitch + j);
        COMPILED_ATTN_KEEP(column[e]);
      }
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        const Vec weight = vload(p[i] + j * kWidth);
#pragma GCC unroll 4
        for (int e = 0; e < E; ++e) sum[i][e] = vfma(weight, column[e], sum[i][e]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int e = 0; e < E; ++e) vstore(to + i * next + e * kWidth, sum[i][e]);
  }

  void store(int64_t row, int64_t count, T* to, int64_t step) {
    float factor[kWidth];
    for (int i = 0; i < kWidth; ++i) factor[i] = total[row][i] == 0.f ? 0.f : 1.f / total[row][i];
    const Vec inverse = vload(factor);
    const float* from = sums.data() + row * s.value_width * kWidth;
    for (int64_t d = 0; d < s.value_width; d += kWidth) {
      const int64_t channels = std::min<int64_t>(kWidth, s.value_width - d);
      Vec r[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        r[i] = i < channels ? vmul(vload(from + (d + i) * kWidth), inverse) : vset(0.f);
      }
      vtranspose(r);
      for (int64_t i = 0; i < count; ++i) vstore(to + i * step + d, r[i], channels);
    }
  }

  const LocalShape& s;
  const T *q, *k, *v;
  const Numbers bias;
  T* out;
  View view_z, view_y;
  std::vector<LaneTile> tiles;
  int64_t columns = -1, margin = 0, pitch = 0, bias_head = -1;
  std::vector<float> keys_t, values_t, queries, scores, sums, table;
  float peak[kGroup][kWidth], total[kGroup][kWidth];
  int64_t used[kGroup];
};

}  // namespace
}  // namespace compiled_attn_cpp

#endif
