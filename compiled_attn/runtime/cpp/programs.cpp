#include "programs.h"

#include <algorithm>

#include "error.h"
#include "json.h"
#include "sha256.h"

namespace {

constexpr std::string_view kIndex = "model/programs.json";
constexpr int64_t kVersion = 1;
const char* const kAnew = "export the decoder again, or fetch the file again";

struct Stored {
  std::string member, sha256;
  int64_t size = 0;
};

const Json& field(const Json& record, std::string_view key, Json::Kind kind) {
  const Json* found = record.find(key);
  if (!found || found->kind != kind) throw JsonError("lacks " + std::string(key));
  return *found;
}

int64_t whole(const Json& value) {
  std::optional<int64_t> found = value.kind == Json::Kind::number ? value.whole() : std::nullopt;
  if (!found || *found < 0) throw JsonError("no whole number of at most 63 bits");
  return *found;
}

Stored read_stored(const Json& record, size_t fields) {
  Stored found{
      field(record, "member", Json::Kind::string).text, field(record, "sha256", Json::Kind::string).text,
      whole(field(record, "size", Json::Kind::number))};
  bool hex = found.sha256.size() == 64 && found.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!hex || record.fields.size() != fields) throw JsonError("is no record of a member");
  return found;
}

struct Index {
  Programs file; // without bytes
  std::vector<Stored> stored; // the programs and then the weights, in the file's order
};

Index read_index(std::string_view text) {
  Json value = parse_json(text, true);
  if (value.kind != Json::Kind::object || value.fields.size() != 4) throw JsonError("other fields");
  if (whole(field(value, "programs_version", Json::Kind::number)) != kVersion) throw JsonError("another version");
  const Json* limit = value.find("limit");
  if (!limit) throw JsonError("lacks limit");
  Index index;
  if (limit->kind != Json::Kind::null) index.file.limit = whole(*limit);
  const std::vector<Json>& programs = field(value, "programs", Json::Kind::array).items;
  const std::vector<Json>& weights = field(value, "weights", Json::Kind::array).items;
  for (const Json& record : programs) {
    if (record.kind != Json::Kind::object) throw JsonError("is no record");
    Program program;
    program.name = field(record, "name", Json::Kind::string).text;
    index.stored.push_back(read_stored(record, 5));
    program.member = index.stored.back().member;
    for (const auto& [name, position] : field(record, "weights", Json::Kind::object).fields) {
      program.weights[name] = whole(position);
      if (program.weights[name] >= int64_t(weights.size())) throw JsonError("a weight that is not there");
    }
    index.file.programs.push_back(program);
  }
  bool known = index.file.programs.size() == 2 && index.file.programs[0].name == "prompt" &&
      index.file.programs[1].name == "step";
  if (!known) throw JsonError("other programs");
  for (const Json& record : weights) {
    if (record.kind != Json::Kind::object) throw JsonError("is no record");
    index.stored.push_back(read_stored(record, 3));
  }
  return index;
}

} // namespace

bool holds_decoder(std::string_view data) {
  constexpr size_t kHeader = 30; // of a zip's first member, before its name
  if (data.size() <= kHeader || data.substr(kHeader, kIndex.size()) != kIndex) return false;
  return uint8_t(data[26]) == kIndex.size() && data[27] == 0; // the name's length
}

Programs programs_of(const Archive& archive, const std::string& where) {
  const auto& members = archive.members;
  auto at = std::find_if(members.begin(), members.end(), [](const auto& member) { return member.first == kIndex; });
  if (at == members.end()) return {};
  if (sha256(at->second) != archive.digest) {
    throw ContractError(
        "the index of programs does not match the digest in the archive", where, "its SHA-256 is another", kAnew);
  }
  Index index;
  try {
    index = read_index(at->second);
  } catch (const JsonError&) {
    throw ContractError(
        "the index of programs is not well formed", where, "known is version 1 in canonical form", kAnew);
  }
  bool same = at == members.begin() && members.size() == index.stored.size() + 1;
  for (size_t i = 0; same && i < index.stored.size(); ++i) same = members[i + 1].first == index.stored[i].member;
  if (!same) {
    std::string facts;
    for (size_t i = 0; i < std::min<size_t>(members.size(), 4); ++i) facts += (i ? ", " : "") + members[i].first;
    throw ContractError("the members are not those that the index of programs names", where, facts, kAnew);
  }
  for (size_t i = 0; i < index.stored.size(); ++i) {
    std::string_view payload = members[i + 1].second;
    const Stored& stored = index.stored[i];
    if (int64_t(payload.size()) != stored.size || sha256(payload) != stored.sha256) {
      throw ContractError(
          "member " + stored.member + " is not the one that the index names",
          where,
          std::to_string(payload.size()) + " bytes",
          kAnew);
    }
    if (i < index.file.programs.size()) {
      index.file.programs[i].data = payload;
    } else {
      index.file.weights.push_back(payload);
    }
  }
  return index.file;
}

void require_weights(
    const Programs& file, const Program& program, const std::map<std::string, Wanted>& wanted, const std::string& where) {
  std::map<std::string, int64_t> given;
  for (const auto& [name, at] : program.weights) given[name] = int64_t(file.weights[size_t(at)].size());
  require_fit(wanted, given, where);
}
