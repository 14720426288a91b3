#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "winnow/v1/inference.pb.h"

namespace winnow::cli {

// What `winnow generate` asks for completions: a server, or an engine in this process.
// Both take the public request and answer with the public response, so that checks,
// defaults, text and output are the same code. Thread-safe: --concurrency threads call
// at once.
class Generator {
 public:
  using OnResponse = std::function<void(const v1::GenerateResponse&)>;

  virtual ~Generator() = default;

  // As rpc GetModelInfo.
  virtual absl::StatusOr<v1::GetModelInfoResponse> GetModelInfo() = 0;

  // Tokens of the prompt that `request` makes, by rpc Tokenize's rules.
  virtual absl::StatusOr<int> CountPromptTokens(const v1::GenerateRequest& request) = 0;

  // As rpc Generate: calls `on_response` on the calling thread for each message in
  // order, the last with finish_reason; returns when the request has ended. Statuses as
  // inference.proto lists them.
  //   DEADLINE_EXCEEDED  `timeout` passed.
  virtual absl::Status Generate(const v1::GenerateRequest& request, absl::Duration timeout,
                                const OnResponse& on_response) = 0;
};

// `address` is HOST:PORT of a router. Connects on first use.
std::unique_ptr<Generator> NewServerGenerator(const std::string& address);

// What --local needs beside the requests.
struct LocalOptions {
  std::string model_dir;    // resolved
  std::string adapter_dir;  // "": none
  float dms_threshold = 0;  // as RuntimeOptions
  std::string kv_mode = "dense-fp8";
  std::string kv_format;  // in place of kv_mode's, if not empty
  uint64_t kv_budget_bytes = uint64_t{1} << 30;
  int prefill_chunk = 512;  // tokens
  int max_num_seqs = 32;    // sequences in one batch
  int max_model_len = 0;    // tokens; 0: the model's
  int threads = 0;          // 0: one a core
};

// Loads the model and runs an engine on a thread of its own.
absl::StatusOr<std::unique_ptr<Generator>> NewLocalGenerator(const LocalOptions& options);

}  // namespace winnow::cli
