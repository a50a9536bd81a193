// Local attention with neighbouring queries of the last axis in the vectors' lanes, for windows that move by one.
//
// For one distance o along the last axis, lane l of a row of keys is the key of query x0 + l at x0 + l + o: one load of
// the transposed row at an offset. So only the keys of a window are multiplied, where a tile (local_tiles.h) multiplies
// the union of its windows. Lanes near a border see other distances than the rest: the distances of all lanes are
// taken, and what a lane does not see is hidden.
//
// A task is a run of rows of one head; its memory plan (floats, W = lanes of a vector, J = distances of a vector):
//
//   keys    [kGroup + window - 1, D, columns]  transposed, a ring of the rows that a group sees; the values likewise
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

// W rows of W channels, `step` apart, as W vectors of one channel each; zeros for rows from `rows` on.
template <class T>
COMPILED_ATTN_INLINE void load_square(const T* from, int64_t step, int64_t rows, Vec (&r)[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) r[i] = i < rows ? vload(from + i * step) : vset(0.f);
  vtranspose(r);
}

// The same of fewer channels.
template <class T>
void load_corner(const T* from, int64_t step, int64_t rows, int64_t channels, Vec (&r)[kWidth]) {
  for (int64_t i = 0; i < kWidth; ++i) r[i] = i < rows ? vload(from + i * step, channels) : vset(0.f);
  vtranspose(r);
}

// to [channels, pitch] = rows of `count` positions, transposed, times `unit`; zeros up to a multiple of W positions.
template <class T>
void transpose_rows(const T* from, int64_t step, int64_t count, int64_t width, float unit, float* to, int64_t pitch) {
  const Vec factor = vset(unit);
  for (int64_t at = 0; at < count; at += kWidth) {
    const int64_t rows = std::min<int64_t>(kWidth, count - at);
    for (int64_t d = 0; d < width; d += kWidth) {
      const int64_t channels = std::min<int64_t>(kWidth, width - d);
      const T* corner = from + at * step + d;
      float* target = to + d * pitch + at;
      Vec r[kWidth];
      if (channels == kWidth) {
        load_square(corner, step, rows, r);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) vstore(target + i * pitch, vmul(r[i], factor));
      } else {
        load_corner(corner, step, rows, channels, r);
        for (int64_t i = 0; i < channels; ++i) vstore(target + i * pitch, vmul(r[i], factor));
      }
    }
  }
}

// Asks for rows of `bytes` that are read next: they lie far apart, beyond what the hardware foresees.
inline void ask_for(const void* from, int64_t step, int64_t count, int64_t bytes) {
  const char* row = static_cast<const char*>(from);
  for (int64_t i = 0; i < count; ++i, row += step) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
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
    groups_of(y.count);
    const T* q_head = q + b * s.q[0] + head * s.q[4] + view_z.query[0] * s.q[1] + residue * s.q[3];
    const T* k_head = k + b * s.k[0] + head * s.k[4] + residue * s.k[3];
    const T* v_head = v + b * s.v[0] + head * s.v[4] + residue * s.v[3];
    T* out_head = out + b * s.out[0] + head * s.out[4] + view_z.query[0] * s.out[1] + residue * s.out[3];
    const int64_t planes = int64_t(view_z.position.size());
    float* keys_to = keys_t.room(planes * ring * s.width * pitch);
    float* values_to = values_t.room(planes * ring * s.value_width * pitch);
    int64_t packed = groups.empty() ? 0 : groups[0].low;
    for (size_t i = 0; i < groups.size(); ++i) {
      const Group& g = groups[i];
      for (packed = std::max(packed, g.low); packed < g.high; ++packed) {
        for (int64_t plane = 0; plane < planes; ++plane) {
          const int64_t slot = plane * ring + packed % ring;
          pack(k_head, s.k, plane, packed, s.width, keys_to + slot * s.width * pitch);
          pack(v_head, s.v, plane, packed, s.value_width, values_to + slot * s.value_width * pitch);
        }
      }
      for (size_t tile = 0; tile < tiles.size(); ++tile) {
        if (i + 1 < groups.size()) foresee(groups[i + 1], packed, tile, q_head, k_head, v_head);
        group(tiles[tile], g, q_head, out_head);
      }
    }
  }

 private:
  // Rows of queries, and the rows of keys that they see among those of the run.
  struct Group {
    int64_t first, count, low, high;
  };

  void groups_of(int64_t count) {
    const int64_t parts = (count + kGroup - 1) / kGroup, rows_y = int64_t(view_y.position.size());
    groups.clear();
    ring = 1;
    for (int64_t i = 0, first = 0; i < parts; ++i) {
      Group g{first, count / parts + (i < count % parts), rows_y, 0};
      for (int64_t r = first; r < first + g.count; ++r) {
        for (int64_t j = 0; j < rows_y; ++j) {
          if (view_y.code[r * rows_y + j] == kUnseen) continue;
          g.low = std::min(g.low, j);
          g.high = std::max(g.high, j + 1);
        }
      }
      ring = std::max(ring, g.high - g.low);
      first += g.count;
      groups.push_back(g);
    }
  }

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

  // One row of keys, transposed. What lies left and right of a row is zero since `layout`.
  void pack(const T* from, const int64_t (&strides)[5], int64_t plane, int64_t row, int64_t width, float* to) {
    const int64_t i = view_z.position[plane], j = view_y.position[row];
    if (i < 0 || j < 0) {
      std::memset(to, 0, width * pitch * sizeof(float));
    } else {
      const int64_t step = strides[3] * s.axis[2].dilation;
      transpose_rows(from + i * strides[1] + j * strides[2], step, columns, width, 1.f, to + margin, pitch);
    }
  }

  // Asks for a tile's share of what the next group reads.
  void foresee(const Group& next, int64_t packed, size_t tile, const T* q_head, const T* k_head, const T* v_head) const {
    const LaneTile& t = tiles[tile];
    const int64_t d = s.axis[2].dilation;
    for (int64_t r = 0; r < next.count; ++r) {
      const T* row = q_head + view_y.query[next.first + r] * s.q[2] + t.first * d * s.q[3];
      ask_for(row, d * s.q[3] * sizeof(T), t.count, s.width * sizeof(T));
    }
    for (int64_t i : view_z.position) {
      for (int64_t row = packed; row < next.high; ++row) {
        const int64_t j = view_y.position[row];
        if (i < 0 || j < 0) continue;
        const T* key = k_head + i * s.k[1] + j * s.k[2] + t.first * d * s.k[3];
        const T* value = v_head + i * s.v[1] + j * s.v[2] + t.first * d * s.v[3];
        ask_for(key, d * s.k[3] * sizeof(T), t.count, s.width * sizeof(T));
        ask_for(value, d * s.v[3] * sizeof(T), t.count, s.value_width * sizeof(T));
      }
    }
  }

  // The group's rows, the tile's columns.
  void group(const LaneTile& tile, const Group& g, const T* q_head, T* out_head) {
    const int64_t first = g.first, count = g.count;
    const int64_t rows_z = int64_t(view_z.position.size()), rows_y = int64_t(view_y.position.size());
    const int64_t step_q = s.q[3] * s.axis[2].dilation, step_out = s.out[3] * s.axis[2].dilation;
    const int64_t span = tile.distances * kWidth;
    queries.room(kGroup * s.width * kWidth);
    scores.room(kGroup * rows_z * ring * span);
    sums.room(kGroup * s.value_width * kWidth);
    std::memset(sums.data(), 0, count * s.value_width * kWidth * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      const T* row = q_head + view_y.query[first + r] * s.q[2] + tile.first * step_q;
      transpose_rows(row, step_q, tile.count, s.width, s.scale * kLog2e, queries.data() + r * s.width * kWidth, kWidth);
      for (int lane = 0; lane < kWidth; ++lane) peak[r][lane] = kMinusInfinity;
      used[r] = 0;
    }
    meet(g, [&](int64_t plane, int64_t row, int64_t r, int64_t rows) {
      const float* key = keys_t.data() + (plane * ring + row % ring) * s.width * pitch;
      key += margin + tile.first + tile.low;
      const int64_t code_z = view_z.code[plane];
      float* to[kGroup];
      const float* biases[kGroup];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t code_y = view_y.code[(first + r + i) * rows_y + row];
        to[i] = scores.data() + ((r + i) * rows_z * ring + used[r + i]++) * span;
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
    for (int64_t r = 0; r < count; ++r) soften(scores.data() + r * rows_z * ring * span, used[r] * tile.distances, r);
    std::fill(used, used + count, 0);
    meet(g, [&](int64_t plane, int64_t row, int64_t r, int64_t rows) {
      const float* value = values_t.data() + (plane * ring + row % ring) * s.value_width * pitch;
      value += margin + tile.first + tile.low;
      const float* from[kGroup];
      for (int64_t i = 0; i < rows; ++i) {
        from[i] = scores.data() + ((r + i) * rows_z * ring + used[r + i]++) * span;
      }
      as_constant<kLaneRows>(rows, [&](auto R) { gather<R()>(tile, value, r, from); });
    });
    for (int64_t r = 0; r < count; ++r) {
      store(r, tile.count, out_head + view_y.query[first + r] * s.out[2] + tile.first * step_out, step_out);
    }
  }

  // Calls f(plane and row of keys, first row of the group, rows) for every row of keys and the rows that see it, few
  // at a time.
  template <class F>
  void meet(const Group& g, const F& f) {
    const int64_t rows_y = int64_t(view_y.position.size());
    for (int64_t i = 0; i < int64_t(view_z.position.size()); ++i) {
      if (view_z.code[i] < 0) continue;
      for (int64_t j = g.low; j < g.high; ++j) {
        int64_t begin = 0, end = g.count;
        while (begin < end && view_y.code[(g.first + begin) * rows_y + j] < 0) ++begin;
        while (end > begin && view_y.code[(g.first + end - 1) * rows_y + j] < 0) --end;
        const int64_t parts = (end - begin + kLaneRows - 1) / kLaneRows;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t rows = (end - begin) / parts + (part < (end - begin) % parts);
          f(i, j, begin + part * ((end - begin) / parts) + std::min(part, (end - begin) % parts), rows);
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
      if (channels == kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) r[i] = vmul(vload(from + (d + i) * kWidth), inverse);
        vtranspose(r);
        if (count == kWidth) {
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) vstore(to + i * step + d, r[i]);
        } else {
          for (int64_t i = 0; i < count; ++i) vstore(to + i * step + d, r[i]);
        }
      } else {
        for (int i = 0; i < kWidth; ++i) {
          r[i] = i < channels ? vmul(vload(from + (d + i) * kWidth), inverse) : vset(0.f);
        }
        vtranspose(r);
        for (int64_t i = 0; i < count; ++i) vstore(to + i * step + d, r[i], channels);
      }
    }
  }

  const LocalShape& s;
  const T *q, *k, *v;
  const Numbers bias;
  T* out;
  View view_z, view_y;
  std::vector<LaneTile> tiles;
  std::vector<Group> groups;
  int64_t columns = -1, margin = 0, pitch = 0, ring = 1, bias_head = -1;
  Lines keys_t, values_t, queries, scores, sums;
  std::vector<float> table;
  alignas(64) float peak[kGroup][kWidth], total[kGroup][kWidth];
  int64_t used[kGroup];
};

}  // namespace
}  // namespace compiled_attn_cpp

#endif
