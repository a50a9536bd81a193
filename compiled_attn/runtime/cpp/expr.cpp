#include "expr.h"

#include <algorithm>
#include <functional>

namespace {

constexpr int kDepth = 32;

const std::map<std::string, std::string> kVariadic = {
    {"add", " + "}, {"mul", "*"}, {"max", ""}, {"min", ""}, {"and", " and "}, {"or", " or "}};
const std::map<std::string, std::string> kBinary = {
    {"floordiv", "//"}, {"mod", "%"}, {"eq", " == "}, {"ne", " != "},
    {"lt", " < "}, {"le", " <= "}, {"gt", " > "}, {"ge", " >= "}};

std::optional<int64_t> apply(const std::string& name, int64_t a, int64_t b) {
  int64_t out = 0;
  if (name == "add") return __builtin_add_overflow(a, b, &out) ? std::nullopt : std::optional(out);
  if (name == "mul") return __builtin_mul_overflow(a, b, &out) ? std::nullopt : std::optional(out);
  if (name == "max") return std::max(a, b);
  if (name == "min") return std::min(a, b);
  if (name == "and") return a != 0 && b != 0;
  if (name == "or") return a != 0 || b != 0;
  if (name == "eq") return a == b;
  if (name == "ne") return a != b;
  if (name == "lt") return a < b;
  if (name == "le") return a <= b;
  if (name == "gt") return a > b;
  if (name == "ge") return a >= b;
  if (b == 0 || (b == -1 && a == INT64_MIN)) return std::nullopt;
  bool down = a % b != 0 && (a < 0) != (b < 0); // C++ rounds to zero, the contract rounds down
  if (name == "floordiv") return a / b - (down ? 1 : 0);
  return a % b + (down ? b : 0);
}

std::string part(const Expr& expr) {
  bool atom = expr.kind != Expr::Kind::operation || expr.name == "max" || expr.name == "min";
  return atom ? text(expr) : "(" + text(expr) + ")";
}

} // namespace

bool Expr::is_condition() const {
  static const std::set<std::string> names = {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"};
  return kind == Kind::operation && names.count(name) > 0;
}

bool is_symbol(const std::string& name) {
  if (name.empty() || (name[0] >= '0' && name[0] <= '9')) return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
  });
}

std::optional<Expr> read_expr(const Json& value, int depth) {
  Expr expr;
  if (depth > kDepth) return std::nullopt;
  if (value.kind == Json::Kind::number) {
    auto whole = value.whole();
    if (!whole) return std::nullopt;
    expr.value = *whole;
    return expr;
  }
  if (value.kind == Json::Kind::string) {
    if (!is_symbol(value.text)) return std::nullopt;
    expr.kind = Expr::Kind::symbol, expr.name = value.text;
    return expr;
  }
  if (value.kind != Json::Kind::array || value.items.empty()) return std::nullopt;
  if (value.items[0].kind != Json::Kind::string) return std::nullopt;
  expr.kind = Expr::Kind::operation, expr.name = value.items[0].text;
  size_t count = value.items.size() - 1;
  bool good = expr.name == "not" ? count == 1 : kBinary.count(expr.name) ? count == 2 : kVariadic.count(expr.name) && count >= 2;
  if (!good) return std::nullopt;
  for (size_t i = 1; i <= count; ++i) {
    auto operand = read_expr(value.items[i], depth + 1);
    if (!operand) return std::nullopt;
    expr.operands.push_back(std::move(*operand));
  }
  return expr;
}

std::optional<int64_t> evaluate(const Expr& expr, const Sizes& sizes) {
  if (expr.kind == Expr::Kind::number) return expr.value;
  if (expr.kind == Expr::Kind::symbol) {
    auto found = sizes.find(expr.name);
    return found == sizes.end() ? std::nullopt : std::optional(found->second);
  }
  auto value = evaluate(expr.operands[0], sizes);
  if (expr.name == "not") return value ? std::optional<int64_t>(*value == 0) : std::nullopt;
  for (size_t i = 1; value && i < expr.operands.size(); ++i) {
    auto next = evaluate(expr.operands[i], sizes);
    value = next ? apply(expr.name, *value, *next) : std::nullopt;
  }
  return value;
}

void collect_symbols(const Expr& expr, std::set<std::string>& out) {
  if (expr.kind == Expr::Kind::symbol) out.insert(expr.name);
  for (const Expr& operand : expr.operands) collect_symbols(operand, out);
}

std::set<std::string> symbols_of(const Expr& expr) {
  std::set<std::string> out;
  collect_symbols(expr, out);
  return out;
}

std::optional<std::pair<std::string, int64_t>> solve(const Expr& expr, int64_t value, const Sizes& sizes) {
  std::vector<std::string> unknown;
  for (const std::string& name : symbols_of(expr)) {
    if (!sizes.count(name)) unknown.push_back(name);
  }
  if (unknown.size() != 1) return std::nullopt;
  Sizes tried = sizes;
  auto at = [&](int64_t n) {
    tried[unknown[0]] = n;
    return evaluate(expr, tried);
  };
  auto at_1 = at(1), at_2 = at(2), at_3 = at(3);
  int64_t slope = 0, next = 0, rest = 0, size = 0;
  if (!at_1 || !at_2 || !at_3) return std::nullopt;
  if (__builtin_sub_overflow(*at_2, *at_1, &slope) || __builtin_sub_overflow(*at_3, *at_2, &next)) return std::nullopt;
  if (slope == 0 || next != slope || __builtin_sub_overflow(value, *at_1, &rest)) return std::nullopt;
  if ((slope == -1 && rest == INT64_MIN) || rest % slope != 0) return std::nullopt;
  if (__builtin_add_overflow(int64_t(1), rest / slope, &size) || at(size) != value) return std::nullopt;
  return std::pair(unknown[0], size);
}

std::string text(const Expr& expr) {
  if (expr.kind == Expr::Kind::number) return std::to_string(expr.value);
  if (expr.kind == Expr::Kind::symbol) return expr.name;
  if (expr.name == "not") return "not " + part(expr.operands[0]);
  bool call = expr.name == "max" || expr.name == "min";
  std::string between = call ? ", " : kVariadic.count(expr.name) ? kVariadic.at(expr.name) : kBinary.at(expr.name);
  std::string out;
  for (size_t i = 0; i < expr.operands.size(); ++i) {
    out += (i ? between : "") + (call ? text(expr.operands[i]) : part(expr.operands[i]));
  }
  return call ? expr.name + "(" + out + ")" : out;
}
