#include "router/served_model.h"

#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/rpc/grpc_status.h"

namespace winnow::router {
namespace {

constexpr int kMaxChatMessages = 1024;

}  // namespace

absl::StatusOr<std::unique_ptr<ServedModel>> ServedModel::Load(const std::string& dir,
                                                               int max_model_len) {
  std::unique_ptr<ServedModel> model(new ServedModel);
  std::filesystem::path path = std::filesystem::path(dir).lexically_normal();
  if (path.filename().empty()) path = path.parent_path();
  model->name_ = path.filename().string();
  WINNOW_ASSIGN_OR_RETURN(model->config_, LoadModelConfig(dir));
  WINNOW_ASSIGN_OR_RETURN(model->tokenizer_, Tokenizer::Load(dir));
  WINNOW_ASSIGN_OR_RETURN(model->chat_template_, ChatTemplate::Load(dir));
  const int own_len = model->config_.max_position_embeddings;
  if (max_model_len > own_len) {
    return absl::InvalidArgumentError(
        absl::StrCat("--max-model-len=", max_model_len, " is beyond the model's ", own_len));
  }
  model->max_model_len_ = max_model_len > 0 ? max_model_len : own_len;
  return model;
}

std::string ServedModel::architecture() const {
  return config_.architecture == "Qwen3ForCausalLM" ? "qwen3" : "llama";
}

v1::SamplingParams ServedModel::DefaultSampling() const {
  const GenerationDefaults& defaults = config_.generation;
  const bool greedy = !defaults.do_sample.value_or(true) || !defaults.temperature.has_value();
  v1::SamplingParams result;
  result.set_temperature(greedy ? 0.0f : *defaults.temperature);
  result.set_top_k(defaults.top_k.value_or(0));
  result.set_top_p(defaults.top_p.value_or(1.0f));
  result.set_skip_special_tokens(true);
  return result;
}

absl::StatusOr<std::vector<int32_t>> ServedModel::EncodeText(const std::string& text) const {
  WINNOW_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                          tokenizer_->Encode(text, /*parse_special=*/false));
  if (tokenizer_->add_bos() && tokenizer_->bos_id().has_value()) {
    ids.insert(ids.begin(), *tokenizer_->bos_id());
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> ServedModel::EncodeChat(const v1::ChatMessages& chat) const {
  if (chat.messages_size() > kMaxChatMessages) {
    return absl::InvalidArgumentError(
        absl::StrCat("chat has ", chat.messages_size(), " messages, more than ", kMaxChatMessages));
  }
  std::vector<ChatMessage> messages;
  for (const v1::ChatMessage& m : chat.messages()) messages.push_back({m.role(), m.content()});
  absl::StatusOr<std::string> prompt =
      chat_template_.Apply(messages, /*add_generation_prompt=*/true);
  if (absl::IsUnimplemented(prompt.status())) {
    return WithReason(prompt.status(), v1::ERROR_REASON_CHAT_UNSUPPORTED);
  }
  WINNOW_RETURN_IF_ERROR(prompt.status());
  return tokenizer_->Encode(*prompt, /*parse_special=*/true);
}

}  // namespace winnow::router
