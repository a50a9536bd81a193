// Several targets in one file; see runtime/bundle.py, whose form and rules these are.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "archive.h"
#include "contract.h"
#include "json.h"

// One artifact of the file. target: what the index says of it.
struct Part {
  std::string member;
  std::string_view data;
  Json target;
};

// The parts of a file for several targets, checked against its index; none where the file is for one target.
// Throws ContractError.
std::vector<Part> parts_of(const Archive& archive, const std::string& where);

// Throws ContractError where the part's own contract states another target than the index.
void compare_target(const Part& part, const Contract& contract, const std::string& where);

std::string name_of(const Part& part);
