// What the kernels of depthwise convolutions share: an axis of the map, and how many threads there are.
#ifndef COMPILED_ATTN_CPP_DEPTHWISE_AXIS_H
#define COMPILED_ATTN_CPP_DEPTHWISE_AXIS_H

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace compiled_attn_cpp {
namespace {

// One axis of the map; padding is what lies ahead of it, what lies behind follows from `out`.
struct DepthwiseAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

inline int64_t depthwise_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
