// Integer expressions over named sizes; see runtime/expr.py, whose rules these are.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "json.h"

using Sizes = std::map<std::string, int64_t>;

struct Expr {
  enum class Kind { number, symbol, operation };
  Kind kind = Kind::number;
  int64_t value = 0;
  std::string name; // of the symbol or the operator
  std::vector<Expr> operands;

  bool is_condition() const;
};

// A JSON value as an expression, or nothing where it is none.
std::optional<Expr> read_expr(const Json& value, int depth = 0);
bool is_symbol(const std::string& name);

// Nothing where a symbol is unknown, a divisor is zero, or the value does not fit 64 bits.
std::optional<int64_t> evaluate(const Expr& expr, const Sizes& sizes);
void collect_symbols(const Expr& expr, std::set<std::string>& out);
std::set<std::string> symbols_of(const Expr& expr);

// The one unknown symbol of `expr`, which is linear in it, and its size.
std::optional<std::pair<std::string, int64_t>> solve(const Expr& expr, int64_t value, const Sizes& sizes);

std::string text(const Expr& expr);
