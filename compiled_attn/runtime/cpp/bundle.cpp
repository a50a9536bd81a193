#include "bundle.h"

#include <algorithm>

#include "error.h"
#include "sha256.h"

namespace {

constexpr std::string_view kIndex = "model/targets.json";
constexpr int64_t kVersion = 1;

[[noreturn]] void malformed(const std::string& where) {
  throw ContractError(
      "the index of targets is not well formed", where, "known is version 1 in canonical form", kAgain);
}

const Json& field(const Json& record, std::string_view key, Json::Kind kind) {
  const Json* found = record.find(key);
  if (!found || found->kind != kind) throw JsonError("lacks " + std::string(key));
  return *found;
}

Part read_part(const Json& record) {
  Part part;
  part.member = field(record, "member", Json::Kind::string).text;
  part.target = field(record, "target", Json::Kind::object);
  for (const char* key : {"name", "device", "platform", "machine", "origin"}) field(part.target, key, Json::Kind::string);
  for (const Json& flag : field(part.target, "isa", Json::Kind::array).items) {
    if (flag.kind != Json::Kind::string) throw JsonError("names a flag by no text");
  }
  bool known = record.fields.size() == 4 && part.target.fields.size() == 6;
  bool sized = field(record, "size", Json::Kind::number).whole().has_value();
  field(record, "sha256", Json::Kind::string);
  if (!known || !sized) throw JsonError("is no record of a part");
  return part;
}

Json read_index(std::string_view text, const std::string& where) {
  try {
    Json index = parse_json(text, true);
    bool sound = index.kind == Json::Kind::object && index.fields.size() == 2 &&
        field(index, "bundle_version", Json::Kind::number).whole() == kVersion &&
        !field(index, "parts", Json::Kind::array).items.empty();
    if (sound) return index;
  } catch (const JsonError&) {
  }
  malformed(where);
}

} // namespace

std::vector<Part> parts_of(const Archive& archive, const std::string& where) {
  const auto& members = archive.members;
  auto at = std::find_if(members.begin(), members.end(), [](const auto& member) { return member.first == kIndex; });
  if (at == members.end()) return {};
  if (sha256(at->second) != archive.digest) {
    throw ContractError(
        "the index of targets does not match the digest in the archive", where, "its SHA-256 is another", kAgain);
  }
  Json index = read_index(at->second, where);
  const std::vector<Json>& records = index.find("parts")->items;
  std::vector<Part> parts;
  try {
    for (const Json& record : records) parts.push_back(read_part(record));
  } catch (const JsonError&) {
    malformed(where);
  }
  bool same = at == members.begin() && members.size() == parts.size() + 1;
  for (size_t i = 0; same && i < parts.size(); ++i) same = members[i + 1].first == parts[i].member;
  if (!same) {
    std::string facts;
    for (size_t i = 0; i < std::min<size_t>(members.size(), 4); ++i) facts += (i ? ", " : "") + members[i].first;
    throw ContractError("the members are not those that the index of targets names", where, facts, kAgain);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i].data = members[i + 1].second;
    bool sized = records[i].find("size")->whole() == int64_t(parts[i].data.size());
    if (!sized || sha256(parts[i].data) != records[i].find("sha256")->text) {
      throw ContractError(
          "member " + parts[i].member + " is not the one that the index names",
          where,
          std::to_string(parts[i].data.size()) + " bytes",
          kAgain);
    }
  }
  return parts;
}

void compare_target(const Part& part, const Contract& contract, const std::string& where) {
  const Json& stated = part.target;
  std::vector<std::string> isa;
  for (const Json& flag : stated.find("isa")->items) isa.push_back(flag.text);
  bool same = stated.find("name")->text == contract.target && stated.find("device")->text == contract.device &&
      stated.find("platform")->text == contract.platform && stated.find("machine")->text == contract.machine &&
      stated.find("origin")->text == contract.origin && isa == contract.isa;
  if (same) return;
  throw ContractError(
      "the index of targets contradicts a contract",
      where,
      "the index states " + name_of(part) + ", its contract " + contract.target + ", or another need of theirs",
      "export the model again; an index is never edited by hand");
}

std::string name_of(const Part& part) { return part.target.find("name")->text; }
