#include "archive.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <unordered_set>

#include "error.h"

namespace {

constexpr std::string_view kRoot = "model/";
constexpr std::string_view kComment = "compiled_attn contract sha256:";
constexpr size_t kCommentSize = kComment.size() + 64, kLocal = 30, kCentral = 46, kEnd = 22, kNameSize = 512;
constexpr uint16_t kVersion = 20, kDate = 0x0021;

uint64_t number(std::string_view data, size_t at, int bytes) {
  uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(data[at + size_t(i)]);
  return value;
}

void put(std::string& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out += char(value >> (8 * i) & 255);
}

struct Member {
  std::string name;
  uint32_t size, crc, offset;

  size_t start() const { return size_t(offset) + kLocal + name.size(); }

  std::string local() const {
    std::string out = "PK\x03\x04";
    for (uint16_t field : {kVersion, uint16_t(0), uint16_t(0), uint16_t(0), kDate}) put(out, field, 2);
    put(out, crc, 4), put(out, size, 4), put(out, size, 4), put(out, name.size(), 2), put(out, 0, 2);
    return out + name;
  }

  std::string central() const {
    std::string out = "PK\x01\x02";
    for (uint16_t field : {kVersion, kVersion, uint16_t(0), uint16_t(0), uint16_t(0), kDate}) put(out, field, 2);
    put(out, crc, 4), put(out, size, 4), put(out, size, 4), put(out, name.size(), 2);
    put(out, 0, 2), put(out, 0, 2), put(out, 0, 2), put(out, 0, 2), put(out, 0, 4), put(out, offset, 4);
    return out + name;
  }
};

std::string quoted(const std::string& name) {
  std::string out = "'";
  for (unsigned char c : name.substr(0, 80)) {
    char hex[5];
    if (c == '\\' || c == '\'') {
      out += '\\', out += char(c);
    } else if (c >= 0x20 && c < 0x7f) {
      out += char(c);
    } else {
      snprintf(hex, sizeof hex, "\\x%02x", c), out += hex;
    }
  }
  return out + "'";
}

void check_name(const std::string& name, const std::string& where) {
  bool good = name.size() <= kNameSize && name.substr(0, kRoot.size()) == kRoot;
  size_t began = 0;
  for (size_t i = 0; good && i <= name.size(); ++i) {
    if (i == name.size() || name[i] == '/') {
      std::string part = name.substr(began, i - began);
      good = !part.empty() && part != "." && part != "..";
      began = i + 1;
    } else {
      char c = name[i];
      bool letter = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
      good = letter || c == '.' || c == '_' || c == '-';
    }
  }
  if (good) return;
  throw ContractError(
      "a member has a name that is not allowed",
      where,
      quoted(name) + "; names begin with model/ and are made of letters, digits, '.', '_', '-' and '/'",
      kAgain);
}

ContractError stray(const std::string& where, size_t offset) {
  return ContractError(
      "a byte outside the members is not what the members give",
      where + ", byte " + std::to_string(offset),
      "headers, directory and end record of an artifact follow from its members, and nothing lies between",
      kAgain);
}

void compare(std::string_view data, size_t offset, std::string_view wanted, const std::string& where) {
  std::string_view found = offset <= data.size() ? data.substr(offset, wanted.size()) : std::string_view();
  if (found == wanted) return;
  size_t i = 0;
  while (i < found.size() && found[i] == wanted[i]) ++i;
  throw stray(where, offset + i);
}

std::string digest_of(std::string_view data, const std::string& where) {
  if (data.size() >= kCommentSize + kEnd) {
    std::string_view comment = data.substr(data.size() - kCommentSize);
    std::string_view digest = comment.substr(kComment.size());
    bool is_hex = digest.find_first_not_of("0123456789abcdef") == std::string_view::npos;
    std::string_view end = data.substr(data.size() - kCommentSize - kEnd, 4);
    if (comment.substr(0, kComment.size()) == kComment && is_hex && end == "PK\x05\x06") return std::string(digest);
  }
  std::string bytes = std::to_string(data.size());
  if (data.substr(0, 4) != "PK\x03\x04") {
    throw ContractError(
        "the file is no compiled_attn artifact",
        where,
        "an artifact begins with PK\\x03\\x04; this file has " + bytes + " bytes and does not",
        "give a file that compiled_attn.export wrote");
  }
  if (data.size() >= kEnd && data.substr(data.size() - kEnd, 4) == "PK\x05\x06") {
    throw ContractError(
        "the package has no contract",
        where,
        "an artifact ends with its contract's digest; this archive ends without a comment",
        "write the package with compiled_attn.export");
  }
  throw ContractError(
      "the artifact is cut short, or bytes follow its end",
      where,
      "an artifact ends with its contract's digest; the last of these " + bytes + " bytes are something else",
      kAgain);
}

std::vector<Member> directory(std::string_view data, const std::string& where) {
  size_t end = data.size() - kCommentSize - kEnd;
  uint64_t count = number(data, end + 10, 2), size = number(data, end + 12, 4), position = number(data, end + 16, 4);
  if (position + size != end) throw stray(where, end);
  std::unordered_set<std::string> seen;
  std::vector<Member> members;
  for (uint64_t i = 0; i < count; ++i) {
    if (position + kCentral > end) throw stray(where, position);
    uint64_t method = number(data, position + 10, 2), stored = number(data, position + 20, 4);
    uint64_t length = number(data, position + 24, 4), name_size = number(data, position + 28, 2);
    Member member{
        std::string(data.substr(position + kCentral, name_size)),
        uint32_t(length),
        uint32_t(number(data, position + 16, 4)),
        uint32_t(number(data, position + 42, 4))};
    check_name(member.name, where);
    if (method != 0) {
      throw ContractError(
          "member " + member.name + " is compressed",
          where,
          "an artifact's members are stored (method 0); this one has method " + std::to_string(method),
          kAgain);
    }
    if (!seen.insert(member.name).second) {
      throw ContractError(
          "two members are named " + member.name, where, "readers differ in which of the two they take", kAgain);
    }
    if (stored != length || member.start() + length > end) throw stray(where, position);
    position += kCentral + name_size;
    members.push_back(std::move(member));
  }
  return members;
}

std::string tail(const std::vector<Member>& members, size_t offset, const std::string& digest) {
  std::string out;
  for (const Member& member : members) out += member.central();
  size_t size = out.size();
  out += "PK\x05\x06";
  put(out, 0, 2), put(out, 0, 2), put(out, members.size(), 2), put(out, members.size(), 2);
  put(out, size, 4), put(out, offset, 4), put(out, kCommentSize, 2);
  return out + std::string(kComment) + digest;
}

} // namespace

uint32_t crc32(std::string_view data) {
  static const auto tables = [] {
    std::array<std::array<uint32_t, 256>, 8> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
      made[0][i] = value;
    }
    for (size_t t = 1; t < 8; ++t) {
      for (size_t i = 0; i < 256; ++i) made[t][i] = made[t - 1][i] >> 8 ^ made[0][made[t - 1][i] & 255];
    }
    return made;
  }();
  uint32_t crc = 0xffffffffu;
  size_t at = 0;
  for (; at + 8 <= data.size(); at += 8) {
    uint64_t word = number(data, at, 8) ^ crc;
    crc = 0;
    for (size_t t = 0; t < 8; ++t) crc ^= tables[7 - t][word >> (8 * t) & 255];
  }
  for (; at < data.size(); ++at) crc = crc >> 8 ^ tables[0][(crc ^ static_cast<unsigned char>(data[at])) & 255];
  return crc ^ 0xffffffffu;
}

Archive unpack(std::string_view data, const std::string& where) {
  Archive archive;
  archive.digest = digest_of(data, where);
  std::vector<Member> members = directory(data, where);
  size_t offset = 0;
  for (const Member& member : members) {
    if (member.offset != offset) throw stray(where, std::min<size_t>(member.offset, offset));
    compare(data, offset, member.local(), where);
    offset = member.start() + member.size;
    std::string_view payload = data.substr(member.start(), member.size);
    if (crc32(payload) != member.crc) {
      throw ContractError(
          "member " + member.name + " is damaged", where, "its bytes do not give the checksum in the archive", kAgain);
    }
    archive.members.emplace_back(member.name, payload);
  }
  std::string end = tail(members, offset, archive.digest);
  compare(data, offset, end, where);
  return archive;
}
