#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/tokenizer/tokenizer_spec.h"

namespace winnow {

// Byte-level byte-pair encoding: starts from the bytes of a word and merges, again and
// again, the neighbours whose merge has the lowest rank, the leftmost among equals.
// Thread-safe: const once made.
class Bpe {
 public:
  // Memory that calls reuse; one per thread.
  struct Scratch {
    struct Symbol {
      int32_t id;
      int32_t prev;
      int32_t next;
    };
    struct Candidate {
      int32_t rank;
      int32_t position;  // of the left symbol
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
    std::string spelling;
  };

  // `spec` is not owned and must outlive *this.
  explicit Bpe(const TokenizerSpec* spec);

  // Appends the ids of `word` to `ids`, in O(n log n) time for n bytes, n < 2^31.
  void Encode(std::string_view word, Scratch* scratch, std::vector<int32_t>* ids) const;

 private:
  void PushCandidate(int32_t position, Scratch* scratch) const;

  const TokenizerSpec* const spec_;
  std::array<int32_t, 256> byte_ids_;                  // -1: the byte is no token
  absl::flat_hash_map<uint64_t, int32_t> merge_rank_;  // by (left << 32 | right)
};

}  // namespace winnow
