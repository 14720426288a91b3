#include "cli/inputs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

namespace winnow::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::vector<Input>> Read(const std::string& text) {
  std::istringstream in(text);
  return ReadInputs(in, "f.jsonl");
}

TEST(Inputs, ReadsAllForms) {
  const auto inputs = Read(
                          "{\"prompt\": \"a\", \"chat\": true}\n\n{\"prompt\": \"b\", \"chat\": "
                          "false}\r\n{\"prompt\": \"c\"}\n{\"token_ids\": [1, 2]}")
                          .value();
  ASSERT_EQ(inputs.size(), 4u);
  EXPECT_EQ(inputs[0].form, Input::Form::kChat);
  EXPECT_EQ(inputs[1].form, Input::Form::kRaw);
  EXPECT_EQ(inputs[1].line, 3);
  EXPECT_EQ(inputs[2].form, Input::Form::kDefault);
  EXPECT_THAT(inputs[3].token_ids, ElementsAre(1, 2));
}

TEST(Inputs, MistakesNameFileLineAndField) {
  const std::pair<const char*, const char*> cases[] = {
      {"nonsense", "f.jsonl:1: is not a JSON object"},
      {"[1]", "f.jsonl:1: is not a JSON object"},
      {"\n{}", "f.jsonl:2: needs either"},
      {R"({"prompt": "a", "token_ids": [1]})", "needs either"},
      {R"({"prompt": 1})", "\"prompt\" is not a string"},
      {R"({"prompt": "a", "chat": 1})", "\"chat\" is not true or false"},
      {R"({"token_ids": []})", "\"token_ids\" is not a list"},
      {R"({"token_ids": [-1]})", "no token id"},
      {R"({"token_ids": [4294967296]})", "no token id"},
      {R"({"token_ids": ["a"]})", "no token id"},
      {"", "f.jsonl holds no prompt"}};
  for (const auto& [text, message] : cases) {
    const auto inputs = Read(text);
    EXPECT_EQ(inputs.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(inputs.status().message()), HasSubstr(message)) << text;
  }
}

TEST(Inputs, FormDecidesTheRequestField) {
  const auto inputs = Read(
                          "{\"prompt\": \"a\", \"chat\": true}\n{\"prompt\": \"b\", \"chat\": "
                          "false}\n{\"prompt\": \"c\"}\n{\"token_ids\": [1, 2]}")
                          .value();
  for (const bool chat : {false, true}) {
    std::vector<v1::GenerateRequest> requests(4);
    for (size_t i = 0; i < 4; ++i) SetInput(inputs[i], chat, &requests[i]);
    EXPECT_EQ(requests[0].chat().messages(0).content(), "a");
    EXPECT_EQ(requests[0].chat().messages(0).role(), "user");
    EXPECT_EQ(requests[1].text(), "b");
    EXPECT_EQ(requests[2].has_chat(), chat);
    EXPECT_EQ(requests[2].has_text(), !chat);
    EXPECT_THAT(requests[3].token_ids().ids(), ElementsAre(1, 2));
  }
}

}  // namespace
}  // namespace winnow::cli
