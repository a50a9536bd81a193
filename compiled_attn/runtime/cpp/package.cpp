#include "package.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>

#include "error.h"

namespace {

constexpr std::string_view kFolder = "model/data/aotinductor/model/";
constexpr std::string_view kMark = "AOTInductorModelBase(";
constexpr std::string_view kLeaf = "{\"type\": null"; // of a serialised pytree spec
const char* const kStamp = "COMPILED_ATTN_CONTRACT";
const std::map<std::string, std::string> kIsa = {
    {"AVX2", "avx2"}, {"AVX512", "avx512f"}, {"AVX512_VNNI", "avx512_vnni"}, {"AMX", "amx_tile"}, {"AMX_FP16", "amx_fp16"}};

struct InputFacts {
  std::string dtype;
  std::map<int64_t, int64_t> sizes, lowest, highest, strides;
};

struct Facts {
  std::map<std::string, std::string> metadata;
  std::map<int64_t, InputFacts> inputs;
  std::string counted_in = "-1", counted_out = "-1";
  std::map<std::string, std::string> specs; // in, out
  std::string_view library;
  std::map<std::string, Wanted> weights; // those that are not in the library
};

[[noreturn]] void clash(const std::string& where, const std::string& stated, const std::string& said) {
  throw ContractError(
      "the contract contradicts the package",
      where,
      "the contract states " + stated + ", the package says " + said,
      kNotByHand);
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

bool contains(std::string_view text, std::string_view part) {
  return std::search(text.begin(), text.end(), std::boyer_moore_horspool_searcher(part.begin(), part.end())) != text.end();
}

int64_t number(const std::string& digits) { return digits.size() > 18 ? -1 : std::stoll(digits); }

bool is_word(char c) { return is_symbol(std::string(1, c)) || (c >= '0' && c <= '9'); }

// Whether `line` begins as `pattern` says: %w a word, %d digits and perhaps an L, a space any white space or none.
bool scan(std::string_view line, std::string_view pattern, std::vector<std::string>& found) {
  found.clear();
  size_t at = 0;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == ' ') {
      while (at < line.size() && std::string_view(" \t\r\n").find(line[at]) != std::string_view::npos) ++at;
    } else if (pattern[i] == '%') {
      bool digits = pattern[++i] == 'd';
      std::string taken;
      while (at < line.size() && (digits ? line[at] >= '0' && line[at] <= '9' : is_word(line[at]))) taken += line[at++];
      if (taken.empty()) return false;
      if (digits && at < line.size() && line[at] == 'L') ++at;
      found.push_back(taken);
    } else if (at >= line.size() || line[at++] != pattern[i]) {
      return false;
    }
  }
  return true;
}

// Takes `suffix` off `word` where it ends so.
bool strip(std::string& word, std::string_view suffix) {
  if (!ends_with(word, suffix)) return false;
  word.resize(word.size() - suffix.size());
  return true;
}

void read_spec(std::string_view line, Facts& facts) {
  for (const char* which : {"in", "out"}) {
    std::string head = std::string(which) + "_spec_ = R\"(";
    if (line.substr(0, head.size()) == head && ends_with(line, ")\";")) {
      facts.specs[which] = line.substr(head.size(), line.size() - head.size() - 3);
    }
  }
}

void read_line(std::string_view line, std::map<std::string, InputFacts*>& inputs, Facts& facts) {
  std::vector<std::string> m;
  auto input = [&](const std::string& name) {
    auto at = inputs.find(name);
    return at == inputs.end() ? nullptr : at->second;
  };
  if (scan(line, "ConstantHandle %w = ConstantHandle(input_handles[%d]);", m)) {
    inputs[m[0]] = &facts.inputs[number(m[1])];
  } else if (scan(line, "int32_t %w = aoti_torch_dtype_%w();", m)) {
    InputFacts* f = strip(m[0], "_expected_dtype") ? input(m[0]) : nullptr;
    if (f) f->dtype = m[1];
  } else if (scan(line, "if (%d != %w[%d]) {", m)) {
    bool is_size = strip(m[1], "_size"), is_stride = !is_size && strip(m[1], "_stride");
    InputFacts* f = is_size || is_stride ? input(m[1]) : nullptr;
    if (f) (is_size ? f->sizes : f->strides)[number(m[2])] = number(m[0]);
  } else if (scan(line, "if (%w[%d] < %d) {", m) || scan(line, "if (%w[%d] > %d) {", m)) {
    InputFacts* f = strip(m[0], "_size") ? input(m[0]) : nullptr;
    if (f) (line.find('<') < line.find('>') ? f->lowest : f->highest)[number(m[1])] = number(m[2]);
  }
}

void read_source(std::string_view source, Facts& facts) {
  std::vector<std::string> counts;
  bool beside = false;
  for (size_t at = source.find(kMark); at != std::string_view::npos; at = source.find(kMark, at + 1)) {
    if (scan(source.substr(at, 200), "AOTInductorModelBase(%d, %d,", counts)) {
      facts.counted_in = counts[0], facts.counted_out = counts[1];
      beside = lie_beside(source.substr(at, 600));
      break;
    }
  }
  WantedReader weights;
  std::map<std::string, InputFacts*> inputs;
  for (size_t began = 0; began < source.size();) {
    size_t end = std::min(source.find('\n', began), source.size());
    std::string_view line = source.substr(began, end - began);
    line.remove_prefix(std::min(line.find_first_not_of(" \t\r"), line.size()));
    read_spec(line, facts), read_line(line, inputs, facts);
    if (beside) weights.line(line);
    began = end + 1;
  }
  facts.weights = weights.all();
}

Facts facts_of(const Archive& archive, const std::string& where) {
  Facts facts;
  std::string wrapper;
  std::string_view source, metadata;
  int libraries = 0, wrappers = 0;
  for (const auto& [name, payload] : archive.members) {
    bool inside = name.compare(0, kFolder.size(), kFolder) == 0 && name.find('/', kFolder.size()) == std::string::npos;
    if (inside && ends_with(name, ".so")) ++libraries, facts.library = payload;
    if (inside && ends_with(name, ".cpp") && contains(payload, kMark)) {
      ++wrappers, source = payload, wrapper = name.substr(0, name.size() - 4) + "_metadata.json";
    }
  }
  if (libraries != 1 || wrappers != 1) {
    throw ContractError(
        "the package holds no single AOTInductor model",
        where,
        "wanted one library and one wrapper source in " + std::string(kFolder) + ", found " + std::to_string(libraries) +
            " and " + std::to_string(wrappers),
        "export the model again");
  }
  for (const auto& [name, payload] : archive.members) {
    if (name == wrapper) metadata = payload;
  }
  try {
    Json value = parse_json(metadata, false);
    if (value.kind != Json::Kind::object) throw JsonError("is no record");
    for (const auto& [key, field] : value.fields) {
      if (field.kind != Json::Kind::string) throw JsonError("holds something else than text");
      facts.metadata[key] = field.text;
    }
  } catch (const JsonError&) {
    throw ContractError(
        "the package's metadata can not be read",
        where + ", member " + wrapper,
        "AOTInductor writes a flat JSON record there",
        "export the model again");
  }
  try {
    read_source(source, facts);
  } catch (const std::invalid_argument&) {
    throw ContractError(
        "the package asks for weights of an unknown form",
        where + ", member " + wrapper.substr(0, wrapper.size() - 14) + ".cpp",
        "AOTInductor writes their dtypes, shapes and strides there",
        "export the model again");
  }
  return facts;
}

void compare_metadata(const Contract& contract, const Facts& facts, const std::string& where) {
  std::vector<std::pair<std::string, std::string>> stated = {
      {"AOTI_DEVICE_KEY", contract.device},
      {"AOTI_PLATFORM", contract.platform},
      {"AOTI_MACHINE", contract.machine},
      {kStamp, contract.stamp}};
  if (contract.device == "cuda") {
    auto sm = std::find_if(contract.isa.begin(), contract.isa.end(), [](const std::string& f) { return f.rfind("sm_", 0) == 0; });
    stated.emplace_back("AOTI_COMPUTE_CAPABILITY", sm == contract.isa.end() ? "none" : sm->substr(3));
  }
  for (const auto& [key, value] : stated) {
    auto said = facts.metadata.find(key);
    if (said == facts.metadata.end() || said->second != value) {
      clash(where, key + " " + value, key + " " + (said == facts.metadata.end() ? "nothing" : said->second));
    }
  }
  auto words = facts.metadata.find("AOTI_CPU_ISA");
  if (words == facts.metadata.end() || contract.device != "cpu") return;
  std::set<std::string> missing;
  std::string word;
  for (char c : words->second + " ") {
    if (c != ' ') {
      word += c;
      continue;
    }
    auto flag = kIsa.find(word);
    word.clear();
    if (flag != kIsa.end() && std::find(contract.isa.begin(), contract.isa.end(), flag->second) == contract.isa.end()) {
      missing.insert(flag->second);
    }
  }
  if (!missing.empty()) clash(where, "no need of " + *missing.begin(), "AOTI_CPU_ISA " + words->second);
}

int64_t get(const std::map<int64_t, int64_t>& facts, int64_t dim, int64_t otherwise) {
  auto found = facts.find(dim);
  return found == facts.end() ? otherwise : found->second;
}

void compare_input(const Contract& contract, const LeafSpec& tensor, const InputFacts& facts, const std::string& where) {
  std::string name = "input " + tensor.name;
  int64_t rank = int64_t(tensor.shape.size()), last = -1;
  if (!facts.dtype.empty() && facts.dtype != tensor.dtype) clash(where, name + " as " + tensor.dtype, facts.dtype);
  for (const auto* dims : {&facts.sizes, &facts.lowest, &facts.highest, &facts.strides}) {
    if (!dims->empty()) last = std::max(last, dims->rbegin()->first);
  }
  if (last >= rank) {
    clash(where, name + " with " + std::to_string(rank) + " dimensions", "at least " + std::to_string(last + 1));
  }
  for (int64_t dim = 0; dim < rank; ++dim) {
    const Expr& size = tensor.shape[size_t(dim)];
    std::string at = name + ", dimension " + std::to_string(dim);
    bool sized = facts.sizes.count(dim) > 0, ranged = facts.lowest.count(dim) || facts.highest.count(dim);
    if (size.kind == Expr::Kind::number) {
      if (get(facts.sizes, dim, size.value) != size.value || ranged) {
        std::string said = sized ? std::to_string(facts.sizes.at(dim)) : "a range";
        clash(where, at + " of size " + std::to_string(size.value), said);
      }
      continue;
    }
    if (sized) clash(where, at + " of any size", std::to_string(facts.sizes.at(dim)));
    if (size.kind != Expr::Kind::symbol) continue;
    const Range& stated = contract.symbols.at(size.name);
    int64_t lowest = get(facts.lowest, dim, 0), highest = get(facts.highest, dim, -1);
    if (lowest > 2 && stated.min < lowest) { // torch writes 2 where it means: any size, traced away from 0 and 1
      clash(where, at + " from " + std::to_string(stated.min), "from " + std::to_string(lowest));
    }
    if (highest >= 0 && (!stated.max || *stated.max > highest)) {
      std::string up = stated.max ? std::to_string(*stated.max) : "any size";
      clash(where, at + " up to " + up, "up to " + std::to_string(highest));
    }
  }
  int64_t stride = 1;
  for (size_t i = tensor.order.size(); i-- > 0;) {
    int64_t dim = tensor.order[i];
    const Expr& size = tensor.shape[size_t(dim)];
    bool one = size.kind == Expr::Kind::number && size.value == 1;
    if (!one && get(facts.strides, dim, stride) != stride) {
      std::string said = std::to_string(facts.strides.at(dim));
      clash(where, name + ", dimension " + std::to_string(dim) + " of stride " + std::to_string(stride), said);
    }
    if (size.kind != Expr::Kind::number) return;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(size.value, 1), &stride)) return;
  }
}

} // namespace

std::map<std::string, Wanted> compare_package(const Contract& contract, const Archive& archive, const std::string& where) {
  Facts facts = facts_of(archive, where);
  compare_metadata(contract, facts, where);
  std::vector<const LeafSpec*> tensors;
  for (const LeafSpec& input : contract.inputs) {
    if (input.kind == LeafSpec::Kind::tensor) tensors.push_back(&input);
  }
  std::string in = std::to_string(tensors.size()), out = std::to_string(contract.outputs.size());
  if (in != facts.counted_in || out != facts.counted_out) {
    std::string said = facts.counted_in + " tensors in and " + facts.counted_out + " results";
    clash(where, in + " tensors in and " + out + " results", said);
  }
  for (const auto& [which, stated] : {std::pair<std::string, std::string>{"in", contract.in_tree}, {"out", contract.out_tree}}) {
    if (!facts.specs.count(which) || facts.specs.at(which) != stated) {
      clash(where, "another structure of the " + which + "puts", "its own");
    }
    if (!contains(facts.library, stated)) {
      clash(where, "a structure of the " + which + "puts", "a library without it");
    }
    size_t leaves = 0, named = which == "in" ? contract.inputs.size() : contract.outputs.size();
    for (size_t at = stated.find(kLeaf); at != std::string::npos; at = stated.find(kLeaf, at + 1)) ++leaves;
    if (leaves != named) clash(where, std::to_string(named) + " " + which + "puts", std::to_string(leaves));
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    auto found = facts.inputs.find(int64_t(i));
    if (found != facts.inputs.end()) compare_input(contract, *tensors[i], found->second, where);
  }
  return facts.weights;
}
