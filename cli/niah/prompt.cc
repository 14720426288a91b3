#include "cli/niah/prompt.h"

#include <optional>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/tokenizer/json_file.h"

namespace winnow::cli {
namespace {

// True if the model's chat template has the switch of Qwen3's. Such templates write
// plain messages as ChatML.
absl::StatusOr<bool> KnowsThinking(const std::string& model_dir) {
  constexpr std::string_view kSwitch = "enable_thinking", kChatMl = "<|im_start|>";
  WINNOW_ASSIGN_OR_RETURN(std::optional<std::string> text,
                          ReadTextFile(model_dir + "/chat_template.jinja"));
  if (!text.has_value()) {
    WINNOW_ASSIGN_OR_RETURN(const auto config, ReadJsonFile(model_dir + "/tokenizer_config.json"));
    const nlohmann::json* value = config ? Find(*config, "chat_template") : nullptr;
    if (value == nullptr || !value->is_string()) return false;
    text = value->get<std::string>();
  }
  return text->find(kSwitch) != text->npos && text->find(kChatMl) != text->npos;
}

}  // namespace

std::string FormName(PromptForm form) {
  switch (form) {
    case PromptForm::kRaw:
      return "raw";
    case PromptForm::kChat:
      return "chat";
    case PromptForm::kThink:
      return "think";
    case PromptForm::kNoThink:
      return "no_think";
  }
  return "";
}

absl::StatusOr<PromptMaker> PromptMaker::Load(const std::string& model_dir) {
  PromptMaker maker;
  WINNOW_ASSIGN_OR_RETURN(maker.config_, LoadModelConfig(model_dir));
  WINNOW_ASSIGN_OR_RETURN(maker.tokenizer_, Tokenizer::Load(model_dir));
  WINNOW_ASSIGN_OR_RETURN(maker.chat_, ChatTemplate::Load(model_dir));
  WINNOW_ASSIGN_OR_RETURN(const bool thinking, KnowsThinking(model_dir));
  if (thinking) {
    maker.forms_ = {PromptForm::kThink, PromptForm::kNoThink};
  } else {
    maker.forms_ = {maker.chat_.supported() ? PromptForm::kChat : PromptForm::kRaw};
  }
  return maker;
}

absl::StatusOr<std::string> PromptMaker::Text(PromptForm form, const PromptParts& parts) const {
  switch (form) {
    case PromptForm::kRaw:
      return absl::StrCat(parts.system, parts.system.empty() ? "" : "\n\n", parts.content,
                          parts.answer_start.empty() ? "\nAnswer:" : "\n\n", parts.answer_start);
    case PromptForm::kChat: {
      std::vector<ChatMessage> messages;
      if (!parts.system.empty()) messages.push_back({.role = "system", .content = parts.system});
      messages.push_back({.role = "user", .content = parts.content});
      WINNOW_ASSIGN_OR_RETURN(std::string text,
                              chat_.Apply(messages, /*add_generation_prompt=*/true));
      return text + parts.answer_start;
    }
    case PromptForm::kThink:
    case PromptForm::kNoThink: {
      std::string text;
      if (!parts.system.empty()) {
        absl::StrAppend(&text, "<|im_start|>system\n", parts.system, "<|im_end|>\n");
      }
      absl::StrAppend(&text, "<|im_start|>user\n", parts.content,
                      "<|im_end|>\n<|im_start|>assistant\n");
      if (form == PromptForm::kNoThink) text += "<think>\n\n</think>\n\n";
      return text;
    }
  }
  return absl::InternalError("no such prompt form");
}

absl::StatusOr<std::vector<int32_t>> PromptMaker::Encode(PromptForm form,
                                                         const PromptParts& parts) const {
  WINNOW_ASSIGN_OR_RETURN(const std::string text, Text(form, parts));
  WINNOW_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                          tokenizer_->Encode(text, /*parse_special=*/form != PromptForm::kRaw));
  if (form == PromptForm::kRaw && tokenizer_->add_bos() && tokenizer_->bos_id().has_value()) {
    ids.insert(ids.begin(), *tokenizer_->bos_id());
  }
  return ids;
}

}  // namespace winnow::cli
