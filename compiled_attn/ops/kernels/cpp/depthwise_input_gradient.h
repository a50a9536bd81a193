// The gradient of a depthwise convolution's input, in channels last:
//
//   out[y] = sum over i of weight[i] * grad[(y + padding - i * dilation) / stride]   where that divides and lies inside
//
//   by channel, columns likewise; grad [B, Y', X', C], out [B, Y, X, C] by their strides, channel stride 1; weight
//   [I, J, C] contiguous.
//
// Positions that lie `stride` apart meet the same places of the kernel. Each such set of positions is a depthwise
// convolution of grad at stride 1 with these places turned around, so that no product is one with an inserted zero.
#ifndef COMPILED_ATTN_CPP_DEPTHWISE_INPUT_GRADIENT_H
#define COMPILED_ATTN_CPP_DEPTHWISE_INPUT_GRADIENT_H

#include <numeric>
#include <vector>

#include "depthwise.h"

namespace compiled_attn_cpp {
namespace {

// The positions first, first + stride, ... of an axis of the input, and the places of the kernel that they meet: the
// first, how far apart they are and how many. padding and dilation: of the convolution of grad that gives them.
struct DepthwisePhase {
  int64_t first, positions, place = 0, step, places, padding, dilation;

  DepthwisePhase(const DepthwiseAxis& a, int64_t first_) : first(first_) {
    const int64_t common = std::gcd(a.stride, a.dilation), ahead = first + a.padding;
    positions = (a.in - first + a.stride - 1) / a.stride;
    step = a.stride / common;
    dilation = a.dilation / common;
    while (place < step && (ahead - place * a.dilation) % a.stride != 0) ++place;
    places = place < std::min(step, a.kernel) ? (a.kernel - place + step - 1) / step : 0;
    padding = (places - 1) * dilation - (ahead - place * a.dilation) / a.stride;
  }
};

// Strides of maps in elements in the order batch, row, column. y, x: of the convolution.
struct DepthwiseInputShape {
  int64_t batch, channels;
  DepthwiseAxis y, x;
  int64_t grad[3], to[3];
};

template <class T>
void depthwise_zeros(const DepthwiseShape& s, T* out) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t y = 0; y < s.y.out; ++y) {
      T* row = out + b * s.to[0] + y * s.to[1];
      for (int64_t x = 0; x < s.x.out; ++x) std::memset((void*)(row + x * s.to[2]), 0, s.channels * sizeof(T));
    }
  }
}

template <class T>
void depthwise_input_gradient(const DepthwiseInputShape& s, const T* grad, const T* weight, T* out) {
  std::vector<T> turned(s.y.kernel * s.x.kernel * s.channels);
  for (int64_t top = 0; top < std::min(s.y.stride, s.y.in); ++top) {
    for (int64_t left = 0; left < std::min(s.x.stride, s.x.in); ++left) {
      const DepthwisePhase y(s.y, top), x(s.x, left);
      T* to = out + top * s.to[1] + left * s.to[2];
      DepthwiseShape part{};
      part.batch = s.batch;
      part.channels = s.channels;
      part.y = {s.y.out, y.positions, y.places, 1, y.padding, y.dilation};
      part.x = {s.x.out, x.positions, x.places, 1, x.padding, x.dilation};
      for (int i = 0; i < 3; ++i) part.from[i] = s.grad[i];
      part.to[0] = s.to[0];
      part.to[1] = s.to[1] * s.y.stride;
      part.to[2] = s.to[2] * s.x.stride;
      if (y.places == 0 || x.places == 0) {
        depthwise_zeros(part, to);
        continue;
      }
      T* tap = turned.data();
      for (int64_t i = y.places - 1; i >= 0; --i) {
        for (int64_t j = x.places - 1; j >= 0; --j, tap += s.channels) {
          const int64_t place = (y.place + i * y.step) * s.x.kernel + x.place + j * x.step;
          std::memcpy((void*)tap, weight + place * s.channels, s.channels * sizeof(T));
        }
      }
      DepthwiseTensors<T> tensors{};
      tensors.x = grad;
      tensors.weight = turned.data();
      tensors.out = to;
      depthwise<T, Activation::none, false>(part, tensors);
    }
  }
}

}  // namespace
}  // namespace compiled_attn_cpp

#endif
