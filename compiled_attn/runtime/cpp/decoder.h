// A decoder's file, opened: two programs over one copy of their weights; see runtime/decoder_file.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "model.h"
#include "programs.h"

class Decoder {
 public:
  // Reads and checks all of the file's bytes, before native code of it is opened.
  Decoder(const Source& source, std::string data, bool is_info = false);

  // Here native code of the file starts to run; the file's bytes are let go.
  void open();

  Model prompt, step;
  std::optional<int64_t> limit; // longest text, where the caches hold all of it

 private:
  struct Read {
    std::string data;
    Programs file;
  };
  static Read read(const Source& source, std::string data);
  Decoder(const Source& source, Read read, bool is_info);
  std::map<std::string, at::Tensor> tensors(const Model& model, const Program& program) const;

  Read read_;
  std::vector<at::Tensor> stores_;
};
