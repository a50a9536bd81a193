// Local attention by tiles of queries that share the keys of their windows.
//
// A tile is a block of the pattern, or neighbours of one class. Along each axis it sees the union of its windows; its
// queries, keys and values are gathered side by side and go through attention.h's block of queries with its online
// softmax. What a query does not see of the union has a bias of minus infinity. The bias is made from the table for one
// tile (or for 64 of its queries at a time) and kept while tiles of the same shape and head follow.
#ifndef COMPILED_ATTN_CPP_LOCAL_TILES_H
#define COMPILED_ATTN_CPP_LOCAL_TILES_H

#include <vector>

#include "attention.h"
#include "local_shape.h"

namespace compiled_attn_cpp {
namespace {

// A row of few channels; a call of memcpy costs more than the row.
template <class T>
COMPILED_ATTN_INLINE void copy_row(const T* from, int64_t width, T* to) {
  constexpr int64_t some = 64 / sizeof(T);
  int64_t d = 0;
  for (; d + some <= width; d += some) std::memcpy(static_cast<void*>(to + d), from + d, 64);
  if (d < width) std::memcpy(static_cast<void*>(to + d), from + d, (width - d) * sizeof(T));
}

// One thread's work on tiles, one after the other.
template <class T>
class LocalTiles {
 public:
  LocalTiles(const LocalShape& shape, const T* q_, const T* k_, const T* v_, Numbers bias_, Numbers relative_, T* out_)
      : s(shape), q(q_), k(k_), v(v_), bias(bias_), relative(relative_), out(out_) {}

  void run(int64_t b, int64_t head, const Run (&runs)[3]) {
    bool same = head == last_head && relative.data == nullptr;
    for (int i = 0; i < 3; ++i) same = !look(s.axis[i], runs[i], view[i]) && same;
    if (head != last_head) read_table(s, bias, head, 1.f, table);
    last_head = head;
    queries = int64_t(view[0].query.size() * view[1].query.size() * view[2].query.size());
    keys = int64_t(view[0].position.size() * view[1].position.size() * view[2].position.size());
    const bool biased = bias.data || relative.data || !(view[0].whole && view[1].whole && view[2].whole);
    gather(q + b * s.q[0] + head * s.q[4], s.q, s.width, true, packed_q);
    gather(k + b * s.k[0] + head * s.k[4], s.k, s.width, false, packed_k);
    gather(v + b * s.v[0] + head * s.v[4], s.v, s.value_width, false, packed_v);
    packed_out.resize(queries * s.value_width);
    const int64_t vectors = (queries + kWidth - 1) / kWidth;
    const int64_t parts = (vectors + kMaxVectors - 1) / kMaxVectors;
    const bool at_once = queries * keys <= kKept, known = same && kept;
    kept = biased && at_once;
    if (biased) ready.resize((at_once ? vectors : kMaxVectors) * kWidth * keys);
    for (int64_t part = 0; part < parts; ++part) {
      // The vectors are dealt evenly: 13 are 4 + 3 + 3 + 3.
      const int64_t begin = part * (vectors / parts) + std::min(part, vectors % parts);
      const int64_t count = vectors / parts + (part < vectors % parts);
      const int64_t first = begin * kWidth, rows = std::min(count * kWidth, queries - first);
      float* biases = biased ? ready.data() + (at_once ? first * keys : 0) : nullptr;
      if (biased && !known) add(b, head, first, rows, count, biases);
      as_constant<kMaxVectors>(count, [&](auto NV) { block<NV()>(first, rows, biases); });
    }
    scatter(out + b * s.out[0] + head * s.out[4]);
  }

 private:
  static constexpr int64_t kKept = 1 << 15;  // floats of bias that are kept from tile to tile

  // The tile as an attention of `rows` queries.
  AttentionShape shape(int64_t rows) const {
    AttentionShape a{};
    a.batch = a.heads = 1;
    a.queries = rows, a.keys = keys, a.width = s.width, a.value_width = s.value_width;
    a.q[2] = a.k[2] = s.width;
    a.v[2] = a.out[2] = s.value_width;
    a.bias[2] = keys, a.bias[3] = 1;
    a.scale = s.scale;
    a.softcap = s.softcap;
    return a;
  }

  template <int NV>
  void block(int64_t first, int64_t rows, const float* biases) {
    const AttentionShape a = shape(rows);
    QueryBlock<T, NV>(a, memory.room(QueryBlock<T, NV>::floats(a)))
        .run(packed_q.data() + first * s.width, packed_k.data(), packed_v.data(), BiasRows{biases, false, true},
             packed_out.data() + first * s.value_width, 0, rows);
  }

  // The tile's queries or keys as rows; keys of zeros where the border has them.
  void gather(const T* from, const int64_t (&strides)[5], int64_t width, bool of_queries, std::vector<T>& to) {
    const auto& z = of_queries ? view[0].query : view[0].position;
    const auto& y = of_queries ? view[1].query : view[1].position;
    const auto& x = of_queries ? view[2].query : view[2].position;
    to.resize(z.size() * y.size() * x.size() * width);
    T* row = to.data();
    for (int64_t i : z) {
      for (int64_t j : y) {
        for (int64_t l : x) {
          if (i < 0 || j < 0 || l < 0) {
            std::memset(static_cast<void*>(row), 0, width * sizeof(T));
          } else {
            copy_row(from + i * strides[1] + j * strides[2] + l * strides[3], width, row);
          }
          row += width;
        }
      }
    }
  }

  void scatter(T* to) const {
    const T* row = packed_out.data();
    for (int64_t i : view[0].query) {
      for (int64_t j : view[1].query) {
        for (int64_t l : view[2].query) {
          copy_row(row, s.value_width, to + i * s.out[1] + j * s.out[2] + l * s.out[3]);
          row += s.value_width;
        }
      }
    }
  }

  // to [keys, vectors, W]: bias and relative logits of the tile's queries from `first` on, times log2(e); minus infinity
  // for what is not seen.
  void add(int64_t b, int64_t head, int64_t first, int64_t rows, int64_t vectors, float* to) {
    added.resize(rows * keys + kWidth);
    const int64_t size_y = int64_t(view[1].query.size()), size_x = int64_t(view[2].query.size());
    const int64_t keys_z = int64_t(view[0].position.size()), keys_y = int64_t(view[1].position.size());
    const int64_t keys_x = int64_t(view[2].position.size());
    float* row = added.data();
    for (int64_t p = first; p < first + rows; ++p) {
      const int64_t z = p / (size_y * size_x), y = p / size_x % size_y, x = p % size_x;
      const int64_t place = b * s.relative[0] + view[0].query[z] * s.relative[1] + view[1].query[y] * s.relative[2] +
                            view[2].query[x] * s.relative[3] + head * s.relative[4];
      const int16_t* codes = view[2].code.data() + x * keys_x;
      for (int64_t i = 0; i < keys_z; ++i) {
        const int16_t code_z = view[0].code[z * keys_z + i];
        for (int64_t j = 0; j < keys_y; ++j, row += keys_x) {
          const int16_t code_y = view[1].code[y * keys_y + j];
          if (code_z == kUnseen || code_y == kUnseen) {
            std::fill(row, row + keys_x, kMinusInfinity);
            continue;
          }
          if (code_z == kSink || code_y == kSink) {
            std::fill(row, row + keys_x, 0.f);
          } else {
            const float* line = table.data() + (code_z * s.axis[1].offsets() + code_y) * s.axis[2].offsets();
            if (view[2].whole) {  // the distances of a row then follow each other
              for (int64_t l = 0; l < keys_x; l += kWidth) vstore(row + l, vload(line + codes[0] + l));
            } else {
              for (int64_t l = 0; l < keys_x; ++l) row[l] = codes[l] >= 0 ? line[codes[l]] : 0.f;
            }
          }
          if (relative.data) {
            const float outer = relative_of(0, place, code_z) + relative_of(1, place, code_y);
            for (int64_t l = 0; l < keys_x; ++l) row[l] += codes[l] >= 0 ? outer + relative_of(2, place, codes[l]) : 0.f;
          }
          for (int64_t l = 0; !view[2].whole && l < keys_x; ++l) row[l] = codes[l] == kUnseen ? kMinusInfinity : row[l];
        }
      }
    }
    load_bias(shape(rows), added.data(), vectors, rows, keys, to);
  }

  float relative_of(int axis, int64_t place, int16_t code) const {
    return relative.data && s.table[axis] >= 0 && code >= 0 ? relative[place + s.table[axis] + code] : 0.f;
  }

  const LocalShape& s;
  const T *q, *k, *v;
  const Numbers bias, relative;
  T* out;
  View view[3];
  int64_t queries = 0, keys = 0, last_head = -1;
  bool kept = false;
  std::vector<T> packed_q, packed_k, packed_v, packed_out;
  std::vector<float> table, added, ready;
  Lines memory;
};

// Most queries of a run along each axis: about 64 in a tile, shared among the axes that have no blocks.
inline void tile_sizes(const LocalShape& s, int64_t (&most)[3]) {
  int64_t budget = 64, free = 0;
  int64_t room[3];
  for (int i = 0; i < 3; ++i) {
    const LocalAxis& a = s.axis[i];
    const bool alone = a.together() > 1 || (a.window == 1 && a.sinks == 0);
    most[i] = 1;
    room[i] = alone ? 0 : (a.queries + a.dilation - 1) / a.dilation;
    if (a.together() > 1) budget /= std::min(a.block, a.queries);
    free += room[i] > 0;
  }
  for (; free > 0; --free) {
    int least = -1;
    for (int i = 0; i < 3; ++i) {
      if (room[i] > 0 && (least < 0 || room[i] < room[least])) least = i;
    }
    int64_t share = 1;
    while (std::pow(double(share + 1), double(free)) <= double(budget)) ++share;
    most[least] = std::max<int64_t>(1, std::min(room[least], share));
    budget /= most[least];
    room[least] = 0;
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
