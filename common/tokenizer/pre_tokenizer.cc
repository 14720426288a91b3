#include "common/tokenizer/pre_tokenizer.h"

#include "common/base/status_macros.h"

namespace winnow {
namespace {

// `a` and `b`, which touch, as one.
std::string_view Join(std::string_view a, std::string_view b) {
  return {a.data(), a.size() + b.size()};
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::Create(const std::vector<SplitStep>& steps) {
  PreTokenizer pre_tokenizer;
  for (const SplitStep& spec : steps) {
    Step step = {spec, std::nullopt};
    if (!spec.regex.empty()) {
      WINNOW_ASSIGN_OR_RETURN(step.regex, Regex::Compile(spec.regex));
    }
    pre_tokenizer.steps_.push_back(std::move(step));
  }
  return pre_tokenizer;
}

absl::Status PreTokenizer::Split(std::string_view text, Scratch* scratch) const {
  scratch->prefixed.clear();
  scratch->words.clear();
  if (!text.empty()) scratch->words.push_back(text);
  for (const Step& step : steps_) {
    scratch->next_words.clear();
    for (std::string_view word : scratch->words) {
      if (step.spec.add_prefix_space && word.front() != ' ') {
        scratch->prefixed.push_back(" " + std::string(word));
        word = scratch->prefixed.back();
      }
      if (step.regex) {
        WINNOW_RETURN_IF_ERROR(Cut(step, word, scratch));
      } else {
        scratch->next_words.push_back(word);
      }
    }
    scratch->words.swap(scratch->next_words);
  }
  return absl::OkStatus();
}

// Appends the parts of `word` to scratch->next_words.
absl::Status PreTokenizer::Cut(const Step& step, std::string_view word, Scratch* scratch) {
  auto& parts = scratch->parts;
  parts.clear();
  size_t done = 0;
  while (true) {
    size_t begin = 0;
    size_t end = 0;
    WINNOW_ASSIGN_OR_RETURN(const bool found,
                            step.regex->Find(word, done, &scratch->regex, &begin, &end));
    if (!found) break;
    if (begin > done) parts.emplace_back(word.substr(done, begin - done), step.spec.invert);
    parts.emplace_back(word.substr(begin, end - begin), !step.spec.invert);
    done = end;
  }
  if (done < word.size()) parts.emplace_back(word.substr(done), step.spec.invert);

  auto& out = scratch->next_words;
  bool previous_match = false;
  bool first = true;
  switch (step.spec.behavior) {
    case SplitBehavior::kIsolated:
      for (const auto& [part, match] : parts) out.push_back(part);
      break;
    case SplitBehavior::kRemoved:
      for (const auto& [part, match] : parts) {
        if (!match) out.push_back(part);
      }
      break;
    case SplitBehavior::kContiguous:
    case SplitBehavior::kMergedWithPrevious:
      for (const auto& [part, match] : parts) {
        const bool join = step.spec.behavior == SplitBehavior::kContiguous
                              ? match == previous_match
                              : match && !previous_match;
        if (join && !first) {
          out.back() = Join(out.back(), part);
        } else {
          out.push_back(part);
        }
        previous_match = match;
        first = false;
      }
      break;
    case SplitBehavior::kMergedWithNext:
      for (size_t i = 0; i < parts.size(); ++i) {
        const bool joins_next = parts[i].second && i + 1 < parts.size() && !parts[i + 1].second;
        out.push_back(joins_next ? Join(parts[i].first, parts[i + 1].first) : parts[i].first);
        i += joins_next ? 1 : 0;
      }
      break;
  }
  return absl::OkStatus();
}

}  // namespace winnow
