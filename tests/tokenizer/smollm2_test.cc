// The default model's tokenizer and chat template, as the converter writes them.

#include "common/tokenizer/chat_template.h"
#include "tests/tokenizer/golden_checks.h"

namespace winnow {
namespace {

class SmolLm2Test : public testing::Test {
 protected:
  void SetUp() override {
    const auto dir = FindSmolLm2();
    if (!dir) GTEST_SKIP() << "needs the default model";
    dir_ = *dir;
    tokenizer_ = MustLoad(dir_);
    ASSERT_NE(tokenizer_, nullptr);
  }
  std::string dir_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(SmolLm2Test, EqualsTokenizers) {
  ExpectCases(*tokenizer_, "tests/tokenizer/golden/smollm2.json");
}

TEST_F(SmolLm2Test, EqualsTokenizersOnWikiText) {
  const auto wiki = FindData("wiki.test.raw");
  if (!wiki) GTEST_SKIP() << "needs ../shared/data/wiki.test.raw";
  ExpectWiki(*tokenizer_, "tests/tokenizer/golden/smollm2.json", *wiki);
}

TEST_F(SmolLm2Test, Facts) {
  EXPECT_EQ(tokenizer_->vocab_size(), 49152);
  EXPECT_EQ(tokenizer_->bos_id(), 1);
  EXPECT_EQ(tokenizer_->eos_id(), 2);
  EXPECT_FALSE(tokenizer_->add_bos());
  EXPECT_EQ(tokenizer_->TokenId("<|im_end|>"), 2);
  EXPECT_TRUE(tokenizer_->IsSpecial(2));
  EXPECT_EQ(tokenizer_->TokenBytes(*tokenizer_->TokenId("Ġthe")), " the");
}

TEST_F(SmolLm2Test, ChatTemplate) {
  const auto chat = ChatTemplate::Load(dir_);
  ASSERT_TRUE(chat.ok()) << chat.status();
  EXPECT_TRUE(chat->supported());
  const ChatMessage message = {"user", "What is the capital of France?"};
  const auto prompt = chat->Apply({&message, 1}, true);
  ASSERT_TRUE(prompt.ok()) << prompt.status();
  EXPECT_EQ(*prompt,
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
            "<|im_start|>assistant\n");
  const Ids ids = MustEncode(*tokenizer_, *prompt, true);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 1), 3) << "<|im_start|>";
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 2), 2) << "<|im_end|>";
}

}  // namespace
}  // namespace winnow
