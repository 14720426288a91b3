#pragma once

#include "common/engine/request.h"
#include "winnow/v1/types.pb.h"

namespace winnow {

// An engine request from what the router resolved; its id stays 0.
template <typename PromptIds>
Request MakeRequest(const PromptIds& prompt_ids, const v1::ResolvedSampling& sampling) {
  Request request;
  request.prompt.assign(prompt_ids.begin(), prompt_ids.end());
  request.sampling = {
      .temperature = sampling.temperature(), .top_k = sampling.top_k(), .top_p = sampling.top_p()};
  request.seed = sampling.seed();
  request.max_tokens = sampling.max_tokens();
  request.stop_token_ids.assign(sampling.stop_token_ids().begin(), sampling.stop_token_ids().end());
  return request;
}

inline v1::FinishReason ToProto(FinishReason reason) {
  return reason == FinishReason::kStop ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH;
}

inline v1::KvUsage ToProto(const KvUsage& usage, uint64_t transferred_bytes) {
  v1::KvUsage out;
  out.set_peak_bytes(usage.peak_bytes);
  out.set_dense_bf16_bytes(usage.dense_bf16_bytes);
  out.set_transferred_bytes(transferred_bytes);
  out.set_live_tokens(usage.live_tokens);
  out.set_logical_tokens(usage.logical_tokens);
  return out;
}

}  // namespace winnow
