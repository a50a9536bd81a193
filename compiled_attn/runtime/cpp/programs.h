// A decoder in one file; see runtime/programs.py, whose form and rules these are.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "archive.h"
#include "contract.h"
#include "weights.h"

// One of its programs. weights: name -> position among the stored ones.
struct Program {
  std::string name, member;
  std::string_view data;
  std::map<std::string, int64_t> weights;
};

struct Programs {
  std::vector<Program> programs; // the prompt's and the step's; none where the file holds no decoder
  std::vector<std::string_view> weights;
  std::optional<int64_t> limit; // longest text
};

// Whether a file's first member is the index of a decoder's programs.
bool holds_decoder(std::string_view data);

// What a file's archive holds of a decoder, checked against its index. Throws ContractError.
Programs programs_of(const Archive& archive, const std::string& where);

// Whether the file's weights are those that a program's code asks for. Throws ContractError.
void require_weights(
    const Programs& file, const Program& program, const std::map<std::string, Wanted>& wanted, const std::string& where);
