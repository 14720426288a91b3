#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "winnow/v1/inference.pb.h"

namespace winnow::cli {

// One prompt, before it is known whether the model takes chat.
struct Input {
  enum class Form { kDefault, kChat, kRaw };  // kDefault: chat if the model knows how

  std::string prompt;  // used if token_ids is empty
  Form form = Form::kDefault;
  std::vector<int32_t> token_ids;
  int line = 0;  // in the file, from 1; 0: from the command line
};

// Reads --prompts: a JSON object a line, {"prompt": text, "chat": bool} with chat
// optional, or {"token_ids": [...]}. Empty lines are skipped.
//   INVALID_ARGUMENT  the line is neither; the message names file, line and field.
absl::StatusOr<std::vector<Input>> ReadInputs(std::istream& in, const std::string& name);

// The request's input field for `input`; `chat` is what kDefault means.
void SetInput(const Input& input, bool chat, v1::GenerateRequest* request);

}  // namespace winnow::cli
