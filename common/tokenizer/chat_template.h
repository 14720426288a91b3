#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace winnow {

struct ChatMessage {
  std::string role;     // "system", "user" or "assistant"
  std::string content;  // UTF-8
};

// How a model wants a conversation written as a prompt. Templates are Jinja programs;
// they are not run but recognised by their text: ChatML as SmolLM2 and Qwen2 write it,
// with or without a system message of its own (chat_template.cc has the exact form).
// Thread-safe: const once loaded.
class ChatTemplate {
 public:
  // Reads `model_dir`/chat_template.jinja, else "chat_template" of
  // tokenizer_config.json (a string, or a list from which "default" is taken). A
  // directory without a template, or with one that is not known, loads: Apply() then
  // says so.
  //   INVALID_ARGUMENT  a file is malformed; the message names file and field.
  static absl::StatusOr<ChatTemplate> Load(const std::string& model_dir);

  // The prompt for `messages`; with `add_generation_prompt`, it ends where the
  // assistant's answer begins. To be encoded with parse_special = true and no BOS.
  // Content is taken as it is: special tokens written in it are special.
  //   INVALID_ARGUMENT  no message, or a role that is not known (named with its index).
  //   UNIMPLEMENTED     the model has no template or one that is not built; the message
  //                     names the model directory, the template's digest and its beginning.
  absl::StatusOr<std::string> Apply(absl::Span<const ChatMessage> messages,
                                    bool add_generation_prompt) const;

  // True if Apply() is built for this model's template.
  bool supported() const { return kind_ == Kind::kChatMl; }

 private:
  enum class Kind { kNone, kUnknown, kChatMl };

  Kind kind_ = Kind::kNone;
  std::string default_system_;  // the whole message written when the first is not "system"
  std::string origin_;          // the model directory
  std::string digest_;          // of a template that is not known, for messages
};

}  // namespace winnow
