#include "router/request.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/rpc/grpc_status.h"

namespace winnow::router {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr int kMaxStopStrings = 16;
constexpr size_t kMaxStopBytes = 256;
constexpr int kMaxStopIds = 64;
constexpr float kMaxTemperature = 100.0f;

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return WithReason(absl::InvalidArgumentError(absl::StrCat(parts...)),
                    v1::ERROR_REASON_INVALID_FIELD);
}

absl::Status Unsupported(const char* field) {
  return WithReason(absl::InvalidArgumentError(
                        absl::StrCat("sampling.", field, " is not supported by this version")),
                    v1::ERROR_REASON_UNSUPPORTED_SAMPLING);
}

// Errors of the tokenizer without a reason of their own get INVALID_FIELD.
absl::Status WithDefaultReason(absl::Status status) {
  if (ReasonOf(status) != v1::ERROR_REASON_UNSPECIFIED || !absl::IsInvalidArgument(status)) {
    return status;
  }
  return WithReason(status, v1::ERROR_REASON_INVALID_FIELD);
}

// Refuses what is known by name only, unless its value changes nothing.
absl::Status CheckUnsupported(const v1::SamplingParams& s) {
  if (s.has_min_p() && s.min_p() != 0.0f) return Unsupported("min_p");
  if (s.has_frequency_penalty() && s.frequency_penalty() != 0.0f) {
    return Unsupported("frequency_penalty");
  }
  if (s.has_presence_penalty() && s.presence_penalty() != 0.0f) {
    return Unsupported("presence_penalty");
  }
  if (s.has_repetition_penalty() && s.repetition_penalty() != 1.0f) {
    return Unsupported("repetition_penalty");
  }
  if (s.has_n() && s.n() != 1) return Unsupported("n");
  if (s.has_min_tokens() && s.min_tokens() != 0) return Unsupported("min_tokens");
  if (s.has_logprobs()) return Unsupported("logprobs");
  if (s.has_prompt_logprobs()) return Unsupported("prompt_logprobs");
  if (!s.logit_bias().empty()) return Unsupported("logit_bias");
  if (s.has_json_schema()) return Unsupported("json_schema");
  if (s.has_regex()) return Unsupported("regex");
  if (s.has_grammar()) return Unsupported("grammar");
  return absl::OkStatus();
}

absl::Status CheckSampling(const v1::SamplingParams& s, int vocab) {
  WINNOW_RETURN_IF_ERROR(CheckUnsupported(s));
  // Written so that NaN fails.
  if (s.has_temperature() && !(s.temperature() >= 0.0f && s.temperature() <= kMaxTemperature)) {
    return Invalid("sampling.temperature=", s.temperature(), " is outside [0, ", kMaxTemperature,
                   "]");
  }
  if (s.has_top_k() && (s.top_k() < 0 || s.top_k() > vocab)) {
    return Invalid("sampling.top_k=", s.top_k(), " is outside [0, ", vocab, "]");
  }
  if (s.has_top_p() && !(s.top_p() > 0.0f && s.top_p() <= 1.0f)) {
    return Invalid("sampling.top_p=", s.top_p(), " is outside (0, 1]");
  }
  if (s.stop_size() > kMaxStopStrings) {
    return Invalid("sampling.stop has ", s.stop_size(), " strings, more than ", kMaxStopStrings);
  }
  for (int i = 0; i < s.stop_size(); ++i) {
    if (s.stop(i).empty() || s.stop(i).size() > kMaxStopBytes) {
      return Invalid("sampling.stop[", i, "] has ", s.stop(i).size(), " bytes, outside [1, ",
                     kMaxStopBytes, "]");
    }
  }
  if (s.stop_token_ids_size() > kMaxStopIds) {
    return Invalid("sampling.stop_token_ids has ", s.stop_token_ids_size(), " ids, more than ",
                   kMaxStopIds);
  }
  for (int i = 0; i < s.stop_token_ids_size(); ++i) {
    if (s.stop_token_ids(i) < 0 || s.stop_token_ids(i) >= vocab) {
      return Invalid("sampling.stop_token_ids[", i, "]=", s.stop_token_ids(i), " is outside [0, ",
                     vocab, ")");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> PromptIds(const v1::GenerateRequest& request,
                                               const ServedModel& model) {
  switch (request.input_case()) {
    case v1::GenerateRequest::kText:
      return model.EncodeText(request.text());
    case v1::GenerateRequest::kChat:
      return model.EncodeChat(request.chat());
    case v1::GenerateRequest::kTokenIds: {
      const auto& ids = request.token_ids().ids();
      const int vocab = model.config().vocab_size;
      for (int i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || ids[i] >= vocab) {
          return Invalid("token_ids.ids[", i, "]=", ids[i], " is outside [0, ", vocab, ")");
        }
      }
      return std::vector<int32_t>(ids.begin(), ids.end());
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      break;
  }
  return Invalid("input is not set: one of text, chat and token_ids is needed");
}

v1::ResolvedSampling Resolve(const v1::SamplingParams& s, const ServedModel& model,
                             int longest_completion, uint64_t drawn_seed) {
  const v1::SamplingParams defaults = model.DefaultSampling();
  v1::ResolvedSampling out;
  out.set_temperature(s.has_temperature() ? s.temperature() : defaults.temperature());
  out.set_top_k(s.has_top_k() ? s.top_k() : defaults.top_k());
  out.set_top_p(s.has_top_p() ? s.top_p() : defaults.top_p());
  out.set_seed(s.has_seed() ? s.seed() : drawn_seed);
  out.set_max_tokens(s.has_max_tokens() ? s.max_tokens() : longest_completion);
  std::vector<int32_t> stop(s.stop_token_ids().begin(), s.stop_token_ids().end());
  if (!s.ignore_eos()) {
    stop.insert(stop.end(), model.config().eos_ids.begin(), model.config().eos_ids.end());
  }
  std::sort(stop.begin(), stop.end());
  stop.erase(std::unique(stop.begin(), stop.end()), stop.end());
  out.mutable_stop_token_ids()->Assign(stop.begin(), stop.end());
  return out;
}

}  // namespace

absl::StatusOr<ResolvedRequest> ResolveRequest(const v1::GenerateRequest& request,
                                               const ServedModel& model, int max_model_len,
                                               uint64_t drawn_seed) {
  const v1::SamplingParams& sampling = request.sampling();
  if (request.request_id().size() > kMaxRequestIdBytes) {
    return Invalid("request_id has ", request.request_id().size(), " bytes, more than ",
                   kMaxRequestIdBytes);
  }
  WINNOW_RETURN_IF_ERROR(CheckSampling(sampling, model.config().vocab_size));
  ResolvedRequest result;
  absl::StatusOr<std::vector<int32_t>> ids = PromptIds(request, model);
  if (!ids.ok()) return WithDefaultReason(ids.status());
  result.prompt_ids = *std::move(ids);
  if (result.prompt_ids.empty()) return Invalid("the prompt is empty");
  const auto prompt_tokens = static_cast<int64_t>(result.prompt_ids.size());
  if (prompt_tokens >= max_model_len) {
    return WithReason(
        absl::InvalidArgumentError(absl::StrCat("the prompt has ", prompt_tokens,
                                                " tokens; with one to generate they pass the "
                                                "model length ",
                                                max_model_len)),
        v1::ERROR_REASON_PROMPT_TOO_LONG);
  }
  const int longest = max_model_len - static_cast<int>(prompt_tokens);
  if (sampling.has_max_tokens() && (sampling.max_tokens() < 1 || sampling.max_tokens() > longest)) {
    return Invalid("sampling.max_tokens=", sampling.max_tokens(), " is outside [1, ", longest,
                   "] for a prompt of ", prompt_tokens, " tokens and model length ", max_model_len);
  }
  result.request_id = request.request_id();
  result.sampling = Resolve(sampling, model, longest, drawn_seed);
  result.stop.assign(sampling.stop().begin(), sampling.stop().end());
  result.skip_special_tokens =
      !sampling.has_skip_special_tokens() || sampling.skip_special_tokens();
  result.return_prompt_token_ids = request.return_prompt_token_ids();
  return result;
}

}  // namespace winnow::router
