// A small JSON reader, of ASCII with each key once. Canonical form (contracts): also sorted keys, no spaces, numbers and
// texts spelled as Python's json does; free form: metadata files.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Json {
  enum class Kind { null, boolean, number, string, array, object };
  Kind kind = Kind::null;
  bool flag = false;
  std::string text; // a string's value (UTF-8), or a number as written
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> fields;
  std::string_view span; // the bytes it was read from

  const Json* find(std::string_view key) const;
  // A whole number that fits 64 bits.
  std::optional<int64_t> whole() const;
};

// Reads all of `text`. Throws JsonError with what is wrong; never reads outside `text`, never recurses beyond 64.
Json parse_json(std::string_view text, bool canonical);
