// What the `tokenizers` library says (make_goldens.py), and llama.cpp's vectors.

#include <iterator>
#include <sstream>

#include "tests/tokenizer/golden_checks.h"

namespace winnow {
namespace {

TEST(GoldenTest, SmallVocabularyUnderEverySetting) {
  const Json root = Json::parse(ReadFile("tests/tokenizer/golden/small.json"));
  ASSERT_GE(root["variants"].size(), 25u);
  for (const Json& variant : root["variants"]) {
    SCOPED_TRACE(variant["name"].get<std::string>());
    Json tokenizer_json = root["base"];
    tokenizer_json.merge_patch(variant["patch"]);
    const auto tokenizer = LoadJson(tokenizer_json);
    ASSERT_NE(tokenizer, nullptr);
    ASSERT_EQ(variant["rows"].size(), root["texts"].size());
    for (size_t i = 0; i < root["texts"].size(); ++i) {
      ExpectRow(*tokenizer, root["texts"][i].get<std::string>(), variant["rows"][i]);
    }
  }
}

class Qwen2Test : public testing::Test {
 protected:
  static void SetUpTestSuite() { tokenizer_ = LoadQwen2().release(); }
  static void TearDownTestSuite() { delete tokenizer_; }
  void SetUp() override {
    if (tokenizer_ == nullptr) GTEST_SKIP() << "needs ../shared/data/qwen2_tokenizer";
  }
  static const Tokenizer* tokenizer_;
};
const Tokenizer* Qwen2Test::tokenizer_ = nullptr;

TEST_F(Qwen2Test, EqualsTokenizers) {
  ExpectCases(*tokenizer_, "tests/tokenizer/golden/qwen2.json");
}

TEST_F(Qwen2Test, EqualsTokenizersOnWikiText) {
  const auto wiki = FindData("wiki.test.raw");
  if (!wiki) GTEST_SKIP() << "needs ../shared/data/wiki.test.raw";
  ExpectWiki(*tokenizer_, "tests/tokenizer/golden/qwen2.json", *wiki);
}

TEST_F(Qwen2Test, LlamaCppVectors) {
  const auto in = FindData("llama_cpp_vocab_tests/ggml-vocab-qwen2.gguf.inp");
  const auto out = FindData("llama_cpp_vocab_tests/ggml-vocab-qwen2.gguf.out");
  if (!in || !out) GTEST_SKIP() << "needs ../shared/data/llama_cpp_vocab_tests";
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::string inputs = ReadFile(*in) + separator;
  std::istringstream expected(ReadFile(*out));
  int vectors = 0;
  for (size_t end = 0; (end = inputs.find(separator)) != std::string::npos; ++vectors) {
    const std::string text = inputs.substr(0, end);
    inputs.erase(0, end + separator.size());
    std::string line;
    std::getline(expected, line);
    std::istringstream numbers(line);
    const Ids ids((std::istream_iterator<int32_t>(numbers)), {});
    EXPECT_EQ(MustEncode(*tokenizer_, text, false), ids) << "vector " << vectors << ": " << text;
    EXPECT_EQ(ids.empty(), text.empty()) << "vector " << vectors;
  }
  EXPECT_EQ(vectors, 47);
}

}  // namespace
}  // namespace winnow
