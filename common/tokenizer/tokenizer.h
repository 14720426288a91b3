#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/tokenizer/utf8.h"

namespace winnow {

// A byte-level BPE tokenizer as a Hugging Face model directory describes it
// (tokenizer.json, tokenizer_config.json): GPT-2, SmolLM2, Llama 3, Qwen2, Qwen3.
// It gives the ids that the `tokenizers` library gives.
// Thread-safe: const once loaded, each call has its own scratch memory.
class Tokenizer {
 public:
  // Reads `model_dir`/tokenizer.json and, where they exist, tokenizer_config.json
  // and special_tokens_map.json beside it.
  //   NOT_FOUND         there is no tokenizer.json.
  //   INVALID_ARGUMENT  a file is malformed; the message names file, field, value.
  //   UNIMPLEMENTED     a model, normalizer, pre-tokenizer, decoder or option that is
  //                     not built (SentencePiece-like byte_fallback, ...), by name.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& model_dir);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The ids of `text`, no BOS added. With `parse_special`, the text of a special
  // token (such as <|im_end|>) becomes that token; without, it is plain text. Added
  // tokens that are not special are found either way. Time is O(n log n) in the bytes
  // of `text`, whatever they are.
  //   INVALID_ARGUMENT    `text` is not UTF-8; the message gives byte and offset.
  //   RESOURCE_EXHAUSTED  tokenizer.json's own regex needs too many steps on `text`.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool parse_special) const;

  // The text of `ids`, always UTF-8: bytes that are none become U+FFFD, one for each
  // maximal ill-formed part (Unicode 3.9, W3C). With `skip_special`, special tokens
  // leave nothing. An id below vocab_size() that names no token leaves nothing.
  //   INVALID_ARGUMENT  an id is outside [0, vocab_size()).
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids, bool skip_special) const;

  // The bytes that `id` stands for, possibly a part of a character; empty if `id`
  // names no token. Valid as long as *this.
  std::string_view TokenBytes(int32_t id) const;

  // The id of the token with this content ("<|im_end|>"; of ordinary tokens, the
  // vocabulary's own spelling, "Ġthe"), or nullopt.
  std::optional<int32_t> TokenId(std::string_view content) const;

  // True if `id` names a special token.
  bool IsSpecial(int32_t id) const;

  // Largest id + 1. The model's logits may be longer (padded).
  int vocab_size() const;

  // From tokenizer_config.json, else special_tokens_map.json; nullopt if both are
  // silent. A model's own list of end ids (generation_config.json) is not read here.
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;

  // True if the files say that a raw prompt starts with bos_id(): "add_bos_token" of
  // tokenizer_config.json, or where that is silent, tokenizer.json's post-processor.
  // The caller prepends it, to raw prompts only: a chat template writes its own.
  bool add_bos() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);

  const std::unique_ptr<const Impl> impl_;
};

// Turns a stream of ids into text piece by piece. The pieces, with what Finish()
// returns, concatenate to Decode() of all the ids. Not thread-safe; one per stream.
class IncrementalDecoder {
 public:
  // `tokenizer` is not owned and must outlive *this.
  IncrementalDecoder(const Tokenizer* tokenizer, bool skip_special)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}

  // The text that `id` completes: whole characters only, possibly none. Bytes of an
  // unfinished character (at most 3) wait for the next id. An id that names no token,
  // also one outside [0, vocab_size()), leaves nothing.
  std::string Append(int32_t id);

  // What is left: U+FFFD if the stream ends inside a character, else nothing. *this
  // is then as new.
  std::string Finish();

 private:
  const Tokenizer* tokenizer_;
  const bool skip_special_;
  Utf8Decoder pending_;
};

}  // namespace winnow
