#include "conversation.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <string_view>

#include "call.h"

namespace {

constexpr std::string_view kPositions = "slots_positions_";

at::ScalarType scalar_type(const LeafSpec& spec, const std::string& where) {
  const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}, {"int64", at::kLong}};
  auto found = known.find(spec.dtype);
  if (found != known.end()) return found->second;
  throw ContractError(
      "the state " + spec.name + " has a type that no cache has", where, spec.dtype, "give it with --input");
}

// Most tokens that a prompt's artifact takes at once.
int64_t chunk_of(const Contract& contract) {
  for (const LeafSpec& input : contract.inputs) {
    if (input.name != "tokens") continue;
    const std::string size = text(input.shape[1]);
    auto symbol = contract.symbols.find(size);
    return symbol == contract.symbols.end() ? std::stoll(size) : symbol->second.max.value_or(512);
  }
  return 1;
}

bool ends_with(const std::vector<int64_t>& said, const std::vector<int64_t>& tokens) {
  return said.size() >= tokens.size() && std::equal(tokens.rbegin(), tokens.rend(), said.rbegin());
}

} // namespace

Conversation::Conversation(
    const Decoder& decoder, at::Tensor tokens, const std::map<std::string, at::Tensor>& given)
    : tokens_(std::move(tokens)) {
  const Model& step = decoder.step;
  if (tokens_.dim() != 2 || tokens_.scalar_type() != at::kLong || tokens_.size(1) == 0) {
    throw ContractError(
        "the prompts are no int64 tensor of two dimensions",
        step.where,
        "wanted is [texts, tokens], -1 in front of shorter ones",
        "write them so");
  }
  lengths_ = given.count("lengths") ? given.at("lengths") : at::zeros({tokens_.size(0)}, at::kLong);
  for (const LeafSpec& input : step.contract.inputs) {
    if (!input.is_mutated) continue;
    if (given.count(input.name)) {
      state_[input.name] = given.at(input.name).clone().to(step.device);
      continue;
    }
    std::vector<int64_t> sizes;
    for (const Expr& size : input.shape) {
      const std::string written = text(size);
      sizes.push_back(step.contract.symbols.count(written) ? tokens_.size(0) : std::stoll(written));
    }
    const int64_t empty = input.name.rfind(kPositions, 0) == 0 ? -1 : 0;
    state_[input.name] = at::full(sizes, empty, at::device(step.device).dtype(scalar_type(input, step.where)));
  }
}

void Conversation::require_room(const Decoder& decoder, int64_t count) const {
  if (!decoder.limit) return;
  const int64_t longest = (lengths_ + tokens_.ge(0).sum(1)).max().item<int64_t>() + count - 1;
  if (longest <= *decoder.limit) return;
  throw ContractError(
      "a text would outgrow the cache",
      "",
      std::to_string(longest) + " tokens, the cache keeps " + std::to_string(*decoder.limit) + " and no policy says what goes",
      "name a policy, or give a greater budget");
}

at::Tensor Conversation::logits(Model& model, const at::Tensor& tokens, const at::Tensor& positions) {
  std::map<std::string, at::Tensor> given = state_;
  given["tokens"] = tokens.contiguous().to(model.device);
  given["positions"] = positions.contiguous().to(model.device);
  Sizes sizes;
  std::vector<at::Tensor> results = model.run(check_inputs(model.contract, given, model.where, sizes));
  check_outputs(model.contract, results, sizes, model.where);
  return results.at(0).select(1, -1).cpu();
}

at::Tensor Conversation::generate(Decoder& decoder, const Saying& saying) {
  require_room(decoder, saying.count);
  const at::Tensor there = tokens_.ge(0);
  const at::Tensor place = (there.cumsum(1) - 1 + lengths_.unsqueeze(1)).masked_fill(there.logical_not(), -1);
  const at::Tensor filled = tokens_.clamp_min(0);
  const int64_t chunk = chunk_of(decoder.prompt.contract);
  at::Tensor scores;
  for (int64_t begin = 0; begin < tokens_.size(1); begin += chunk) {
    const int64_t end = std::min(begin + chunk, tokens_.size(1));
    scores = logits(decoder.prompt, filled.slice(1, begin, end), place.slice(1, begin, end));
  }
  lengths_ = lengths_ + there.sum(1);
  std::vector<at::Tensor> said;
  std::vector<std::vector<int64_t>> texts(size_t(tokens_.size(0)));
  at::Tensor going = at::ones({tokens_.size(0), 1}, at::kBool);
  for (int64_t i = 0; i < saying.count; ++i) {
    said.push_back(saying.sampling.tokens(scores, lengths_).masked_fill(going.logical_not(), -1));
    for (int64_t text = 0; text < tokens_.size(0); ++text) {
      const int64_t token = said.back()[text][0].item<int64_t>();
      if (token < 0) continue;
      std::vector<int64_t>& mine = texts[size_t(text)];
      mine.push_back(token);
      saying.on_token(text, token);
      for (const std::vector<int64_t>& stop : saying.stop) {
        if (ends_with(mine, stop)) going[text][0] = false;
      }
    }
    if (i + 1 == saying.count || !going.any().item<bool>()) break;
    const at::Tensor place = lengths_.unsqueeze(1).masked_fill(going.logical_not(), -1);
    scores = logits(decoder.step, said.back().clamp_min(0), place);
    lengths_ = lengths_ + going.squeeze(1);
  }
  return at::cat(said, 1);
}

std::map<std::string, at::Tensor> Conversation::state() const {
  std::map<std::string, at::Tensor> found = state_;
  found["lengths"] = lengths_;
  return found;
}
