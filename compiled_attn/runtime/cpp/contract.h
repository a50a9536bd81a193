// The contract of an artifact; see runtime/contract.py, whose form and rules these are.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "expr.h"

struct LeafSpec {
  enum class Kind { tensor, constant, size };
  Kind kind = Kind::tensor;
  std::string name;
  std::string dtype, device; // of a tensor
  std::vector<Expr> shape;
  std::vector<int64_t> order; // dimensions from the outermost in memory to the innermost
  bool is_mutated = false;
  std::string constant; // as JSON
  Expr size;
};

struct Range {
  int64_t min = 0;
  std::optional<int64_t> max;
  bool bound = true;
};

struct MemberSpec {
  std::string name, sha256;
  int64_t size = 0;
};

struct Contract {
  std::vector<LeafSpec> inputs, outputs;
  std::map<std::string, Range> symbols;
  std::vector<Expr> guards;
  std::string in_tree, out_tree;
  std::string target, device, platform, machine, origin;
  std::vector<std::string> isa;
  std::map<std::string, std::string> versions;
  std::vector<MemberSpec> members;
  std::string stamp; // digest of everything but the members
};

constexpr std::string_view kContractMember = "model/extra/compiled_attn_contract.json";

// Reads and checks a contract. Throws ContractError naming the field and what is wrong with it.
Contract read_contract(std::string_view data, const std::string& where);

std::string describe(const LeafSpec& leaf);
std::string range_text(const Range& range);
