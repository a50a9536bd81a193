#include "sample.h"

#include <ATen/ATen.h>

#include <tuple>

namespace {

// The mixing function of SplitMix64.
uint64_t mixed(uint64_t word) {
  word += 0x9e3779b97f4a7c15u;
  word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9u;
  word = (word ^ word >> 27) * 0x94d049bb133111ebu;
  return word ^ word >> 31;
}

// [B, 1] float64 of [0, 1).
at::Tensor uniform(uint64_t seed, const at::Tensor& positions) {
  at::Tensor found = at::empty({positions.size(0), 1}, at::kDouble);
  for (int64_t text = 0; text < positions.size(0); ++text) {
    const uint64_t word = mixed(mixed(mixed(seed) + uint64_t(text)) + uint64_t(positions[text].item<int64_t>()));
    found[text][0] = double(word >> 32) / 4294967296.0;
  }
  return found;
}

} // namespace

at::Tensor Sampling::tokens(const at::Tensor& logits, const at::Tensor& positions) const {
  if (temperature == 0) return logits.argmax(1, true);
  const at::Tensor scores = logits.to(at::kFloat) / temperature;
  const auto [values, indices] = scores.sort(/*stable=*/true, /*dim=*/1, /*descending=*/true);
  const at::Tensor probabilities = values.softmax(1);
  at::Tensor dropped = (probabilities.cumsum(1) - probabilities).ge(top_p); // those before reach it
  if (top_k) dropped = dropped.logical_or(at::arange(scores.size(1)).ge(top_k));
  dropped.select(1, 0).fill_(false);
  const at::Tensor running = probabilities.masked_fill(dropped, 0.0).to(at::kDouble).cumsum(1);
  const at::Tensor passed = running.le(running.narrow(1, -1, 1) * uniform(seed, positions));
  return indices.gather(1, passed.sum(1, true).clamp_max(scores.size(1) - 1));
}
