// An artifact's bytes, checked as far as archive, contract and members go; see runtime/load.py.
#pragma once

#include <string>

#include "archive.h"
#include "contract.h"

struct Verified {
  Archive archive; // without the contract's own member
  Contract contract;
};

// Throws ContractError. The caller compares the package's own word (package.h) after release and machine.
Verified verify(Archive archive, const std::string& where);
