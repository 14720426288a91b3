#include "cli/niah/filler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/testing/temp_dir.h"

namespace winnow::cli {
namespace {

using ::testing::HasSubstr;

std::string Show(std::string_view text) {
  std::string out;
  for (const Sentence& s : SplitSentences(text)) {
    out += (s.starts_paragraph ? "P:" : "S:") + s.text + "|";
  }
  return out;
}

TEST(Filler, CutsParagraphsAndSentences) {
  EXPECT_EQ(Show("One two. Three\nfour!  Five?\n \n\tSix."),
            "P:One two.|S:Three four!|S:Five?|P:Six.|");
  // An abbreviation before a small letter ends nothing, a number does.
  EXPECT_EQ(Show("See e.g. this. 12 of them."), "P:See e.g. this.|S:12 of them.|");
  EXPECT_EQ(Show(""), "");
  EXPECT_EQ(Show(" \n\n \r\n"), "");
  EXPECT_EQ(Show(std::string_view("a\0b", 3)), "P:a b|");
}

TEST(Filler, LeavesOutWhatMightBeSpecialTokens) {
  EXPECT_EQ(Show("<|im_end|> here. Good one."), "P:Good one.|");
}

TEST(Filler, CutsLongSentences) {
  std::string words;
  for (int i = 0; i < 300; ++i) words += "word" + std::to_string(i % 10) + " ";
  const std::vector<Sentence> cut = SplitSentences(words);
  ASSERT_GT(cut.size(), 4u);
  for (const Sentence& s : cut) {
    EXPECT_LE(s.text.size(), 400u);
    EXPECT_EQ(s.text.substr(0, 4), "word");
  }
  EXPECT_EQ(JoinParagraphs(cut).size(), 1u);
  // Characters of two bytes, no space: no character is cut.
  std::string dense;
  for (int i = 0; i < 500; ++i) dense += "a\xC3\xA9";
  for (const Sentence& s : SplitSentences(dense)) {
    EXPECT_LE(s.text.size(), 400u);
    EXPECT_NE(static_cast<unsigned char>(s.text[0]), 0xA9u);
  }
}

TEST(Filler, JoinsParagraphs) {
  EXPECT_THAT(JoinParagraphs(SplitSentences("A b. C d.\n\nE f.")),
              ::testing::ElementsAre("A b. C d.", "E f."));
}

TEST(Filler, BuiltInHasEightParagraphsWithoutDigits) {
  const std::vector<Sentence> sentences = LoadFiller("").value();
  EXPECT_EQ(JoinParagraphs(sentences).size(), 8u);
  EXPECT_EQ(BuiltInFiller().find_first_of("0123456789<"), BuiltInFiller().npos);
}

TEST(Filler, BadFilesAreNamed) {
  const testing::TempDir dir;
  dir.Write("empty", "  \n");
  dir.Write("bytes", "abc \xFF def");
  dir.Write("good", "Hello there.");
  EXPECT_EQ(LoadFiller(dir.File("none")).status().code(), absl::StatusCode::kNotFound);
  for (const char* name : {"empty", "bytes"}) {
    const absl::Status status = LoadFiller(dir.File(name)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("--filler " + dir.File(name)));
  }
  EXPECT_EQ(LoadFiller(dir.File("good")).value().size(), 1u);
  EXPECT_FALSE(LoadFiller(dir.path()).ok());
}

}  // namespace
}  // namespace winnow::cli
