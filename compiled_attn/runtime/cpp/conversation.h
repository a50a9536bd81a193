// Texts under way over a decoder; see runtime/generate.py, whose loop this is.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "decoder.h"
#include "sample.h"

// How texts are continued.
struct Saying {
  int64_t count = 64; // most tokens a text
  Sampling sampling;
  std::vector<std::vector<int64_t>> stop; // sequences of tokens behind which a text ends; they are part of what is said
  std::function<void(int64_t text, int64_t token)> on_token = [](int64_t, int64_t) {};
};

class Conversation {
 public:
  // tokens: int64 [B, T], -1 in front of shorter prompts.  given: state to go on with, by the contract's names (and
  // "lengths", [B], tokens seen of each text); what is not given begins empty.
  Conversation(const Decoder& decoder, at::Tensor tokens, const std::map<std::string, at::Tensor>& given);

  // At most `count` tokens behind each prompt, int64 [B, <= count]; a text that ended is filled up with -1.
  at::Tensor generate(Decoder& decoder, const Saying& saying);

  // What the programs wrote into, by name, and the lengths.
  std::map<std::string, at::Tensor> state() const;

 private:
  void require_room(const Decoder& decoder, int64_t count) const;
  at::Tensor logits(Model& model, const at::Tensor& tokens, const at::Tensor& positions);

  at::Tensor tokens_, lengths_;
  std::map<std::string, at::Tensor> state_;
};
