#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "tests/tokenizer/tokenizer_testing.h"

namespace winnow {

// What make_goldens.py's row() wrote of `text`.
inline void ExpectRow(const Tokenizer& tokenizer, const std::string& text, const Json& row) {
  const Ids ids = row["ids"].get<Ids>();
  EXPECT_EQ(MustEncode(tokenizer, text, true), ids) << text;
  EXPECT_EQ(MustEncode(tokenizer, text, false), row.value("plain_ids", ids)) << text;
  const std::string decoded = row.value("decoded", text);
  const std::string skipped = row.value("skipped", text);
  EXPECT_EQ(MustDecode(tokenizer, ids, false), decoded);
  EXPECT_EQ(MustDecode(tokenizer, ids, true), skipped);
  EXPECT_EQ(DecodeStep(tokenizer, ids, false), decoded);
  EXPECT_EQ(DecodeStep(tokenizer, ids, true), skipped);
}

inline void ExpectCases(const Tokenizer& tokenizer, const std::string& golden) {
  const Json root = Json::parse(ReadFile(golden));
  ASSERT_GE(root["cases"].size(), 300u);
  for (const Json& row : root["cases"]) {
    ExpectRow(tokenizer, row["text"].get<std::string>(), row);
  }
}

// The whole split, each block of 100 lines, and each line by itself.
inline void ExpectWiki(const Tokenizer& tokenizer, const std::string& golden,
                       const std::string& file) {
  const Json wiki = Json::parse(ReadFile(golden))["wiki"];
  const std::string text = ReadFile(file);
  const Ids all = MustEncode(tokenizer, text, true);
  EXPECT_EQ(all.size(), wiki["count"].get<size_t>());
  EXPECT_EQ(Crc32(all), wiki["crc32"].get<uint32_t>());
  EXPECT_EQ(MustDecode(tokenizer, all, false), text);
  EXPECT_EQ(DecodeStep(tokenizer, all, false), text);
  size_t begin = 0;
  for (const Json& block : wiki["blocks"]) {
    size_t end = begin;
    const size_t block_begin = begin;
    for (const Json& count : block["line_counts"]) {
      end = std::min(text.find('\n', begin), text.size());
      const std::string_view line = std::string_view(text).substr(begin, end - begin);
      EXPECT_EQ(MustEncode(tokenizer, line, true).size(), count.get<size_t>()) << line;
      begin = end + 1;
    }
    const Ids ids =
        MustEncode(tokenizer, std::string_view(text).substr(block_begin, end - block_begin), true);
    EXPECT_EQ(ids.size(), block["count"].get<size_t>());
    EXPECT_EQ(Crc32(ids), block["crc32"].get<uint32_t>()) << "block at byte " << block_begin;
  }
  EXPECT_GT(begin, text.size()) << "the goldens end before the text";
}

}  // namespace winnow
