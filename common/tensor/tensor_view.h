#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace winnow {

// Element types of safetensors files. Only the first three hold weights here.
enum class DType : uint8_t {
  kBf16,
  kF16,
  kF32,
  kF64,
  kI64,
  kU64,
  kI32,
  kU32,
  kI16,
  kU16,
  kI8,
  kU8,
  kBool,
  kF8E4m3,
  kF8E5m2,
};

// As a safetensors header writes it: "BF16".
const char* DTypeName(DType dtype);
size_t DTypeBytes(DType dtype);

// Elements in memory that somebody else owns; row-major, at any alignment.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> dims;
  const uint8_t* data = nullptr;
  size_t bytes = 0;  // the product of dims times DTypeBytes(dtype)
};

// "[49152, 576]".
std::string DimsString(const std::vector<int64_t>& dims);

}  // namespace winnow
