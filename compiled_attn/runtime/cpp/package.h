// What a package says about itself, read as text, and whether the contract agrees; see runtime/package.py.
#pragma once

#include <string>

#include "archive.h"
#include "contract.h"

// Throws ContractError at the first statement of the package that the contract contradicts.
void compare_package(const Contract& contract, const Archive& archive, const std::string& where);
