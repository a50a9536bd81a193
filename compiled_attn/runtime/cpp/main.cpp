// Runs an artifact of compiled_attn without Python:
//   runner model.pt2 --input x=in.npy --output-dir out [--repeat N] [--threads N] [--expect-sha256 H] [--device D]
//   runner decoder.pt2 --input tokens=in.npy --output-dir out [--count N]     continues texts
//       [--temperature T] [--top-k K] [--top-p P] [--seed S] [--stop N,N,... ...] [--stream]     greedily unless there
//       is a temperature; a text ends behind a token or several in a row; each is printed with its text as it comes
//   runner model.pt2 --info
// Everything is checked before native code of the file is opened. Exit code: 0, or 1 with an error in four parts on
// stderr, or 2 for a wrong command line.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "contract.h"
#include "conversation.h"
#include "decoder.h"
#include "error.h"
#include "model.h"
#include "npy.h"
#include "sample.h"

namespace fs = std::filesystem;

namespace {

const char* const kUsage =
    "usage: runner model.pt2 --input name=file.npy ... --output-dir folder\n"
    "              [--repeat N] [--threads N] [--expect-sha256 digest] [--device cpu|cuda[:i]]\n"
    "       runner decoder.pt2 --input tokens=file.npy --output-dir folder [--count N] [--input state=...]\n"
    "              [--temperature T] [--top-k K] [--top-p P] [--seed S] [--stop N,N,... ...] [--stream]\n"
    "       runner model.pt2 --info\n"
    "bfloat16 tensors are .npy files of uint16 bit patterns. Loading an artifact runs native code: trust the file.\n";

struct Options {
  Source source;
  std::string output;
  std::vector<std::pair<std::string, std::string>> inputs;
  int repeat = 1, threads = 0;
  Saying saying;
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

int64_t whole(const std::string& flag, const std::string& text) {
  bool good = !text.empty() && text.size() <= 18 && text.find_first_not_of("0123456789") == std::string::npos;
  if (!good) wrong_usage(flag + " takes a whole number from 0");
  return std::stoll(text);
}

// Tokens of a sequence "5,7,2".
std::vector<int64_t> sequence(const std::string& flag, const std::string& text) {
  std::vector<int64_t> found;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    found.push_back(whole(flag, text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return found;
}

void print_token(int64_t text, int64_t token) {
  std::printf("%lld %lld\n", (long long)text, (long long)token);
  std::fflush(stdout);
}

double fraction(const std::string& flag, const std::string& text, double most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value >= 0 && value <= most)) wrong_usage(flag + " is out of its range");
  return value;
}

Options parse(int count, char** words) {
  Options options;
  std::random_device chance;
  Sampling& sampling = options.saying.sampling;
  sampling.seed = uint64_t(chance()) << 32 | chance();
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
    } else if (word == "--count") {
      options.saying.count = positive(word, value());
    } else if (word == "--temperature") {
      sampling.temperature = fraction(word, value(), std::numeric_limits<double>::max());
    } else if (word == "--top-p") {
      sampling.top_p = fraction(word, value(), 1);
    } else if (word == "--top-k") {
      sampling.top_k = whole(word, value());
    } else if (word == "--stop") {
      options.saying.stop.push_back(sequence(word, value()));
    } else if (word == "--stream") {
      options.saying.on_token = print_token;
    } else if (word == "--seed") {
      sampling.seed = uint64_t(whole(word, value()));
    } else if (word == "--repeat") {
      options.repeat = positive(word, value());
    } else if (word == "--threads") {
      options.threads = positive(word, value());
    } else if (word == "--expect-sha256") {
      options.source.digest = value();
      std::transform(options.source.digest.begin(), options.source.digest.end(), options.source.digest.begin(), ::tolower);
    } else if (word == "--device") {
      options.source.device = value();
    } else if (word == "--info") {
      options.is_info = true;
    } else if (word.rfind("--", 0) == 0 || !options.source.path.empty()) {
      wrong_usage(word + " is not known");
    } else {
      options.source.path = word;
    }
  }
  if (options.source.path.empty()) wrong_usage("the artifact's path is missing");
  if (!options.is_info && options.output.empty()) wrong_usage("--output-dir is missing");
  return options;
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

using Time = std::chrono::steady_clock::time_point;

double milliseconds(Time since) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - since).count();
}

std::map<std::string, at::Tensor> read_inputs(const Contract& contract, const Options& options) {
  std::map<std::string, at::Tensor> given;
  for (const auto& [name, path] : options.inputs) {
    if (given.count(name)) {
      throw ContractError("argument " + name + " is given twice", options.source.path, "", "pass each argument once");
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

// began: when the file was read.
void run(const Options& options, std::string data, Time began) {
  Model model(options.source, std::move(data), options.is_info);
  const Contract& contract = model.contract;
  if (options.is_info) return print_info(contract);
  Sizes sizes;
  std::vector<at::Tensor> inputs = check_inputs(contract, read_inputs(contract, options), model.where, sizes);
  double checked = milliseconds(began);

  if (options.threads) at::set_num_threads(options.threads);
  c10::InferenceMode no_gradients;
  for (at::Tensor& tensor : inputs) tensor = tensor.to(model.device);
  began = std::chrono::steady_clock::now();
  model.open();
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
    results = model.run(taken);
    times.push_back(milliseconds(began));
  }
  check_outputs(contract, results, sizes, model.where);
  write_outputs(contract, results, taken, options.output);
  std::printf("checked  %10.3f ms\nloaded   %10.3f ms\nfirst    %10.3f ms\n", checked, loaded, times[0]);
  std::sort(times.begin(), times.end());
  std::printf(
      "median   %10.3f ms, of %d, %d threads\n", times[times.size() / 2], options.repeat, at::get_num_threads());
}

// A decoder's file: continues the prompts, and writes the tokens and the state.
void generate(const Options& options, std::string data) {
  Decoder decoder(options.source, std::move(data), options.is_info);
  if (options.is_info) {
    for (const Model* model : {&decoder.prompt, &decoder.step}) {
      std::printf("program  %s\n", model->where.substr(model->where.rfind('/') + 1).c_str());
      print_info(model->contract);
    }
    return;
  }
  std::map<std::string, at::Tensor> given = read_inputs(decoder.step.contract, options);
  auto tokens = given.find("tokens");
  if (tokens == given.end()) wrong_usage("--input tokens=file.npy is missing");
  if (options.threads) at::set_num_threads(options.threads);
  c10::InferenceMode no_gradients;
  Conversation talk(decoder, tokens->second, given);
  decoder.open();
  auto began = std::chrono::steady_clock::now();
  at::Tensor said = talk.generate(decoder, options.saying);
  double spent = milliseconds(began);
  std::error_code status;
  fs::create_directories(options.output, status);
  write_npy((fs::path(options.output) / "tokens.npy").string(), said);
  for (const auto& [name, tensor] : talk.state()) {
    write_npy((fs::path(options.output) / (name + ".npy")).string(), tensor.cpu());
  }
  const long long count = said.size(1);
  std::printf("tokens   %10lld a text, %.3f ms each, %d threads\n", count, spent / double(count), at::get_num_threads());
}

} // namespace

int main(int count, char** words) {
  Options options = parse(count, words);
  try {
    Time began = std::chrono::steady_clock::now();
    std::string data = read_file(options.source);
    if (holds_decoder(data)) {
      generate(options, std::move(data));
    } else {
      run(options, std::move(data), began);
    }
    return 0;
  } catch (const UsageError& error) {
    wrong_usage(error.what());
  } catch (const ContractError& error) {
    std::cerr << "error: " << error.what() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << ContractError::text("the runner failed", options.source.path, first_line(error.what()), "report it")
              << "\n";
  }
  return 1;
}
