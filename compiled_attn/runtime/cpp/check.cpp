// Checks artifacts without libtorch and without running anything of them: check file.pt2 ...
// One line a file: ok, or the error's first sentence. Exit code 1 where one of them is not ok.
#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "error.h"
#include "package.h"
#include "verify.h"

int main(int count, char** words) {
  bool all_good = true;
  for (int i = 1; i < count; ++i) {
    std::string path = words[i], answer = "ok";
    std::ifstream file(path, std::ios::binary);
    std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    try {
      Verified found = verify(data, path);
      compare_package(found.contract, found.archive, path);
    } catch (const ContractError& error) {
      answer = error.what();
      answer.resize(std::min(answer.find('\n'), answer.size()));
      all_good = false;
    }
    std::cout << answer << "\n";
  }
  return all_good ? 0 : 1;
}
