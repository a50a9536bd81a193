#include "json.h"

#include <charconv>
#include <cstdlib>

namespace {

constexpr int kDepth = 64;

class Parser {
 public:
  Parser(std::string_view text, bool canonical) : text_(text), canonical_(canonical) {}

  Json all() {
    skip();
    Json value = next(0);
    skip();
    if (at_ != text_.size()) throw JsonError("is no JSON (more follows its end)");
    return value;
  }

 private:
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip() {
    size_t began = at_;
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
    if (canonical_ && at_ != began) throw JsonError("is not in canonical form");
  }

  void take(std::string_view wanted) {
    if (text_.substr(at_, wanted.size()) != wanted) throw JsonError("is no JSON (at byte " + std::to_string(at_) + ")");
    at_ += wanted.size();
  }

  Json next(int depth) {
    if (depth > kDepth) throw JsonError("is no JSON (nested too deep)");
    size_t began = at_;
    Json value;
    switch (peek()) {
      case '{': object(value, depth); break;
      case '[': array(value, depth); break;
      case '"':
        value.kind = Json::Kind::string;
        value.text = string();
        break;
      case 't': take("true"), value.kind = Json::Kind::boolean, value.flag = true; break;
      case 'f': take("false"), value.kind = Json::Kind::boolean; break;
      case 'n': take("null"); break;
      default: number(value);
    }
    value.span = text_.substr(began, at_ - began);
    return value;
  }

  void object(Json& value, int depth) {
    value.kind = Json::Kind::object;
    take("{"), skip();
    if (peek() == '}') return take("}");
    while (true) {
      std::string key = string();
      if (value.find(key)) throw JsonError("is not in canonical form (a key comes twice)");
      if (canonical_ && !value.fields.empty() && key <= value.fields.back().first) {
        throw JsonError("is not in canonical form");
      }
      skip(), take(":"), skip();
      Json field = next(depth + 1);
      value.fields.emplace_back(std::move(key), std::move(field));
      skip();
      if (peek() != ',') return take("}");
      take(","), skip();
    }
  }

  void array(Json& value, int depth) {
    value.kind = Json::Kind::array;
    take("["), skip();
    if (peek() == ']') return take("]");
    while (true) {
      value.items.push_back(next(depth + 1));
      skip();
      if (peek() != ',') return take("]");
      take(","), skip();
    }
  }

  bool digit() const { return peek() >= '0' && peek() <= '9'; }

  void digits() {
    if (!digit()) throw JsonError("is no JSON (at byte " + std::to_string(at_) + ")");
    while (digit()) ++at_;
  }

  void number(Json& value) {
    size_t began = at_;
    if (peek() == '-') ++at_;
    if (peek() == '0') {
      ++at_;
    } else {
      digits();
    }
    if (peek() == '.') ++at_, digits();
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    value.kind = Json::Kind::number;
    value.text = text_.substr(began, at_ - began);
    if (canonical_ && value.text != canonical_number(value.text)) throw JsonError("is not in canonical form");
  }

  // As Python's repr spells the same number; empty where it is none that Python's json writes.
  static std::string canonical_number(const std::string& text) {
    if (text.find_first_of(".eE") == std::string::npos) return text == "-0" || text.size() > 4300 ? "" : text;
    double value = 0;
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) return "";
    char buffer[64];
    auto [stop, failed] = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
    std::string all(buffer, stop), sign = all[0] == '-' ? "-" : "";
    size_t mark = all.find('e');
    int power = std::atoi(all.c_str() + mark + 1);
    std::string digits;
    for (char c : all.substr(0, mark)) {
      if (c >= '0' && c <= '9') digits += c;
    }
    int count = int(digits.size());
    if (value == 0) return sign + "0.0";
    if (power < -4 || power >= 16) {
      std::string exponent = std::to_string(std::abs(power));
      if (exponent.size() < 2) exponent = "0" + exponent;
      return sign + digits.substr(0, 1) + (count > 1 ? "." + digits.substr(1) : "") + "e" + (power < 0 ? "-" : "+") + exponent;
    }
    if (power < 0) return sign + "0." + std::string(size_t(-power - 1), '0') + digits;
    if (count <= power + 1) return sign + digits + std::string(size_t(power + 1 - count), '0') + ".0";
    return sign + digits.substr(0, size_t(power + 1)) + "." + digits.substr(size_t(power + 1));
  }

  unsigned hex4() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      char c = peek();
      int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
      if (c >= 'A' && c <= 'F') digit = c - 'A' + 10;
      if (canonical_ && c >= 'A' && c <= 'F') throw JsonError("is not in canonical form");
      if (digit < 0) throw JsonError("is no JSON (at byte " + std::to_string(at_) + ")");
      code = code * 16 + unsigned(digit);
    }
    return code;
  }

  unsigned escaped() {
    unsigned code = hex4();
    if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
      size_t back = at_;
      at_ += 2;
      unsigned low = hex4();
      if (low >= 0xdc00 && low < 0xe000) return 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      at_ = back;
    }
    return code;
  }

  static void append(std::string& out, unsigned code) {
    if (code < 0x80) {
      out += char(code);
    } else if (code < 0x800) {
      out += char(0xc0 | code >> 6), out += char(0x80 | (code & 63));
    } else if (code < 0x10000) {
      out += char(0xe0 | code >> 12), out += char(0x80 | (code >> 6 & 63)), out += char(0x80 | (code & 63));
    } else {
      out += char(0xf0 | code >> 18), out += char(0x80 | (code >> 12 & 63));
      out += char(0x80 | (code >> 6 & 63)), out += char(0x80 | (code & 63));
    }
  }

  std::string string() {
    take("\"");
    std::string out;
    while (true) {
      if (at_ >= text_.size()) throw JsonError("is no JSON (it ends in a string)");
      unsigned char c = static_cast<unsigned char>(text_[at_++]);
      if (c == '"') return out;
      if (c < 0x20 || c >= 0x80) throw JsonError("is no JSON (at byte " + std::to_string(at_ - 1) + ")");
      if (c != '\\') {
        out += char(c);
        continue;
      }
      char kind = peek();
      ++at_;
      size_t known = std::string_view("\"\\/bfnrt").find(kind);
      if (kind == 'u') {
        unsigned code = escaped();
        bool short_form = code >= 8 && code <= 13 && code != 11;
        if (canonical_ && (short_form || (code >= 0x20 && code < 0x80))) throw JsonError("is not in canonical form");
        append(out, code);
      } else if (kind == '/' && canonical_) {
        throw JsonError("is not in canonical form");
      } else if (known != std::string_view::npos && at_ <= text_.size()) {
        out += "\"\\/\b\f\n\r\t"[known];
      } else {
        throw JsonError("is no JSON (at byte " + std::to_string(at_ - 1) + ")");
      }
    }
  }

  std::string_view text_;
  bool canonical_;
  size_t at_ = 0;
};

} // namespace

const Json* Json::find(std::string_view key) const {
  for (const auto& [name, value] : fields) {
    if (name == key) return &value;
  }
  return nullptr;
}

std::optional<int64_t> Json::whole() const {
  int64_t value = 0;
  if (kind != Kind::number) return std::nullopt;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

Json parse_json(std::string_view text, bool canonical) { return Parser(text, canonical).all(); }
