// A megabyte of anything is encoded in bounded time: quadratic work on it would take
// from minutes to days.

#include <ctime>
#include <random>

#include "tests/tokenizer/tokenizer_testing.h"

namespace winnow {
namespace {

constexpr size_t kBytes = 1'000'000;
// Seconds of CPU. An -O2 build needs 1.1 at most; sanitizers and slow hosts need more.
constexpr double kLimitSeconds = 20.0;

std::string Repeat(std::string_view unit) {
  std::string text;
  while (text.size() + unit.size() <= kBytes) text += unit;
  return text;
}

std::string Random(const std::vector<std::string>& units) {
  std::mt19937 rng(1);
  std::string text;
  while (text.size() < kBytes) text += units[rng() % units.size()];
  return text;
}

std::vector<std::pair<const char*, std::string>> Cases() {
  std::vector<std::string> letters;
  for (char c = 'a'; c <= 'z'; ++c) letters.emplace_back(1, c);
  return {{"one letter", Repeat("a")},
          {"one word", Random(letters)},
          {"pairs", Repeat("ab")},
          {"spaces", Repeat(" ")},
          {"spaces and a letter", Repeat(" ") + "x"},
          {"long gaps", Repeat(std::string(1000, ' ') + "x")},
          {"line feeds", Repeat("\n")},
          {"spaces and line feeds", Repeat(" \n")},
          {"line feeds, then spaces", std::string(kBytes / 2, '\n') + std::string(kBytes / 2, ' ')},
          {"digits", Repeat("7")},
          {"emoji", Repeat("\U0001F600")},
          {"marks out of order", "e" + Random({"\u0301", "\u0323", "\u0345", "\u093c"})},
          {"marks in pairs", "e" + Repeat("\u0301\u0323")},
          {"apostrophes", Repeat("'")},
          {"beginnings of a special token", Repeat("<|im_star")},
          {"special tokens", Repeat("<|im_end|>")}};
}

void ExpectBoundedTime(const Tokenizer& tokenizer) {
  for (const auto& [name, text] : Cases()) {
    const std::clock_t begin = std::clock();
    const Ids ids = MustEncode(tokenizer, text, true);
    IncrementalDecoder decoder(&tokenizer, false);
    size_t bytes = 0;
    for (const int32_t id : ids) bytes += decoder.Append(id).size();
    const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    EXPECT_LT(seconds, kLimitSeconds) << name;
    EXPECT_GT(bytes, 0u) << name;
  }
}

TEST(TokenizerTimeTest, SmallVocabulary) {
  const Json root = Json::parse(ReadFile("tests/tokenizer/golden/small.json"));
  for (const char* name : {"no_regex", "nfc", "digits_True"}) {
    SCOPED_TRACE(name);
    for (const Json& variant : root["variants"]) {
      if (variant["name"] != name) continue;
      Json tokenizer_json = root["base"];
      tokenizer_json.merge_patch(variant["patch"]);
      tokenizer_json["added_tokens"] = {
          {{"id", 300}, {"content", "<|im_end|>"}, {"special", true}}};
      ExpectBoundedTime(*LoadJson(tokenizer_json));
    }
  }
}

TEST(TokenizerTimeTest, Qwen2) {
  const auto tokenizer = LoadQwen2();
  if (tokenizer == nullptr) GTEST_SKIP() << "needs ../shared/data/qwen2_tokenizer";
  ExpectBoundedTime(*tokenizer);
}

// White space around a token that swallows it is walked once, not once a token.
TEST(TokenizerTimeTest, StrippingTokens) {
  Json root = SmallTokenizerJson();
  root["added_tokens"] = {
      {{"id", 300}, {"content", "<L"}, {"lstrip", true}, {"rstrip", true}, {"special", true}}};
  const auto tokenizer = LoadJson(root);
  const std::clock_t begin = std::clock();
  EXPECT_EQ(MustEncode(*tokenizer, "<L" + Repeat(" ") + "<L", true), Ids({300, 300}));
  EXPECT_EQ(MustEncode(*tokenizer, Repeat(" <L"), true).size(), kBytes / 3);
  EXPECT_LT(static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC, kLimitSeconds);
}

// A regex that backtracks without end is an error, not a hang.
TEST(TokenizerTimeTest, RunawayRegex) {
  Json root = SmallTokenizerJson();
  root["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"}, {"pattern", {{"Regex", "(a|a)+$"}}}, {"behavior", "Isolated"}},
        {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
  const auto tokenizer = LoadJson(root);
  ASSERT_NE(tokenizer, nullptr);
  const std::clock_t begin = std::clock();
  const auto ids = tokenizer->Encode(std::string(5000, 'a') + "b", true);
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kResourceExhausted) << ids.status();
  EXPECT_LT(static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC, kLimitSeconds);
  EXPECT_EQ(MustEncode(*tokenizer, "b", true).size(), 1u) << "usable after the error";
}

}  // namespace
}  // namespace winnow
