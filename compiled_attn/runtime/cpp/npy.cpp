#include "npy.h"

#include <ATen/ops/empty.h>

#include <cctype>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "error.h"

namespace {

const std::map<std::string, at::ScalarType> kRead = {
    {"|b1", at::kBool}, {"|u1", at::kByte}, {"|i1", at::kChar}, {"<i2", at::kShort}, {"<i4", at::kInt},
    {"<i8", at::kLong}, {"<f2", at::kHalf}, {"<f4", at::kFloat}, {"<f8", at::kDouble},
    {"<c8", at::kComplexFloat}, {"<c16", at::kComplexDouble}};

[[noreturn]] void refuse(const std::string& path, const std::string& facts) {
  throw ContractError("the .npy file can not be read", path, facts, "write it with numpy.save");
}

// The header: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 5), }
struct Header {
  std::string descr;
  bool fortran = false;
  std::vector<int64_t> shape;
};

class HeaderParser {
 public:
  HeaderParser(const std::string& text, const std::string& path) : text_(text), path_(path) {}

  Header all() {
    Header header;
    int seen = 0;
    take('{');
    while (peek() != '}') {
      std::string key = quoted();
      take(':');
      if (key == "descr") {
        header.descr = quoted(), seen |= 1;
      } else if (key == "fortran_order") {
        header.fortran = word() == "True", seen |= 2;
      } else if (key == "shape") {
        header.shape = tuple(), seen |= 4;
      } else {
        refuse(path_, "its header has an unknown field");
      }
      if (peek() == ',') take(',');
    }
    if (seen != 7) refuse(path_, "its header lacks descr, fortran_order or shape");
    return header;
  }

 private:
  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  void take(char wanted) {
    if (peek() != wanted) refuse(path_, "its header is not as numpy writes it");
    ++at_;
  }

  std::string quoted() {
    take('\'');
    size_t end = text_.find('\'', at_);
    if (end == std::string::npos) refuse(path_, "its header is not as numpy writes it");
    std::string out = text_.substr(at_, end - at_);
    at_ = end + 1;
    return out;
  }

  std::string word() {
    std::string out;
    while (std::isalnum(static_cast<unsigned char>(peek()))) out += text_[at_++];
    return out;
  }

  std::vector<int64_t> tuple() {
    std::vector<int64_t> out;
    take('(');
    while (peek() != ')') {
      std::string digits = word();
      bool good = !digits.empty() && digits.size() <= 15 && digits.find_first_not_of("0123456789") == std::string::npos;
      if (!good || out.size() >= 32) refuse(path_, "its shape is no shape");
      out.push_back(std::stoll(digits));
      if (peek() == ',') take(',');
    }
    take(')');
    return out;
  }

  const std::string& text_;
  const std::string& path_;
  size_t at_ = 0;
};

at::ScalarType type_of(const Header& header, const std::string& dtype, const std::string& path) {
  bool bits = header.descr == "<u2" || header.descr == "|V2" || header.descr == "<V2";
  if (dtype == "bfloat16" && bits) return at::kBFloat16;
  auto found = kRead.find(header.descr);
  if (found == kRead.end()) refuse(path, "its dtype " + header.descr + " is none that artifacts take");
  return found->second;
}

} // namespace

at::Tensor read_npy(const std::string& path, const std::string& dtype) {
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(path, "it can not be opened");
  std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (data.size() < 12 || data.compare(0, 6, "\x93NUMPY") != 0) refuse(path, "it does not begin as an .npy file");
  auto byte = [&](size_t at) { return size_t(static_cast<unsigned char>(data[at])); };
  size_t start = data[6] == 1 ? 10 : 12;
  size_t length = byte(8) | byte(9) << 8;
  if (start == 12) length |= byte(10) << 16 | byte(11) << 24;
  if (length > data.size() - start) refuse(path, "it ends within its header");
  std::string text = data.substr(start, length);
  Header header = HeaderParser(text, path).all();

  at::ScalarType type = type_of(header, dtype, path);
  int64_t bytes = int64_t(c10::elementSize(type));
  for (int64_t size : header.shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) refuse(path, "its shape is no shape");
  }
  if (size_t(bytes) != data.size() - start - length) {
    refuse(path, "its shape asks for " + std::to_string(bytes) + " bytes, it holds " +
        std::to_string(data.size() - start - length));
  }
  std::vector<int64_t> sizes = header.shape;
  if (header.fortran) sizes = std::vector<int64_t>(header.shape.rbegin(), header.shape.rend());
  at::Tensor tensor = at::empty(sizes, at::TensorOptions().dtype(type));
  if (bytes) std::memcpy(tensor.mutable_data_ptr(), data.data() + start + length, size_t(bytes));
  if (!header.fortran) return tensor;
  std::vector<int64_t> reversed;
  for (int64_t i = tensor.dim(); i-- > 0;) reversed.push_back(i);
  return tensor.permute(reversed);
}

void write_npy(const std::string& path, const at::Tensor& tensor) {
  at::Tensor whole = tensor.contiguous();
  std::string descr = whole.scalar_type() == at::kBFloat16 ? "<u2" : "";
  for (const auto& [name, type] : kRead) {
    if (type == whole.scalar_type()) descr = name;
  }
  std::string shape;
  for (int64_t size : whole.sizes()) shape += std::to_string(size) + ", ";
  if (whole.dim() > 1) shape.resize(shape.size() - 2);
  if (whole.dim() == 1) shape.resize(shape.size() - 1);
  std::string header = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.resize((header.size() + 1 + 10 + 63) / 64 * 64 - 10 - 1, ' ');
  header += '\n';
  std::ofstream file(path, std::ios::binary);
  file << "\x93NUMPY" << '\x01' << '\x00' << char(header.size() & 255) << char(header.size() >> 8) << header;
  file.write(static_cast<const char*>(whole.const_data_ptr()), std::streamsize(whole.nbytes()));
  if (!file) throw ContractError("the result can not be written", path, "", "give a folder that can be written to");
}
