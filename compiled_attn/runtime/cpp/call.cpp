#include "call.h"

#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <set>

#include "error.h"

namespace {

std::string dtype_name(at::ScalarType type) {
  static const std::map<at::ScalarType, std::string> names = {
      {at::kBool, "bool"}, {at::kByte, "uint8"}, {at::kChar, "int8"}, {at::kShort, "int16"}, {at::kInt, "int32"},
      {at::kLong, "int64"}, {at::kHalf, "float16"}, {at::kBFloat16, "bfloat16"}, {at::kFloat, "float32"},
      {at::kDouble, "float64"}, {at::kComplexFloat, "complex64"}, {at::kComplexDouble, "complex128"}};
  auto found = names.find(type);
  return found == names.end() ? "another" : found->second;
}

std::string list(at::IntArrayRef sizes) {
  std::string out;
  for (int64_t size : sizes) out += (out.empty() ? "" : ", ") + std::to_string(size);
  return out;
}

std::string state_of(const Expr& expr, const Sizes& sizes) {
  std::string out;
  for (const std::string& name : symbols_of(expr)) {
    auto found = sizes.find(name);
    if (found != sizes.end()) out += (out.empty() ? "" : ", ") + name + "=" + std::to_string(found->second);
  }
  return out;
}

class Checker {
 public:
  Checker(const Contract& contract, const std::string& where) : contract_(contract), where_(where) {}

  [[noreturn]] void fail(const std::string& what, const std::string& facts, const std::string& advice) const {
    throw ContractError(what, where_, facts, advice);
  }

  void check_names(const std::map<std::string, at::Tensor>& given) const {
    std::string taken, all;
    std::set<std::string> names;
    for (const LeafSpec& input : contract_.inputs) {
      if (input.kind != LeafSpec::Kind::tensor) continue;
      names.insert(input.name);
      taken += (taken.empty() ? "" : ", ") + input.name;
    }
    for (const auto& [name, tensor] : given) {
      all += (all.empty() ? "" : ", ") + name;
      if (!names.count(name)) {
        fail("argument " + name + " is not taken", "the artifact takes " + taken, "pass exactly these, once");
      }
    }
    for (const LeafSpec& input : contract_.inputs) {
      if (input.kind == LeafSpec::Kind::tensor && !given.count(input.name)) {
        fail(
            "argument " + input.name + " is missing",
            "the artifact takes " + taken + "; given are " + (all.empty() ? "none" : all),
            "pass " + input.name + " as well");
      }
    }
  }

  void check_tensor(const LeafSpec& spec, const at::Tensor& tensor) const {
    std::string found = dtype_name(tensor.scalar_type());
    if (found != spec.dtype) {
      fail(
          "input " + spec.name + " has another dtype",
          "wanted " + describe(spec) + ", given is " + found,
          "convert it: " + spec.name + ".to(torch." + spec.dtype + ")");
    }
    if (tensor.dim() != int64_t(spec.shape.size())) {
      fail(
          "input " + spec.name + " has another rank",
          "wanted " + describe(spec) + ", given is [" + list(tensor.sizes()) + "]",
          "reshape it to the wanted dimensions");
    }
  }

  void check_range(const LeafSpec& spec, size_t dim, const std::string& symbol, int64_t found) const {
    const Range& range = contract_.symbols.at(symbol);
    if (found >= range.min && (!range.max || found <= *range.max)) return;
    fail(
        "input " + spec.name + " has a size out of range in dimension " + std::to_string(dim),
        symbol + " is allowed " + range_text(range) + ", given is " + std::to_string(found),
        "pass a size within the range, or export the model with a wider one");
  }

  [[noreturn]] void wrong_size(const LeafSpec& spec, size_t dim, const std::string& wanted, int64_t found) const {
    fail(
        "input " + spec.name + " has another size in dimension " + std::to_string(dim),
        "wanted " + wanted + ", given is " + std::to_string(found),
        "pass the wanted size, or export the model with this dimension dynamic");
  }

  Sizes check_sizes(const std::vector<const LeafSpec*>& specs, const std::vector<at::Tensor>& tensors) const {
    struct Open {
      const LeafSpec* spec;
      size_t dim;
      const Expr* size;
      int64_t found;
    };
    Sizes sizes;
    std::vector<Open> rest;
    for (size_t i = 0; i < specs.size(); ++i) {
      for (size_t dim = 0; dim < specs[i]->shape.size(); ++dim) {
        const Expr& size = specs[i]->shape[dim];
        int64_t found = tensors[i].size(int64_t(dim));
        if (size.kind == Expr::Kind::number) {
          if (size.value != found) wrong_size(*specs[i], dim, std::to_string(size.value), found);
        } else if (size.kind == Expr::Kind::symbol && !sizes.count(size.name)) {
          check_range(*specs[i], dim, size.name, found);
          sizes[size.name] = found;
        } else {
          rest.push_back({specs[i], dim, &size, found});
        }
      }
    }
    for (const Open& open : rest) {
      auto solved = solve(*open.size, open.found, sizes);
      if (!solved) continue;
      check_range(*open.spec, open.dim, solved->first, solved->second);
      sizes[solved->first] = solved->second;
    }
    for (const Open& open : rest) {
      auto value = evaluate(*open.size, sizes);
      if (value == open.found) continue;
      std::string state = state_of(*open.size, sizes), wanted = text(*open.size);
      if (value) {
        wanted = open.size->kind == Expr::Kind::symbol ? state : wanted + " = " + std::to_string(*value) + " (" + state + ")";
      }
      wrong_size(*open.spec, open.dim, wanted, open.found);
    }
    for (const Expr& guard : contract_.guards) {
      if (evaluate(guard, sizes) != 1) {
        fail(
            "the inputs' sizes break a condition of the export",
            "it relies on " + text(guard) + ", given is " + state_of(guard, sizes),
            "pass sizes that satisfy it, or export the model for these");
      }
    }
    return sizes;
  }

  at::Tensor arranged(const LeafSpec& spec, const at::Tensor& tensor) const {
    std::vector<int64_t> strides(spec.order.size());
    int64_t step = 1;
    for (size_t i = spec.order.size(); i-- > 0;) {
      strides[size_t(spec.order[i])] = step;
      step *= std::max<int64_t>(tensor.size(spec.order[i]), 1);
    }
    bool same = true;
    for (size_t d = 0; d < strides.size(); ++d) {
      same = same && (tensor.size(int64_t(d)) <= 1 || tensor.stride(int64_t(d)) == strides[d]);
    }
    if (same || tensor.numel() == 0) return tensor;
    if (spec.is_mutated) {
      fail(
          "state " + spec.name + " has another memory order",
          "wanted strides (" + list(strides) + "), given are (" + list(tensor.strides()) +
              "); the call writes into it, so it is not copied",
          "pass state as the model's export had it (contiguous)");
    }
    return at::empty_strided(tensor.sizes(), strides, tensor.options()).copy_(tensor);
  }

 private:
  const Contract& contract_;
  const std::string& where_;
};

} // namespace

std::vector<at::Tensor> check_inputs(
    const Contract& contract, const std::map<std::string, at::Tensor>& given, const std::string& where, Sizes& sizes) {
  Checker checker(contract, where);
  checker.check_names(given);
  std::vector<const LeafSpec*> specs;
  std::vector<at::Tensor> tensors;
  for (const LeafSpec& input : contract.inputs) {
    if (input.kind != LeafSpec::Kind::tensor) continue;
    specs.push_back(&input), tensors.push_back(given.at(input.name));
    checker.check_tensor(input, tensors.back());
  }
  sizes = checker.check_sizes(specs, tensors);
  for (size_t i = 0; i < specs.size(); ++i) tensors[i] = checker.arranged(*specs[i], tensors[i]);
  return tensors;
}

void check_outputs(
    const Contract& contract, const std::vector<at::Tensor>& results, const Sizes& sizes, const std::string& where) {
  for (size_t i = 0; i < contract.outputs.size(); ++i) {
    const LeafSpec& spec = contract.outputs[i];
    if (spec.kind != LeafSpec::Kind::tensor) continue;
    bool agrees = i < results.size() && results[i].defined() && results[i].dim() == int64_t(spec.shape.size()) &&
        dtype_name(results[i].scalar_type()) == spec.dtype;
    for (size_t d = 0; agrees && d < spec.shape.size(); ++d) {
      auto wanted = evaluate(spec.shape[d], sizes);
      agrees = !wanted || *wanted == results[i].size(int64_t(d));
    }
    if (agrees) continue;
    bool some = i < results.size() && results[i].defined();
    std::string computed = some ? dtype_name(results[i].scalar_type()) + "[" + list(results[i].sizes()) + "]" : "nothing";
    throw ContractError(
        "output " + spec.name + " is not what the contract states",
        where,
        "stated " + describe(spec) + ", computed " + computed,
        "export the model again; this artifact's code and contract do not belong together");
  }
}
