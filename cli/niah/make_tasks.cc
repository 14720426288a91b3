#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/niah/facts.h"
#include "cli/niah/random.h"
#include "cli/niah/task.h"
#include "common/base/status_macros.h"

namespace winnow::cli {
namespace {

constexpr int kAttempts = 50;  // draws of facts whose answers the filler holds

// Facts to plant, at their depths, and what is asked at the end.
struct Plan {
  std::vector<Fact> facts;
  std::vector<double> depths;
  std::string question, answer_start;
  std::vector<std::string> answers;
};

Plan DrawPlan(const std::string& kind, double depth, int needles, NiahRandom* random) {
  Plan plan;
  if (kind == "facts") {
    plan.facts = MixedFacts(random);
    plan.depths = {depth};
    while (plan.depths.size() < plan.facts.size()) {
      plan.depths.push_back(random->Below(1001) / 1000.0);
    }
    plan.answers = {plan.facts[0].answer};
    plan.question = plan.facts[0].question;
    plan.answer_start = plan.facts[0].answer_start;
    return plan;
  }
  plan.facts = NumberFacts(kind == "multi" ? needles : 1, random);
  for (size_t i = 0; i < plan.facts.size(); ++i) {
    const double shifted = depth + static_cast<double>(i) / static_cast<double>(plan.facts.size());
    plan.depths.push_back(shifted > 1 ? shifted - 1 : shifted);
    plan.answers.push_back(plan.facts[i].answer);
  }
  const Fact all = AskForAll(plan.facts);
  plan.question = all.question;
  plan.answer_start = all.answer_start;
  return plan;
}

// The filler as a circle of sentences with their sizes.
class Haystack {
 public:
  Haystack(absl::Span<const Sentence> sentences, const Tokenizer* tokenizer)
      : sentences_(sentences), tokenizer_(tokenizer), tokens_(sentences.size(), 0) {}

  uint32_t size() const { return static_cast<uint32_t>(sentences_.size()); }
  const Sentence& at(size_t i) const { return sentences_[i % sentences_.size()]; }

  // Tokens of sentence `i` behind another one.
  absl::StatusOr<int> Tokens(size_t i) {
    int& tokens = tokens_[i % tokens_.size()];
    if (tokens == 0) {
      WINNOW_ASSIGN_OR_RETURN(tokens, Count(Joint(at(i)) + at(i).text));
    }
    return tokens;
  }
  absl::StatusOr<int> Count(const std::string& text) const {
    WINNOW_ASSIGN_OR_RETURN(const auto ids, tokenizer_->Encode(text, /*parse_special=*/false));
    return static_cast<int>(ids.size());
  }
  static std::string Joint(const Sentence& sentence) {
    return sentence.starts_paragraph ? "\n\n" : " ";
  }

  // Sentences [begin, begin + sizes.size()) with the facts between them. A fact goes
  // where the tokens in front of it come nearest to its share of all.
  std::string WithFacts(size_t begin, absl::Span<const int> sizes, const Plan& plan) const {
    std::vector<int64_t> before = {0};
    for (const int size : sizes) before.push_back(before.back() + size);
    std::vector<std::string> planted(before.size());
    for (size_t i = 0; i < plan.facts.size(); ++i) {
      const double target = plan.depths[i] * static_cast<double>(before.back());
      const auto nearer = [target](int64_t a, int64_t b) {
        return std::abs(static_cast<double>(a) - target) <
               std::abs(static_cast<double>(b) - target);
      };
      const auto at = std::min_element(before.begin(), before.end(), nearer) - before.begin();
      absl::StrAppend(&planted[static_cast<size_t>(at)], " ", plan.facts[i].sentence);
    }
    std::string text;
    for (size_t i = 0; i < before.size(); ++i) {
      // A fact stands in a paragraph: behind the start of the one that begins here.
      const bool last = i == sizes.size();
      const std::string joint = last ? "" : Joint(at(begin + i));
      if (!planted[i].empty() && joint == "\n\n") {
        absl::StrAppend(&text, joint, planted[i].substr(1), " ");
      } else {
        absl::StrAppend(&text, planted[i], joint);
      }
      if (!last) text += at(begin + i).text;
    }
    absl::StripLeadingAsciiWhitespace(&text);
    return text;
  }

 private:
  const absl::Span<const Sentence> sentences_;
  const Tokenizer* const tokenizer_;
  std::vector<int> tokens_;  // [sentences]; 0: not counted yet
};

int Occurrences(const std::string& text, const std::string& what) {
  int count = 0;
  for (size_t at = text.find(what); at != text.npos; at = text.find(what, at + 1)) ++count;
  return count;
}

bool EachAnswerOnce(const std::string& text, const std::vector<std::string>& answers) {
  const std::string lower = absl::AsciiStrToLower(text);
  return std::all_of(answers.begin(), answers.end(), [&](const std::string& answer) {
    return Occurrences(lower, absl::AsciiStrToLower(answer)) == 1;
  });
}

// Fills `task` but for its answers' being in the filler too: then false.
absl::StatusOr<bool> Build(const Plan& plan, PromptForm form, const PromptMaker& prompts,
                           uint32_t begin, Haystack* hay, NiahTask* task) {
  const std::string ask =
      form == PromptForm::kRaw
          ? ""
          : "\n\nAnswer the question with words of the text above. " + plan.question;
  const auto parts = [&](const std::string& context) {
    return PromptParts{.content = context + ask, .answer_start = plan.answer_start};
  };
  const int limit = task->context - task->max_new_tokens;
  WINNOW_ASSIGN_OR_RETURN(const std::vector<int32_t> frame, prompts.Encode(form, parts("")));
  int room = limit - static_cast<int>(frame.size());
  for (const Fact& fact : plan.facts) {
    WINNOW_ASSIGN_OR_RETURN(const int size, hay->Count(" " + fact.sentence));
    room -= size;
  }
  std::vector<int> sizes;
  for (;;) {
    WINNOW_ASSIGN_OR_RETURN(const int size, hay->Tokens(begin + sizes.size()));
    if (size > room) break;
    room -= size;
    sizes.push_back(size);
  }
  // Where pieces meet, a tokenizer may need a token more than for the pieces.
  for (; !sizes.empty(); sizes.pop_back()) {
    const PromptParts whole = parts(hay->WithFacts(begin, sizes, plan));
    WINNOW_ASSIGN_OR_RETURN(task->prompt_ids, prompts.Encode(form, whole));
    if (static_cast<int>(task->prompt_ids.size()) > limit) continue;
    WINNOW_ASSIGN_OR_RETURN(const std::string text, prompts.Text(form, whole));
    task->answers = plan.answers;
    return EachAnswerOnce(text, plan.answers);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--lengths: ", task->context, " tokens hold question and needles (",
                   frame.size(), " tokens of them around the text) and ", task->max_new_tokens,
                   " new tokens, but no sentence of filler"));
}

absl::Status CheckOptions(const NiahTaskOptions& options, const ModelConfig& config) {
  for (const int length : options.lengths) {
    if (length < 1 || length > config.max_position_embeddings) {
      return absl::InvalidArgumentError(absl::StrCat("--lengths: ", length, " is outside [1, ",
                                                     config.max_position_embeddings,
                                                     "], the model's length"));
    }
  }
  for (const double depth : options.depths) {
    if (!(depth >= 0 && depth <= 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--depths: ", depth * 100, " is outside [0, 100]"));
    }
  }
  for (const std::string& kind : options.kinds) {
    if (kind != "single" && kind != "facts" && kind != "multi") {
      return absl::InvalidArgumentError(
          absl::StrCat("--kinds: '", kind, "' is not single, facts or multi"));
    }
  }
  if (options.lengths.empty()) return absl::InvalidArgumentError("--lengths is empty");
  if (options.depths.empty()) return absl::InvalidArgumentError("--depths is empty");
  if (options.kinds.empty()) return absl::InvalidArgumentError("--kinds is empty");
  if (options.needles < 1 || options.needles > kMaxNumberFacts) {
    return absl::InvalidArgumentError(
        absl::StrCat("--needles=", options.needles, " is outside [1, ", kMaxNumberFacts, "]"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<NiahTask>> MakeTasks(const NiahTaskOptions& options,
                                                const PromptMaker& prompts,
                                                absl::Span<const Sentence> filler) {
  WINNOW_RETURN_IF_ERROR(CheckOptions(options, prompts.config()));
  if (filler.empty()) return absl::InvalidArgumentError("--filler holds no sentence");
  Haystack hay(filler, &prompts.tokenizer());
  std::vector<NiahTask> tasks;
  for (const int length : options.lengths) {
    for (int i = 0; i < options.tasks; ++i) {
      const size_t column = static_cast<size_t>(i) % options.depths.size();
      const size_t row = static_cast<size_t>(i) / options.depths.size();
      NiahTask task;
      task.kind = options.kinds[(column + row) % options.kinds.size()];
      task.context = length;
      task.depth = options.depths[column];
      const int more = task.kind == "multi" ? 12 * (options.needles - 1) : 0;
      task.max_new_tokens = options.max_new_tokens > 0 ? options.max_new_tokens : 24 + more;
      task.id = absl::StrFormat("%d-%s-%04d", length, task.kind, i);
      NiahRandom random(options.seed, static_cast<uint32_t>(length), static_cast<uint32_t>(i));
      bool built = false;
      for (int attempt = 0; attempt < kAttempts && !built; ++attempt) {
        const Plan plan = DrawPlan(task.kind, task.depth, options.needles, &random);
        const uint32_t begin = random.Below(hay.size());
        WINNOW_ASSIGN_OR_RETURN(built, Build(plan, options.form, prompts, begin, &hay, &task));
      }
      if (!built) {
        return absl::InvalidArgumentError(
            absl::StrCat("--filler: it held the answers of task ", task.id, " in each of ",
                         kAttempts, " draws; take a text without the names of cities and people"));
      }
      tasks.push_back(std::move(task));
    }
  }
  return tasks;
}

}  // namespace winnow::cli
