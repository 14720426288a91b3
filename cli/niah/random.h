#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/sampling/philox.h"

namespace winnow::cli {

// Random integers that are the same on every platform: counter-based, no standard
// library distributions. A stream is named by a seed and two indices.
class NiahRandom {
 public:
  NiahRandom(uint64_t seed, uint32_t first, uint32_t second)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        first_(first),
        second_(second) {}

  // In [0, bound), each equally likely. REQUIRES: bound >= 1.
  uint32_t Below(uint32_t bound) {
    // Words at or above the largest multiple of `bound` would favour small results.
    const uint64_t limit = (uint64_t{1} << 32) / bound * bound;
    uint64_t word = Next();
    while (word >= limit) word = Next();
    return static_cast<uint32_t>(word % bound);
  }

  template <typename T>
  const T& Pick(const std::vector<T>& values) {
    return values[Below(static_cast<uint32_t>(values.size()))];
  }

 private:
  uint32_t Next() { return Philox4x32({first_, second_, counter_++, 0}, key_)[0]; }

  const std::array<uint32_t, 2> key_;
  const uint32_t first_, second_;
  uint32_t counter_ = 0;
};

}  // namespace winnow::cli
