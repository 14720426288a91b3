#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/cuda/dms_prefill_fp8.h"

// Inputs of the FP8 prefill and what it must give, in double.
namespace winnow::kernels {

inline constexpr int kDim = kPrefillFp8Dim;
inline constexpr size_t kTokenBytes = TokenBytes(KvFormatId::kFp8, kDim);

struct Sequence {
  int prefix, chunk;
};

struct Fp8Case {
  std::string name;
  std::vector<Sequence> sequences;
  int kv_heads = 2, group = 4, window = 256, shift = 1;
  double evict_rate = 0.875;  // of KV head 0; later heads evict a little less
  friend void PrintTo(const Fp8Case& c, std::ostream* os) { *os << c.name; }
};

constexpr size_t Size(int64_t n) { return static_cast<size_t>(n); }

// What the inputs are made of.
enum class Data {
  kExact,   // weights are powers of two and sums of few bits: nothing is rounded
  kNormal,  // scores of standard deviation 1.5
  kPeaky,   // of 6: a few keys have most of the weight
};

// All tokens of a sequence, prefix first.
struct Inputs {
  int tokens = 0;
  float scale = 0.0f;
  std::vector<Bf16> q, k, v;       // [tokens, heads, kDim]
  std::vector<uint8_t> decisions;  // [tokens, kv_heads]
  std::vector<uint8_t> rows;       // StoreRow()'s
  std::vector<float> stored_k, stored_v;
};

// `tokens` tokens, the same for the same seed.
Inputs MakeInputs(const Fp8Case& c, int tokens, Data data, uint32_t seed);
// Whether the token's key is seen when it is older than the window.
bool Kept(const Fp8Case& c, const Inputs& in, int token, int head);
// The queries of the chunk as the kernel rounds them: 16 rows of (position, head of the
// group) of a tile share the power of two that brings the largest into [128, 256).
// All of in.q, the prefix's as they are.
std::vector<double> RoundedQueries(const Fp8Case& c, const Inputs& in, int prefix);

struct Expected {
  std::vector<double> out;  // [chunk, heads, kDim], as all
  // Empty unless asked for: sums of weight * |value|, of (weight * value)^2, and of what
  // weights below e4m3's normal range may be off by: 2^-10 where the largest is 2^7.
  std::vector<double> absolute, square, underflow;
};

// Attention of the tokens from `prefix` on, over the stored values, with these queries.
Expected Attention(const Fp8Case& c, const Inputs& in, int prefix, const std::vector<double>& q,
                   bool sums);

}  // namespace winnow::kernels
