#include "common/tokenizer/tokenizer.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "common/tokenizer/bpe.h"
#include "tests/tokenizer/tokenizer_testing.h"

namespace winnow {
namespace {

// Random valid UTF-8: runs of letters, white space, digits, marks, any code point.
std::string RandomText(std::mt19937* rng) {
  const auto append = [](uint32_t point, std::string* out) {
    if (point < 0x80) {
      *out += static_cast<char>(point);
    } else if (point < 0x800) {
      *out += static_cast<char>(0xC0 | point >> 6);
      *out += static_cast<char>(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
      *out += static_cast<char>(0xE0 | point >> 12);
      *out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
      *out += static_cast<char>(0x80 | (point & 0x3F));
    } else {
      *out += static_cast<char>(0xF0 | point >> 18);
      *out += static_cast<char>(0x80 | (point >> 12 & 0x3F));
      *out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
      *out += static_cast<char>(0x80 | (point & 0x3F));
    }
  };
  std::string text;
  for (uint32_t i = (*rng)() % 40; i > 0; --i) {
    const uint32_t r = (*rng)();
    switch ((*rng)() % 8) {
      case 0:
        text += " ";
        break;
      case 1:
        text += "\n\r\t"[r % 3];
        break;
      case 2:
        append('0' + r % 10, &text);
        break;
      case 3:
        append(r % 0x80, &text);
        break;
      case 4:
        append(0x300 + r % 0x30, &text);
        break;
      case 5: {
        uint32_t point = r % 0x110000;
        if (point >= 0xD800 && point < 0xE000) point = 0xFFFD;
        append(point, &text);
        break;
      }
      default:
        append('a' + r % 4, &text);
    }
  }
  return text;
}

TEST(TokenizerTest, SpecialTokensAreReadOnlyIfAsked) {
  Json root = SmallTokenizerJson();
  root["added_tokens"] = {{{"id", 300}, {"content", "<|x|>"}, {"special", true}},
                          {{"id", 301}, {"content", "<t>"}, {"special", false}}};
  const auto tokenizer = LoadJson(root);
  EXPECT_EQ(MustEncode(*tokenizer, "<|x|><t>", true), Ids({300, 301}));
  const Ids plain = MustEncode(*tokenizer, "<|x|><t>", false);
  EXPECT_EQ(plain.size(), 6u);
  EXPECT_EQ(plain.back(), 301);
  EXPECT_EQ(MustDecode(*tokenizer, plain, true), "<|x|><t>");
  EXPECT_EQ(MustDecode(*tokenizer, {300, 301}, true), "<t>");
  EXPECT_EQ(MustDecode(*tokenizer, {300, 301}, false), "<|x|><t>");
  EXPECT_EQ(tokenizer->vocab_size(), 302);
  EXPECT_TRUE(tokenizer->IsSpecial(300));
  EXPECT_FALSE(tokenizer->IsSpecial(301));
  EXPECT_FALSE(tokenizer->IsSpecial(-1));
  EXPECT_FALSE(tokenizer->IsSpecial(302));
  EXPECT_EQ(tokenizer->TokenId("<|x|>"), 300);
  EXPECT_EQ(tokenizer->TokenId("Ġa"), tokenizer->TokenId("Ġa"));
  EXPECT_EQ(tokenizer->TokenId("nope"), std::nullopt);
}

TEST(TokenizerTest, IdsThatNameNoToken) {
  Json root = SmallTokenizerJson();
  const int n = static_cast<int>(root["model"]["vocab"].size());
  root["added_tokens"] = {{{"id", n + 10}, {"content", "<far>"}}};
  const auto tokenizer = LoadJson(root);
  EXPECT_EQ(tokenizer->vocab_size(), n + 11);
  EXPECT_EQ(MustDecode(*tokenizer, {'a', n + 5, 'b'}, false), "ab");
  EXPECT_EQ(tokenizer->Decode({1, -1}, false).status(),
            absl::InvalidArgumentError("token id -1 at index 1 is outside [0, " +
                                       std::to_string(n + 11) + ")"));
  EXPECT_EQ(tokenizer->Decode({n + 11}, true).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(tokenizer->TokenBytes(n + 5), "");
  EXPECT_EQ(tokenizer->TokenBytes(-1), "");
  EXPECT_EQ(tokenizer->TokenBytes(1 << 30), "");
  IncrementalDecoder decoder(tokenizer.get(), false);
  EXPECT_EQ(decoder.Append(-5) + decoder.Append(1 << 30) + decoder.Append(n + 5), "");
}

TEST(TokenizerTest, InvalidUtf8IsRefusedByName) {
  const auto tokenizer = LoadJson(SmallTokenizerJson());
  EXPECT_EQ(
      tokenizer->Encode("ab\xC3(", true).status(),
      absl::InvalidArgumentError("text is not UTF-8: byte 0xc3 at offset 2 begins no character"));
}

TEST(TokenizerTest, TextMayHoldNul) {
  const auto tokenizer = LoadJson(SmallTokenizerJson());
  const std::string text("a\0b\0", 4);
  EXPECT_EQ(MustDecode(*tokenizer, MustEncode(*tokenizer, text, true), false), text);
}

// "€" is three bytes; with no merge for them, three tokens.
TEST(IncrementalDecoderTest, HoldsBytesBackUntilACharacterIsWhole) {
  Json root = SmallTokenizerJson();
  root["added_tokens"] = {{{"id", 300}, {"content", "<s>"}, {"special", true}}};
  const auto tokenizer = LoadJson(root);
  const Ids ids = MustEncode(*tokenizer, "a€", false);
  ASSERT_EQ(ids.size(), 4u);
  IncrementalDecoder decoder(tokenizer.get(), true);
  EXPECT_EQ(decoder.Append(ids[0]), "a");
  EXPECT_EQ(decoder.Append(ids[1]), "");
  EXPECT_EQ(decoder.Append(ids[2]), "");
  EXPECT_EQ(decoder.Append(300), "") << "a special token that is skipped does not cut";
  EXPECT_EQ(decoder.Append(ids[3]), "€");
  EXPECT_EQ(decoder.Finish(), "");
  EXPECT_EQ(decoder.Append(ids[1]), "");
  EXPECT_EQ(decoder.Append(ids[0]), "\uFFFDa") << "what cannot become a character comes out";
  EXPECT_EQ(decoder.Append(ids[1]), "");
  EXPECT_EQ(decoder.Finish(), "\uFFFD");
  EXPECT_EQ(decoder.Append(ids[3]), "\uFFFD") << "as new after Finish()";
}

TEST(TokenizerTest, RoundTrip) {
  std::mt19937 rng(17);
  Json root = SmallTokenizerJson();
  root["added_tokens"] = {{{"id", 300}, {"content", "<|x|>"}, {"special", true}}};
  const auto tokenizer = LoadJson(root);
  for (int i = 0; i < 5000; ++i) {
    const std::string text = RandomText(&rng);
    const Ids ids = MustEncode(*tokenizer, text, i % 2 == 0);
    ASSERT_EQ(MustDecode(*tokenizer, ids, false), text);
    ASSERT_EQ(DecodeStep(*tokenizer, ids, false), text);
  }
}

TEST(TokenizerTest, RoundTripQwen2) {
  const auto tokenizer = LoadQwen2();
  if (tokenizer == nullptr) GTEST_SKIP() << "needs ../shared/data/qwen2_tokenizer";
  std::mt19937 rng(18);
  for (int i = 0; i < 3000; ++i) {
    const std::string text = NormalizeNfc(RandomText(&rng));
    const Ids ids = MustEncode(*tokenizer, text, false);
    ASSERT_EQ(MustDecode(*tokenizer, ids, false), text);
  }
}

// Bytes from anywhere: a status or ids, whose text is then the input; and any ids
// through both decoders alike.
TEST(TokenizerTest, RandomBytesAndRandomIds) {
  std::mt19937 rng(19);
  Json root = SmallTokenizerJson();
  root["added_tokens"] = {
      {{"id", 300}, {"content", "<<"}, {"special", true}, {"lstrip", true}},
      {{"id", 301}, {"content", "éé"}, {"normalized", true}, {"single_word", true}}};
  const auto tokenizer = LoadJson(root);
  int valid = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bytes;
    for (uint32_t n = rng() % 8; n > 0; --n) {
      bytes += static_cast<char>(rng() % 3 == 0 ? rng() % 256 : rng() % 128);
    }
    const auto ids = tokenizer->Encode(bytes, i % 2 == 0);
    EXPECT_EQ(ids.ok(), CheckUtf8(bytes, "bytes").ok());
    valid += ids.ok() ? 1 : 0;

    Ids random_ids;
    for (uint32_t n = rng() % 8; n > 0; --n) {
      random_ids.push_back(static_cast<int32_t>(rng() % tokenizer->vocab_size()));
    }
    for (const bool skip_special : {false, true}) {
      const std::string text = MustDecode(*tokenizer, random_ids, skip_special);
      EXPECT_TRUE(CheckUtf8(text, "text").ok());
      EXPECT_EQ(DecodeStep(*tokenizer, random_ids, skip_special), text);
    }
  }
  EXPECT_GT(valid, 1000);
  EXPECT_LT(valid, 19000);
}

TEST(TokenizerTest, ThreadsShareOne) {
  const auto tokenizer = LoadJson(SmallTokenizerJson());
  std::mt19937 rng(20);
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (int i = 0; i < 200; ++i) {
    texts.push_back(RandomText(&rng));
    expected.push_back(MustEncode(*tokenizer, texts.back(), true));
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (size_t i = 0; i < texts.size(); ++i) {
        EXPECT_EQ(MustEncode(*tokenizer, texts[i], true), expected[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// The definition: merge the leftmost pair of the lowest rank until there is none.
Ids NaiveBpe(const TokenizerSpec& spec, std::string_view word) {
  std::map<std::pair<int32_t, int32_t>, size_t> rank;
  for (size_t i = 0; i < spec.merges.size(); ++i) {
    rank[{spec.merges[i].left, spec.merges[i].right}] = i;
  }
  Ids ids;
  for (const char c : word) ids.push_back(spec.vocab.at(ByteSpelling(static_cast<uint8_t>(c))));
  while (true) {
    size_t best = spec.merges.size();
    size_t where = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto it = rank.find({ids[i], ids[i + 1]});
      if (it != rank.end() && it->second < best) {
        best = it->second;
        where = i;
      }
    }
    if (best == spec.merges.size()) return ids;
    ids[where] = spec.merges[best].merged;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
}

// Random vocabularies over two or three letters, where merges overlap in every way.
TEST(BpeTest, EqualsTheDefinition) {
  std::mt19937 rng(21);
  Bpe::Scratch scratch;
  size_t merged = 0;
  for (int round = 0; round < 300; ++round) {
    TokenizerSpec spec;
    std::vector<std::string> tokens;
    for (int byte = 0; byte < 256; ++byte) {
      spec.vocab.emplace(ByteSpelling(static_cast<uint8_t>(byte)), byte);
    }
    const size_t letters = 2 + round % 2;
    for (size_t i = 0; i < letters; ++i) tokens.emplace_back(1, static_cast<char>('a' + i));
    for (int i = 0; i < 20; ++i) {
      const std::string left = tokens[rng() % tokens.size()];
      const std::string right = tokens[rng() % tokens.size()];
      if (left.size() + right.size() > 8) continue;
      const auto [it, inserted] =
          spec.vocab.emplace(left + right, static_cast<int32_t>(spec.vocab.size()));
      spec.merges.push_back({spec.vocab.at(left), spec.vocab.at(right), it->second});
      if (inserted) tokens.push_back(left + right);
    }
    const Bpe bpe(&spec);
    for (int i = 0; i < 50; ++i) {
      std::string word;
      for (uint32_t n = rng() % 40; n > 0; --n) word += static_cast<char>('a' + rng() % letters);
      Ids ids;
      bpe.Encode(word, &scratch, &ids);
      ASSERT_EQ(ids, NaiveBpe(spec, word)) << word;
      merged += word.size() - ids.size();
    }
  }
  EXPECT_GT(merged, 10000u);
}

TEST(ByteLevelTest, SpellingsAreGpt2sAndDistinct) {
  EXPECT_EQ(ByteSpelling(' '), "Ġ");
  EXPECT_EQ(ByteSpelling('\n'), "Ċ");
  EXPECT_EQ(ByteSpelling('!'), "!");
  EXPECT_EQ(ByteSpelling(0xAD), "Ń");
  EXPECT_EQ(ByteSpelling(0xFF), "ÿ");
  std::set<std::string> all;
  for (int byte = 0; byte < 256; ++byte) {
    const std::string& spelling = ByteSpelling(static_cast<uint8_t>(byte));
    all.insert(spelling);
    EXPECT_EQ(BytesOfSpelling(spelling), std::string(1, static_cast<char>(byte)));
  }
  EXPECT_EQ(all.size(), 256u);
  EXPECT_EQ(BytesOfSpelling("Ġthe"), " the");
  EXPECT_EQ(BytesOfSpelling("a b"), std::nullopt);
  EXPECT_EQ(BytesOfSpelling("你"), std::nullopt);
  EXPECT_EQ(BytesOfSpelling("\xC5"), std::nullopt);
}

}  // namespace
}  // namespace winnow
