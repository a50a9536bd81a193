// The strict zip form of artifacts; see runtime/archive.py, whose rules these are.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

struct Archive {
  std::vector<std::pair<std::string, std::string_view>> members; // in order; views into the data given
  std::string digest; // of the contract, from the comment
};

// Accounts for every byte of `data`. where: the file's name, for errors. Throws ContractError.
Archive unpack(std::string_view data, const std::string& where);

uint32_t crc32(std::string_view data);
