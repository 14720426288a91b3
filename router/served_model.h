#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/model/model_config.h"
#include "common/tokenizer/chat_template.h"
#include "common/tokenizer/tokenizer.h"
#include "winnow/v1/inference.pb.h"

namespace winnow::router {

// What the text side knows of a model: tokenizer, chat template and configuration, no
// weights. Thread-safe: const once loaded.
class ServedModel {
 public:
  // `max_model_len` 0 takes the model's own length.
  //   NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED  as the three loaders; also a
  //       max_model_len beyond the model's.
  static absl::StatusOr<std::unique_ptr<ServedModel>> Load(const std::string& dir,
                                                           int max_model_len);

  const std::string& name() const { return name_; }  // last part of the directory's path
  const ModelConfig& config() const { return config_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const ChatTemplate& chat_template() const { return chat_template_; }
  int max_model_len() const { return max_model_len_; }
  // "llama" or "qwen3".
  std::string architecture() const;
  // What generation_config.json says, greedy where it is silent.
  v1::SamplingParams DefaultSampling() const;

  // A raw prompt to ids: special tokens in it are text; BOS if the tokenizer's files say
  // so.
  //   INVALID_ARGUMENT, RESOURCE_EXHAUSTED  as Tokenizer::Encode.
  absl::StatusOr<std::vector<int32_t>> EncodeText(const std::string& text) const;
  // Messages through the chat template to ids, ready for the assistant's answer.
  //   INVALID_ARGUMENT  no message or more than 1024; a role that is not known.
  //   UNIMPLEMENTED     the model's template is not known.
  absl::StatusOr<std::vector<int32_t>> EncodeChat(const v1::ChatMessages& chat) const;

 private:
  ServedModel() = default;

  std::string name_;
  ModelConfig config_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ChatTemplate chat_template_;
  int max_model_len_ = 0;
};

}  // namespace winnow::router
