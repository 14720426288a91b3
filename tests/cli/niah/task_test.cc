#include "cli/niah/task.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "cli/niah/facts.h"
#include "tests/testing/tiny_served.h"

namespace winnow::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The tiny model's tokens are bytes, so lengths in tokens are lengths in bytes.
class Tasks : public ::testing::Test {
 protected:
  Tasks() : filler_(LoadFiller("").value()), prompts_(PromptMaker::Load(model_.dir()).value()) {}

  static NiahTaskOptions Options() {
    NiahTaskOptions options{.lengths = {900, 2048}, .tasks = 12, .seed = 7};
    for (int i = 0; i <= 4; ++i) options.depths.push_back(i / 4.0);
    options.kinds = {"single", "facts", "multi"};
    options.form = PromptForm::kChat;
    return options;
  }
  std::vector<NiahTask> Make(const NiahTaskOptions& options) const {
    const auto tasks = MakeTasks(options, prompts_, filler_);
    EXPECT_TRUE(tasks.ok()) << tasks.status();
    return tasks.ok() ? *tasks : std::vector<NiahTask>();
  }
  std::string Text(const NiahTask& task) const {
    return prompts_.tokenizer().Decode(task.prompt_ids, /*skip_special=*/false).value();
  }

  const testing::TinyServed model_;
  const std::vector<Sentence> filler_;
  const PromptMaker prompts_;
};

int Count(const std::string& text, const std::string& what) {
  int count = 0;
  for (size_t at = text.find(what); at != text.npos; at = text.find(what, at + 1)) ++count;
  return count;
}

TEST_F(Tasks, FitTheirLengthAndHoldEachAnswerOnce) {
  const std::vector<NiahTask> tasks = Make(Options());
  ASSERT_EQ(tasks.size(), 24u);
  for (const NiahTask& task : tasks) {
    const int size = static_cast<int>(task.prompt_ids.size()) + task.max_new_tokens;
    EXPECT_LE(size, task.context) << task.id;
    EXPECT_GE(size, task.context - 402) << task.id;  // a sentence more would not fit
    const std::string lower = absl::AsciiStrToLower(Text(task));
    EXPECT_EQ(task.answers.size(), task.kind == "multi" ? 3u : 1u);
    for (const std::string& answer : task.answers) {
      EXPECT_EQ(Count(lower, absl::AsciiStrToLower(answer)), 1) << task.id << " " << answer;
    }
  }
}

TEST_F(Tasks, NeedlesAreAtTheirDepthBetweenSentences) {
  NiahTaskOptions options = Options();
  options.lengths = {2048};
  options.kinds = {"single"};
  for (const NiahTask& task : Make(options)) {
    const std::string text = Text(task);
    const std::string user = "<|im_start|>user\n", question = "\n\nAnswer the question with words";
    const size_t begin = text.find(user) + user.size(), end = text.find(question);
    const std::string context = text.substr(begin, end - begin);
    const size_t at = context.find("The secret number of the ");
    const size_t size = context.find(task.answers[0]) + task.answers[0].size() + 1 - at;
    ASSERT_NE(at, context.npos);
    // The longest sentence of the filler has under 250 bytes.
    const double depth = static_cast<double>(at) / static_cast<double>(context.size() - size);
    EXPECT_NEAR(depth, task.depth, 125.0 / static_cast<double>(context.size() - size)) << task.id;
    if (at > 0) {
      EXPECT_THAT(context.substr(at - 2, 2), ::testing::AnyOf(". ", "\n\n")) << task.id;
    }
    if (at + size < context.size()) {
      EXPECT_EQ(context[at + size], ' ') << task.id;
    }
    // The answer follows the prompt directly.
    EXPECT_THAT(text, ::testing::EndsWith(context.substr(at, size - 7)));
  }
}

TEST_F(Tasks, RawPromptsEndWithTheAnswersFirstWords) {
  NiahTaskOptions options = Options();
  options.form = PromptForm::kRaw;
  for (const NiahTask& task : Make(options)) {
    const std::string text = Text(task);
    EXPECT_EQ(text.find("<|im_start|>"), text.npos);
    EXPECT_EQ(text.find('?', text.rfind("\n\n")), text.npos);
    if (task.kind == "multi") continue;
    // The needle up to the answer is what the prompt ends with.
    const std::string start = text.substr(text.rfind("\n\n") + 2);
    EXPECT_NE(text.find(start + " " + task.answers[0] + "."), text.npos) << start;
  }
}

TEST_F(Tasks, DepthsAndKindsAreCrossed) {
  NiahTaskOptions options = Options();
  options.lengths = {1500};
  options.tasks = 15;
  std::set<std::pair<double, std::string>> seen;
  for (const NiahTask& task : Make(options)) seen.insert({task.depth, task.kind});
  EXPECT_EQ(seen.size(), 15u);
}

TEST_F(Tasks, DependOnSeedLengthAndNumberAlone) {
  NiahTaskOptions options = Options();
  const std::vector<NiahTask> tasks = Make(options);
  options.lengths = {2048};
  options.tasks = 3;
  const std::vector<NiahTask> some = Make(options);
  for (size_t i = 0; i < some.size(); ++i) EXPECT_EQ(TaskLine(some[i]), TaskLine(tasks[12 + i]));
  options.seed = 8;
  EXPECT_NE(TaskLine(Make(options)[0]), TaskLine(some[0]));
}

// What the facts are is fixed for all platforms and versions.
TEST(Facts, AreTheSameEverywhere) {
  NiahRandom random(1, 1024, 0);
  const std::vector<Fact> numbers = NumberFacts(2, &random);
  EXPECT_EQ(numbers[0].sentence, "The secret number of the gatehouse is 53782.");
  EXPECT_EQ(numbers[1].sentence, "The secret number of the greenhouse is 21199.");
  EXPECT_EQ(MixedFacts(&random)[0].sentence, "Veronica spent the whole winter in Naples.");
}

TEST(Facts, QuestionForAllNamesEachSubject) {
  NiahRandom random(3, 0, 0);
  const std::vector<Fact> facts = NumberFacts(kMaxNumberFacts, &random);
  const Fact all = AskForAll(facts);
  std::set<std::string> subjects;
  for (const Fact& fact : facts) {
    const std::string start = "The secret number of the ";
    const std::string subject =
        fact.answer_start.substr(start.size(), fact.answer_start.size() - start.size() - 3);
    EXPECT_EQ(Count(all.question, "the " + subject), 1);
    EXPECT_EQ(fact.answer.size(), 5u);
    subjects.insert(subject);
  }
  EXPECT_EQ(subjects.size(), facts.size());
  EXPECT_THAT(AskForAll({facts[0], facts[1]}).answer_start,
              ::testing::MatchesRegex("The secret numbers of the [a-z]+ and the [a-z]+ are"));
}

TEST(Facts, MixedAreOfThreeKinds) {
  for (uint32_t i = 0; i < 20; ++i) {
    NiahRandom random(3, 1, i);
    std::set<std::string> kinds;
    for (const Fact& fact : MixedFacts(&random)) {
      kinds.insert(fact.kind);
      EXPECT_EQ(fact.sentence, fact.answer_start + " " + fact.answer + ".");
      EXPECT_EQ(fact.question.back(), '?');
    }
    EXPECT_EQ(kinds.size(), 3u);
  }
}

TEST_F(Tasks, MistakesAreNamed) {
  const auto error = [&](auto change, absl::Span<const Sentence> filler) {
    NiahTaskOptions options = Options();
    change(&options);
    const auto tasks = MakeTasks(options, prompts_, filler);
    EXPECT_EQ(tasks.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(tasks.status().message());
  };
  EXPECT_THAT(error([](auto* o) { o->lengths = {4096}; }, filler_),
              HasSubstr("--lengths: 4096 is outside [1, 2048]"));
  EXPECT_THAT(error([](auto* o) { o->lengths = {150}; }, filler_), HasSubstr("--lengths: 150"));
  EXPECT_THAT(error([](auto* o) { o->depths = {1.5}; }, filler_),
              HasSubstr("--depths: 150 is outside"));
  EXPECT_THAT(error([](auto* o) { o->kinds = {"hay"}; }, filler_), HasSubstr("--kinds: 'hay'"));
  EXPECT_THAT(error([](auto* o) { o->needles = 17; }, filler_), HasSubstr("--needles=17"));
  EXPECT_THAT(error([](auto*) {}, {}), HasSubstr("--filler"));
}

TEST_F(Tasks, FillerWithTheAnswersIsRefused) {
  // All the cities and people there are, and all codes and numbers for a byte each.
  std::string names;
  for (uint32_t i = 0; i < 2000; ++i) {
    NiahRandom random(5, 5, i);
    for (const Fact& fact : MixedFacts(&random)) {
      if (fact.kind == "city" || fact.kind == "name") names += fact.answer + ". ";
    }
  }
  NiahTaskOptions options = Options();
  options.kinds = {"facts"};
  options.lengths = {2048};
  options.tasks = 40;
  const auto tasks = MakeTasks(options, prompts_, SplitSentences(names));
  if (tasks.ok()) {
    for (const NiahTask& task : *tasks) EXPECT_EQ(Count(Text(task), task.answers[0]), 1);
  } else {
    EXPECT_THAT(std::string(tasks.status().message()), HasSubstr("held the answers of task"));
  }
}

TEST(Task, FoundTakesAllAnswersWhateverTheCase) {
  const NiahTask task{.answers = {"48213", "Lisbon"}};
  EXPECT_TRUE(Found(task, "it is LISBON, and 48213."));
  EXPECT_FALSE(Found(task, "48213"));
  EXPECT_FALSE(Found(task, "4821 3 Lisbon"));
  EXPECT_FALSE(Found(task, ""));
}

TEST(Task, LinesReadBack) {
  const NiahTask task{.id = "a\"b",
                      .kind = "multi",
                      .context = 100,
                      .depth = 0.25,
                      .prompt_ids = {0, 5, 2147483647},
                      .answers = {"x", "y"},
                      .max_new_tokens = 9};
  std::istringstream in(TaskLine(task) + "\n\n");
  const std::vector<NiahTask> read = ReadTasks(in, "f").value();
  ASSERT_EQ(read.size(), 1u);
  EXPECT_EQ(read[0].id, task.id);
  EXPECT_EQ(read[0].kind, task.kind);
  EXPECT_EQ(read[0].context, 100);
  EXPECT_EQ(read[0].depth, 0.25);
  EXPECT_THAT(read[0].prompt_ids, ElementsAre(0, 5, 2147483647));
  EXPECT_THAT(read[0].answers, ElementsAre("x", "y"));
  EXPECT_EQ(read[0].max_new_tokens, 9);
}

TEST(Task, BadLinesNameFileLineAndField) {
  const auto line = [](const std::string& field, const std::string& value) {
    std::string text = "{";
    for (const auto& [name, good] :
         std::initializer_list<std::pair<const char*, const char*>>{{"id", "\"a\""},
                                                                    {"kind", "\"single\""},
                                                                    {"context", "64"},
                                                                    {"depth", "0.5"},
                                                                    {"prompt_ids", "[1]"},
                                                                    {"answers", "[\"x\"]"},
                                                                    {"max_new_tokens", "4"}}) {
      absl::StrAppend(&text, text.size() > 1 ? "," : "", "\"", name,
                      "\":", field == name ? value : std::string(good));
    }
    return text + "}";
  };
  std::istringstream good(line("", ""));
  EXPECT_TRUE(ReadTasks(good, "f").ok());
  const std::pair<std::string, const char*> cases[] = {
      {"[]", "f:1: is not a JSON object"},
      {line("id", "4"), "\"id\" is not a string"},
      {line("kind", "null"), "\"kind\" is not a string"},
      {line("context", "0"), "\"context\" is not a number in"},
      {line("context", "-5"), "\"context\" is not a number in"},
      {line("depth", "1.1"), "\"depth\" is not a number in [0, 1]"},
      {line("depth", "\"0\""), "\"depth\" is not a number in [0, 1]"},
      {line("prompt_ids", "[]"), "\"prompt_ids\" is not a list"},
      {line("prompt_ids", "[-1]"), "\"prompt_ids\" holds something"},
      {line("prompt_ids", "[4294967296]"), "\"prompt_ids\" holds something"},
      {line("answers", "[]"), "\"answers\" is not a list"},
      {line("answers", "[\"\"]"), "\"answers\" holds something"},
      {line("max_new_tokens", "99999999999"), "\"max_new_tokens\" is not a number in"},
      {line("", "") + "\n" + line("", ""), "f:2: \"id\" a stands in the file twice"},
      {"", "f holds no task"}};
  for (const auto& [text, message] : cases) {
    std::istringstream in(text);
    const auto tasks = ReadTasks(in, "f");
    EXPECT_EQ(tasks.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(tasks.status().message()), HasSubstr(message)) << text;
  }
}

}  // namespace
}  // namespace winnow::cli
