// Runs an artifact of compiled_attn without Python:
//   runner model.pt2 --input x=in.npy --output-dir out [--repeat N] [--threads N] [--expect-sha256 H] [--device D]
//   runner model.pt2 --info
// Everything is checked before native code of the file is opened. Exit code: 0, or 1 with an error in four parts on
// stderr, or 2 for a wrong command line.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <sys/utsname.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/headeronly/version.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "archive.h"
#include "call.h"
#include "contract.h"
#include "error.h"
#include "npy.h"
#include "package.h"
#include "sha256.h"
#include "verify.h"

namespace fs = std::filesystem;

namespace {

const char* const kUsage =
    "usage: runner model.pt2 --input name=file.npy ... --output-dir folder\n"
    "              [--repeat N] [--threads N] [--expect-sha256 digest] [--device cpu|cuda[:i]]\n"
    "       runner model.pt2 --info\n"
    "bfloat16 tensors are .npy files of uint16 bit patterns. Loading an artifact runs native code: trust the file.\n";

struct Options {
  std::string path, output, digest, device;
  std::vector<std::pair<std::string, std::string>> inputs;
  int repeat = 1, threads = 0;
  bool is_info = false;
};

[[noreturn]] void wrong_usage(const std::string& problem) {
  std::cerr << "error: " << problem << "\n" << kUsage;
  std::exit(2);
}

int positive(const std::string& flag, const std::string& text) {
  bool good = !text.empty() && text.size() <= 8 && text.find_first_not_of("0123456789") == std::string::npos;
  if (!good || std::stoi(text) < 1) wrong_usage(flag + " takes a whole number from 1");
  return std::stoi(text);
}

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    auto value = [&] {
      if (i + 1 >= count) wrong_usage(word + " takes a value");
      return std::string(words[++i]);
    };
    if (word == "--help" || word == "-h") {
      std::cout << kUsage;
      std::exit(0);
    } else if (word == "--input") {
      std::string pair = value();
      size_t at = pair.find('=');
      if (at == std::string::npos) wrong_usage("--input takes name=file.npy");
      options.inputs.emplace_back(pair.substr(0, at), pair.substr(at + 1));
    } else if (word == "--output-dir") {
      options.output = value();
    } else if (word == "--repeat") {
      options.repeat = positive(word, value());
    } else if (word == "--threads") {
      options.threads = positive(word, value());
    } else if (word == "--expect-sha256") {
      options.digest = value();
      std::transform(options.digest.begin(), options.digest.end(), options.digest.begin(), ::tolower);
    } else if (word == "--device") {
      options.device = value();
    } else if (word == "--info") {
      options.is_info = true;
    } else if (word.rfind("--", 0) == 0 || !options.path.empty()) {
      wrong_usage(word + " is not known");
    } else {
      options.path = word;
    }
  }
  if (options.path.empty()) wrong_usage("the artifact's path is missing");
  if (!options.is_info && options.output.empty()) wrong_usage("--output-dir is missing");
  return options;
}

std::string read_file(const Options& options) {
  std::error_code status;
  bool is_folder = fs::is_directory(options.path, status);
  std::ifstream file(options.path, std::ios::binary);
  if (!file || is_folder) {
    std::string facts = is_folder ? std::strerror(EISDIR) : std::strerror(errno);
    throw ContractError(
        "the file can not be read", options.path, facts, "give the path of an artifact that compiled_attn.export wrote");
  }
  std::string data;
  uintmax_t size = fs::file_size(options.path, status);
  if (!status) data.reserve(size);
  data.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  if (!options.digest.empty()) {
    std::string found = sha256(data);
    if (found != options.digest) {
      throw ContractError(
          "the file is not the expected one",
          options.path,
          "expected SHA-256 " + options.digest + ", found " + found,
          "fetch the file again, or ask its author for the digest");
    }
  }
  return data;
}

void require_torch(const Contract& contract, const std::string& where) {
  auto stated = contract.versions.find("torch");
  std::string built = stated == contract.versions.end() ? "nothing" : stated->second;
  built = built.substr(0, built.find('+'));
  std::string here = TORCH_VERSION;
  here = here.substr(0, here.find('+'));
  if (built == here) return;
  throw ContractError(
      "the artifact was built with another torch",
      where,
      "built with " + built + ", this is " + here,
      "install torch==" + built + ", or export the model again with this torch");
}

std::set<std::string> cpu_flags() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(std::min(line.find(':') + 1, line.size())));
    return {std::istream_iterator<std::string>(words), {}};
  }
#if defined(__x86_64__)
  std::set<std::string> flags = {"sse4_2", "ssse3", "popcnt"};
  if (__builtin_cpu_supports("avx2")) flags.insert({"avx2", "fma", "f16c", "bmi2"});
  if (__builtin_cpu_supports("avx512f")) flags.insert({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"});
  return flags;
#else
  return {"asimd"};
#endif
}

void require_machine(const Contract& contract, const std::string& where) {
  utsname system{};
  uname(&system);
  std::string platform = system.sysname;
  std::transform(platform.begin(), platform.end(), platform.begin(), ::tolower);
  std::string here = platform + " " + system.machine, built = contract.platform + " " + contract.machine;
  if (here != built) {
    throw ContractError(
        "the artifact was built for another kind of machine",
        where,
        "built for " + built + ", this is " + here,
        "export the model on a machine of this kind");
  }
  std::set<std::string> flags = cpu_flags();
  std::string missing;
  for (const std::string& flag : contract.isa) {
    if (flag.rfind("sm_", 0) != 0 && !flags.count(flag)) missing += (missing.empty() ? "" : ", ") + flag;
  }
  if (!missing.empty()) {
    throw ContractError(
        "this CPU lacks instructions that the artifact needs",
        where,
        "it needs " + missing,
        "export the model on a CPU of this kind");
  }
  if (contract.device == "cuda" && !at::globalContext().hasCUDA()) {
    throw ContractError(
        "the artifact needs a GPU that is not here",
        where,
        "this libtorch finds no CUDA device",
        "run it on such a GPU, or export the model for target='cpu'");
  }
}

// A device's compute capability as "sm_80", by the driver; empty where it does not tell.
std::string capability_of(int device) {
  using Init = int (*)(unsigned);
  using Attribute = int (*)(int*, int, int);
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  auto init = driver ? reinterpret_cast<Init>(dlsym(driver, "cuInit")) : nullptr;
  auto attribute = driver ? reinterpret_cast<Attribute>(dlsym(driver, "cuDeviceGetAttribute")) : nullptr;
  int major = 0, minor = 0; // attributes 75 and 76 of the driver's interface
  if (!init || !attribute || init(0) || attribute(&major, 75, device) || attribute(&minor, 76, device)) return "";
  return "sm_" + std::to_string(major * 10 + minor);
}

// Machine code runs on the compute capability it was made for, with the shared memory that its launches were chosen for.
void require_capability(const Contract& contract, const c10::Device& device, const std::string& where) {
  if (contract.device != "cuda") return;
  std::string found = capability_of(device.has_index() ? device.index() : 0), wanted;
  for (const std::string& flag : contract.isa) {
    if (flag.rfind("sm_", 0) == 0) wanted = flag;
  }
  if (found == wanted) return;
  throw ContractError(
      "the artifact was built for another GPU",
      where,
      "it needs " + (wanted.empty() ? "none that it names" : wanted) + " (" + contract.target + "); " + device.str() +
          " is " + (found.empty() ? "unknown to the driver" : found),
      "export the model for this GPU, or give --device one of the other kind");
}

c10::Device device_of(const Contract& contract, const Options& options) {
  std::string wanted = options.device.empty() ? contract.device : options.device;
  std::string kind = wanted.substr(0, wanted.find(':'));
  if (kind == contract.device && (kind == "cpu" || kind == "cuda")) {
    try {
      return c10::Device(wanted);
    } catch (const c10::Error&) {
      wrong_usage("--device takes cpu, cuda or cuda:i");
    }
  }
  throw ContractError(
      "the artifact was built for another device",
      options.path,
      "built for " + contract.device + ", asked for " + wanted,
      "load it without --device, or export the model with target='" + kind + "'");
}

// A folder of mode 0700 that goes with this object.
class PrivateFolder {
 public:
  PrivateFolder() {
    std::string pattern = (fs::temp_directory_path() / "compiled_attn-XXXXXX").string();
    if (!mkdtemp(pattern.data())) {
      throw ContractError("no private folder can be made", pattern, std::strerror(errno), "set TMPDIR to a folder");
    }
    path = pattern;
  }
  PrivateFolder(const PrivateFolder&) = delete;
  PrivateFolder& operator=(const PrivateFolder&) = delete;
  ~PrivateFolder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }

  void write(const std::string& name, std::string_view data) const {
    fs::path target = path / name;
    fs::create_directories(target.parent_path());
    std::ofstream file(target, std::ios::binary);
    file.write(data.data(), std::streamsize(data.size()));
    if (!file.flush()) throw ContractError("a private copy can not be written", target.string(), "", "free disk space");
  }

  fs::path path;
};

std::string first_line(const std::string& text) { return text.substr(0, std::min<size_t>(text.find('\n'), 400)); }

using Loader = torch::inductor::AOTIModelPackageLoader;

// Here native code of the file starts to run.
std::unique_ptr<Loader> open(
    const PrivateFolder& folder, const Archive& archive, const std::string& data, c10::Device device,
    const std::string& where) {
#ifdef LOADS_DIRECTORIES
  (void)data;
  for (const auto& [name, payload] : archive.members) folder.write(name, payload);
  std::string source = folder.path.string();
#else
  (void)archive;
  folder.write("model.pt2", data);
  std::string source = (folder.path / "model.pt2").string();
#endif
  try {
    return std::make_unique<Loader>(source, "model", false, 1, device.is_cuda() ? device.index() : c10::DeviceIndex(-1));
  } catch (const std::exception& error) {
    throw ContractError(
        "AOTInductor can not open the package",
        where,
        first_line(error.what()),
        "run compiled_attn.doctor(); check that temporary files may be executed (TMPDIR)");
  }
}

std::string leaf_text(const LeafSpec& leaf) {
  if (leaf.kind == LeafSpec::Kind::constant) return "always " + leaf.constant;
  if (leaf.kind == LeafSpec::Kind::size) return "size " + text(leaf.size);
  return describe(leaf) + (leaf.is_mutated ? ", state" : "");
}

void print_info(const Contract& contract) {
  for (const LeafSpec& input : contract.inputs) std::printf("input    %-20s %s\n", input.name.c_str(), leaf_text(input).c_str());
  for (const LeafSpec& output : contract.outputs) std::printf("output   %-20s %s\n", output.name.c_str(), leaf_text(output).c_str());
  for (const auto& [name, range] : contract.symbols) {
    std::printf("size     %-20s %s%s\n", name.c_str(), range_text(range).c_str(), range.bound ? "" : ", by the data");
  }
  for (const Expr& guard : contract.guards) std::printf("guard    %s\n", text(guard).c_str());
  std::string isa;
  for (const std::string& flag : contract.isa) isa += " " + flag;
  std::printf("origin   %s\n", contract.origin.c_str());
  std::printf(
      "target   %-20s %s, %s %s,%s\n", contract.target.c_str(), contract.device.c_str(), contract.platform.c_str(),
      contract.machine.c_str(), isa.c_str());
  for (const auto& [name, version] : contract.versions) std::printf("version  %-20s %s\n", name.c_str(), version.c_str());
  for (const MemberSpec& member : contract.members) {
    std::printf("member   %12lld B  %s  %s\n", (long long)member.size, member.sha256.substr(0, 16).c_str(), member.name.c_str());
  }
}

double milliseconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - since).count();
}

std::map<std::string, at::Tensor> read_inputs(const Contract& contract, const Options& options) {
  std::map<std::string, at::Tensor> given;
  for (const auto& [name, path] : options.inputs) {
    if (given.count(name)) {
      throw ContractError("argument " + name + " is given twice", options.path, "", "pass each argument once");
    }
    std::string dtype;
    for (const LeafSpec& input : contract.inputs) {
      if (input.name == name) dtype = input.dtype;
    }
    given[name] = read_npy(path, dtype);
  }
  return given;
}

void write_outputs(
    const Contract& contract, const std::vector<at::Tensor>& results, const std::vector<at::Tensor>& inputs,
    const fs::path& folder) {
  std::error_code status;
  fs::create_directories(folder, status);
  for (size_t i = 0; i < contract.outputs.size(); ++i) {
    const LeafSpec& spec = contract.outputs[i];
    if (spec.kind == LeafSpec::Kind::constant) continue;
    std::string path = (folder / (spec.name + ".npy")).string();
    write_npy(path, results[i].cpu());
    std::printf("output   %-20s %s\n", spec.name.c_str(), path.c_str());
  }
  size_t position = 0;
  for (const LeafSpec& spec : contract.inputs) {
    if (spec.kind != LeafSpec::Kind::tensor) continue;
    const at::Tensor& tensor = inputs[position++];
    if (!spec.is_mutated) continue;
    std::string path = (folder / (spec.name + ".npy")).string();
    write_npy(path, tensor.cpu());
    std::printf("state    %-20s %s\n", spec.name.c_str(), path.c_str());
  }
}

void run(const Options& options) {
  auto began = std::chrono::steady_clock::now();
  std::string data = read_file(options);
  auto [archive, contract] = verify(data, options.path);
  if (options.is_info) {
    compare_package(contract, archive, options.path);
    return print_info(contract);
  }
  require_torch(contract, options.path);
  require_machine(contract, options.path);
  compare_package(contract, archive, options.path);
  c10::Device device = device_of(contract, options);
  require_capability(contract, device, options.path);
  Sizes sizes;
  std::vector<at::Tensor> inputs = check_inputs(contract, read_inputs(contract, options), options.path, sizes);
  double checked = milliseconds(began);

  if (options.threads) at::set_num_threads(options.threads);
  c10::InferenceMode no_gradients;
  for (at::Tensor& tensor : inputs) tensor = tensor.to(device);
  began = std::chrono::steady_clock::now();
  PrivateFolder folder;
  std::unique_ptr<Loader> loader = open(folder, archive, data, device, options.path);
  double loaded = milliseconds(began);

  std::vector<double> times;
  std::vector<at::Tensor> results, taken;
  for (int i = 0; i < options.repeat; ++i) {
    taken = inputs;
    size_t position = 0;
    for (const LeafSpec& spec : contract.inputs) { // each run begins with the state that was given
      if (spec.kind != LeafSpec::Kind::tensor) continue;
      if (spec.is_mutated) taken[position] = inputs[position].clone();
      ++position;
    }
    began = std::chrono::steady_clock::now();
    try {
      results = loader->run(taken);
    } catch (const std::exception& error) {
      throw ContractError(
          "the artifact's code stopped",
          options.path,
          first_line(error.what()),
          "run the model eagerly on the same inputs; if that works, export it again");
    }
    times.push_back(milliseconds(began));
  }
  check_outputs(contract, results, sizes, options.path);
  write_outputs(contract, results, taken, options.output);
  std::printf("checked  %10.3f ms\nloaded   %10.3f ms\nfirst    %10.3f ms\n", checked, loaded, times[0]);
  std::sort(times.begin(), times.end());
  std::printf(
      "median   %10.3f ms, of %d, %d threads\n", times[times.size() / 2], options.repeat, at::get_num_threads());
}

} // namespace

int main(int count, char** words) {
  Options options = parse(count, words);
  try {
    run(options);
    return 0;
  } catch (const ContractError& error) {
    std::cerr << "error: " << error.what() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << ContractError::text("the runner failed", options.path, first_line(error.what()), "report it")
              << "\n";
  }
  return 1;
}
