// The pattern of a local attention and what a run of its queries sees, one axis at a time.
#ifndef COMPILED_ATTN_CPP_LOCAL_SHAPE_H
#define COMPILED_ATTN_CPP_LOCAL_SHAPE_H

#include <algorithm>
#include <vector>

#include "lines.h"
#include "simd.h"

namespace compiled_attn_cpp {
namespace {

enum Border : int64_t { kClamp = 0, kMask = 1, kZero = 2 };

// The pattern along one axis, as ops/local_geometry.py defines it.
struct LocalAxis {
  int64_t queries, keys, window, stride, block, dilation, shift, border, causal, sinks;

  int64_t together() const { return dilation == 1 ? block : 1; }
  int64_t offsets() const { return 2 * window - 1; }
};

// Strides in elements in the order batch, three spatial axes, head; the bias's: head, three axes.
struct LocalShape {
  int64_t batch, heads, width, value_width;
  LocalAxis axis[3];
  int64_t q[5], k[5], v[5], out[5], relative[5], bias[4];
  int64_t table[3];  // where an axis's distances begin among the relative logits; -1: it has none
  float scale;
};

// Numbers of float32 or bfloat16; null where there are none.
struct Numbers {
  const void* data;
  bool bf16;
  float operator[](int64_t i) const {
    return bf16 ? to_float(static_cast<const Bf16*>(data)[i]) : static_cast<const float*>(data)[i];
  }
};

// Queries of one axis that are computed together: places in a class of positions `residue` modulo the dilation.
struct Run {
  int64_t residue, first, count;
};

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// All runs of an axis; where there are no blocks, of at most `most` queries.
inline std::vector<Run> runs_of(const LocalAxis& a, int64_t most) {
  std::vector<Run> runs;
  if (a.together() > 1) {
    for (int64_t begin = a.shift > 0 ? a.shift - a.block : 0; begin < a.queries; begin += a.block) {
      const int64_t first = std::max<int64_t>(begin, 0);
      runs.push_back({0, first, std::min(begin + a.block, a.queries) - first});
    }
    return runs;
  }
  for (int64_t residue = 0; residue < std::min(a.dilation, a.queries); ++residue) {
    const int64_t size = (a.queries - residue + a.dilation - 1) / a.dilation;
    const int64_t parts = (size + most - 1) / most;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = i * (size / parts) + std::min(i, size % parts);
      runs.push_back({residue, first, size / parts + (i < size % parts)});
    }
  }
  return runs;
}

// Where the window of a query begins among `size` keys of its class; it may lie beyond the ends.
inline int64_t start_of(const LocalAxis& a, int64_t place, int64_t size) {
  const int64_t origin = floor_div(place - a.shift, a.block) * a.stride + a.shift;
  const int64_t start = origin - (a.causal ? a.window - a.stride : (a.window - a.stride + 1) / 2);
  return a.border == kClamp && !a.causal ? std::max<int64_t>(std::min(start, size - a.window), 0) : start;
}

constexpr int16_t kUnseen = -1;
constexpr int16_t kSink = -2;  // seen, with no bias

// What a run sees along its axis: the union of its windows, and for each query and key the distance or a code.
struct View {
  std::vector<int64_t> position;  // of each key; -1: a key of zeros
  std::vector<int16_t> code;      // [queries, keys]
  std::vector<int64_t> query;     // position of each query
  bool whole;                     // whether every query sees every key, with its bias
};

inline void look(const LocalAxis& a, const Run& run, View& to) {
  const int64_t size = run.residue < a.keys ? (a.keys - run.residue + a.dilation - 1) / a.dilation : 0;
  std::vector<int64_t> start(run.count), stand(run.count);
  int64_t low = INT64_MAX, high = INT64_MIN;
  to.query.resize(run.count);
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t place = run.first + i;
    const int64_t block = floor_div(place - a.shift, a.block);
    start[i] = start_of(a, place, size);
    stand[i] = block * a.stride + place - block * a.block;
    to.query[i] = run.residue + place * a.dilation;
    low = std::min(low, start[i]);
    high = std::max(high, a.causal ? std::min(start[i] + a.window, stand[i] + 1) : start[i] + a.window);
  }
  if (a.border != kZero) {
    low = std::max<int64_t>(low, 0);
    high = std::min(high, size);
  }
  to.position.clear();
  std::vector<int64_t> at;
  for (int64_t key = 0; key < std::min(a.sinks, size); ++key) {
    if (key < low || key >= high) at.push_back(key);
  }
  for (int64_t key = low; key < high; ++key) at.push_back(key);
  const int64_t keys = int64_t(at.size());
  for (int64_t key : at) to.position.push_back(key >= 0 && key < size ? run.residue + key * a.dilation : -1);
  to.code.resize(run.count * keys);
  to.whole = true;
  for (int64_t i = 0; i < run.count; ++i) {
    for (int64_t u = 0; u < keys; ++u) {
      const bool inside = at[u] >= start[i] && at[u] < start[i] + a.window;
      const bool hidden = a.causal && at[u] > stand[i];
      const bool sink = at[u] >= 0 && at[u] < std::min(a.sinks, size);
      const int16_t code = inside ? int16_t(at[u] - stand[i] + a.window - 1) : sink ? kSink : kUnseen;
      to.code[i * keys + u] = hidden ? kUnseen : code;
      to.whole = to.whole && to.code[i * keys + u] >= 0;
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
