#pragma once

#include <cstdint>
#include <cstring>
#include <ostream>
#include <random>
#include <vector>

namespace winnow::kernels {

// Named shapes of left_pad_2d, for the CPU and the GPU test.
struct LeftPad2dCase {
  const char* name;
  int num_rows, seq;
  size_t row_bytes;
  friend void PrintTo(const LeftPad2dCase& c, std::ostream* os) { *os << c.name; }
};

inline const LeftPad2dCase kLeftPad2dCases[] = {
    {"one_element", 1, 1, 1},
    {"odd_bytes", 5, 7, 3},
    {"words", 9, 33, 12},
    {"bf16_head_128", 16, 513, 256},
    {"float_head_128", 8, 100, 512},
    {"many_rows", 70'000, 3, 4},
    {"prime_everything", 13, 127, 31},
    {"empty", 0, 5, 16},
};

struct LeftPad2dInputs {
  explicit LeftPad2dInputs(const LeftPad2dCase& c)
      : in(static_cast<size_t>(c.num_rows) * static_cast<size_t>(c.seq) * c.row_bytes),
        lens(static_cast<size_t>(c.num_rows)) {
    in.reserve(1);  // not null even if empty
    lens.reserve(1);
    std::mt19937 rng(17);
    for (uint8_t& byte : in) byte = static_cast<uint8_t>(rng());
    for (size_t n = 0; n < lens.size(); ++n) {
      // Empty and full rows first.
      lens[n] = n == 0 ? c.seq : n == 1 ? 0 : static_cast<int32_t>(rng() % (c.seq + 1u));
    }
  }
  std::vector<uint8_t> in;
  std::vector<int32_t> lens;
};

}  // namespace winnow::kernels
