#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/kv/sequence_cache.h"

namespace winnow {

// Flat rows whose K tells which token of which head they are, so that a test
// can ask a cache which tokens it holds.
class TaggedTokens {
 public:
  explicit TaggedTokens(const kernels::KvLayout& layout, int num_kv_heads)
      : layout_(layout), num_kv_heads_(num_kv_heads) {}

  // Rows of tokens [first, first + n), [n, num_kv_heads, TokenBytes]; valid
  // until the next call.
  const uint8_t* Rows(int first, int n) {
    const size_t bytes = kernels::TokenBytes(layout_.format, layout_.head_dim);
    rows_.resize(static_cast<size_t>(n * num_kv_heads_) * bytes);
    std::vector<float> k(static_cast<size_t>(layout_.head_dim));
    for (int t = 0; t < n; ++t) {
      for (int g = 0; g < num_kv_heads_; ++g) {
        // Small numbers, far enough apart for every format.
        for (int d = 0; d < 8; ++d) {
          k[static_cast<size_t>(d)] = static_cast<float>(((first + t) >> (2 * d)) & 3);
        }
        k[8] = static_cast<float>(g % 8);
        k[9] = 7.0f;  // the largest, so that every row has one scale
        kernels::StoreRow(layout_.format, layout_.head_dim, k.data(), k.data(),
                          &rows_[static_cast<size_t>(t * num_kv_heads_ + g) * bytes]);
      }
    }
    return rows_.data();
  }

  // The token ids a span holds, in its own order.
  std::vector<int> Ids(const kernels::Span& span, int g) const {
    std::vector<int> ids;
    for (int i = 0; i < span.num_live(); ++i) {
      float k[kernels::kMaxHeadDim], v[kernels::kMaxHeadDim];
      const kernels::TokenRef token = kernels::SpanToken(layout_, span, i);
      LoadK(layout_.format, layout_.head_dim, token, k);
      LoadV(layout_.format, layout_.head_dim, token, v);
      int id = 0;
      for (int d = 0; d < 8; ++d) id |= static_cast<int>(k[d] + 0.5f) << (2 * d);
      const auto near = [&](int d) { return std::fabs(k[d] - v[d]) < 0.25f; };
      const bool intact = static_cast<int>(k[8] + 0.5f) == g % 8 && near(3) && near(9);
      ids.push_back(intact ? id : -1);
    }
    return ids;
  }

 private:
  const kernels::KvLayout layout_;
  const int num_kv_heads_;
  std::vector<uint8_t> rows_;
};

}  // namespace winnow
