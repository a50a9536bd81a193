// The one error of the runner: four parts, printed as the Python side prints them.
#pragma once

#include <stdexcept>
#include <string>

struct ContractError : std::runtime_error {
  ContractError(const std::string& what, const std::string& where, const std::string& facts, const std::string& advice)
      : std::runtime_error(text(what, where, facts, advice)) {}

  static std::string text(
      const std::string& what, const std::string& where, const std::string& facts, const std::string& advice) {
    std::string all = what;
    if (!where.empty()) all += "\n  where: " + where;
    if (!facts.empty()) all += "\n  facts: " + facts;
    if (!advice.empty()) all += "\n  do:    " + advice;
    return all;
  }
};

// The artifact is sound, but made for another machine or device; because: the facts.
struct Unfit : ContractError {
  Unfit(const std::string& what, const std::string& where, const std::string& facts, const std::string& advice)
      : ContractError(what, where, facts, advice), because(facts) {}

  std::string because;
};

inline const char* const kAgain = "export the model again, or fetch the file again";
inline const char* const kNotByHand = "export the model again; a contract is never edited by hand";
