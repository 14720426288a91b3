#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace winnow::cli {

// A piece of the text that needles are hidden in, white space made single spaces.
struct Sentence {
  std::string text;  // at most 400 bytes
  bool starts_paragraph = false;
};

// Cuts text into sentences; blank lines end paragraphs, sentences beyond 400 bytes are
// cut at a space. Sentences with a '<' are left out: they might spell a model's
// special tokens.
std::vector<Sentence> SplitSentences(std::string_view text);

// The paragraphs of `sentences`, sentences joined by spaces.
std::vector<std::string> JoinParagraphs(const std::vector<Sentence>& sentences);

// Some neutral paragraphs, separated by blank lines.
std::string_view BuiltInFiller();

// The sentences of a UTF-8 text file, or of BuiltInFiller() if `path` is empty.
//   NOT_FOUND, UNAVAILABLE  no such file, or not readable.
//   INVALID_ARGUMENT        not UTF-8, no sentence in it, or above 64 MiB.
absl::StatusOr<std::vector<Sentence>> LoadFiller(const std::string& path);

}  // namespace winnow::cli
