#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "tests/integration/process.h"
#include "winnow/v1/inference.grpc.pb.h"
#include "winnow/v1/worker.grpc.pb.h"

namespace winnow::testing {

struct ClusterOptions {
  std::string model_dir;
  std::string adapter_dir;  // empty: none
  std::string kv_mode = "dense-bf16";
  int prefill_chunk = 64;
  int threads = 1;
  int max_num_seqs = 32;
  std::string kv_budget = "64MiB";
  std::vector<std::string> router_flags;
};

// What one Generate call gave.
struct Generated {
  grpc::Status status;
  std::vector<int32_t> token_ids;
  std::string text;
  v1::GenerateResponse last;  // finish reason, usage
  absl::Duration elapsed;
  absl::Duration since_last_message;  // from the last message to the status
};

// Router, one prefill and one decode worker, as real processes on loopback.
class Cluster {
 public:
  // Fails the running test if a process does not get ready.
  explicit Cluster(const ClusterOptions& options);
  // Shows what the processes logged if the test has failed.
  ~Cluster();

  Process& router() { return *router_; }
  Process& prefill() { return *prefill_; }
  Process& decode() { return *decode_; }
  const std::string& address() const { return router_address_; }
  v1::Inference::Stub* stub() { return stub_.get(); }

  // `on_message`, if set, is called after each message with the number so far.
  Generated Generate(const v1::GenerateRequest& request, absl::Duration timeout = absl::Seconds(60),
                     const std::function<void(int, grpc::ClientContext*)>& on_message = nullptr);

  // The workers' own account, asked anew.
  v1::LoadSnapshot PrefillLoad() { return Load(prefill_address_); }
  v1::LoadSnapshot DecodeLoad() { return Load(decode_address_); }
  // True if both workers say that their allocators hold nothing, within `timeout`.
  bool PagesReturn(absl::Duration timeout);

  void RestartPrefill();
  void RestartDecode();

 private:
  std::unique_ptr<Process> StartWorker(const std::string& name, const std::string& listen,
                                       std::string* address);
  static v1::LoadSnapshot Load(const std::string& address);

  const ClusterOptions options_;
  std::unique_ptr<Process> router_, prefill_, decode_;
  std::string router_address_, prefill_address_, decode_address_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

}  // namespace winnow::testing
