#pragma once

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "common/base/thread_pool.h"
#include "common/kv/kv_cache.h"
#include "common/kv/sequence_cache.h"
#include "kernels/compact_decode_attention.h"
#include "kernels/dms_prefill_attention.h"

namespace winnow {

// Random queries, stored keys and values, and decisions of one layer, and the
// two ways through the ops: chunked prefill and one token at a time.
struct DmsCase {
  std::string name;
  int num_tokens = 0;
  int window = 0;  // 0: dense
  int shift = 1;
  double evict_rate = 0.5;  // of the decisions; head g's is shifted by g / 10
  kernels::KvFormatId format = kernels::KvFormatId::kFp8;
  int num_heads = 2, num_kv_heads = 1, head_dim = 16;
  uint32_t seed = 1;

  friend void PrintTo(const DmsCase& c, std::ostream* os) { *os << c.name; }
};

struct DmsInputs {
  explicit DmsInputs(const DmsCase& test_case);
  const uint8_t* row(int t, int g) const;
  bool decision(int t, int g) const { return decisions[at(t, g)] != 0; }
  size_t at(int t, int g) const { return static_cast<size_t>(t * c.num_kv_heads + g); }
  float scale() const;

  DmsCase c;
  std::vector<float> q;            // [num_tokens, num_heads, head_dim]
  std::vector<float> k, v;         // [num_tokens, num_kv_heads, head_dim]; stored as they are
  std::vector<uint8_t> rows;       // [num_tokens, num_kv_heads, TokenBytes]
  std::vector<uint8_t> decisions;  // [num_tokens, num_kv_heads]
};

// A cache of one layer with room for `sequences` such sequences.
std::unique_ptr<KvCache> MakeCache(const DmsCase& c, int sequences = 1, bool poison = true);

// Appends [begin, end) chunk by chunk; returns the attention output of those tokens.
std::vector<float> Prefill(const DmsInputs& in, int begin, int end, int chunk, ThreadPool* pool,
                           SequenceCache* sequence, const KvCache& cache);
// The same, a token a step.
std::vector<float> Decode(const DmsInputs& in, int begin, int end, ThreadPool* pool,
                          SequenceCache* sequence, const KvCache& cache);

// [query head][token][key]: the closed form of the mask.
bool OracleVisible(const DmsInputs& in, int g, int i, int j);
// Attention in double over the visible keys, from the stored bytes; a rotated format's
// output rotated back.
std::vector<double> OracleAttention(const DmsInputs& in);

}  // namespace winnow
