#include "verify.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <utility>
#include <vector>

#include "error.h"
#include "sha256.h"

namespace {

// The members without the contract's own.
Contract take_contract(Archive& archive, const std::string& where) {
  auto at = std::find_if(archive.members.begin(), archive.members.end(), [](const auto& member) {
    return member.first == kContractMember;
  });
  if (at == archive.members.end()) {
    throw ContractError(
        "the package has no contract",
        where,
        "there is no member " + std::string(kContractMember),
        "write the package with compiled_attn.export");
  }
  std::string_view text = at->second;
  archive.members.erase(at);
  if (sha256(text) != archive.digest) {
    throw ContractError(
        "the contract does not match the digest in the archive",
        where,
        "its SHA-256 is another than the one in the archive's comment",
        kAgain);
  }
  return read_contract(text, where);
}

void compare_members(const Contract& contract, const Archive& archive, const std::string& where) {
  std::set<std::string> wanted, found;
  bool same = contract.members.size() == archive.members.size();
  for (const MemberSpec& member : contract.members) wanted.insert(member.name);
  for (size_t i = 0; i < archive.members.size(); ++i) {
    found.insert(archive.members[i].first);
    same = same && contract.members[i].name == archive.members[i].first;
  }
  if (!same) {
    std::vector<std::string> differing;
    std::set_symmetric_difference(
        wanted.begin(), wanted.end(), found.begin(), found.end(), std::back_inserter(differing));
    if (differing.empty()) differing.push_back("their order");
    std::string facts = "the difference: ";
    for (size_t i = 0; i < std::min<size_t>(differing.size(), 3); ++i) facts += (i ? ", " : "") + differing[i];
    throw ContractError("the members are not those that the contract names", where, facts, kAgain);
  }
  for (size_t i = 0; i < archive.members.size(); ++i) {
    const MemberSpec& member = contract.members[i];
    std::string_view payload = archive.members[i].second;
    if (int64_t(payload.size()) != member.size || sha256(payload) != member.sha256) {
      throw ContractError(
          "member " + member.name + " is not the one that the contract names",
          where,
          "stated are " + std::to_string(member.size) + " bytes of SHA-256 " + member.sha256.substr(0, 12) + ", found " +
              std::to_string(payload.size()) + " others",
          kAgain);
    }
  }
}

} // namespace

Verified verify(Archive archive, const std::string& where) {
  Verified found;
  found.archive = std::move(archive);
  found.contract = take_contract(found.archive, where);
  compare_members(found.contract, found.archive, where);
  return found;
}
