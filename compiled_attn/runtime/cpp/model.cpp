#include "model.h"

#include <dlfcn.h>
#include <sys/utsname.h>
#include <torch/headeronly/version.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <unordered_map>
#include <utility>

#include "package.h"
#include "sha256.h"
#include "verify.h"

namespace fs = std::filesystem;

namespace {

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
    throw Unfit(
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
    throw Unfit(
        "this CPU lacks instructions that the artifact needs",
        where,
        "it needs " + missing,
        "export the model on a CPU of this kind");
  }
  if (contract.device == "cuda" && !at::globalContext().hasCUDA()) {
    throw Unfit(
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
  throw Unfit(
      "the artifact was built for another GPU",
      where,
      "it needs " + (wanted.empty() ? "none that it names" : wanted) + " (" + contract.target + "); " + device.str() +
          " is " + (found.empty() ? "unknown to the driver" : found),
      "export the model for this GPU, or give --device one of the other kind");
}

c10::Device device_of(const Contract& contract, const Source& source) {
  std::string wanted = source.device.empty() ? contract.device : source.device;
  std::string kind = wanted.substr(0, wanted.find(':'));
  if (kind == contract.device && (kind == "cpu" || kind == "cuda")) {
    try {
      return c10::Device(wanted);
    } catch (const c10::Error&) {
      throw UsageError("--device takes cpu, cuda or cuda:i");
    }
  }
  throw Unfit(
      "the artifact was built for another device",
      source.path,
      "built for " + contract.device + ", asked for " + wanted,
      "load it without --device, or export the model with target='" + kind + "'");
}

// Here native code of the file starts to run.
std::unique_ptr<Loader> open_package(
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

} // namespace

PrivateFolder::PrivateFolder() {
  std::string pattern = (fs::temp_directory_path() / "compiled_attn-XXXXXX").string();
  if (!mkdtemp(pattern.data())) {
    throw ContractError("no private folder can be made", pattern, std::strerror(errno), "set TMPDIR to a folder");
  }
  path = pattern;
}

PrivateFolder::~PrivateFolder() {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

void PrivateFolder::write(const std::string& name, std::string_view data) const {
  fs::path target = path / name;
  fs::create_directories(target.parent_path());
  std::ofstream file(target, std::ios::binary);
  file.write(data.data(), std::streamsize(data.size()));
  if (!file.flush()) throw ContractError("a private copy can not be written", target.string(), "", "free disk space");
}

std::string read_file(const Source& source) {
  std::error_code status;
  bool is_folder = fs::is_directory(source.path, status);
  std::ifstream file(source.path, std::ios::binary);
  if (!file || is_folder) {
    std::string facts = is_folder ? std::strerror(EISDIR) : std::strerror(errno);
    throw ContractError(
        "the file can not be read", source.path, facts, "give the path of an artifact that compiled_attn.export wrote");
  }
  std::string data;
  uintmax_t size = fs::file_size(source.path, status);
  if (!status) data.reserve(size);
  data.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  if (!source.digest.empty()) {
    std::string found = sha256(data);
    if (found != source.digest) {
      throw ContractError(
          "the file is not the expected one",
          source.path,
          "expected SHA-256 " + source.digest + ", found " + found,
          "fetch the file again, or ask its author for the digest");
    }
  }
  return data;
}

std::string first_line(const std::string& text) { return text.substr(0, std::min<size_t>(text.find('\n'), 400)); }

Model::Model(const Source& source, std::string data, bool is_info) : where(source.path), data_(std::move(data)) {
  Archive archive = unpack(data_, where);
  std::vector<Part> parts = parts_of(archive, where);
  parts.empty() ? check(std::move(archive), source, is_info) : choose(parts, source, is_info);
  if (wanted.empty() || is_info) return;
  throw ContractError(
      "the artifact's weights are not in it",
      where,
      "its code asks for " + std::to_string(wanted.size()) + " of them, which lie in the file that it is a program of",
      "load that file: compiled_attn.load_decoder(path)");
}

Model::Model(const Source& source, const Program& program, bool is_info)
    : where(source.path + ", member " + program.member), data_(program.data) {
  check(unpack(data_, where), source, is_info);
}

void Model::choose(const std::vector<Part>& parts, const Source& source, bool is_info) {
  std::string whole = std::move(data_), refused;
  for (const Part& part : parts) {
    where = source.path + ", member " + part.member;
    data_ = part.data;
    try {
      check(unpack(data_, where), source, is_info);
    } catch (const Unfit& error) {
      refused += (refused.empty() ? "not " : "; not ") + name_of(part) + " because " + error.because;
      continue;
    }
    compare_target(part, contract, where);
    return;
  }
  throw ContractError(
      "none of the file's targets is here",
      source.path,
      refused,
      "export the model for what is here (target='auto'), or run it on one of these");
}

void Model::check(Archive archive, const Source& source, bool is_info) {
  auto [members, stated] = verify(std::move(archive), where);
  archive_ = std::move(members);
  contract = std::move(stated);
  if (!is_info) {
    require_torch(contract, where);
    require_machine(contract, where);
  }
  wanted = compare_package(contract, archive_, where);
  if (is_info) return;
  device = device_of(contract, source);
  require_capability(contract, device, where);
}

void Model::open(const std::map<std::string, at::Tensor>& weights) {
  folder_ = std::make_unique<PrivateFolder>();
  loader_ = open_package(*folder_, archive_, data_, device, where);
  weights_ = weights;
  if (weights.empty()) return;
  std::unordered_map<std::string, at::Tensor> given(weights.begin(), weights.end());
  loader_->load_constants(given, false, true, true); // in use at once, all of them, ours
}

std::vector<at::Tensor> Model::run(const std::vector<at::Tensor>& inputs) {
  try {
    return loader_->run(inputs);
  } catch (const std::exception& error) {
    throw ContractError(
        "the artifact's code stopped",
        where,
        first_line(error.what()),
        "run the model eagerly on the same inputs; if that works, export it again");
  }
}
