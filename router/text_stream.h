#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/tokenizer/tokenizer.h"

namespace winnow::router {

// Turns a completion's tokens into the text that the client sees: whole characters, stop
// ids without text, and nothing from a stop string on. Text that may be the beginning of
// a stop string is held back until it is clear. Not thread-safe; one a completion.
class TextStream {
 public:
  // `tokenizer` is not owned and must outlive *this. Strings in `stop` are not empty.
  TextStream(const Tokenizer* tokenizer, bool skip_special, std::vector<std::string> stop,
             std::vector<int32_t> stop_token_ids);

  // Takes the next token and appends the text that is safe to show. Once a stop string or
  // stop id was met, takes nothing more.
  void Append(int32_t token, std::string* text);

  // The completion has ended by other means: appends what was held back. After a stop
  // string: nothing.
  void Finish(std::string* text);

  // Which one ended the text, if any.
  const std::optional<std::string>& stop_text() const { return stop_text_; }
  const std::optional<int32_t>& stop_token_id() const { return stop_token_id_; }
  bool stopped() const { return stop_text_.has_value() || stop_token_id_.has_value(); }

 private:
  // Looks for a stop string in held_ and moves to `text` what cannot belong to one.
  void Release(std::string* text);

  IncrementalDecoder decoder_;
  const std::vector<std::string> stop_;
  const std::vector<int32_t> stop_token_ids_;
  std::string held_;  // shorter than the longest stop string between calls
  std::optional<std::string> stop_text_;
  std::optional<int32_t> stop_token_id_;
};

}  // namespace winnow::router
