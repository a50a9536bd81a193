// NumPy's .npy files, read and written. bfloat16, which NumPy lacks, travels as its bits: dtype uint16 ('<u2') or '|V2'.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

// A tensor that owns its memory; for `dtype` "bfloat16" a file of 16-bit patterns is taken as bfloat16.
// Fortran order gives a tensor of that memory order. Throws ContractError naming the file.
at::Tensor read_npy(const std::string& path, const std::string& dtype);

// Writes a CPU tensor in C order. Throws ContractError.
void write_npy(const std::string& path, const at::Tensor& tensor);
