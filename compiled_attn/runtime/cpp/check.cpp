// Checks artifacts without libtorch and without running anything of them: check file.pt2 ...
// One line a file: ok, or the error's first sentence. Exit code 1 where one of them is not ok.
#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <utility>

#include "error.h"
#include "package.h"
#include "programs.h"
#include "verify.h"

namespace {

std::map<std::string, Wanted> check_artifact(Archive archive, const std::string& where) {
  Verified found = verify(std::move(archive), where);
  return compare_package(found.contract, found.archive, where);
}

void check_file(std::string_view data, const std::string& path) {
  Archive archive = unpack(data, path);
  Programs file = programs_of(archive, path);
  if (file.programs.empty()) check_artifact(std::move(archive), path);
  for (const Program& program : file.programs) {
    std::string where = path + ", member " + program.member;
    require_weights(file, program, check_artifact(unpack(program.data, where), where), where);
  }
}

} // namespace

int main(int count, char** words) {
  bool all_good = true;
  for (int i = 1; i < count; ++i) {
    std::string path = words[i], answer = "ok";
    std::ifstream file(path, std::ios::binary);
    std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    try {
      check_file(data, path);
    } catch (const ContractError& error) {
      answer = error.what();
      answer.resize(std::min(answer.find('\n'), answer.size()));
      all_good = false;
    }
    std::cout << answer << "\n";
  }
  return all_good ? 0 : 1;
}
