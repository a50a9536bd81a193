// How a token is drawn from logits; see runtime/sample.py, whose draws these are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

struct Sampling {
  double temperature = 0, top_p = 1; // temperature 0: the likeliest token
  int64_t top_k = 0;                 // 0: all
  uint64_t seed = 0;

  // One token a text, int64 [B, 1], of logits [B, vocabulary], for the places `positions` [B] in the texts.
  at::Tensor tokens(const at::Tensor& logits, const at::Tensor& positions) const;
};
