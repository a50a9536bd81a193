// Local attention with neighbouring queries of the last axis in the vectors' lanes, for windows that move by one.
//
// For slot j of its window, lane l meets the key at start(l) + j. Where windows follow each other, start(l) is start(0) +
// l: one load of the transposed row at an offset. Near a border neighbours share a start, and the same load is permuted,
// by lanes that are the same for all slots, since start(l) - start(0) is at most l. So only the keys of a window are
// multiplied, where a tile (local_tiles.h) multiplies the union of its windows. What a lane does not see is hidden.
//
// A task is a run of rows of one head; its memory plan (floats, W = lanes of a vector, J = slots of a vector's windows):
//
//   keys    [kGroup + window - 1, D, columns]  transposed, a ring of the rows that a group sees
//   values  [kGroup + window - 1, columns, Dv] Dv rounded up to vectors
//   queries [D, kGroup, W]                     a group of rows, transposed, times scale * log2(e)
//   scores  [kGroup, window of rows, J, W]     turned into probabilities where they lie
//   sums    [kGroup, W, Dv]
//
// A row of keys meets all rows of the group that see it, so that a loaded vector is used by several of them. Scores have
// queries in their lanes; sums have channels there, so that values need no transposing and no query of a vector is idle.
#ifndef COMPILED_ATTN_CPP_LOCAL_LANES_H
#define COMPILED_ATTN_CPP_LOCAL_LANES_H

#include <vector>

#include "attention.h"
#include "local_shape.h"

namespace compiled_attn_cpp {
namespace {

constexpr int64_t kGroup = 6, kBlock = kGroup * kWidth;  // rows of queries; one channel of them
#if defined(COMPILED_ATTN_AVX512) || defined(__aarch64__)
constexpr int kLaneRows = 6, kLaneSlots = 4, kLaneSums = 24;  // register tiles of 32 registers
#else
constexpr int kLaneRows = 3, kLaneSlots = 3, kLaneSums = 12;  // of 16
#endif

// A vector of queries of the last axis: the slots of their windows that any of them sees, and which lanes see which.
struct LaneTile {
  int64_t first, count, key, slots;  // key: the first lane's at slot 0
  int64_t distance;                  // the least at slot 0, counted from the least of the bias
  Lanes keys, distances;             // of each lane, counted from those
  int32_t start[kWidth];             // `keys` once more
  std::vector<float> seen;           // [slots, W], at or above 0 where a lane sees
  bool hides;                        // whether one lane does not see them all
};

inline std::vector<LaneTile> lane_tiles(const LocalAxis& a, int64_t size) {
  const int64_t parts = (size + kWidth - 1) / kWidth;
  std::vector<LaneTile> tiles(parts);
  for (int64_t i = 0; i < parts; ++i) {
    LaneTile& t = tiles[i];
    t.first = i * (size / parts) + std::min(i, size % parts);
    t.count = size / parts + (i < size % parts);
    int64_t start[kWidth], low[kWidth], high[kWidth], least = a.window, most = 0;
    for (int64_t lane = 0; lane < t.count; ++lane) {
      const int64_t place = t.first + lane;
      start[lane] = start_of(a, place, size);
      low[lane] = a.border == kZero ? 0 : std::max<int64_t>(-start[lane], 0);
      high[lane] = a.border == kZero ? a.window : std::min(a.window, size - start[lane]);
      if (a.causal) high[lane] = std::min(high[lane], place + 1 - start[lane]);
      least = std::min(least, low[lane]);
      most = std::max(most, high[lane]);
    }
    const int64_t last = t.count - 1;
    int32_t distances[kWidth] = {};
    std::fill(t.start, t.start + kWidth, 0);
    for (int64_t lane = 0; lane < t.count; ++lane) {
      t.start[lane] = int32_t(start[lane] - start[0]);
      distances[lane] = int32_t(start[lane] - lane - (start[last] - last));
    }
    std::memcpy(&t.keys, t.start, sizeof(t.keys));
    std::memcpy(&t.distances, distances, sizeof(t.distances));
    t.key = start[0] + least;
    t.distance = start[last] + least - (t.first + last) + a.window - 1;
    t.slots = most - least;
    t.seen.assign(t.slots * kWidth, 0.f);
    t.hides = false;
    for (int64_t j = 0; j < t.slots; ++j) {
      for (int64_t lane = 0; lane < t.count; ++lane) {
        const bool visible = least + j >= low[lane] && least + j < high[lane];
        t.seen[j * kWidth + lane] = visible ? 0.f : -1.f;
        t.hides = t.hides || !visible;
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
    groups_of(y.count);
    layout(size, int64_t(view_z.position.size()) * ring);
    if (head != bias_head) read_table(s, bias, head, kLog2e, table);
    bias_head = head;
    const T* q_head = q + b * s.q[0] + head * s.q[4] + view_z.query[0] * s.q[1] + residue * s.q[3];
    const T* k_head = k + b * s.k[0] + head * s.k[4] + residue * s.k[3];
    const T* v_head = v + b * s.v[0] + head * s.v[4] + residue * s.v[3];
    T* out_head = out + b * s.out[0] + head * s.out[4] + view_z.query[0] * s.out[1] + residue * s.out[3];
    const int64_t planes = int64_t(view_z.position.size());
    int64_t packed = groups.empty() ? 0 : groups[0].low;
    for (const Group& g : groups) {
      for (packed = std::max(packed, g.low); packed < g.high; ++packed) {
        for (int64_t plane = 0; plane < planes; ++plane) {
          const int64_t slot = plane * ring + packed % ring;
          pack_keys(k_head, plane, packed, keys_t + slot * s.width * pitch);
          pack_values(v_head, plane, packed, values + slot * value_row);
        }
      }
      for (const LaneTile& tile : tiles) group(tile, g, q_head, out_head);
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

  // One piece of memory: the system takes several back at the end of each call and hands them out page by page anew.
  void layout(int64_t size, int64_t rows) {
    if (size == columns && rows <= slots) return;
    const LocalAxis& a = s.axis[2];
    if (size != columns) tiles = lane_tiles(a, size);
    columns = size;
    slots = rows;
    int64_t span = 0;
    for (const LaneTile& tile : tiles) span = std::max(span, tile.slots * kWidth);
    margin = (a.window + kWidth - 1) / kWidth * kWidth;
    pitch = margin + (size + kWidth - 1) / kWidth * kWidth + margin + kWidth;
    if (pitch / kWidth % 2 == 0) pitch += kWidth;  // rows of channels then lie in all sets of the cache
    padded = (s.value_width + kWidth - 1) / kWidth * kWidth;
    value_row = (margin + size + margin) * padded;
    const int64_t ring_size = slots * (s.width * pitch + value_row);
    keys_t = memory.room(ring_size + kBlock * (s.width + padded) + kGroup * slots * span);
    values = keys_t + slots * s.width * pitch;
    queries = keys_t + ring_size;
    sums = queries + kBlock * s.width;
    scores = sums + kBlock * padded;
    std::memset(keys_t, 0, ring_size * sizeof(float));
  }

  // One row of keys, transposed. What lies left and right of a row is zero since `layout`.
  void pack_keys(const T* from, int64_t plane, int64_t row, float* to) {
    const int64_t i = view_z.position[plane], j = view_y.position[row];
    if (i < 0 || j < 0) {
      std::memset(to, 0, s.width * pitch * sizeof(float));
    } else {
      const int64_t step = s.k[3] * s.axis[2].dilation;
      transpose_rows(from + i * s.k[1] + j * s.k[2], step, columns, s.width, 1.f, to + margin, pitch);
    }
  }

  void pack_values(const T* from, int64_t plane, int64_t row, float* to) {
    const int64_t i = view_z.position[plane], j = view_y.position[row];
    if (i < 0 || j < 0) {
      std::memset(to, 0, value_row * sizeof(float));
      return;
    }
    const int64_t step = s.v[3] * s.axis[2].dilation, whole = s.value_width / kWidth * kWidth;
    from += i * s.v[1] + j * s.v[2];
    to += margin * padded;
    for (int64_t x = 0; x < columns; ++x, from += step, to += padded) {
      for (int64_t d = 0; d < whole; d += kWidth) vstore(to + d, vload(from + d));
      if (whole < s.value_width) vstore(to + whole, vload(from + whole, s.value_width - whole));
    }
  }

  // The group's rows, the tile's columns.
  void group(const LaneTile& tile, const Group& g, const T* q_head, T* out_head) {
    const int64_t first = g.first, count = g.count;
    const int64_t rows_z = int64_t(view_z.position.size()), rows_y = int64_t(view_y.position.size());
    const int64_t step_q = s.q[3] * s.axis[2].dilation, step_out = s.out[3] * s.axis[2].dilation;
    const int64_t span = tile.slots * kWidth;
    std::memset(sums, 0, kBlock * padded * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      const T* row = q_head + view_y.query[first + r] * s.q[2] + tile.first * step_q;
      transpose_rows(row, step_q, tile.count, s.width, s.scale * kLog2e, queries + r * kWidth, kBlock);
      for (int lane = 0; lane < kWidth; ++lane) peak[r][lane] = kMinusInfinity;
      used[r] = 0;
    }
    meet(g, [&](int64_t plane, int64_t row, int64_t r, int64_t rows) {
      const float* key = keys_t + (plane * ring + row % ring) * s.width * pitch;
      key += margin + tile.key;
      const int64_t code_z = view_z.code[plane];
      float* to[kGroup];
      const float* biases[kGroup];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t code_y = view_y.code[(first + r + i) * rows_y + row];
        to[i] = scores + ((r + i) * rows_z * ring + used[r + i]++) * span;
        biases[i] = table.data() + (code_z * s.axis[1].offsets() + code_y) * s.axis[2].offsets();
        biases[i] += tile.distance;
      }
      const int64_t parts = (tile.slots + kLaneSlots - 1) / kLaneSlots;
      for (int64_t part = 0, j = 0; part < parts; ++part) {
        const int64_t count = tile.slots / parts + (part < tile.slots % parts);
        as_constant<kLaneRows>(rows, [&](auto R) {
          as_constant<kLaneSlots>(count, [&](auto J) { score<R(), J()>(tile, key, r, j, to, biases); });
        });
        j += count;
      }
    });
    for (int64_t r = 0; r < count; ++r) soften(scores + r * rows_z * ring * span, used[r] * tile.slots, r);
    std::fill(used, used + count, 0);
    meet(g, [&](int64_t plane, int64_t row, int64_t r, int64_t rows) {
      const float* value = values + (plane * ring + row % ring) * value_row + (margin + tile.key) * padded;
      const float* from[kGroup];
      for (int64_t i = 0; i < rows; ++i) {
        from[i] = scores + ((r + i) * rows_z * ring + used[r + i]++) * span;
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

  // Scores of R rows of queries, from row r on, at J slots from j on.
  template <int R, int J>
  __attribute__((noinline)) void score(const LaneTile& tile, const float* key, int64_t r, int64_t j, float* const* to,
                                       const float* const* biases) {
    Vec sum[R][J];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int l = 0; l < J; ++l) sum[i][l] = vset(0.f);
    const float* query = queries + r * kWidth;
    const int64_t below = pitch;
    const Lanes lanes = tile.keys, distances = tile.distances;
    key += j;
    for (int64_t d = s.width; d > 0; --d, key += below, query += kBlock) {
      Vec rows[R];
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        rows[i] = vload(query + i * kWidth);
        COMPILED_ATTN_KEEP(rows[i]);
      }
#pragma GCC unroll 4
      for (int l = 0; l < J; ++l) {
        Vec column = vpermute(vload(key + l), lanes);
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) sum[i][l] = vfma(rows[i], column, sum[i][l]);
      }
    }
    const float* seen = tile.hides ? tile.seen.data() + j * kWidth : nullptr;
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const float* bias_row = biases[i] + j;
      float* score_row = to[i] + j * kWidth;
      Vec greatest = vload(peak[r + i]);
#pragma GCC unroll 4
      for (int l = 0; l < J; ++l) sum[i][l] = vadd(sum[i][l], vpermute(vload(bias_row + l), distances));
      if (seen) {
#pragma GCC unroll 4
        for (int l = 0; l < J; ++l) {
          sum[i][l] = vless(vload(seen + l * kWidth), vset(0.f), vset(kMinusInfinity), sum[i][l]);
        }
      }
#pragma GCC unroll 4
      for (int l = 0; l < J; ++l) {
        vstore(score_row + l * kWidth, sum[i][l]);
        greatest = vmax(sum[i][l], greatest);
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
    for (; d + 2 * kWidth <= padded; d += 2 * kWidth) gather<R, 2>(tile, value, r, from, d);
    if (d < padded) gather<R, 1>(tile, value, r, from, d);
  }

  template <int R, int E>
  __attribute__((noinline)) void gather(const LaneTile& tile, const float* value, int64_t r, const float* const* from,
                                        int64_t d) {
    constexpr int Q = std::min(kLaneSums / (R * E), 4);
    float* to = sums + r * kWidth * padded + d;
    int64_t x = 0;
    for (; x + Q <= tile.count; x += Q) gather<R, E, Q>(tile, value + d, x, from, to + x * padded);
    for (; x < tile.count; ++x) gather<R, E, 1>(tile, value + d, x, from, to + x * padded);
  }

  // The same for E vectors of channels of Q queries, from query x on.
  template <int R, int E, int Q>
  COMPILED_ATTN_INLINE void gather(const LaneTile& tile, const float* value, int64_t x, const float* const* from,
                                   float* to) {
    const int64_t next = kWidth * padded, step = padded;
    const float *p[R], *column[Q];
    Vec sum[R][Q][E];
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) column[i] = value + tile.start[x + i] * step;
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      p[i] = from[i] + x;
#pragma GCC unroll 4
      for (int l = 0; l < Q; ++l)
#pragma GCC unroll 2
        for (int e = 0; e < E; ++e) sum[i][l][e] = vload(to + i * next + l * step + e * kWidth);
    }
    const int64_t span = tile.slots * kWidth;
    for (int64_t j = 0; j < span; j += kWidth) {
#pragma GCC unroll 4
      for (int l = 0; l < Q; ++l) {
        Vec v[E];
#pragma GCC unroll 2
        for (int e = 0; e < E; ++e) {
          v[e] = vload(column[l] + e * kWidth);
          COMPILED_ATTN_KEEP(v[e]);
        }
        column[l] += step;
#pragma GCC unroll 6
        for (int i = 0; i < R; ++i) {
          Vec weight = vset(p[i][j + l]);
          if constexpr (E > 1) COMPILED_ATTN_KEEP(weight);
#pragma GCC unroll 2
          for (int e = 0; e < E; ++e) sum[i][l][e] = vfma(weight, v[e], sum[i][l][e]);
        }
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int l = 0; l < Q; ++l)
#pragma GCC unroll 2
        for (int e = 0; e < E; ++e) vstore(to + i * next + l * step + e * kWidth, sum[i][l][e]);
  }

  void store(int64_t row, int64_t count, T* to, int64_t step) {
    const float* from = sums + row * kWidth * padded;
    const int64_t whole = s.value_width / kWidth * kWidth;
    for (int64_t x = 0; x < count; ++x, from += padded, to += step) {
      const Vec inverse = vset(total[row][x] == 0.f ? 0.f : 1.f / total[row][x]);
      for (int64_t d = 0; d < whole; d += kWidth) vstore(to + d, vmul(vload(from + d), inverse));
      if (whole < s.value_width) vstore(to + whole, vmul(vload(from + whole), inverse), s.value_width - whole);
    }
  }

  const LocalShape& s;
  const T *q, *k, *v;
  const Numbers bias;
  T* out;
  View view_z, view_y;
  std::vector<LaneTile> tiles;
  std::vector<Group> groups;
  int64_t columns = -1, slots = 0, margin = 0, pitch = 0, padded = 0, value_row = 0, ring = 1, bias_head = -1;
  Lines memory;
  float *keys_t = nullptr, *values = nullptr, *queries = nullptr, *scores = nullptr, *sums = nullptr;
  std::vector<float> table;
  alignas(64) float peak[kGroup][kWidth], total[kGroup][kWidth];
  int64_t used[kGroup];
};

}  // namespace
}  // namespace compiled_attn_cpp

#endif
