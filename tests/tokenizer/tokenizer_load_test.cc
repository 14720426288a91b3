// Malformed and unbuilt tokenizer files: each a status that names file, field and value.

#include <cctype>
#include <ostream>

#include "tests/tokenizer/tokenizer_testing.h"

namespace winnow {
namespace {

using Code = absl::StatusCode;

absl::Status LoadText(const std::string& text) {
  ModelDir dir;
  dir.Write("tokenizer.json", text);
  const absl::Status status = Tokenizer::Load(dir.path()).status();
  if (!status.ok()) {
    EXPECT_NE(status.message().find(dir.path() + "/tokenizer.json"), status.message().npos);
  }
  return status;
}

struct Case {
  const char* patch;  // a JSON merge patch to the small tokenizer
  Code code;
  const char* message;  // a part of it
};

// ctest's names are made of this: letters, digits and underscores.
void PrintTo(const Case& c, std::ostream* os) {
  for (const char* p = c.patch; *p != '\0'; ++p) {
    if (std::isalnum(static_cast<unsigned char>(*p)) != 0) *os << *p;
    if (*p == ' ') *os << '_';
  }
}

class PatchTest : public testing::TestWithParam<Case> {};

TEST_P(PatchTest, IsNamed) {
  Json root = SmallTokenizerJson();
  root.merge_patch(Json::parse(GetParam().patch));
  const absl::Status status = LoadText(root.dump());
  EXPECT_EQ(status.code(), GetParam().code) << GetParam().patch << "\n" << status;
  EXPECT_NE(status.message().find(GetParam().message), status.message().npos) << status;
}

constexpr Code kInvalid = Code::kInvalidArgument;
constexpr Code kUnbuilt = Code::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Invalid, PatchTest,
    testing::Values(
        Case{R"({"model": null})", kInvalid, "model is missing or not an object"},
        Case{R"({"model": [1]})", kInvalid, "model is missing or not an object"},
        Case{R"({"model": {"type": 3}})", kInvalid, "model.type is not a string"},
        Case{R"({"model": {"vocab": null}})", kInvalid, "model.vocab is missing or not an object"},
        Case{R"({"model": {"vocab": ["a"]}})", kInvalid, "model.vocab is missing"},
        Case{R"({"model": {"vocab": {"new": -1}}})", kInvalid,
             R"(model.vocab["new"]="-1" is not an integer in [0, 4194303])"},
        Case{R"({"model": {"vocab": {"new": 4194304}}})", kInvalid,
             "\"4194304\" is not an integer"},
        Case{R"({"model": {"vocab": {"new": 18446744073709551615}}})", kInvalid,
             "is not an integer"},
        Case{R"({"model": {"vocab": {"new": 1.5}}})", kInvalid, "\"1.5\" is not an integer"},
        Case{R"({"model": {"vocab": {"new": "7"}}})", kInvalid, "is not an integer"},
        Case{R"({"model": {"vocab": {"new": 7}}})", kInvalid, "have the same id 7"},
        Case{R"({"model": {"merges": null}})", kInvalid, "model.merges is missing"},
        Case{R"({"model": {"merges": {}}})", kInvalid, "model.merges is missing or not an array"},
        Case{R"({"model": {"merges": ["a b", "a  b"]}})", kInvalid,
             R"(model.merges[1]="a  b" is not two tokens)"},
        Case{R"({"model": {"merges": ["ab"]}})", kInvalid, "model.merges[0]=\"ab\""},
        Case{R"({"model": {"merges": [["a", "b", "c"]]}})", kInvalid, "model.merges[0] is neither"},
        Case{R"({"model": {"merges": [["a", 1]]}})", kInvalid, "model.merges[0] is neither"},
        Case{R"({"model": {"merges": [7]}})", kInvalid, "model.merges[0] is neither"},
        Case{R"({"model": {"merges": ["a nope"]}})", kInvalid,
             R"(model.merges[0] names "nope", which is not in model.vocab)"},
        Case{R"({"model": {"merges": ["q q"]}})", kInvalid, R"(names "qq", which is not in)"},
        Case{R"({"model": {"unk_token": "nope"}})", kInvalid, "model.unk_token=\"nope\""},
        Case{R"({"model": {"ignore_merges": 1}})", kInvalid, "model.ignore_merges is not true"},
        Case{R"({"added_tokens": {}})", kInvalid, "added_tokens is not an array"},
        Case{R"({"added_tokens": [1]})", kInvalid, "added_tokens[0] is not an object"},
        Case{R"({"added_tokens": [{"id": 300}]})", kInvalid, "added_tokens[0].content has 0 bytes"},
        Case{R"({"added_tokens": [{"content": "x"}]})", kInvalid, "added_tokens[0].id is missing"},
        Case{R"({"added_tokens": [{"id": 99999999, "content": "<x>"}]})", kInvalid,
             "added_tokens[0].id=\"99999999\" is not an integer in [0, 4194303]"},
        Case{R"({"added_tokens": [{"id": 33, "content": "<x>"}]})", kInvalid,
             R"(added_tokens[0]: "<x>" and "!" have the same id 33)"},
        Case{R"({"added_tokens": [{"id": 300, "content": "<x>"}, {"id": 300, "content": "<y>"}]})",
             kInvalid, R"("<y>" and "<x>" have the same id 300)"},
        Case{R"({"added_tokens": [{"id": 300, "content": "<x>"}, {"id": 301, "content": "<x>"}]})",
             kInvalid, R"("<x>" has the ids 300 and 301)"},
        Case{R"({"added_tokens": [{"id": 300, "content": "ab"}]})", kInvalid,
             R"("ab" has the ids)"},
        Case{R"({"added_tokens": [{"id": 300, "content": "<x>", "special": "yes"}]})", kInvalid,
             "added_tokens[0].special is not true or false"},
        Case{R"({"pre_tokenizer": {"type": "Sequence"}})", kInvalid,
             "pre_tokenizer.pretokenizers is missing"},
        Case{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split",
                 "pattern": {"Regex": "("}, "behavior": "Isolated"}, {"type": "ByteLevel"}]}})",
             kInvalid, "pre_tokenizer: regex \"(\": missing closing parenthesis"},
        Case{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split",
                 "pattern": {}, "behavior": "Isolated"}, {"type": "ByteLevel"}]}})",
             kInvalid, "pattern has not one of Regex and String"},
        Case{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split",
                 "pattern": {"Regex": "a"}, "behavior": "Sideways"}, {"type": "ByteLevel"}]}})",
             kInvalid, "behavior=\"Sideways\" is not known"},
        Case{R"({"post_processor": {"type": "TemplateProcessing"}})", kInvalid,
             "single is missing"},
        Case{R"({"post_processor": {"type": "TemplateProcessing", "single":
                 [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}})",
             kInvalid, "SpecialToken.id=\"<s>\" is no token"}));

INSTANTIATE_TEST_SUITE_P(
    Unbuilt, PatchTest,
    testing::Values(
        Case{R"({"model": {"type": "Unigram"}})", kUnbuilt, "model: type \"Unigram\" is not built"},
        Case{R"({"model": {"type": "WordPiece"}})", kUnbuilt, "WordPiece"},
        Case{R"({"model": {"byte_fallback": true}})", kUnbuilt, "SentencePiece"},
        Case{R"({"model": {"dropout": 0.1}})", kUnbuilt, "dropout"},
        Case{R"({"model": {"end_of_word_suffix": "</w>"}})", kUnbuilt, "end_of_word_suffix"},
        Case{R"({"model": {"continuing_subword_prefix": "##"}})", kUnbuilt, "\"##\""},
        Case{R"({"normalizer": {"type": "Lowercase"}})", kUnbuilt,
             "normalizer: type \"Lowercase\""},
        Case{R"({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"},
                 {"type": "Replace"}]}})",
             kUnbuilt, "\"Replace\""},
        Case{R"({"pre_tokenizer": null})", kUnbuilt, "without ByteLevel"},
        Case{R"({"pre_tokenizer": {"type": "Metaspace"}})", kUnbuilt, "\"Metaspace\""},
        Case{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"},
                 {"type": "Digits"}]}})",
             kUnbuilt, "a part after ByteLevel"},
        Case{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split",
                 "pattern": {"Regex": "\\w+"}, "behavior": "Isolated"}, {"type": "ByteLevel"}]}})",
             kUnbuilt, "uses \\w"},
        Case{R"({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split",
                 "pattern": {"Regex": "[a-z&&[^b]]"}, "behavior": "Isolated"},
                 {"type": "ByteLevel"}]}})",
             kUnbuilt, "&& in a class"},
        Case{R"({"decoder": null})", kUnbuilt, "decoder"},
        Case{R"({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}})", kUnbuilt,
             "\"Fuse\""},
        Case{R"({"post_processor": {"type": "BertProcessing"}})", kUnbuilt, "\"BertProcessing\""},
        Case{R"({"post_processor": {"type": "TemplateProcessing", "single":
                 [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "!"}}]}})",
             kUnbuilt, "anything but one token before the text"}));

TEST(TokenizerLoadTest, NoFile) {
  ModelDir dir;
  const absl::Status status = Tokenizer::Load(dir.path()).status();
  EXPECT_EQ(status.code(), Code::kNotFound);
  EXPECT_EQ(status.message(), dir.path() + "/tokenizer.json does not exist");
  EXPECT_EQ(Tokenizer::Load("/nonexistent/folder").status().code(), Code::kNotFound);
  std::filesystem::create_directory(dir.path() + "/tokenizer.json");
  EXPECT_EQ(Tokenizer::Load(dir.path()).status().code(), Code::kUnavailable);
}

TEST(TokenizerLoadTest, NotJson) {
  for (const char* text : {"", "{", "not json", "[1, 2", "{\"model\": {}} trailing",
                           "{\"a\": \"\xFF\"}", "{\"a\": \"\\ud800\"}"}) {
    const absl::Status status = LoadText(text);
    EXPECT_EQ(status.code(), kInvalid) << text;
    EXPECT_NE(status.message().find("is not JSON"), status.message().npos) << status;
  }
  for (const char* text : {"[]", "3", "null", "\"model\""}) {
    EXPECT_EQ(LoadText(text).code(), kInvalid) << text;
  }
}

TEST(TokenizerLoadTest, DeepNestingIsNoCrash) {
  EXPECT_EQ(LoadText(std::string(100'000, '[')).code(), kInvalid);
  std::string balanced = std::string(50'000, '[') + std::string(50'000, ']');
  EXPECT_EQ(LoadText(balanced).code(), kInvalid);
  EXPECT_EQ(LoadText("{\"model\": " + balanced + "}").code(), kInvalid);
}

// Cut anywhere, or with any byte changed, the file loads or is refused.
TEST(TokenizerLoadTest, TruncatedAndDamagedFilesNeverCrash) {
  const std::string text = SmallTokenizerJson().dump();
  for (size_t length = 0; length < text.size(); length += 37) {
    EXPECT_EQ(LoadText(text.substr(0, length)).code(), kInvalid) << length;
  }
  uint32_t random = 1;
  for (int i = 0; i < 400; ++i) {
    random = random * 1664525 + 1013904223;
    std::string damaged = text;
    damaged[(random >> 8) % text.size()] = static_cast<char>("\"{}[],:0a\\ "[random % 11]);
    const absl::Status status = LoadText(damaged);
    EXPECT_TRUE(status.ok() || status.code() == kInvalid || status.code() == kUnbuilt) << status;
  }
}

TEST(TokenizerLoadTest, LongAddedTokenIsRefused) {
  Json root = SmallTokenizerJson();
  root["added_tokens"] = {{{"id", 300}, {"content", std::string(512, 'x')}}};
  EXPECT_TRUE(LoadText(root.dump()).ok());
  root["added_tokens"] = {{{"id", 300}, {"content", std::string(513, 'x')}}};
  EXPECT_EQ(LoadText(root.dump()).code(), kInvalid);
}

// A file of before "type" existed, and one with null where others have nothing.
TEST(TokenizerLoadTest, OlderFiles) {
  Json root = SmallTokenizerJson();
  root["model"].erase("type");
  root["added_tokens"] = nullptr;
  EXPECT_TRUE(LoadText(root.dump()).ok());
}

class BosTest : public testing::Test {
 protected:
  BosTest() : root_(SmallTokenizerJson()) {
    root_["added_tokens"] = {{{"id", 300}, {"content", "<s>"}, {"special", true}},
                             {{"id", 301}, {"content", "</s>"}, {"special", true}}};
  }
  absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const Json& config) {
    dir_.Write("tokenizer.json", root_.dump());
    if (!config.is_null()) dir_.Write("tokenizer_config.json", config.dump());
    return Tokenizer::Load(dir_.path());
  }
  void AddPostProcessor() {
    root_["post_processor"] = Json::parse(R"({"type": "Sequence", "processors": [
        {"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": [
          {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
          "pair": [], "special_tokens": {}}]})");
  }
  Json root_;
  ModelDir dir_;
};

TEST_F(BosTest, SilentFilesAddNone) {
  const auto tokenizer = Load(nullptr);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_FALSE((*tokenizer)->add_bos());
  EXPECT_EQ((*tokenizer)->bos_id(), std::nullopt);
  EXPECT_EQ((*tokenizer)->eos_id(), std::nullopt);
}

TEST_F(BosTest, NamesAlone) {
  const auto tokenizer = Load({{"bos_token", "<s>"}, {"eos_token", {{"content", "</s>"}}}});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_FALSE((*tokenizer)->add_bos());
  EXPECT_EQ((*tokenizer)->bos_id(), 300);
  EXPECT_EQ((*tokenizer)->eos_id(), 301);
}

TEST_F(BosTest, PostProcessorAddsIt) {
  AddPostProcessor();
  const auto tokenizer = Load(nullptr);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE((*tokenizer)->add_bos());
  EXPECT_EQ((*tokenizer)->bos_id(), 300);
  EXPECT_EQ(MustEncode(**tokenizer, "a", true).size(), 1u) << "the caller prepends it";
}

TEST_F(BosTest, ConfigDecidesWhereItSpeaks) {
  AddPostProcessor();
  auto tokenizer = Load({{"add_bos_token", false}, {"bos_token", "<s>"}});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_FALSE((*tokenizer)->add_bos());
  root_["post_processor"] = nullptr;
  tokenizer = Load({{"add_bos_token", true}, {"bos_token", "<s>"}});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE((*tokenizer)->add_bos());
}

TEST_F(BosTest, SpecialTokensMapFillsIn) {
  dir_.Write("special_tokens_map.json", R"({"bos_token": "</s>", "eos_token": "</s>"})");
  auto tokenizer = Load({{"bos_token", "<s>"}, {"eos_token", nullptr}});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos_id(), 300);
  EXPECT_EQ((*tokenizer)->eos_id(), 301);
  tokenizer = Load({{"add_bos_token", true}});
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE((*tokenizer)->add_bos());
  EXPECT_EQ((*tokenizer)->bos_id(), 301);
}

TEST_F(BosTest, BadConfigsAreNamed) {
  const std::pair<Json, const char*> cases[] = {
      {Json::array(), "not an object"},
      {{{"add_bos_token", true}}, "add_bos_token=true, but there is no bos_token"},
      {{{"add_bos_token", "yes"}}, "add_bos_token is not true or false"},
      {{{"bos_token", "nope"}}, "bos_token=\"nope\" is no token"},
      {{{"eos_token", 2}}, "eos_token is not a string"},
      {{{"eos_token", {{"content", 2}}}}, "eos_token.content is not a string"}};
  for (const auto& [config, message] : cases) {
    const absl::Status status = Load(config).status();
    EXPECT_EQ(status.code(), kInvalid) << status;
    EXPECT_NE(status.message().find(message), status.message().npos) << status;
    EXPECT_NE(status.message().find("tokenizer_config.json"), status.message().npos) << status;
  }
  EXPECT_EQ(Load({{"add_eos_token", true}}).status().code(), kUnbuilt);
}

}  // namespace
}  // namespace winnow
