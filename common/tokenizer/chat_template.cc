#include "common/tokenizer/chat_template.h"

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/json_file.h"

namespace winnow {
namespace {

// ChatML as SmolLM2 and Qwen2 write it, after Normalize(). Between kLoop and kMessage
// may stand kIfNoSystem, a system message as a string literal, and kEndIf.
constexpr const char* kLoop = "{% for message in messages %}";
constexpr const char* kIfNoSystem =
    "{% if loop.first and messages[0]['role'] != 'system' %}{{'<|im_start|>system\n";
constexpr const char* kEndIf = "<|im_end|>\n'}}{% endif %}";
constexpr const char* kMessage =
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}";

// One spelling for what Jinja takes alike: "\n" in a literal for a line feed, spaces just
// inside {{ }}, white space at the ends of the file.
std::string Normalize(std::string_view text) {
  std::string out = absl::StrReplaceAll(
      std::string(text), {{"\r\n", "\n"}, {"\\n", "\n"}, {"{{ ", "{{"}, {" }}", "}}"}});
  absl::StripAsciiWhitespace(&out);
  return out;
}

// The system message that a known template writes by itself ("": none), or nullopt if
// `text` is no known template.
std::optional<std::string> DefaultSystemOfChatMl(const std::string& text) {
  absl::string_view rest = text;
  if (!absl::ConsumePrefix(&rest, kLoop) || !absl::ConsumeSuffix(&rest, kMessage)) {
    return std::nullopt;
  }
  if (rest.empty()) return "";
  if (!absl::ConsumePrefix(&rest, kIfNoSystem) || !absl::ConsumeSuffix(&rest, kEndIf)) {
    return std::nullopt;
  }
  // A plain literal: no end of it, no escape, no other Jinja.
  if (rest.find_first_of("'\\{}") != rest.npos) return std::nullopt;
  return std::string(rest);
}

// FNV-1a.
uint64_t Digest(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

// The template's text, or nullopt if the directory has none.
absl::StatusOr<std::optional<std::string>> ReadTemplate(const std::string& model_dir) {
  WINNOW_ASSIGN_OR_RETURN(std::optional<std::string> jinja,
                          ReadTextFile(model_dir + "/chat_template.jinja"));
  if (jinja) return jinja;
  const std::string file = model_dir + "/tokenizer_config.json";
  WINNOW_ASSIGN_OR_RETURN(const auto config, ReadJsonFile(file));
  const nlohmann::json* value = config ? Find(*config, "chat_template") : nullptr;
  if (value == nullptr) return std::optional<std::string>();
  if (value->is_string()) return std::optional<std::string>(value->get<std::string>());
  if (!value->is_array()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": chat_template is neither a string nor a list"));
  }
  for (const nlohmann::json& entry : *value) {
    absl::StatusOr<std::string> name = StringOr(entry, "chat_template[]", "name", "");
    absl::StatusOr<std::string> text = StringOr(entry, "chat_template[]", "template", "");
    if (!name.ok()) return InFile(file, name.status());
    if (!text.ok()) return InFile(file, text.status());
    if (*name == "default") return std::optional<std::string>(*std::move(text));
  }
  return std::optional<std::string>();
}

}  // namespace

absl::StatusOr<ChatTemplate> ChatTemplate::Load(const std::string& model_dir) {
  ChatTemplate chat;
  chat.origin_ = model_dir;
  WINNOW_ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadTemplate(model_dir));
  if (!text) return chat;
  const std::string normalized = Normalize(*text);
  const std::optional<std::string> system = DefaultSystemOfChatMl(normalized);
  if (system) {
    chat.kind_ = Kind::kChatMl;
    chat.default_system_ = *system;
  } else {
    chat.kind_ = Kind::kUnknown;
    chat.digest_ =
        absl::StrFormat("%016x, beginning with %s", Digest(normalized), Quote(normalized));
  }
  return chat;
}

absl::StatusOr<std::string> ChatTemplate::Apply(absl::Span<const ChatMessage> messages,
                                                bool add_generation_prompt) const {
  if (kind_ == Kind::kNone) {
    return absl::UnimplementedError(
        absl::StrCat("the model in ", origin_, " has no chat template; a raw prompt works"));
  }
  if (kind_ == Kind::kUnknown) {
    return absl::UnimplementedError(absl::StrCat("the chat template of the model in ", origin_,
                                                 " (digest ", digest_,
                                                 ") is not built; a raw prompt works"));
  }
  if (messages.empty()) return absl::InvalidArgumentError("messages is empty");
  constexpr std::string_view kRoles[] = {"system", "user", "assistant"};
  for (size_t i = 0; i < messages.size(); ++i) {
    if (std::find(std::begin(kRoles), std::end(kRoles), messages[i].role) == std::end(kRoles)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "messages[", i, "].role=", Quote(messages[i].role), " is not system, user or assistant"));
    }
  }
  std::string prompt;
  const auto add = [&prompt](const std::string& role, const std::string& content) {
    absl::StrAppend(&prompt, "<|im_start|>", role, "\n", content, "<|im_end|>\n");
  };
  if (messages[0].role != "system" && !default_system_.empty()) add("system", default_system_);
  for (const ChatMessage& message : messages) add(message.role, message.content);
  if (add_generation_prompt) prompt += "<|im_start|>assistant\n";
  return prompt;
}

}  // namespace winnow
