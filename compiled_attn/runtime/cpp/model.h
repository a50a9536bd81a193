// An artifact: read, checked against its contract and this machine, and then opened and run.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <filesystem>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "archive.h"
#include "bundle.h"
#include "contract.h"
#include "error.h"
#include "programs.h"
#include "weights.h"

// Where an artifact lies. digest: the SHA-256 that it must have, in hex, or empty.  device: empty for the contract's.
struct Source {
  std::string path, digest, device;
};

// A wrong command line.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A folder of mode 0700 that goes with this object.
class PrivateFolder {
 public:
  PrivateFolder();
  PrivateFolder(const PrivateFolder&) = delete;
  PrivateFolder& operator=(const PrivateFolder&) = delete;
  ~PrivateFolder();
  void write(const std::string& name, std::string_view data) const;

  std::filesystem::path path;
};

using Loader = torch::inductor::AOTIModelPackageLoader;

class Model {
 public:
  // Checks a file's bytes, before native code of it is opened; of a file for several targets, the first part that this
  // machine can run. is_info: on a machine that need not run it, then the first part.
  Model(const Source& source, std::string data, bool is_info = false);

  // The same of one of a decoder's programs.
  Model(const Source& source, const Program& program, bool is_info);

  // Here native code of the file starts to run. weights: those that it asks for.
  void open(const std::map<std::string, at::Tensor>& weights = {});

  // The results on checked inputs, in the contract's order; state is written in place.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs);

  std::string where;
  Contract contract;
  c10::Device device = c10::kCPU;
  std::map<std::string, Wanted> wanted; // weights that its code asks for, where they are not in it

 private:
  void check(Archive archive, const Source& source, bool is_info);
  void choose(const std::vector<Part>& parts, const Source& source, bool is_info);

  std::string data_;
  Archive archive_;
  std::unique_ptr<PrivateFolder> folder_; // outlives the loader
  std::map<std::string, at::Tensor> weights_; // outlive the loader, which reads them where they are
  std::unique_ptr<Loader> loader_;
};

// All bytes of a file, of the digest that the source states. Throws ContractError.
std::string read_file(const Source& source);

std::string first_line(const std::string& text);
