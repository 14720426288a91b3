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
  friend void PrintTo(const Fp8Case& c, std::ostream* os) {
    *os << c.name << ": heads " << c.kv_heads << " group " << c.group << " window " << c.window
        << " shift " << c.shift << " evict " << c.evict_rate;
    for (const Sequence& s : c.sequences) *os << " " << s.prefix << "+" << s.chunk;
  }
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
// Of V, among the tokens that are laid out together with this one: 64 of the band, or of what
// is older than it (which the test lays out). A token's scale there is ValueScale() of its
// row times 2^PrefillFp8Octaves().
float LargestValueScale(const Fp8Case& c, const Inputs& in, int prefix, int token, int head);
// The queries as the kernel rounds them: a power of two brings a row's largest into [1/2, 1),
// but none less than 2^-9 in the units of its exponents.
std::vector<double> RoundedQueries(const Inputs& in);

struct Expected {
  std::vector<double> out;  // [chunk, heads, kDim], as all
  // Empty unless asked for: sums of weight * |value|, of (weight * value)^2, of |value| times
  // what weights below e4m3's normal range may be off by, of that alone, of weight^2. A row's
  // largest times V's scale is 2^6 at least, and there 2^-7 is taken for nothing, and what
  // is above for less by less; 2^-10 is lost by rounding.
  std::vector<double> absolute, square, underflow, lost, concentration;
  std::vector<double> scale;  // sums of weight * V's scale as laid out
};

// Attention of the tokens from `prefix` on, over the stored values, with these queries.
Expected Attention(const Fp8Case& c, const Inputs& in, int prefix, const std::vector<double>& q,
                   bool sums);

}  // namespace winnow::kernels
