#pragma once

#include <bitset>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "common/tokenizer/tokenizer_spec.h"

namespace winnow {

// Finds added tokens in text: leftmost first, the longest of those that begin there.
// Thread-safe: const once made.
class AddedTokens {
 public:
  // A stretch of text: an added token, or (id -1) what lies between two.
  struct Segment {
    std::string_view text;
    int32_t id;
  };

  // `token` is not owned and must outlive *this. `content` is what is looked for.
  void Add(const AddedToken* token, std::string_view content);

  bool empty() const { return tokens_.empty(); }

  // Appends the segments of `text` to `segments`; none is empty. Without
  // `parse_special`, special tokens are text. Time is linear in `text`.
  void Split(std::string_view text, bool parse_special, std::vector<Segment>* segments) const;

 private:
  // The longest token that begins at byte `start` of `text`, and its length; or null.
  const AddedToken* Match(std::string_view text, size_t start, size_t* length) const;

  // A trie: children by (node << 8 | byte); node 0 is the root.
  absl::flat_hash_map<uint64_t, uint32_t> children_;
  std::vector<const AddedToken*> tokens_;  // by node; null: no token ends here
  std::bitset<256> first_bytes_;
};

}  // namespace winnow
