#include "cli/inputs.h"

#include <istream>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"

namespace winnow::cli {
namespace {

using Json = nlohmann::json;

absl::Status Bad(const std::string& name, int line, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(name, ":", line, ": ", what));
}

absl::StatusOr<Input> ParseLine(const std::string& text, const std::string& name, int line) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Bad(name, line, "is not a JSON object");
  Input input;
  input.line = line;
  const bool has_prompt = json.contains("prompt");
  if (has_prompt == json.contains("token_ids")) {
    return Bad(name, line, "needs either \"prompt\" or \"token_ids\"");
  }
  if (has_prompt) {
    if (!json["prompt"].is_string()) return Bad(name, line, "\"prompt\" is not a string");
    input.prompt = json["prompt"].get<std::string>();
    if (json.contains("chat")) {
      if (!json["chat"].is_boolean()) return Bad(name, line, "\"chat\" is not true or false");
      input.form = json["chat"].get<bool>() ? Input::Form::kChat : Input::Form::kRaw;
    }
    return input;
  }
  const Json& ids = json["token_ids"];
  if (!ids.is_array() || ids.empty()) {
    return Bad(name, line, "\"token_ids\" is not a list of at least one id");
  }
  for (const Json& id : ids) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<int32_t>::max()) {
      return Bad(name, line, "\"token_ids\" holds something that is no token id");
    }
    input.token_ids.push_back(id.get<int32_t>());
  }
  return input;
}

}  // namespace

absl::StatusOr<std::vector<Input>> ReadInputs(std::istream& in, const std::string& name) {
  std::vector<Input> inputs;
  std::string text;
  for (int line = 1; std::getline(in, text); ++line) {
    if (text.find_first_not_of(" \t\r") == text.npos) continue;
    absl::StatusOr<Input> input = ParseLine(text, name, line);
    if (!input.ok()) return input.status();
    inputs.push_back(*std::move(input));
  }
  if (inputs.empty()) return absl::InvalidArgumentError(absl::StrCat(name, " holds no prompt"));
  return inputs;
}

void SetInput(const Input& input, bool chat, v1::GenerateRequest* request) {
  if (!input.token_ids.empty()) {
    request->mutable_token_ids()->mutable_ids()->Assign(input.token_ids.begin(),
                                                        input.token_ids.end());
    return;
  }
  if (input.form == Input::Form::kChat || (input.form == Input::Form::kDefault && chat)) {
    v1::ChatMessage* message = request->mutable_chat()->add_messages();
    message->set_role("user");
    message->set_content(input.prompt);
    return;
  }
  request->set_text(input.prompt);
}

}  // namespace winnow::cli
