// Mixing of each place's neighborhood by weights that are given:
//
//   out[query, m] = sum over the slots of the query's window of weights[query, m, slot] v[key]
//
//   weights [B, *L, H, M, K] and v [B, *keys, H, D] are read in place by any strides; one to three spatial axes, those
//   that are missing in front have one query and one key. out [B, *L, H, M, D] is written by its strides, the last 1.
//   Slots count a window's places in row-major order; one without a key adds nothing.
//
// A register tile holds the sums of up to four queries, five mixes and kMixVectors vectors of channels, to which slot
// after slot is added. Heads are gone through at each place, as they lie in memory, but no more of them in a row than
// keep their windows in the first-level cache, where those of neighboring queries meet. Rows of values that are no
// vectors of float32 (bfloat16, a width between vectors, channels that lie apart) are widened once into a thread's own
// memory, which holds those that a row of queries sees and keeps what the next row sees too.
#ifndef COMPILED_ATTN_CPP_NEIGHBORHOOD_H
#define COMPILED_ATTN_CPP_NEIGHBORHOOD_H

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "lines.h"
#include "local_shape.h"

namespace compiled_attn_cpp {
namespace {

// Strides in elements: batch, three spatial axes, head, then the weights' mix and slot, the values' channel, the
// output's mix.
struct NeighborhoodShape {
  int64_t batch, heads, mixes, width;
  LocalAxis axis[3];
  int64_t weights[7], v[6], out[6];
};

constexpr int kMostMixes = 5;
#if defined(COMPILED_ATTN_AVX512) || defined(__aarch64__)
constexpr int kMixVectors = 4;  // 32 registers
#else
constexpr int kMixVectors = 2;  // 16 registers
#endif
constexpr int64_t kMixThreads = 1 << 15;  // multiplications below which one thread does the work
constexpr int64_t kMixTasks = 4;          // a thread
constexpr int64_t kLeastMixRows = 4;      // of queries, in a task
constexpr int64_t kMixWindows = 6 << 10;  // floats of windows that are read in a row, a share of the first-level cache
constexpr int64_t kMixRing = 96 << 10;    // floats of widened rows, a share of the second-level cache

// Queries of a register tile, so that its sums do not wait for each other.
constexpr int queries_together(int mixes) { return mixes == 1 ? 4 : mixes == 2 ? 2 : 1; }

// A query's window along an axis: where its first slot's key lies, perhaps beyond the ends, and its slots with keys.
struct Span {
  int64_t first, low, high;
};

inline std::vector<Span> spans_of(const LocalAxis& a) {
  std::vector<Span> spans(a.queries);
  for (int64_t i = 0; i < a.queries; ++i) {
    const int64_t residue = i % a.dilation;
    const int64_t size = residue < a.keys ? (a.keys - residue + a.dilation - 1) / a.dilation : 0;
    const int64_t start = start_of(a, i / a.dilation, size);
    const int64_t low = std::min(std::max<int64_t>(-start, 0), a.window);
    spans[i] = {residue + start * a.dilation, low, std::max(low, std::min(size - start, a.window))};
  }
  return spans;
}

// What all tasks share: every axis's windows, and rows of queries in an order in which neighbors see the same keys.
struct NeighborhoodPlan {
  std::vector<Span> spans[3];
  std::vector<int64_t> rows;

  explicit NeighborhoodPlan(const NeighborhoodShape& s) {
    for (int i = 0; i < 3; ++i) spans[i] = spans_of(s.axis[i]);
    for (int64_t residue = 0; residue < s.axis[1].dilation; ++residue) {
      for (int64_t y = residue; y < s.axis[1].queries; y += s.axis[1].dilation) rows.push_back(y);
    }
  }
};

// A task: rows of queries of one plane, by their numbers in the plan, some heads, and vectors of channels.
struct NeighborhoodPart {
  int64_t batch, plane, begin, end, head, heads, channel, vectors;
};

template <class T>
class Neighborhood {
 public:
  Neighborhood(const NeighborhoodShape& shape, const NeighborhoodPlan& plan_, const T* weights_, const T* v_, T* out_)
      : s(shape), plan(plan_), weights(weights_), v(v_), out(out_) {
    direct = reads_in_place(s);
    places.resize(s.axis[0].window * s.axis[1].window);
  }

  // Whether values are read where they lie.
  static bool reads_in_place(const NeighborhoodShape& s) {
    return std::is_same_v<T, float> && s.v[5] == 1 && s.width % kWidth == 0;
  }

  void run(const NeighborhoodPart& part_) {
    part = part_;
    step = direct ? s.v[3] : part.vectors * kWidth;
    apart = direct ? s.v[4] : s.axis[2].keys * step;
    const int64_t window = s.axis[0].window * s.axis[1].window * (s.axis[2].window + queries_together(1) - 1);
    together = std::max<int64_t>(1, kMixWindows / (window * part.vectors * kWidth));
    from = v + part.batch * s.v[0] + part.head * s.v[4] + part.channel * s.v[5];
    if (!direct) ring = memory.room(int64_t(places.size()) * part.heads * apart);
    std::fill(places.begin(), places.end(), -1);
    as_constant<kMixVectors>(part.vectors, [&](auto vectors) {
      for (int64_t i = part.begin; i < part.end; ++i) row<vectors()>(plan.rows[i]);
    });
  }

 private:
  // A row of values that a row of queries sees, those of the task's first head, and the number of its first slot.
  struct Line {
    const float* values;
    int64_t slot;
  };

  template <int V>
  void row(int64_t y) {
    const Span &tall = plan.spans[1][y], &deep = plan.spans[0][part.plane];
    lines.clear();
    for (int64_t i = deep.low; i < deep.high; ++i) {
      for (int64_t j = tall.low; j < tall.high; ++j) {
        const int64_t z = deep.first + i * s.axis[0].dilation, at = tall.first + j * s.axis[1].dilation;
        const int64_t slot = i * s.axis[1].window + j;
        lines.push_back({values(z, at, i), slot * s.axis[2].window});
      }
    }
    const int64_t row_of[3] = {part.batch, part.plane, y};
    given = weights + part.head * s.weights[4];
    to = out + part.head * s.out[4] + part.channel;
    for (int i = 0; i < 3; ++i) given += row_of[i] * s.weights[i], to += row_of[i] * s.out[i];
    for (int64_t head = 0; head < part.heads; head += together) {
      const int64_t end = std::min(part.heads, head + together);
      if (s.mixes <= 2) {
        as_constant<2>(s.mixes, [&](auto mixes) { columns<mixes(), V>(head, end); });
      } else {
        columns<kMostMixes, V>(head, end);
      }
    }
  }

  // All queries of a row, for some of the task's heads; those of a tile have keys in the same slots.
  template <int M, int V>
  void columns(int64_t first_head, int64_t end_head) {
    constexpr int most = queries_together(M);
    const std::vector<Span>& across = plan.spans[2];
    const int64_t end = int64_t(across.size()), tiles = (s.mixes + M - 1) / M;
    for (int64_t x = 0, count = 1; x < end; x += count) {
      const Span& span = across[x];
      count = 1;
      while (count < most && x + count < end && across[x + count].low == span.low && across[x + count].high == span.high)
        ++count;
      if (count < most) count = 1;
      for (int64_t head = first_head; head < end_head; ++head) {
        load_weights(x, head, count);
        for (int64_t i = 0, m = 0; i < tiles; ++i) {
          const int64_t mixes = s.mixes / tiles + (i < s.mixes % tiles);
          if (count > 1) {
            tile<most, M, V>(x, head, m);
          } else {
            as_constant<M>(mixes, [&](auto own) { tile<1, own(), V>(x, head, m); });
          }
          m += mixes;
        }
      }
    }
  }

  // Finds a tile's weights where they lie; those of bfloat16 are widened.
  void load_weights(int64_t x, int64_t head, int64_t count) {
    const T* p = given + x * s.weights[3] + head * s.weights[4];
    if constexpr (std::is_same_v<T, float>) {
      mixed = {p, s.weights[3], s.weights[5], s.weights[6]};
    } else {
      const int64_t slots = s.axis[0].window * s.axis[1].window * s.axis[2].window;
      const bool joined = s.weights[6] == 1 && s.weights[5] == slots;
      const int64_t lines_of_query = joined ? 1 : s.mixes, size = joined ? s.mixes * slots : slots;
      const int64_t pitch = (size + kWidth - 1) / kWidth * kWidth, query = lines_of_query * pitch;
      float* wide = widened.room(queries_together(1) * query);
      for (int64_t q = 0; q < count; ++q) {
        for (int64_t m = 0; m < lines_of_query; ++m) {
          widen_line(p + q * s.weights[3] + m * s.weights[5], s.weights[6], size, wide + q * query + m * pitch);
        }
      }
      mixed = {wide, query, joined ? slots : pitch, 1};
    }
  }

  static void widen_line(const T* p, int64_t apart, int64_t count, float* to) {
    int64_t i = 0;
    for (; apart == 1 && i + kWidth <= count; i += kWidth) vstore(to + i, vload(p + i));
    for (; i < count; ++i) to[i] = to_float(p[i * apart]);
  }

  // M mixes of Q queries of a head from (x, m) on, V vectors of channels.
  template <int Q, int M, int V>
  __attribute__((noinline)) void tile(int64_t x, int64_t head, int64_t m) {
    const Span* across = plan.spans[2].data() + x;
    const int64_t low = across->low, high = across->high, next = s.axis[2].dilation * step;
    const int64_t slot = mixed.slot, mix = mixed.mix;
    Vec sum[Q][M][V];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 5
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) sum[q][i][u] = vset(0.f);
    for (const Line& line : lines) {
      const float *value[Q], *weight[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        value[q] = line.values + head * apart + across[q].first * step + low * next;
        weight[q] = mixed.data + q * mixed.query + m * mix + (line.slot + low) * slot;
      }
      for (int64_t j = low; j < high; ++j) {
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
          Vec own[V];
#pragma GCC unroll 4
          for (int u = 0; u < V; ++u) {
            own[u] = vload(value[q] + u * kWidth);
            if constexpr (M > 1) COMPILED_ATTN_KEEP(own[u]);
          }
#pragma GCC unroll 5
          for (int i = 0; i < M; ++i) {
            const Vec w = vset(weight[q][i * mix]);
#pragma GCC unroll 4
            for (int u = 0; u < V; ++u) sum[q][i][u] = vfma(w, own[u], sum[q][i][u]);
          }
          value[q] += next;
          weight[q] += slot;
        }
      }
    }
    const int64_t left = s.width - part.channel;
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 5
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) {
          T* p = to + (x + q) * s.out[3] + head * s.out[4] + (m + i) * s.out[5] + u * kWidth;
          if (left - u * kWidth >= kWidth) {
            vstore(p, sum[q][i][u]);
          } else {
            vstore(p, sum[q][i][u], left - u * kWidth);
          }
        }
  }

  // The row (z, y) of values, which is the window's i-th from its first plane on.
  const float* values(int64_t z, int64_t y, int64_t i) {
    const T* p = from + z * s.v[1] + y * s.v[2];
    if constexpr (std::is_same_v<T, float>) {
      if (direct) return p;
    }
    const LocalAxis& a = s.axis[1];
    const int64_t place = i * a.window + y / a.dilation % a.window, number = z * a.keys + y;
    float* line = ring + place * part.heads * apart;
    for (int64_t head = 0; head < part.heads && places[place] != number; ++head) {
      widen_row(p + head * s.v[4], line + head * apart);
    }
    places[place] = number;
    return line;
  }

  void widen_row(const T* p, float* line) {
    const int64_t keys = s.axis[2].keys;
    for (int64_t u = 0; u < part.vectors; ++u) {
      const int64_t lanes = std::min<int64_t>(kWidth, s.width - part.channel - u * kWidth);
      const T* own = p + u * kWidth * s.v[5];
      float* at = line + u * kWidth;
      if (s.v[5] == 1) {
        for (int64_t x = 0; x < keys; ++x) {
          const T* found = own + x * s.v[3];
          vstore(at + x * step, lanes == kWidth ? vload(found) : vload(found, lanes));
        }
      } else if (s.v[3] == 1) {
        for (int64_t x = 0; x < keys; x += kWidth) {
          const int64_t count = std::min<int64_t>(kWidth, keys - x);
          Vec block[kWidth];
          for (int c = 0; c < kWidth; ++c) {
            const T* found = own + c * s.v[5] + x;
            block[c] = c >= lanes ? vset(0.f) : count == kWidth ? vload(found) : vload(found, count);
          }
          vtranspose(block);
          for (int64_t i = 0; i < count; ++i) vstore(at + (x + i) * step, block[i]);
        }
      } else {
        for (int64_t x = 0; x < keys; ++x) {
          for (int c = 0; c < kWidth; ++c) {
            at[x * step + c] = c < lanes ? to_float(own[x * s.v[3] + c * s.v[5]]) : 0.f;
          }
        }
      }
    }
  }

  // Where a tile's weights lie, and their strides.
  struct Mixed {
    const float* data;
    int64_t query, mix, slot;
  };

  const NeighborhoodShape& s;
  const NeighborhoodPlan& plan;
  const T *weights, *v;
  T* out;
  bool direct;
  NeighborhoodPart part;
  int64_t step = 0, apart = 0;  // from place to place of a row of values, and from head to head
  int64_t together = 1;         // heads that are gone through at one place
  const T *from = nullptr, *given = nullptr;
  T* to = nullptr;
  Mixed mixed{};
  Lines memory, widened;
  float* ring = nullptr;
  std::vector<int64_t> places;  // numbers of the rows that lie in the ring
  std::vector<Line> lines;
};

inline int64_t neighborhood_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Threads: OpenMP's. A task is a run of rows of one plane, some heads, and some vectors of channels.
template <class T>
void neighborhood_apply(const NeighborhoodShape& s, const T* weights, const T* v, T* out) {
  const NeighborhoodPlan plan(s);
  const int64_t vectors = (s.width + kWidth - 1) / kWidth, chunks = (vectors + kMixVectors - 1) / kMixVectors;
  const int64_t planes = s.axis[0].queries, rows = s.axis[1].queries;
  const int64_t others = std::max<int64_t>(1, s.batch * planes * chunks);
  const int64_t wanted = neighborhood_threads() > 1 ? kMixTasks * neighborhood_threads() : 1;
  const int64_t runs = std::max<int64_t>(1, std::min((wanted + others - 1) / others, rows / kLeastMixRows));
  int64_t groups = (wanted + others * runs - 1) / (others * runs);  // of heads
  if (!Neighborhood<T>::reads_in_place(s)) {
    const int64_t lines = s.axis[0].window * s.axis[1].window, wide = std::min<int64_t>(vectors, kMixVectors) * kWidth;
    groups = std::max(groups, (lines * s.heads * s.axis[2].keys * wide + kMixRing - 1) / kMixRing);
  }
  groups = std::max<int64_t>(1, std::min(groups, s.heads));
  const int64_t tasks = rows * s.axis[2].queries * s.heads > 0 ? s.batch * planes * chunks * runs * groups : 0;
  int64_t work = s.batch * s.heads * planes * rows * s.axis[2].queries * s.mixes * s.width;
  for (const LocalAxis& a : s.axis) work *= a.window;
#pragma omp parallel if (work > kMixThreads && tasks > 1)
  {
    Neighborhood<T> mine(s, plan, weights, v, out);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t i = task / groups % runs, group = task % groups, chunk = task / (groups * runs) % chunks;
      const int64_t plane = task / (groups * runs * chunks) % planes, b = task / (groups * runs * chunks) / planes;
      const int64_t first = chunk * vectors / chunks, last = (chunk + 1) * vectors / chunks;
      const int64_t head = group * s.heads / groups, heads = (group + 1) * s.heads / groups - head;
      mine.run({b, plane, i * rows / runs, (i + 1) * rows / runs, head, heads, first * kWidth, last - first});
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
