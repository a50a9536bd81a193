#include "contract.h"

#include <algorithm>
#include <set>

#include "error.h"
#include "sha256.h"

namespace {

constexpr int64_t kVersion = 2;
const std::string kNative = "built on its target", kCross = "cross-compiled, not run on the target";
constexpr size_t kMaxRank = 32;
const std::set<std::string> kDtypes = {
    "bool", "uint8", "int8", "int16", "int32", "int64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128"};

class Reader {
 public:
  explicit Reader(std::string where) : where_(std::move(where)) {}

  [[noreturn]] void fail(const std::string& path, const std::string& problem) const {
    throw ContractError(
        "the contract is not well formed",
        where_,
        path + " " + problem,
        "export the model again; a contract is never edited by hand");
  }

  // The fields of a record that has exactly these, in this order.
  std::vector<const Json*> record(const Json& value, const std::string& path, std::vector<std::string> keys) const {
    std::vector<const Json*> found;
    for (const std::string& key : keys) found.push_back(value.find(key));
    bool good = value.kind == Json::Kind::object && value.fields.size() == keys.size() &&
        std::find(found.begin(), found.end(), nullptr) == found.end();
    if (good) return found;
    std::sort(keys.begin(), keys.end());
    std::string all;
    for (const std::string& key : keys) all += (all.empty() ? "" : ", ") + key;
    fail(path, "does not have exactly the fields " + all);
  }

  std::string text(const Json& value, const std::string& path) const {
    if (value.kind != Json::Kind::string) fail(path, "is no text");
    return value.text;
  }

  int64_t number(const Json& value, const std::string& path) const {
    auto whole = value.whole();
    if (!whole || *whole < 0) fail(path, "is no whole number of at most 63 bits");
    return *whole;
  }

  bool flag(const Json& value, const std::string& path) const {
    if (value.kind != Json::Kind::boolean) fail(path, "is neither true nor false");
    return value.flag;
  }

  const std::vector<Json>& items(const Json& value, const std::string& path) const {
    if (value.kind != Json::Kind::array) fail(path, "is no list");
    return value.items;
  }

  const std::vector<std::pair<std::string, Json>>& entries(const Json& value, const std::string& path) const {
    if (value.kind != Json::Kind::object) fail(path, "is no record");
    return value.fields;
  }

  template <class Out, class Read>
  std::vector<Out> all(const Json& value, const std::string& path, Read read) const {
    std::vector<Out> out;
    for (const Json& item : items(value, path)) out.push_back(read(item, path + "[" + std::to_string(out.size()) + "]"));
    return out;
  }

  std::vector<std::string> texts(const Json& value, const std::string& path) const {
    return all<std::string>(value, path, [this](const Json& v, const std::string& p) { return text(v, p); });
  }

  Expr expression(const Json& value, const std::string& path) const {
    auto expr = read_expr(value);
    if (!expr) fail(path, "is no expression");
    return *expr;
  }

  LeafSpec leaf(const Json& value, const std::string& path) const {
    const Json* kind = value.kind == Json::Kind::object ? value.find("kind") : nullptr;
    std::string word = kind && kind->kind == Json::Kind::string ? kind->text : "";
    LeafSpec leaf;
    if (word == "constant") {
      auto f = record(value, path, {"name", "value", "kind"});
      if (f[1]->kind == Json::Kind::array || f[1]->kind == Json::Kind::object) fail(path + ".value", "is no constant");
      leaf.kind = LeafSpec::Kind::constant, leaf.name = text(*f[0], path + ".name"), leaf.constant = f[1]->span;
    } else if (word == "size") {
      auto f = record(value, path, {"name", "value", "kind"});
      leaf.kind = LeafSpec::Kind::size, leaf.name = text(*f[0], path + ".name");
      leaf.size = expression(*f[1], path + ".value");
    } else if (word == "tensor") {
      tensor(value, path, leaf);
    } else {
      fail(path + ".kind", "is none of constant, size, tensor");
    }
    return leaf;
  }

  void tensor(const Json& value, const std::string& path, LeafSpec& leaf) const {
    auto f = record(value, path, {"name", "dtype", "shape", "order", "device", "mutated", "kind"});
    if (f[1]->kind != Json::Kind::string || !kDtypes.count(f[1]->text)) fail(path + ".dtype", "is no dtype");
    leaf.shape = all<Expr>(*f[2], path + ".shape", [this](const Json& v, const std::string& p) { return expression(v, p); });
    bool negative = std::any_of(leaf.shape.begin(), leaf.shape.end(), [](const Expr& e) {
      return e.kind == Expr::Kind::number && e.value < 0;
    });
    if (negative || leaf.shape.size() > kMaxRank) fail(path + ".shape", "is no shape");
    leaf.order = all<int64_t>(*f[3], path + ".order", [this](const Json& v, const std::string& p) { return number(v, p); });
    std::vector<int64_t> sorted = leaf.order;
    std::sort(sorted.begin(), sorted.end());
    bool once = sorted.size() == leaf.shape.size();
    for (size_t i = 0; once && i < sorted.size(); ++i) once = sorted[i] == int64_t(i);
    if (!once) fail(path + ".order", "does not name each dimension once");
    leaf.name = text(*f[0], path + ".name"), leaf.dtype = f[1]->text;
    leaf.device = text(*f[4], path + ".device"), leaf.is_mutated = flag(*f[5], path + ".mutated");
  }

  void call(const Json& value, Contract& out) const {
    auto f = record(
        value, "call", {"arguments", "guards", "in_tree", "inputs", "out_tree", "outputs", "positional", "symbols"});
    std::vector<std::string> arguments = texts(*f[0], "call.arguments");
    int64_t positional = number(*f[6], "call.positional");
    out.inputs = all<LeafSpec>(*f[3], "call.inputs", [this](const Json& v, const std::string& p) {
      LeafSpec found = leaf(v, p);
      if (found.kind == LeafSpec::Kind::size) fail(p, "is a size, which is no input");
      return found;
    });
    out.outputs =
        all<LeafSpec>(*f[5], "call.outputs", [this](const Json& v, const std::string& p) { return leaf(v, p); });
    for (const auto& [name, range] : entries(*f[7], "call.symbols")) {
      std::string path = "call.symbols." + name;
      auto g = record(range, path, {"min", "max", "bound"});
      if (!is_symbol(name)) fail(path, "is no symbol");
      Range read;
      read.min = number(*g[0], path + ".min");
      if (g[1]->kind != Json::Kind::null) read.max = number(*g[1], path + ".max");
      if (read.max && *read.max < read.min) fail(path, "has an empty range");
      read.bound = flag(*g[2], path + ".bound");
      out.symbols[name] = read;
    }
    out.guards = all<Expr>(*f[1], "call.guards", [this](const Json& v, const std::string& p) {
      Expr guard = expression(v, p);
      if (!guard.is_condition()) fail(p, "is no condition");
      return guard;
    });
    out.in_tree = text(*f[2], "call.in_tree"), out.out_tree = text(*f[4], "call.out_tree");
    consistent(out, arguments, positional);
  }

  void consistent(const Contract& call, const std::vector<std::string>& arguments, int64_t positional) const {
    std::set<std::string> names;
    for (const LeafSpec& input : call.inputs) {
      if (!names.insert(input.name).second) fail("call.inputs", "has two inputs of one name");
    }
    if (std::set<std::string>(arguments.begin(), arguments.end()).size() != arguments.size()) {
      fail("call.arguments", "has two arguments of one name");
    }
    if (positional > int64_t(arguments.size())) fail("call.positional", "counts more arguments than there are");
    std::set<std::string> taken, given;
    for (const LeafSpec& input : call.inputs) {
      for (const Expr& size : input.shape) collect_symbols(size, taken);
    }
    for (const Expr& guard : call.guards) collect_symbols(guard, taken);
    for (const std::string& name : taken) {
      auto found = call.symbols.find(name);
      if (found == call.symbols.end() || !found->second.bound) fail("call.inputs", "mention a symbol without a range");
    }
    std::set<std::string> known = determined(call);
    for (const auto& [name, range] : call.symbols) {
      if (range.bound && !known.count(name)) fail("call.symbols", "has " + name + ", which no input determines");
    }
    for (const LeafSpec& output : call.outputs) {
      for (const Expr& size : output.shape) collect_symbols(size, given);
      collect_symbols(output.size, given);
    }
    for (const std::string& name : given) {
      if (!call.symbols.count(name)) fail("call.outputs", "mention a symbol without a range");
    }
  }

  static std::set<std::string> determined(const Contract& call) {
    std::set<std::string> known;
    for (const LeafSpec& input : call.inputs) {
      for (const Expr& size : input.shape) {
        if (size.kind == Expr::Kind::symbol) known.insert(size.name);
      }
    }
    for (const LeafSpec& input : call.inputs) {
      for (const Expr& size : input.shape) {
        Sizes others, tried;
        for (const std::string& name : known) others[name] = 5;
        tried = others;
        std::string unknown;
        int count = 0;
        for (const std::string& name : symbols_of(size)) {
          if (!known.count(name)) unknown = name, ++count;
        }
        if (count != 1) continue;
        tried[unknown] = 7;
        auto value = evaluate(size, tried);
        auto solved = value ? solve(size, *value, others) : std::nullopt;
        if (solved && solved->second == 7) known.insert(unknown);
      }
    }
    return known;
  }

  void target(const Json& value, Contract& out) const {
    auto f = record(value, "target", {"device", "isa", "machine", "name", "origin", "platform"});
    out.device = text(*f[0], "target.device"), out.isa = texts(*f[1], "target.isa");
    out.machine = text(*f[2], "target.machine"), out.target = text(*f[3], "target.name");
    out.platform = text(*f[5], "target.platform");
    out.origin = f[4]->kind == Json::Kind::string ? f[4]->text : "";
    if (out.origin != kNative && out.origin != kCross) {
      fail("target.origin", "is neither '" + kNative + "' nor '" + kCross + "'");
    }
  }

  MemberSpec member(const Json& value, const std::string& path) const {
    auto f = record(value, path, {"name", "sha256", "size"});
    MemberSpec out;
    out.sha256 = text(*f[1], path + ".sha256");
    bool is_hex = out.sha256.size() == 64 && out.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (!is_hex) fail(path + ".sha256", "is no SHA-256 in hex");
    out.name = text(*f[0], path + ".name"), out.size = number(*f[2], path + ".size");
    return out;
  }

  void pass(const Json& value, const std::string& path) const {
    auto f = record(value, path, {"name", "options"});
    text(*f[0], path + ".name"), entries(*f[1], path + ".options");
  }

 private:
  std::string where_;
};

} // namespace

Contract read_contract(std::string_view data, const std::string& where) {
  Reader reader(where);
  Json value;
  try {
    value = parse_json(data, true);
  } catch (const JsonError& error) {
    reader.fail("the text", error.what());
  }
  const Json* version = value.find("contract_version");
  if (version && version->whole() != kVersion) {
    throw ContractError(
        "the contract has a version that this library does not know",
        where,
        "its version is " + std::string(version->span) + ", known is " + std::to_string(kVersion),
        "load it with the compiled_attn that wrote it, or export the model again");
  }
  auto f = reader.record(
      value, "the contract", {"call", "contract_version", "members", "passes", "target", "versions"});
  Contract out;
  reader.call(*f[0], out);
  reader.target(*f[4], out);
  for (const auto& [name, text] : reader.entries(*f[5], "versions")) {
    out.versions[name] = reader.text(text, "versions." + name);
  }
  const std::vector<Json>& passes = reader.items(*f[3], "passes");
  for (size_t i = 0; i < passes.size(); ++i) reader.pass(passes[i], "passes[" + std::to_string(i) + "]");
  out.members = reader.all<MemberSpec>(
      *f[2], "members", [&](const Json& v, const std::string& p) { return reader.member(v, p); });
  std::string parts;
  for (int i : {0, 3, 4, 5}) parts += (i ? "\n" : "") + std::string(f[size_t(i)]->span);
  out.stamp = sha256(parts);
  return out;
}

std::string describe(const LeafSpec& leaf) {
  std::string out;
  for (const Expr& size : leaf.shape) out += (out.empty() ? "" : ", ") + text(size);
  return leaf.dtype + "[" + out + "]";
}

std::string range_text(const Range& range) {
  return std::to_string(range.min) + (range.max ? " to " + std::to_string(*range.max) : " or more");
}
