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
  float softcap;  // scaled scores s become softcap * tanh(s / softcap) where it is not 0
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
  std::vector<int64_t> start, stand;  // of each query, from the first key on: its window, and itself
};

// Returns whether `to.code` is other than it was: most runs of an axis differ by their place alone.
inline bool look(const LocalAxis& a, const Run& run, View& to) {
  const int64_t size = run.residue < a.keys ? (a.keys - run.residue + a.dilation - 1) / a.dilation : 0;
  int64_t low = INT64_MAX, high = INT64_MIN;
  bool changed = a.sinks > 0 || int64_t(to.start.size()) != run.count;
  to.start.resize(run.count);
  to.stand.resize(run.count);
  to.query.resize(run.count);
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t place = run.first + i, start = start_of(a, place, size);
    const int64_t block = floor_div(place - a.shift, a.block), stand = block * a.stride + place - block * a.block;
    low = std::min(low, start);
    high = std::max(high, a.causal ? std::min(start + a.window, stand + 1) : start + a.window);
    to.query[i] = run.residue + place * a.dilation;
  }
  if (a.border != kZero) {
    low = std::max<int64_t>(low, 0);
    high = std::min(high, size);
  }
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t place = run.first + i, block = floor_div(place - a.shift, a.block);
    const int64_t start = start_of(a, place, size) - low, stand = block * a.stride + place - block * a.block - low;
    changed = changed || start != to.start[i] || stand != to.stand[i];
    to.start[i] = start;
    to.stand[i] = stand;
  }
  std::vector<int64_t>& at = to.position;
  const int64_t before = int64_t(at.size());
  at.clear();
  for (int64_t key = 0; key < std::min(a.sinks, size); ++key) {
    if (key < low || key >= high) at.push_back(key);
  }
  for (int64_t key = low; key < high; ++key) at.push_back(key);
  const int64_t keys = int64_t(at.size());
  if (changed || keys != before) {
    changed = true;
    to.code.resize(run.count * keys);
    to.whole = true;
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t start = to.start[i] + low, stand = to.stand[i] + low;
      for (int64_t u = 0; u < keys; ++u) {
        const bool inside = at[u] >= start && at[u] < start + a.window;
        const bool hidden = a.causal && at[u] > stand;
        const bool sink = at[u] >= 0 && at[u] < std::min(a.sinks, size);
        const int16_t code = inside ? int16_t(at[u] - stand + a.window - 1) : sink ? kSink : kUnseen;
        to.code[i * keys + u] = hidden ? kUnseen : code;
        to.whole = to.whole && to.code[i * keys + u] >= 0;
      }
    }
  }
  for (int64_t& key : at) key = key >= 0 && key < size ? run.residue + key * a.dilation : -1;
  return changed;
}

// The head's table of biases [z, y, x] times `unit`, with a vector of zeros behind it; zeros where there is none.
inline void read_table(const LocalShape& s, Numbers bias, int64_t head, float unit, std::vector<float>& table) {
  const int64_t z = s.axis[0].offsets(), y = s.axis[1].offsets(), x = s.axis[2].offsets();
  table.assign(z * y * x + kWidth, 0.f);
  if (!bias.data) return;
  float* to = table.data();
  for (int64_t i = 0; i < z; ++i) {
    for (int64_t j = 0; j < y; ++j) {
      const int64_t row = head * s.bias[0] + i * s.bias[1] + j * s.bias[2];
      for (int64_t l = 0; l < x; ++l) *to++ = bias[row + l * s.bias[3]] * unit;
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
