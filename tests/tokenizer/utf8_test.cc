#include "common/tokenizer/utf8.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace winnow {
namespace {

constexpr const char* kBad = "\xEF\xBF\xBD";

std::string Decode(std::string_view bytes, size_t piece) {
  Utf8Decoder decoder;
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += piece) {
    decoder.Append(bytes.substr(i, piece), &text);
    EXPECT_TRUE(CheckUtf8(text, "text").ok());
  }
  decoder.Finish(&text);
  return text;
}

TEST(Utf8Test, NamesByteAndOffset) {
  EXPECT_TRUE(CheckUtf8("", "text").ok());
  EXPECT_TRUE(CheckUtf8("a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xF4\x8F\xBF\xBF", "text").ok());
  EXPECT_TRUE(CheckUtf8(std::string_view("\0", 1), "text").ok());
  const auto message = [](std::string_view bytes) {
    const absl::Status status = CheckUtf8(bytes, "text");
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_EQ(message("ab\xFFz"), "text is not UTF-8: byte 0xff at offset 2 begins no character");
  EXPECT_EQ(message("\x80"), "text is not UTF-8: byte 0x80 at offset 0 begins no character");
  EXPECT_EQ(message("\xC0\x80"), "text is not UTF-8: byte 0xc0 at offset 0 begins no character");
  EXPECT_EQ(message("\xED\xA0\x80"),
            "text is not UTF-8: byte 0xed at offset 0 begins no character");
  EXPECT_EQ(message("\xF4\x90\x80\x80"),
            "text is not UTF-8: byte 0xf4 at offset 0 begins no character");
  EXPECT_EQ(message("\xE0\x9F\xBF"),
            "text is not UTF-8: byte 0xe0 at offset 0 begins no character");
  EXPECT_EQ(message("a\xE2\x82"),
            "text is not UTF-8: byte 0xe2 at offset 1 begins a character that is cut off");
}

// Table 3-8 and the examples after it in Unicode 3.9: one U+FFFD a maximal part.
TEST(Utf8Test, ReplacesMaximalParts) {
  const std::string bad = kBad;
  for (const size_t piece : {1, 2, 3, 4, 100}) {
    EXPECT_EQ(Decode("a\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64", piece),
              "a" + bad + bad + bad + "b" + bad + "c" + bad + bad + "d");
    EXPECT_EQ(Decode("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", piece),
              bad + bad + bad + bad + bad + bad + bad + bad + "A");
    EXPECT_EQ(Decode("\xED\xA0\x80\xF4\x91\x92\xFF", piece),
              bad + bad + bad + bad + bad + bad + bad);
    EXPECT_EQ(Decode("\xF0\x9F\x98", piece), bad);
    EXPECT_EQ(Decode("x\xE2\x82\xAC", piece), "x\xE2\x82\xAC");
  }
}

TEST(Utf8Test, CutsChangeNothing) {
  std::mt19937 rng(5);
  // Bytes that often continue one another.
  const std::string alphabet = "a\x80\xA0\xBF\x90\xC3\xE0\xE2\xED\xF0\xF4\xFF";
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (size_t i = rng() % 12; i > 0; --i) bytes += alphabet[rng() % alphabet.size()];
    const std::string whole = Decode(bytes, 100);
    EXPECT_EQ(Decode(bytes, 1), whole);
    EXPECT_EQ(Decode(bytes, 2), whole);
    if (CheckUtf8(bytes, "bytes").ok()) {
      EXPECT_EQ(whole, bytes);
    }
  }
}

TEST(Utf8Test, FinishLeavesItAsNew) {
  Utf8Decoder decoder;
  std::string text;
  decoder.Append("\xE2\x82", &text);
  EXPECT_EQ(text, "");
  decoder.Finish(&text);
  decoder.Append(
      "\xAC"
      "b",
      &text);
  decoder.Finish(&text);
  EXPECT_EQ(text, std::string(kBad) + kBad + "b");
}

TEST(NfcTest, Facts) {
  EXPECT_EQ(NormalizeNfc(""), "");
  EXPECT_EQ(NormalizeNfc("plain"), "plain");
  EXPECT_EQ(NormalizeNfc("e\u0301"), "\u00e9");
  EXPECT_EQ(NormalizeNfc("\u00e9"), "\u00e9");
  EXPECT_EQ(NormalizeNfc("\u212b"), "\u00c5");               // a singleton
  EXPECT_EQ(NormalizeNfc("a\u0301\u0323"), "\u1ea1\u0301");  // reordered, composed
  EXPECT_EQ(NormalizeNfc("a\u0323\u0301"), "\u1ea1\u0301");
  EXPECT_EQ(NormalizeNfc("\u1100\u1161\u11a8"), "\uac01");  // Hangul
  EXPECT_EQ(NormalizeNfc("\u0958"), "\u0915\u093c");        // a composition exclusion
  EXPECT_EQ(NormalizeNfc("\u0301\u0323"), "\u0323\u0301");  // no starter
  EXPECT_EQ(NormalizeNfc("\ufb01\u00bd"), "\ufb01\u00bd");  // compatibility: kept
  EXPECT_EQ(NormalizeNfc("\U0001F600e\u0308."), "\U0001F600\u00eb.");
}

// Equals are kept in their order: 0300 and 0301 have the same class.
TEST(NfcTest, TheSortIsStable) {
  std::string marks;
  std::string sorted;
  for (int i = 0; i < 50; ++i) {
    marks += i % 2 == 0 ? "\u0301\u0323" : "\u0300\u0323";
    sorted += i % 2 == 0 ? "\u0301" : "\u0300";
  }
  std::string below;
  for (int i = 0; i < 50; ++i) below += "\u0323";
  EXPECT_EQ(NormalizeNfc("\u25cc" + marks), "\u25cc" + below + sorted);
}

}  // namespace
}  // namespace winnow
