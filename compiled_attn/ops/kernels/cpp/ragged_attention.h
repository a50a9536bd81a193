// softmax(scale * q k^T) v within each of several sequences that lie packed behind one another.
//
//   q [T, H, D], k [S, H, D], v [S, H, Dv] are read in place by their strides, channel stride 1; any D and Dv.
//   q_offsets, k_offsets [B + 1]: sequence b is the rows [offsets[b], offsets[b + 1]); they rise from 0 to T and S.
//   out [T, H, Dv] is written by its strides, channel stride 1. A query that sees no key gets zeros.
//
// The blocks of attention.h, each with the sizes of its own sequence. A task is one block of queries of one head. Tasks
// are dealt one by one, those of the sequences with the most keys first, so that no thread begins a long one last.
#ifndef COMPILED_ATTN_CPP_RAGGED_ATTENTION_H
#define COMPILED_ATTN_CPP_RAGGED_ATTENTION_H

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"

namespace compiled_attn_cpp {
namespace {

// Throws unless the offsets rise from 0 to `rows`: what lies between two of them is read without another look.
inline void check_offsets(const char* name, const int64_t* offsets, int64_t sequences, int64_t rows) {
  bool whole = offsets[0] == 0 && offsets[sequences] == rows;
  for (int64_t b = 0; b < sequences; ++b) whole = whole && offsets[b] <= offsets[b + 1];
  if (!whole) {
    throw std::runtime_error(std::string("ragged_attention: ") + name +
                             " does not cut all packed rows into sequences; let it begin with 0, never fall, and end "
                             "with the number of rows");
  }
}

// s.batch: sequences.  s.queries, s.keys: T and S.  Strides of the batch are not read.  Threads: OpenMP's.
template <class T>
void ragged_attention(const AttentionShape& s, const T* q, const T* k, const T* v, const int64_t* q_offsets,
                      const int64_t* k_offsets, T* out) {
  check_offsets("q_offsets", q_offsets, s.batch, s.queries);
  check_offsets("k_offsets", k_offsets, s.batch, s.keys);
  std::vector<int64_t> order(s.batch), end(s.batch);  // sequences, longest first, and the tasks up to each
  std::iota(order.begin(), order.end(), int64_t(0));
  const auto length = [](const int64_t* offsets, int64_t b) { return offsets[b + 1] - offsets[b]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return length(k_offsets, a) > length(k_offsets, b); });
  const auto vectors_of = [&](int64_t b) { return (length(q_offsets, b) + kWidth - 1) / kWidth; };
  const auto blocks_of = [&](int64_t b) { return (vectors_of(b) + kMaxVectors - 1) / kMaxVectors; };
  int64_t tasks = 0;
  for (int64_t i = 0; i < s.batch; ++i) end[i] = tasks += blocks_of(order[i]) * s.heads;
  const int64_t floats = QueryBlock<T, kMaxVectors>::floats(s);
#pragma omp parallel if (tasks > 1)
  {
    constexpr uintptr_t line = 64;  // bytes
    std::unique_ptr<float[]> memory(new float[floats + line / sizeof(float)]);
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + line - 1) / line * line);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t i = std::upper_bound(end.begin(), end.end(), task) - end.begin();
      const int64_t b = order[i], vectors = vectors_of(b), blocks = blocks_of(b);
      const int64_t within = task - (i ? end[i - 1] : 0), block = within % blocks, head = within / blocks;
      AttentionShape own = s;
      own.queries = length(q_offsets, b), own.keys = length(k_offsets, b);
      const T* q_head = q + q_offsets[b] * s.q[2] + head * s.q[1];
      const T* k_head = k + k_offsets[b] * s.k[2] + head * s.k[1];
      const T* v_head = v + k_offsets[b] * s.v[2] + head * s.v[1];
      T* out_head = out + q_offsets[b] * s.out[2] + head * s.out[1];
      deal_block(own, q_head, k_head, v_head, {nullptr, false}, out_head, block, blocks, vectors, aligned);
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
