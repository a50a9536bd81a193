// Texts under way over a decoder's two artifacts; see runtime/generate.py, whose loop this is.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "model.h"

class Conversation {
 public:
  // tokens: int64 [B, T], -1 in front of shorter prompts.  given: state to go on with, by the contract's names (and
  // "lengths", [B], tokens seen of each text); what is not given begins empty.
  Conversation(const Model& step, at::Tensor tokens, const std::map<std::string, at::Tensor>& given);

  // The `count` likeliest tokens behind each prompt, int64 [B, count].
  at::Tensor generate(Model& prompt, Model& step, int64_t count);

  // What the artifacts wrote into, by name, and the lengths.
  std::map<std::string, at::Tensor> state() const;

 private:
  at::Tensor logits(Model& model, const at::Tensor& tokens, const at::Tensor& positions);

  at::Tensor tokens_, lengths_;
  std::map<std::string, at::Tensor> state_;
};
