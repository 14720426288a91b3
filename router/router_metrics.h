#pragma once

#include <array>

#include "absl/status/status.h"
#include "common/metrics/metrics.h"

namespace winnow::router {

// The router's own metrics. Time to first token is measured here, from the acceptance of
// the client's call to the first token handed to its stream, and nowhere else.
// Thread-safe.
struct RouterMetrics {
  // `registry` is not owned and must outlive *this.
  RouterMetrics(MetricsRegistry* registry, const std::string& model);

  // winnow_requests_total{code}.
  void CountRequest(absl::StatusCode code);

  enum Path { kDisagg, kLocal };
  std::array<prometheus::Histogram*, 2> time_to_first_token;  // by Path
  std::array<prometheus::Histogram*, 2> e2e_latency;          // by Path
  std::array<prometheus::Counter*, 2> decisions;              // by Path
  prometheus::Histogram* inter_token;
  prometheus::Histogram* time_per_output_token;
  prometheus::Histogram* queue_time;
  prometheus::Counter* prompt_tokens;
  prometheus::Counter* generation_tokens;
  prometheus::Counter* retries;
  prometheus::Counter* kv_transfer_bytes;
  prometheus::Gauge* running;
  prometheus::Gauge* waiting;

 private:
  std::array<prometheus::Counter*, 17> requests_;
};

}  // namespace winnow::router
