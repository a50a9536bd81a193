// Weights beside the code; see runtime/weights.py, whose rules these are.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

// One tensor that the code asks for. offset: of its first element in its storage, in elements, as are the strides.
struct Wanted {
  std::string dtype;
  std::vector<int64_t> shape, stride;
  int64_t offset = 0;

  int64_t reach() const; // bytes that its storage has at least
};

// Collects what a wrapper source asks for, line by line. Throws std::invalid_argument.
class WantedReader {
 public:
  void line(std::string_view line);
  std::map<std::string, Wanted> all() const; // by name

 private:
  std::map<int64_t, std::map<std::string, std::string>> fields_;
};

// Whether the text from AOTInductor's mark on says that the weights are beside the code.
bool lie_beside(std::string_view constructor);

// given: name -> bytes of its storage. Throws ContractError where the code asks for others.
void require_fit(
    const std::map<std::string, Wanted>& wanted, const std::map<std::string, int64_t>& given, const std::string& where);
