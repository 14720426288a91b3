#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "common/config/flags.h"

namespace winnow::config {

// ${WINNOW_CACHE:-${XDG_CACHE_HOME:-~/.cache}/winnow}, where models lie in models/.
std::string CacheDir();
// CacheDir()/models/SmolLM2-135M-Instruct.
std::string DefaultModelDir();
// The directory that a --model value names: "default" or "" is DefaultModelDir().
std::string ResolveModelDir(const std::string& value);

// The directory that an --adapter value names beside this --model value, "" for none:
// "none" is none; "default" or "" is the default model's own adapter where --model is the
// default one, else none. That adapter is $WINNOW_DEFAULT_ADAPTER, else the one
// in training/adapters of the checkout that this program was built in.
std::string ResolveAdapterDir(const std::string& model, const std::string& value);
inline constexpr char kAdapterHelp[] =
    "Directory of a DMS adapter, none, or default: the default model's own; for the dms- modes.";

inline constexpr char kThresholdHelp[] =
    "dms- modes: evict a token iff its logit is above this. Higher keeps more and costs memory, "
    "lower keeps less and costs quality; unset: 0, as trained. All workers of a router must agree.";

// What every server has.
struct ServerConfig {
  std::string listen;                                // HOST:PORT; port 0 takes a free one
  std::string metrics = {};                          // HOST:PORT of /metrics; "": none
  bool reflection = true;                            // grpc.reflection, for grpcurl
  absl::Duration drain_timeout = absl::Seconds(30);  // SIGTERM: most time for open requests
};

struct RouterConfig {
  ServerConfig server{.listen = "127.0.0.1:50051"};
  std::string model = "default";
  std::vector<std::string> prefill_workers;              // HOST:PORT; empty: decode workers prefill
  std::vector<std::string> decode_workers;               // HOST:PORT; at least one
  int max_model_len = 0;                                 // tokens; 0: the model's
  int max_concurrency = 256;                             // requests in work at once
  int max_queue = 1024;                                  // requests that wait for a place
  absl::Duration default_deadline = absl::Seconds(600);  // of a call without one
};

// Prefill and decode workers.
struct WorkerConfig {
  ServerConfig server;
  std::string model = "default";
  std::string adapter = "default";
  std::string kv_mode = "dense-fp8";
  std::string kv_format;               // in place of kv_mode's, if not empty
  std::optional<float> dms_threshold;  // RuntimeOptions::dms_threshold; unset: 0
  uint64_t kv_budget_bytes = uint64_t{1} << 30;
  int prefill_chunk = 512;  // tokens
  int max_num_seqs = 32;    // sequences in one batch
  int max_waiting = 256;    // requests that wait for a place
  int max_model_len = 0;    // tokens; 0: the model's
  int threads = 0;          // 0: one a core
};

// The flags that set `config`, whose values are the defaults.
FlagSet RouterFlags(RouterConfig* config);
// `program` is "winnow-prefill-worker" or "winnow-decode-worker".
FlagSet WorkerFlags(const std::string& program, WorkerConfig* config);

}  // namespace winnow::config
