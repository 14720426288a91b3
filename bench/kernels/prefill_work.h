#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kv_format.h"

namespace winnow::kernels {

// What a sparse prefill of one sequence, shift 1, format fp8, cannot do without.
struct PrefillWork {
  double flop = 0.0;             // of the two products, over the pairs that are seen
  double compact_bytes = 0.0;    // BF16 K and V in and out, flat rows, survivors
  double attention_bytes = 0.0;  // q and out
};

// `decisions`: [seq, kv_heads], 1: the token before is evicted.
inline PrefillWork WorkOfPrefill(int seq, int window, int head_dim, int kv_heads, int group,
                                 const std::vector<uint8_t>& decisions) {
  double pairs = 0.0, survivors = 0.0;
  for (int h = 0; h < kv_heads; ++h) {
    double kept = 0.0;
    for (int i = 0; i < seq; ++i) {
      pairs += std::min(i, window) + 1 + kept;
      const int expires = i - window;  // leaves the window of token i + 1
      if (expires >= 0 &&
          decisions[static_cast<size_t>(expires + 1) * static_cast<size_t>(kv_heads) +
                    static_cast<size_t>(h)] == 0) {
        ++kept;
      }
    }
    survivors += kept;
  }
  const double vectors = double(seq) * kv_heads, dim = head_dim;
  const double stored = vectors * double(TokenBytes(KvFormatId::kFp8, head_dim));
  return {.flop = 4.0 * dim * group * pairs,
          .compact_bytes = vectors * dim * 4 * 2 + stored + survivors * dim * 4,
          .attention_bytes = vectors * dim * 2 * group * 2};
}

}  // namespace winnow::kernels
