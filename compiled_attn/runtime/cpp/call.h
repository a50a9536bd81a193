// Checks of a call's tensors and results; see runtime/call.py, whose rules and sentences these are.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

#include "contract.h"

// The tensors to run on, in the contract's order and in the wanted memory order, given by name. Throws ContractError.
std::vector<at::Tensor> check_inputs(
    const Contract& contract, const std::map<std::string, at::Tensor>& given, const std::string& where, Sizes& sizes);

// Throws ContractError where the compiled code gave what the contract excludes.
void check_outputs(
    const Contract& contract, const std::vector<at::Tensor>& results, const Sizes& sizes, const std::string& where);
