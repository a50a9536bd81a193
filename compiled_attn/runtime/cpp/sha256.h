// SHA-256 (FIPS 180-4), since torch's wheel ships none.
#pragma once

#include <string>
#include <string_view>

// Digest of `data` as 64 lowercase hex digits.
std::string sha256(std::string_view data);
