#include "common/tokenizer/chat_template.h"

#include "tests/tokenizer/tokenizer_testing.h"

namespace winnow {
namespace {

// As the models' files have it; \n is a line feed here and a Jinja escape below.
constexpr const char* kSmolLm2 =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}";
constexpr const char* kBare =
    R"({% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'])"
    R"( + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %})"
    R"({{ '<|im_start|>assistant\n' }}{% endif %})";

absl::StatusOr<std::string> Apply(const ChatTemplate& chat, std::vector<ChatMessage> messages,
                                  bool add_generation_prompt = true) {
  return chat.Apply(messages, add_generation_prompt);
}

ChatTemplate LoadJinja(const std::string& jinja) {
  ModelDir dir;
  dir.Write("chat_template.jinja", jinja);
  const auto chat = ChatTemplate::Load(dir.path());
  EXPECT_TRUE(chat.ok()) << chat.status();
  return *chat;
}

TEST(ChatTemplateTest, SmolLm2WritesItsOwnSystemMessageIfThereIsNone) {
  const ChatTemplate chat = LoadJinja(kSmolLm2);
  ASSERT_TRUE(chat.supported());
  EXPECT_EQ(*Apply(chat, {{"user", "Hi"}}),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(*Apply(chat, {{"system", "Be brief."}, {"user", "Hi"}}),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n");
}

TEST(ChatTemplateTest, SeveralTurnsWithoutGenerationPrompt) {
  const ChatTemplate chat = LoadJinja(kBare);
  EXPECT_EQ(
      *Apply(chat, {{"user", "a\n"}, {"assistant", ""}, {"system", "s"}, {"user", "d"}}, false),
      "<|im_start|>user\na\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
      "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nd<|im_end|>\n");
}

TEST(ChatTemplateTest, OneTemplateInItsSpellings) {
  std::string escaped = kSmolLm2;
  for (size_t i = 0; (i = escaped.find('\n', i)) != std::string::npos;)
    escaped.replace(i, 1, "\\n");
  for (const std::string& jinja :
       {escaped, std::string(kSmolLm2) + "\n", "\n" + std::string(kSmolLm2)}) {
    const ChatTemplate chat = LoadJinja(jinja);
    ASSERT_TRUE(chat.supported()) << jinja;
    EXPECT_EQ(*Apply(chat, {{"user", "x"}}), *Apply(LoadJinja(kSmolLm2), {{"user", "x"}}));
  }
}

TEST(ChatTemplateTest, AnotherDefaultSystemMessage) {
  std::string jinja = kSmolLm2;
  const std::string theirs = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
  jinja.replace(jinja.find(theirs), theirs.size(), "You are a helpful assistant.");
  EXPECT_EQ(*Apply(LoadJinja(jinja), {{"user", "x"}}, false),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nx<|im_end|>\n");
}

TEST(ChatTemplateTest, FilesInTheirOrder) {
  ModelDir dir;
  const auto first_words = [&] {
    const auto chat = ChatTemplate::Load(dir.path());
    EXPECT_TRUE(chat.ok()) << chat.status();
    return Apply(*chat, {{"user", "x"}}).value_or("").substr(0, 20);
  };
  EXPECT_EQ(first_words(), "");
  dir.Write("tokenizer_config.json", Json({{"chat_template", kBare}}).dump());
  EXPECT_EQ(first_words(), "<|im_start|>user\nx<|");
  dir.Write("tokenizer_config.json", Json({{"chat_template",
                                            {{{"name", "tool_use"}, {"template", kBare}},
                                             {{"name", "default"}, {"template", kSmolLm2}}}}})
                                         .dump());
  EXPECT_EQ(first_words(), "<|im_start|>system\nY");
  dir.Write("chat_template.jinja", kBare);
  EXPECT_EQ(first_words(), "<|im_start|>user\nx<|");
}

TEST(ChatTemplateTest, OthersAreUnimplementedByName) {
  for (const std::string& jinja :
       {std::string(), std::string("{{ bos_token }}"), std::string(kSmolLm2) + "{{ x }}",
        std::string(kSmolLm2).replace(std::string(kSmolLm2).find("helpful"), 7, "' + x + '"),
        std::string(kSmolLm2).replace(std::string(kSmolLm2).find("helpful"), 7, "\\u0041"),
        "\xff\xfe" + std::string(kBare)}) {
    const ChatTemplate chat = LoadJinja(jinja);
    EXPECT_FALSE(chat.supported()) << jinja;
    const auto status = Apply(chat, {{"user", "x"}}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
    EXPECT_NE(status.message().find("winnow_test_"), status.message().npos) << status;
    EXPECT_NE(status.message().find("digest"), status.message().npos) << status;
  }
}

TEST(ChatTemplateTest, QwenTemplatesOfTheData) {
  const auto config = FindData("qwen2_tokenizer/qwen3_tokenizer_config.json");
  if (!config) GTEST_SKIP() << "needs ../shared/data/qwen2_tokenizer";
  ModelDir dir;
  dir.Write("tokenizer_config.json", ReadFile(*config));
  const auto chat = ChatTemplate::Load(dir.path());
  ASSERT_TRUE(chat.ok()) << chat.status();
  EXPECT_EQ(Apply(*chat, {{"user", "x"}}).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(ChatTemplateTest, BadMessages) {
  const ChatTemplate chat = LoadJinja(kSmolLm2);
  EXPECT_EQ(Apply(chat, {}).status(), absl::InvalidArgumentError("messages is empty"));
  EXPECT_EQ(
      Apply(chat, {{"user", "x"}, {"tool\n", "y"}}).status(),
      absl::InvalidArgumentError(R"(messages[1].role="tool\n" is not system, user or assistant)"));
}

TEST(ChatTemplateTest, MalformedFiles) {
  for (const char* text : {"{", "{\"chat_template\": 3}", "{\"chat_template\": [{\"name\": 1}]}",
                           "{\"chat_template\": [{\"name\": \"default\", \"template\": {}}]}"}) {
    ModelDir dir;
    dir.Write("tokenizer_config.json", text);
    const auto status = ChatTemplate::Load(dir.path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_NE(status.message().find("tokenizer_config.json"), status.message().npos) << status;
  }
  ModelDir dir;
  dir.Write("tokenizer_config.json", "[]");  // no template in it
  EXPECT_TRUE(ChatTemplate::Load(dir.path()).ok());
}

}  // namespace
}  // namespace winnow
