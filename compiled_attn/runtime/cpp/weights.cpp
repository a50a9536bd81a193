#include "weights.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <set>
#include <stdexcept>

#include "error.h"

namespace {

constexpr std::string_view kField = "constants_info_[";
constexpr std::string_view kDtype = "cached_torch_dtype_";
const char* const kIndexByHand = "export the decoder again; an index is never edited by hand";
const std::map<std::string, int64_t> kItemSize = {
    {"bool", 1}, {"uint8", 1}, {"int8", 1}, {"int16", 2}, {"int32", 4},
    {"int64", 8}, {"float16", 2}, {"bfloat16", 2}, {"float32", 4}, {"float64", 8}};

bool starts(std::string_view text, std::string_view head) { return text.substr(0, head.size()) == head; }

int64_t number(std::string_view text) {
  int64_t value = 0;
  auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (status != std::errc() || end != text.data() + text.size() || value < 0) throw std::invalid_argument("no number");
  return value;
}

// {64, 32}
std::vector<int64_t> numbers(std::string_view text) {
  if (text.size() < 2 || text.front() != '{' || text.back() != '}') throw std::invalid_argument("no list");
  text = text.substr(1, text.size() - 2);
  std::vector<int64_t> found;
  while (!text.empty()) {
    size_t end = std::min(text.find(','), text.size());
    found.push_back(number(text.substr(0, end)));
    text.remove_prefix(std::min(end + 1, text.size()));
    text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
  }
  return found;
}

Wanted wanted_of(const std::map<std::string, std::string>& said) {
  Wanted found;
  found.dtype = said.at("dtype");
  if (starts(found.dtype, kDtype)) found.dtype.erase(0, kDtype.size());
  if (!kItemSize.count(found.dtype)) throw std::invalid_argument("a dtype of no weight");
  found.shape = numbers(said.at("shape")), found.stride = numbers(said.at("stride"));
  found.offset = number(said.at("offset"));
  if (found.shape.size() != found.stride.size()) throw std::invalid_argument("sizes and strides differ in number");
  return found;
}

} // namespace

int64_t Wanted::reach() const {
  int64_t last = offset;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == 0) return 0;
    int64_t step;
    if (__builtin_mul_overflow(shape[i] - 1, stride[i], &step) || __builtin_add_overflow(last, step, &last)) return INT64_MAX;
  }
  int64_t bytes;
  bool over = __builtin_add_overflow(last, 1, &last) || __builtin_mul_overflow(last, kItemSize.at(dtype), &bytes);
  return over ? INT64_MAX : bytes;
}

void WantedReader::line(std::string_view line) {
  if (!starts(line, kField)) return;
  line.remove_prefix(kField.size());
  size_t closed = line.find("]."), equals = line.find(" = ");
  if (closed == std::string_view::npos || equals == std::string_view::npos || equals < closed) return;
  std::string_view name = line.substr(closed + 2, equals - closed - 2), value = line.substr(equals + 3);
  const std::set<std::string_view> known = {"dtype", "offset", "shape", "stride", "original_fqn"};
  if (!known.count(name) || value.empty() || value.back() != ';') return;
  fields_[number(line.substr(0, closed))][std::string(name)] = value.substr(0, value.size() - 1);
}

std::map<std::string, Wanted> WantedReader::all() const {
  std::map<std::string, Wanted> found;
  for (const auto& [index, said] : fields_) {
    if (said.size() != 5) throw std::invalid_argument("a constant of no known form");
    std::string name = said.at("original_fqn");
    if (name.size() < 2) throw std::invalid_argument("a constant without a name");
    found[name.substr(1, name.size() - 2)] = wanted_of(said);
  }
  return found;
}

bool lie_beside(std::string_view constructor) {
  constructor = constructor.substr(0, constructor.find('{'));
  size_t last = constructor.rfind(',');
  return last != std::string_view::npos && constructor.find("false", last) != std::string_view::npos;
}

void require_fit(
    const std::map<std::string, Wanted>& wanted, const std::map<std::string, int64_t>& given, const std::string& where) {
  std::set<std::string> asked, there;
  for (const auto& [name, want] : wanted) asked.insert(name);
  for (const auto& [name, bytes] : given) there.insert(name);
  if (asked != there) {
    std::vector<std::string> differing;
    std::set_symmetric_difference(asked.begin(), asked.end(), there.begin(), there.end(), std::back_inserter(differing));
    std::string facts = "the difference: ";
    for (size_t i = 0; i < std::min<size_t>(differing.size(), 3); ++i) facts += (i ? ", " : "") + differing[i];
    throw ContractError("the weights are not those that the code asks for", where, facts, kIndexByHand);
  }
  for (const auto& [name, want] : wanted) {
    if (want.reach() > given.at(name)) {
      throw ContractError(
          "the weight " + name + " is cut short",
          where,
          "the code reads " + std::to_string(want.reach()) + " bytes, there are " + std::to_string(given.at(name)),
          kIndexByHand);
    }
  }
}
