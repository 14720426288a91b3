#include "router/text_stream.h"

#include <gtest/gtest.h>

#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace winnow::router {
namespace {

class TextStreamTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ::winnow::testing::WriteTinyModel(dir_.path());
    tokenizer_ = Tokenizer::Load(dir_.path()).value();
  }

  std::vector<int32_t> Ids(const std::string& text) {
    return tokenizer_->Encode(text, /*parse_special=*/false).value();
  }

  // Feeds the bytes of `text` one by one; returns what was shown after each, joined by '|'.
  std::string Shown(const std::string& text, std::vector<std::string> stop, bool* stopped) {
    TextStream stream(tokenizer_.get(), true, std::move(stop), {});
    std::string shown;
    for (int32_t id : Ids(text)) {
      stream.Append(id, &shown);
      shown += '|';
    }
    stream.Finish(&shown);
    *stopped = stream.stopped();
    return shown;
  }

  ::winnow::testing::TempDir dir_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(TextStreamTest, WithoutStopStringsEverythingComesAtOnce) {
  bool stopped = true;
  EXPECT_EQ(Shown("abc", {}, &stopped), "a|b|c|");
  EXPECT_FALSE(stopped);
}

TEST_F(TextStreamTest, HoldsBackOnlyWhatMayBeginAStopString) {
  bool stopped = false;
  EXPECT_EQ(Shown("xabaabc.", {"abc"}, &stopped), "x|||ab|a||||");
  EXPECT_TRUE(stopped);
  EXPECT_EQ(Shown("xab", {"abc"}, &stopped), "x|||ab");
  EXPECT_FALSE(stopped);
}

TEST_F(TextStreamTest, TheEarliestOfSeveralWins) {
  TextStream stream(tokenizer_.get(), true, {"cd", "bcd", "bc"}, {});
  std::string shown;
  for (int32_t id : Ids("abcd")) stream.Append(id, &shown);
  EXPECT_EQ(shown, "a");
  EXPECT_EQ(stream.stop_text(), "bc");
}

TEST_F(TextStreamTest, CharactersStayWhole) {
  bool stopped = true;
  EXPECT_EQ(Shown("a\u00e9\u20ac", {"\u20acx"}, &stopped), "a||\u00e9||||\u20ac");
  EXPECT_FALSE(stopped);
}

TEST_F(TextStreamTest, StopIdEndsItWithoutText) {
  TextStream stream(tokenizer_.get(), false, {"yz"}, {258});
  std::string shown;
  const std::vector<int32_t> ids = Ids("xy");
  for (int32_t id : ids) stream.Append(id, &shown);
  EXPECT_EQ(shown, "x");
  stream.Append(258, &shown);
  stream.Append(ids[0], &shown);
  stream.Finish(&shown);
  EXPECT_EQ(shown, "xy");
  EXPECT_EQ(stream.stop_token_id(), 258);
  EXPECT_FALSE(stream.stop_text().has_value());
}

}  // namespace
}  // namespace winnow::router
