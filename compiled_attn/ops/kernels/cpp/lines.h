// What several kernels of this folder share: aligned memory of a thread, and counts made constants.
#ifndef COMPILED_ATTN_CPP_LINES_H
#define COMPILED_ATTN_CPP_LINES_H

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "simd.h"

namespace compiled_attn_cpp {
namespace {

// Memory that begins at a line of the cache; it grows, keeps nothing then, and is zero where it was never written.
class Lines {
 public:
  Lines() = default;
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { release(); }

  float* room(int64_t floats) {
    if (floats > size) {
      release();
      memory = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
      size = floats;
      clear();
    }
    return memory;
  }
  void clear() {
    if (size > 0) std::memset(memory, 0, size * sizeof(float));
  }
  float* data() { return memory; }

 private:
  void release() {
    if (memory != nullptr) ::operator delete(memory, std::align_val_t(64));
  }

  float* memory = nullptr;
  int64_t size = 0;
};

// Calls f with n, which is 1 to N, as a constant.
template <int N, class F>
COMPILED_ATTN_INLINE void as_constant(int64_t n, const F& f) {
  if constexpr (N == 1) {
    f(std::integral_constant<int, 1>());
  } else {
    if (n == N) {
      f(std::integral_constant<int, N>());
    } else {
      as_constant<N - 1>(n, f);
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
