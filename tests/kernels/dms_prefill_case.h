#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "common/base/bf16.h"
#include "kernels/kv_format.h"

// Random ragged batches for the sparse prefill, and both ways through it.
namespace winnow::kernels {

// A chunk and the tokens before it.
struct PrefillSequence {
  int prefix, chunk;
};

struct PrefillCase {
  std::string name;
  std::vector<PrefillSequence> sequences;
  int head_dim = 128, kv_heads = 2, group = 4, window = 256, shift = 1;
  double evict_rate = 0.875;  // of KV head 0; later heads evict a little less
  KvFormatId format = KvFormatId::kFp8;
  float sink = 1.0f;        // times which the first 16 keys are longer than the others
  bool one_matrix = false;  // q, k and v are parts of one matrix's rows
  friend void PrintTo(const PrefillCase& c, std::ostream* os) {
    *os << c.name << ": " << KvFormatName(c.format) << " d" << c.head_dim << " heads " << c.kv_heads
        << " group " << c.group << " window " << c.window << " shift " << c.shift << " evict "
        << c.evict_rate << " sink " << c.sink << (c.one_matrix ? " one matrix" : "");
    for (const PrefillSequence& s : c.sequences) *os << " " << s.prefix << "+" << s.chunk;
  }
};

// All tokens of a sequence, prefix first.
struct PrefillInputs {
  std::vector<Bf16> q, k, v;       // [tokens, heads, head_dim]
  std::vector<uint8_t> decisions;  // [tokens, kv_heads]
  // Of StoreRow(): flat rows, and what they hold, rounded to BF16.
  std::vector<uint8_t> rows;
  std::vector<Bf16> stored_k, stored_v;
};

constexpr size_t Size(int n) { return static_cast<size_t>(n); }

PrefillInputs MakePrefillInputs(const PrefillCase& c, int tokens, uint32_t seed);
// Fills rows, stored_k and stored_v from k and v.
void StorePrefillInputs(const PrefillCase& c, PrefillInputs* in);

// The CPU twin over stored_k and `v` [tokens, kv_heads, head_dim], as one chunk:
// [tokens, heads, head_dim].
std::vector<float> CpuPrefill(const PrefillCase& c, const PrefillInputs& in,
                              const std::vector<Bf16>& v, float scale);

struct DevicePrefill {
  std::vector<std::vector<Bf16>> out, band_k, band_v;  // of each sequence's chunk
  std::vector<std::vector<uint8_t>> rows;
};
// Both ops over a batch of these sequences, with rows of nobody, which stay as they were,
// between them.
DevicePrefill RunPrefill(const PrefillCase& c, const std::vector<PrefillSequence>& sequences,
                         const std::vector<const PrefillInputs*>& inputs, float scale,
                         bool portable);

}  // namespace winnow::kernels
