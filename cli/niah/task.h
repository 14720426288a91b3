#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cli/niah/filler.h"
#include "cli/niah/prompt.h"

namespace winnow::cli {

// One needle test, as a line of a task file: a JSON object with these fields. Any
// program that has the model can run it: generate greedily from prompt_ids.
struct NiahTask {
  std::string id;    // unique in its file
  std::string kind;  // "single", "facts" or "multi"
  int context = 0;   // prompt_ids.size() + max_new_tokens is at most this
  double depth = 0;  // of the (first) needle that is asked for; 0 first, 1 last
  std::vector<int32_t> prompt_ids;
  std::vector<std::string> answers;  // the output must hold all of them
  int max_new_tokens = 0;
};

// True if every answer occurs in `output`; capitals do not matter.
bool Found(const NiahTask& task, std::string_view output);

// The task as one line of JSON, without the newline.
std::string TaskLine(const NiahTask& task);
// Reads a task file. Empty lines are skipped, fields that are not known ignored.
//   INVALID_ARGUMENT  no task, or a bad one: the message names file, line and field.
absl::StatusOr<std::vector<NiahTask>> ReadTasks(std::istream& in, const std::string& name);

struct NiahTaskOptions {
  std::vector<int> lengths = {1024, 2048, 4096, 8192};  // NiahTask::context
  int tasks = 40;                                       // a length
  std::vector<double> depths;                           // in [0, 1]; taken in turn
  // Taken in turn: "single" is one number; "facts" are three facts of different kinds
  // of which one is asked for; "multi" are `needles` numbers, all asked for.
  std::vector<std::string> kinds = {"single", "facts"};
  // kRaw, or PromptMaker::short_form() with a question. A raw prompt is a text whose last
  // words are those of the needle in front of the answer; small models read it best.
  PromptForm form = PromptForm::kRaw;
  int needles = 3;         // of "multi"; [1, kMaxNumberFacts]
  int max_new_tokens = 0;  // 0: 24, and 12 more for each further needle of "multi"
  uint64_t seed = 1;
};

// Tasks, `tasks` for each length in order. A task depends on the seed, its length and
// its number among the tasks of that length, not on how many there are; depths and kinds
// are crossed evenly. Each answer stands in the prompt's text exactly once, in a
// sentence of its own between two sentences of filler, as near as that allows to
// its depth in tokens of filler.
//   INVALID_ARGUMENT  an option is out of range, by name; a length too short for the
//                     question or beyond the model; filler that holds the answers.
absl::StatusOr<std::vector<NiahTask>> MakeTasks(const NiahTaskOptions& options,
                                                const PromptMaker& prompts,
                                                absl::Span<const Sentence> filler);

}  // namespace winnow::cli
