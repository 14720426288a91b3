#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/model_config.h"
#include "common/tokenizer/chat_template.h"
#include "common/tokenizer/tokenizer.h"

namespace winnow::cli {

// How a model is asked.
enum class PromptForm {
  kRaw,      // text to be continued, with a BOS where the tokenizer's files want one
  kChat,     // a user's message, through the model's chat template
  kThink,    // ChatML for a template with enable_thinking, and thinking allowed
  kNoThink,  // likewise, with an empty block of thoughts before the answer
};
// "raw", "chat", "think", "no_think".
std::string FormName(PromptForm form);

// A prompt in parts, before it is known how the model is asked.
struct PromptParts {
  std::string system;   // "": the template's own
  std::string content;  // what the user writes, question included
  // The answer's first words. kRaw and kChat end with them; without any, kRaw ends with
  // "Answer:".
  std::string answer_start;
};

// The text side of a model: tokenizer, chat template, configuration.
class PromptMaker {
 public:
  //   NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED  as the loaders of the three.
  static absl::StatusOr<PromptMaker> Load(const std::string& model_dir);

  // What the model can be asked in: kThink and kNoThink if its template knows
  // enable_thinking, else kChat if the template is known, else kRaw.
  const std::vector<PromptForm>& forms() const { return forms_; }
  // The one of them for short answers.
  PromptForm short_form() const { return forms_.back(); }

  // The prompt as text, then as ids. `form` is one of forms(), or kRaw.
  absl::StatusOr<std::string> Text(PromptForm form, const PromptParts& parts) const;
  absl::StatusOr<std::vector<int32_t>> Encode(PromptForm form, const PromptParts& parts) const;

  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const ModelConfig& config() const { return config_; }

 private:
  PromptMaker() = default;

  ModelConfig config_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ChatTemplate chat_;
  std::vector<PromptForm> forms_;
};

}  // namespace winnow::cli
