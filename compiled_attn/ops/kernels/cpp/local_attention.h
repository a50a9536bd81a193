// Local attention: softmax over each query's window of (scale * q k + bias[distance] + relative logits) v, the scaled
// product capped if asked.
//
//   q [B, *L, H, D], k, v [B, *keys, H, D or Dv] are read in place by their strides, channel stride 1; one to three
//   spatial axes, those that are missing in front have one query and one key.
//   bias, if any, is a table [H, *(2 window - 1)] of distances; relative, if any, [B, *L, H, sum of (2 window - 1)].
//   out [B, *L, H, Dv] is written by its strides, channel stride 1.
//
// Two forms: tiles of queries that share the keys of their windows (local_tiles.h) for blocks, halos, long windows and
// small maps, capped scores; queries in lanes (local_lanes.h) for windows that move by one. Nothing of size N x N exists in either.
#ifndef COMPILED_ATTN_CPP_LOCAL_ATTENTION_H
#define COMPILED_ATTN_CPP_LOCAL_ATTENTION_H

#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "local_lanes.h"
#include "local_tiles.h"

namespace compiled_attn_cpp {
namespace {

// Threads: OpenMP's; consecutive tiles of a head go to one thread, which keeps their bias.
template <class T>
void by_tiles_of_queries(const LocalShape& s, const T* q, const T* k, const T* v, Numbers bias, Numbers relative,
                         T* out) {
  int64_t most[3];
  tile_sizes(s, most);
  std::vector<Run> runs[3];
  int64_t tiles = 1;
  for (int i = 0; i < 3; ++i) {
    runs[i] = runs_of(s.axis[i], most[i]);
    tiles *= int64_t(runs[i].size());
  }
  const int64_t tasks = s.heads * s.batch * tiles;
#pragma omp parallel if (tasks > 1)
  {
    LocalTiles<T> mine(s, q, k, v, bias, relative, out);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t tile = task % tiles, b = task / tiles % s.batch, head = task / tiles / s.batch;
      const int64_t size_y = int64_t(runs[1].size()), size_x = int64_t(runs[2].size());
      mine.run(b, head, {runs[0][tile / (size_y * size_x)], runs[1][tile / size_x % size_y], runs[2][tile % size_x]});
    }
  }
}

// Scores that the two forms compute for a query, in lanes of vectors: what each wastes at borders is counted.
inline double tile_work(const LocalShape& s) {
  int64_t most[3];
  tile_sizes(s, most);
  double keys = 1, queries = 1;
  for (int i = 0; i < 3; ++i) {
    const LocalAxis& a = s.axis[i];
    const double size = double(a.queries + a.dilation - 1) / double(a.dilation);
    const double run = a.together() > 1 ? double(std::min(a.block, a.queries)) : double(most[i]);
    queries *= run;
    keys *= a.together() > 1 ? double(a.window) : std::min(run + double(a.window - 1), size);
  }
  return keys * std::ceil(queries / kWidth) * kWidth / queries;
}

inline double lane_work(const LocalShape& s) {
  const LocalAxis& a = s.axis[2];
  const int64_t size = (a.queries + a.dilation - 1) / a.dilation;
  double work = 0;
  for (const LaneTile& tile : lane_tiles(a, size)) work += double(tile.slots * kWidth) / double(size);
  for (int i = 0; i < 2; ++i) {
    const LocalAxis& b = s.axis[i];
    work *= double(std::min(b.window, std::max<int64_t>(1, (b.keys + b.dilation - 1) / b.dilation)));
  }
  return work;
}

inline bool prefers_lanes(const LocalShape& s, bool relative) {
  const LocalAxis& a = s.axis[2];
  if (relative || s.softcap != 0.f || a.stride != 1 || a.block != 1 || a.sinks || a.window > 64 || a.queries == 0) return false;
  if (s.axis[0].sinks || s.axis[1].sinks) return false;
  return lane_work(s) < tile_work(s);
}

inline int64_t local_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Threads: OpenMP's, one task a run of rows of one head.
template <class T>
void by_rows_in_lanes(const LocalShape& s, const T* q, const T* k, const T* v, Numbers bias, T* out) {
  const LocalAxis& a = s.axis[2];
  const int64_t classes = std::min(a.dilation, a.queries);
  // Short runs transpose the rows that they share with their neighbours again: no shorter than all threads need.
  const int64_t columns = s.heads * s.batch * s.axis[0].queries * std::min(s.axis[1].dilation, s.axis[1].queries) * classes;
  const int64_t parts = (2 * local_threads() + columns - 1) / std::max<int64_t>(1, columns);
  const int64_t rows_of_class = (s.axis[1].queries + s.axis[1].dilation - 1) / s.axis[1].dilation;
  const int64_t most = std::max(kGroup, (rows_of_class + parts - 1) / parts);
  const std::vector<Run> z = runs_of(s.axis[0], 1), y = runs_of(s.axis[1], local_threads() == 1 ? rows_of_class : most);
  std::vector<Run> single;
  for (const Run& run : z) {
    for (int64_t i = 0; i < run.count; ++i) single.push_back({run.residue, run.first + i, 1});
  }
  const int64_t rows = int64_t(y.size()), planes = int64_t(single.size());
  const int64_t tasks = s.heads * s.batch * planes * rows * classes;
#pragma omp parallel if (tasks > 1)
  {
    LaneRows<T> mine(s, q, k, v, bias, out);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t run = task % rows, plane = task / rows % planes, residue = task / (rows * planes) % classes;
      const int64_t b = task / (rows * planes * classes) % s.batch, head = task / (rows * planes * classes) / s.batch;
      mine.run(b, head, single[plane], y[run], residue);
    }
  }
}

template <class T>
void local_attention(const LocalShape& s, const T* q, const T* k, const T* v, Numbers bias, Numbers relative, T* out) {
  if (prefers_lanes(s, relative.data != nullptr)) {
    by_rows_in_lanes(s, q, k, v, bias, out);
  } else {
    by_tiles_of_queries(s, q, k, v, bias, relative, out);
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
