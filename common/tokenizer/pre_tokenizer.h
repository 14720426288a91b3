#pragma once

#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/tokenizer/regex.h"
#include "common/tokenizer/tokenizer_spec.h"

namespace winnow {

// Cuts text into the words that BPE never merges across. Thread-safe: const once made.
class PreTokenizer {
 public:
  // Words of one call and the memory behind them; one per thread.
  struct Scratch {
    std::vector<std::string_view> words;
    std::vector<std::string_view> next_words;
    std::vector<std::pair<std::string_view, bool>> parts;  // of one word; true: a match
    std::deque<std::string> prefixed;                      // words that got a space in front
    Regex::Scratch regex;
  };

  // INVALID_ARGUMENT, UNIMPLEMENTED: a regex, as Regex::Compile() says.
  static absl::StatusOr<PreTokenizer> Create(const std::vector<SplitStep>& steps);

  // Leaves the words of `text` in scratch->words; they live as long as `text` and until
  // the next call. RESOURCE_EXHAUSTED as Regex::Find() says.
  absl::Status Split(std::string_view text, Scratch* scratch) const;

 private:
  struct Step {
    SplitStep spec;
    std::optional<Regex> regex;
  };

  static absl::Status Cut(const Step& step, std::string_view word, Scratch* scratch);

  std::vector<Step> steps_;
};

}  // namespace winnow
