#include "router/router_metrics.h"

#include "common/rpc/grpc_status.h"

namespace winnow::router {

RouterMetrics::RouterMetrics(MetricsRegistry* registry, const std::string& model) {
  const MetricsRegistry::Labels by_model = {{"model", model}};
  const char* const paths[] = {"disagg", "local"};
  const char* const reasons[] = {"pair", "no_prefill_worker"};
  for (size_t i = 0; i < 2; ++i) {
    const MetricsRegistry::Labels labels = {{"model", model}, {"path", paths[i]}};
    time_to_first_token[i] =
        registry->Histogram("winnow_time_to_first_token_seconds",
                            "From acceptance of the client's call to its first token.",
                            TimeToFirstTokenBuckets(), labels);
    e2e_latency[i] =
        registry->Histogram("winnow_e2e_request_latency_seconds",
                            "From acceptance of the client's call to its end, OK only.",
                            RequestLatencyBuckets(), labels);
    decisions[i] = registry->Counter("winnow_disagg_decisions_total",
                                     "Requests sent to a pair of workers, or to a decode worker "
                                     "alone, and why.",
                                     {{"decision", paths[i]}, {"reason", reasons[i]}});
  }
  inter_token =
      registry->Histogram("winnow_inter_token_latency_seconds",
                          "Between the tokens of one request.", InterTokenBuckets(), by_model);
  time_per_output_token = registry->Histogram(
      "winnow_request_time_per_output_token_seconds",
      "Mean time of a token after the first, one value a request.", InterTokenBuckets(), by_model);
  queue_time = registry->Histogram("winnow_request_queue_time_seconds",
                                   "Time a request waited in the router's queue.",
                                   RequestLatencyBuckets(), {{"model", model}, {"role", "router"}});
  prompt_tokens = registry->Counter("winnow_prompt_tokens_total",
                                    "Prompt tokens of requests that ended OK.", by_model);
  generation_tokens =
      registry->Counter("winnow_generation_tokens_total", "Tokens sent to clients.", by_model);
  retries = registry->Counter("winnow_retries_total",
                              "Requests sent to a second pair after the first failed.");
  kv_transfer_bytes = registry->Counter("winnow_router_kv_transfer_bytes_total",
                                        "KV bytes that crossed for requests that ended OK.");
  running =
      registry->Gauge("winnow_num_requests_running", "Requests in work.", {{"role", "router"}});
  waiting = registry->Gauge("winnow_num_requests_waiting", "Requests that wait for a place.",
                            {{"role", "router"}});
  for (size_t code = 0; code < requests_.size(); ++code) {
    requests_[code] =
        registry->Counter("winnow_requests_total", "Generate calls by the status they ended with.",
                          {{"code", std::string(CodeName(static_cast<absl::StatusCode>(code)))}});
  }
}

void RouterMetrics::CountRequest(absl::StatusCode code) {
  const auto index = static_cast<size_t>(code);
  requests_[index < requests_.size() ? index : 2]->Increment();
}

}  // namespace winnow::router
