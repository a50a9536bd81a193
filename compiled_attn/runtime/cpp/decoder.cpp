#include "decoder.h"

#include <ATen/ATen.h>

#include <cstring>

namespace {

at::ScalarType type_of(const std::string& dtype) {
  const std::map<std::string, at::ScalarType> known = {
      {"bool", at::kBool}, {"uint8", at::kByte}, {"int8", at::kChar}, {"int16", at::kShort}, {"int32", at::kInt},
      {"int64", at::kLong}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"float32", at::kFloat},
      {"float64", at::kDouble}};
  return known.at(dtype);
}

at::Tensor stored(std::string_view bytes, const c10::Device& device) {
  at::Tensor made = at::empty({int64_t(bytes.size())}, at::kByte);
  std::memcpy(made.data_ptr(), bytes.data(), bytes.size());
  return made.to(device);
}

} // namespace

Decoder::Read Decoder::read(const Source& source, std::string data) {
  Read found{std::move(data), {}};
  found.file = programs_of(unpack(found.data, source.path), source.path);
  return found;
}

Decoder::Decoder(const Source& source, std::string data, bool is_info)
    : Decoder(source, read(source, std::move(data)), is_info) {}

Decoder::Decoder(const Source& source, Read read, bool is_info)
    : prompt(source, read.file.programs.at(0), is_info),
      step(source, read.file.programs.at(1), is_info),
      limit(read.file.limit),
      read_(std::move(read)) {
  const Programs& file = read_.file;
  require_weights(file, file.programs[0], prompt.wanted, prompt.where);
  require_weights(file, file.programs[1], step.wanted, step.where);
}

void Decoder::open() {
  for (std::string_view bytes : read_.file.weights) stores_.push_back(stored(bytes, step.device));
  prompt.open(tensors(prompt, read_.file.programs[0]));
  step.open(tensors(step, read_.file.programs[1]));
  read_ = {};
}

std::map<std::string, at::Tensor> Decoder::tensors(const Model& model, const Program& program) const {
  std::map<std::string, at::Tensor> found;
  for (const auto& [name, want] : model.wanted) {
    const at::Tensor& store = stores_.at(size_t(program.weights.at(name)));
    at::Tensor tensor = at::empty({0}, at::device(store.device()).dtype(type_of(want.dtype)));
    found[name] = tensor.set_(store.storage(), want.offset, want.shape, want.stride);
  }
  return found;
}
