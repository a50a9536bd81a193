// What a package says about itself, read as text, and whether the contract agrees; see runtime/package.py.
#pragma once

#include <map>
#include <string>

#include "archive.h"
#include "contract.h"
#include "weights.h"

// The weights that the code asks for, where they are not in its library. Throws ContractError at the first statement of
// the package that the contract contradicts.
std::map<std::string, Wanted> compare_package(const Contract& contract, const Archive& archive, const std::string& where);
