#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"

namespace winnow {

// What tokenizer.json and its neighbours say, checked and without JSON.

struct AddedToken {
  int32_t id = 0;
  std::string content;       // 1 to 512 bytes
  bool special = false;      // found in text only if the caller asks for it
  bool single_word = false;  // not found next to a letter, digit or underscore
  bool lstrip = false;       // swallows the white space before it
  bool rstrip = false;       // swallows the white space after it
  bool normalized = false;   // looked for after normalization, else before it
};

// One cut of the pre-tokenizer: what becomes of the matches of a pattern, and of the
// text between them, as `tokenizers` names it.
enum class SplitBehavior { kIsolated, kRemoved, kContiguous, kMergedWithPrevious, kMergedWithNext };

struct SplitStep {
  bool add_prefix_space = false;  // first, each piece that does not begin with ' ' gets one
  std::string regex;              // Oniguruma's syntax; empty: no cut
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  // matches and the text between them change places
};

struct Merge {
  int32_t left;
  int32_t right;
  int32_t merged;
};

struct TokenizerSpec {
  // Ordinary tokens in the byte-level spelling ("Ġthe"). Ids are distinct and in
  // [0, kMaxVocab).
  absl::flat_hash_map<std::string, int32_t> vocab;
  std::vector<Merge> merges;      // by rank
  std::optional<int32_t> unk_id;  // for bytes that are no token; nullopt: left out
  bool fuse_unk = false;          // one unk_id for a run of such bytes
  bool ignore_merges = false;     // a piece that is a token is that token
  std::vector<AddedToken> added;
  bool nfc = false;
  std::vector<SplitStep> splits;
  int vocab_size = 0;  // largest id + 1, added tokens included
  bool add_bos = false;
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;
};

inline constexpr int32_t kMaxVocab = 1 << 22;
inline constexpr size_t kMaxAddedTokenBytes = 512;

// The id of the token with this content; INVALID_ARGUMENT, naming `path`, if none has it.
absl::StatusOr<int32_t> FindToken(const TokenizerSpec& spec, const std::string& content,
                                  const std::string& path);

// Reads the files named in Tokenizer::Load(), with its statuses.
absl::StatusOr<TokenizerSpec> ReadTokenizerSpec(const std::string& model_dir);

}  // namespace winnow
