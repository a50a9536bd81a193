// The kernels behind plain C functions, one per element type, for tests that call them with raw pointers.
#include "attention.h"
#include "cached_attention.h"
#include "class_row.h"
#include "depthwise.h"
#include "depthwise_gradient.h"
#include "depthwise_input_gradient.h"
#include "gemm.h"
#include "local_attention.h"
#include "neighborhood.h"
#include "ragged_attention.h"
#include "select_tokens.h"

#include <omp.h>

using namespace compiled_attn_cpp;

static AttentionShape attention_shape(const int64_t* sizes, const int64_t* strides, float scale, int causal) {
  AttentionShape s{};
  s.batch = sizes[0], s.heads = sizes[1], s.queries = sizes[2], s.keys = sizes[3];
  s.width = sizes[4], s.value_width = sizes[5];
  for (int i = 0; i < 3; ++i) {
    s.q[i] = strides[i], s.k[i] = strides[3 + i], s.v[i] = strides[6 + i], s.out[i] = strides[9 + i];
  }
  for (int i = 0; i < 4; ++i) s.bias[i] = strides[12 + i];
  s.scale = scale;
  s.causal = causal;
  return s;
}

// bias_kind: 0 none (a null pointer), 1 float32, 2 bfloat16.
template <class T>
static void run_attention(const AttentionShape& s, const void* q, const void* k, const void* v, const void* bias,
                          int bias_kind, void* out) {
  const T *a = (const T*)q, *b = (const T*)k, *c = (const T*)v;
  if (bias_kind != 2) attention<T, float>(s, a, b, c, (const float*)bias, (T*)out);
  if (bias_kind == 2) attention<T, Bf16>(s, a, b, c, (const Bf16*)bias, (T*)out);
}

template <class T>
static void run_class_row(const AttentionShape& s, const void* q, const void* k, const void* bias, int bias_kind,
                          float* row, int64_t at) {
  const T *a = (const T*)q, *b = (const T*)k;
  if (bias_kind != 2) class_row<T, float>(s, a, b, (const float*)bias, row, at);
  if (bias_kind == 2) class_row<T, Bf16>(s, a, b, (const Bf16*)bias, row, at);
}

template <class T, int NV>
static void run_gemm(const GemmShape& s, int activation, const void* x, const void* packed, const void* bias,
                     const void* residual, void* out) {
  const T *a = (const T*)x, *w = (const T*)packed, *b = (const T*)bias, *r = (const T*)residual;
  if (activation == 0) {
    as_constant<NV>(last_vectors(s.outer, NV * kWidth), [&](auto last) {
      gemm<T, Activation::none, NV, decltype(last)::value>(s, a, w, b, r, (T*)out);
    });
  }
  if (activation == 1) gemm<T, Activation::relu, NV>(s, a, w, b, r, (T*)out);
  if (activation == 2) gemm<T, Activation::silu, NV>(s, a, w, b, r, (T*)out);
  if (activation == 3) gemm<T, Activation::gelu, NV>(s, a, w, b, r, (T*)out);
  if (activation == 4) gemm<T, Activation::gelu_tanh, NV>(s, a, w, b, r, (T*)out);
}

template <class T, Activation A>
static void run_depthwise(const DepthwiseShape& s, int norm, const void* const* p, void* out) {
  const DepthwiseTensors<T> t{(const T*)p[0], (const T*)p[1], (const T*)p[2], (const T*)p[3],
                              (const T*)p[4], (const T*)p[5], (const T*)p[6], (T*)out};
  if (norm) {
    depthwise<T, A, true>(s, t);
  } else {
    depthwise<T, A, false>(s, t);
  }
}

template <Activation A>
static void run_activation(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t n = std::min<int64_t>(kWidth, count - i);
    vstore(out + i, activate<A>(vload(x + i, n)), n);
  }
}

extern "C" {

void set_threads(int count) { omp_set_num_threads(count); }

// One vector after the other; the order of the activations is that of the enumeration.
void call_activation(int activation, const float* x, float* out, int64_t count) {
  if (activation == 0) run_activation<Activation::none>(x, out, count);
  if (activation == 1) run_activation<Activation::relu>(x, out, count);
  if (activation == 2) run_activation<Activation::relu6>(x, out, count);
  if (activation == 3) run_activation<Activation::silu>(x, out, count);
  if (activation == 4) run_activation<Activation::hardswish>(x, out, count);
  if (activation == 5) run_activation<Activation::gelu>(x, out, count);
  if (activation == 6) run_activation<Activation::gelu_tanh>(x, out, count);
}

// numbers: a DepthwiseShape's integers. tensors: x, weight, bias, gate, residual, the norm's weight and bias.
void call_depthwise(int bf16, int silu, int norm, const int64_t* numbers, float eps, const void* const* tensors,
                    void* out) {
  DepthwiseShape s{};
  std::memcpy(&s, numbers, 26 * sizeof(int64_t));
  s.eps = eps;
  if (!bf16 && !silu) run_depthwise<float, Activation::none>(s, norm, tensors, out);
  if (!bf16 && silu) run_depthwise<float, Activation::silu>(s, norm, tensors, out);
  if (bf16 && !silu) run_depthwise<Bf16, Activation::none>(s, norm, tensors, out);
  if (bf16 && silu) run_depthwise<Bf16, Activation::silu>(s, norm, tensors, out);
}

// numbers: a DepthwiseGradientShape's.
void call_depthwise_gradient(int bf16, const int64_t* numbers, const void* x, const void* grad, void* out) {
  DepthwiseGradientShape s{};
  std::memcpy(&s, numbers, sizeof(s));
  if (bf16) {
    depthwise_weight_gradient<Bf16>(s, (const Bf16*)x, (const Bf16*)grad, (Bf16*)out);
  } else {
    depthwise_weight_gradient<float>(s, (const float*)x, (const float*)grad, (float*)out);
  }
}

// numbers: a DepthwiseInputShape's.
void call_depthwise_input_gradient(int bf16, const int64_t* numbers, const void* grad, const void* weight, void* out) {
  DepthwiseInputShape s{};
  std::memcpy(&s, numbers, sizeof(s));
  if (bf16) {
    depthwise_input_gradient<Bf16>(s, (const Bf16*)grad, (const Bf16*)weight, (Bf16*)out);
  } else {
    depthwise_input_gradient<float>(s, (const float*)grad, (const float*)weight, (float*)out);
  }
}

// sizes: rows, inner, outer, and the strides of x's, the residual's and the output's rows. vectors: of a block.
void call_gemm(int bf16, int vectors, int activation, const int64_t* sizes, const void* x, const void* packed,
               const void* bias, const void* residual, void* out) {
  const GemmShape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  constexpr int most = kMaxVectors == 4 ? 3 : 2;  // what the template asks for where nothing is wasted
  if (!bf16) {
    if (vectors == 1) run_gemm<float, 1>(s, activation, x, packed, bias, residual, out);
    if (vectors == most) run_gemm<float, most>(s, activation, x, packed, bias, residual, out);
  }
  if constexpr (StepOf<Bf16>::kPerStep == 2) {
    if (bf16 && vectors == 1) run_gemm<Bf16, 1>(s, activation, x, packed, bias, residual, out);
    if (bf16 && vectors == most) run_gemm<Bf16, most>(s, activation, x, packed, bias, residual, out);
  }
}

// The lanes of a vector, and whether bfloat16 is multiplied as such.
int lanes() { return kWidth; }
int multiplies_bf16() { return StepOf<Bf16>::kPerStep == 2; }

void call_attention(int bf16, const int64_t* sizes, const int64_t* strides, float scale, int causal, float softcap,
                    const void* q, const void* k, const void* v, const void* bias, int bias_kind, void* out) {
  AttentionShape s = attention_shape(sizes, strides, scale, causal);
  s.softcap = softcap;
  if (bf16) {
    run_attention<Bf16>(s, q, k, v, bias, bias_kind, out);
  } else {
    run_attention<float>(s, q, k, v, bias, bias_kind, out);
  }
}

void call_class_row(int bf16, const int64_t* sizes, const int64_t* strides, float scale, const void* q, const void* k,
                    const void* bias, int bias_kind, float* row, int64_t at) {
  const AttentionShape s = attention_shape(sizes, strides, scale, 0);
  if (bf16) {
    run_class_row<Bf16>(s, q, k, bias, bias_kind, row, at);
  } else {
    run_class_row<float>(s, q, k, bias, bias_kind, row, at);
  }
}

// sizes: sequences, heads, queries, keys, width, value width; strides (row, head) of q, k, v and out.
void call_ragged_attention(int bf16, const int64_t* sizes, const int64_t* strides, float scale, int causal,
                           const void* q, const void* k, const void* v, const int64_t* q_offsets,
                           const int64_t* k_offsets, void* out) {
  AttentionShape s{};
  s.batch = sizes[0], s.heads = sizes[1], s.queries = sizes[2], s.keys = sizes[3];
  s.width = sizes[4], s.value_width = sizes[5];
  s.scale = scale;
  s.causal = causal;
  for (int i = 0; i < 2; ++i) {
    s.q[2 - i] = strides[i], s.k[2 - i] = strides[2 + i], s.v[2 - i] = strides[4 + i], s.out[2 - i] = strides[6 + i];
  }
  if (bf16) {
    ragged_attention(s, (const Bf16*)q, (const Bf16*)k, (const Bf16*)v, q_offsets, k_offsets, (Bf16*)out);
  } else {
    ragged_attention(s, (const float*)q, (const float*)k, (const float*)v, q_offsets, k_offsets, (float*)out);
  }
}

// sizes: batch, key heads, share, queries, slots, width, value width, window, tail. strides: q, k, v, out, positions
// (three each), queries (two).
void call_cached_attention(int bf16, const int64_t* sizes, const int64_t* strides, float scale, const void* q,
                           const void* k, const void* v, const int64_t* positions, const int64_t* queries, void* out,
                           float* mass) {
  CacheShape s{};
  s.batch = sizes[0], s.groups = sizes[1], s.share = sizes[2], s.queries = sizes[3], s.slots = sizes[4];
  s.width = sizes[5], s.value_width = sizes[6], s.window = sizes[7], s.tail = sizes[8];
  for (int i = 0; i < 3; ++i) {
    s.q[i] = strides[i], s.k[i] = strides[3 + i], s.v[i] = strides[6 + i], s.out[i] = strides[9 + i];
    s.positions[i] = strides[12 + i];
  }
  s.at[0] = strides[15], s.at[1] = strides[16];
  s.scale = scale;
  if (bf16) {
    cached_attention(s, (const Bf16*)q, (const Bf16*)k, (const Bf16*)v, positions, queries, (Bf16*)out, mass);
  } else {
    cached_attention(s, (const float*)q, (const float*)k, (const float*)v, positions, queries, (float*)out, mass);
  }
}

// axes: three times queries, keys, window, stride, block, dilation, shift, border, causal, sinks. sizes: batch, heads,
// width, value width. strides: q, k, v, out, relative (five each), bias (four). kinds: of bias and relative, as above.
void call_local_attention(int bf16, const int64_t* sizes, const int64_t* axes, const int64_t* strides,
                          const int64_t* table, float scale, float softcap, const void* q, const void* k,
                          const void* v, const void* bias, int bias_kind, const void* relative, int relative_kind,
                          void* out) {
  LocalShape s{};
  s.batch = sizes[0], s.heads = sizes[1], s.width = sizes[2], s.value_width = sizes[3];
  std::memcpy(s.axis, axes, sizeof(s.axis));
  std::memcpy(s.q, strides, 29 * sizeof(int64_t));
  std::memcpy(s.table, table, sizeof(s.table));
  s.scale = scale, s.softcap = softcap;
  const Numbers b{bias, bias_kind == 2}, r{relative, relative_kind == 2};
  if (bf16) {
    local_attention(s, (const Bf16*)q, (const Bf16*)k, (const Bf16*)v, b, r, (Bf16*)out);
  } else {
    local_attention(s, (const float*)q, (const float*)k, (const float*)v, b, r, (float*)out);
  }
}

// sizes: batch, heads, mixes, width. axes: as above. strides: weights (seven), v, out (six each).
void call_neighborhood(int bf16, const int64_t* sizes, const int64_t* axes, const int64_t* strides, const void* weights,
                       const void* v, void* out) {
  NeighborhoodShape s{};
  s.batch = sizes[0], s.heads = sizes[1], s.mixes = sizes[2], s.width = sizes[3];
  std::memcpy(s.axis, axes, sizeof(s.axis));
  std::memcpy(s.weights, strides, 19 * sizeof(int64_t));
  if (bf16) {
    neighborhood_apply(s, (const Bf16*)weights, (const Bf16*)v, (Bf16*)out);
  } else {
    neighborhood_apply(s, (const float*)weights, (const float*)v, (float*)out);
  }
}

// sizes: batch, tokens, channels, prefix, keep; strides: x, score, out (batch, token each).
void call_select_tokens(int bf16, int bf16_score, const int64_t* sizes, const int64_t* strides, int fuse, const void* x,
                        const void* score, void* tokens, int64_t* index) {
  SelectShape s{};
  s.batch = sizes[0], s.tokens = sizes[1], s.channels = sizes[2], s.prefix = sizes[3], s.keep = sizes[4];
  for (int i = 0; i < 2; ++i) s.x[i] = strides[i], s.score[i] = strides[2 + i], s.out[i] = strides[4 + i];
  s.fuse = fuse;
  if (bf16 && bf16_score) select_tokens(s, (const Bf16*)x, (const Bf16*)score, (Bf16*)tokens, index);
  if (bf16 && !bf16_score) select_tokens(s, (const Bf16*)x, (const float*)score, (Bf16*)tokens, index);
  if (!bf16 && bf16_score) select_tokens(s, (const float*)x, (const Bf16*)score, (float*)tokens, index);
  if (!bf16 && !bf16_score) select_tokens(s, (const float*)x, (const float*)score, (float*)tokens, index);
}

}  // extern "C"
