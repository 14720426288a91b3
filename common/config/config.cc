#include "common/config/config.h"

#include <cstdlib>
#include <filesystem>

#include "common/kv/kv_mode.h"

namespace winnow::config {
namespace {

constexpr int kMaxTokens = 1 << 24;

void AddServerFlags(FlagSet* flags, ServerConfig* config) {
  flags->AddHostPort("listen", &config->listen,
                     "HOST:PORT to serve gRPC on; port 0 takes a free one. Beyond loopback anyone "
                     "who reaches the port is served: there is no authentication.");
  flags->AddEndpoint("metrics-port", &config->metrics,
                     "off, PORT (on 127.0.0.1) or HOST:PORT of /metrics, /healthz and /readyz over "
                     "HTTP; port 0 takes a free one and logs it.");
  flags->AddBool("reflection", &config->reflection,
                 "Serve gRPC reflection, for grpcurl and the like.");
  flags->AddDuration("drain-timeout", &config->drain_timeout,
                     "On SIGTERM, most time that open requests get to end; those left are "
                     "cancelled. Longer delays a restart.");
}

}  // namespace

std::string CacheDir() {
  if (const char* dir = std::getenv("WINNOW_CACHE"); dir != nullptr && *dir != '\0') return dir;
  if (const char* dir = std::getenv("XDG_CACHE_HOME"); dir != nullptr && *dir != '\0') {
    return std::string(dir) + "/winnow";
  }
  const char* home = std::getenv("HOME");
  return std::string(home != nullptr ? home : ".") + "/.cache/winnow";
}

std::string DefaultModelDir() { return CacheDir() + "/models/SmolLM2-135M-Instruct"; }

std::string ResolveModelDir(const std::string& value) {
  return value.empty() || value == "default" ? DefaultModelDir() : value;
}

std::string ResolveAdapterDir(const std::string& model, const std::string& value) {
  if (value == "none") return "";
  if (!value.empty() && value != "default") return value;
  if (ResolveModelDir(model) != DefaultModelDir()) return "";
  if (const char* dir = std::getenv("WINNOW_DEFAULT_ADAPTER"); dir != nullptr) return dir;
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return "";
  // build/PRESET/bin/PROGRAM
  const std::filesystem::path dir =
      (program.parent_path() / "../../../training/adapters/smollm2-135m-lora8").lexically_normal();
  return std::filesystem::exists(dir / "dms_metadata.json", error) ? dir.string() : "";
}

FlagSet RouterFlags(RouterConfig* config) {
  FlagSet flags("winnow-router --decode-workers LIST [--prefill-workers LIST] [flags]",
                "The public service: tokenizes, picks a pair of workers for each request and "
                "streams its tokens.");
  AddServerFlags(&flags, &config->server);
  flags.AddString("model", &config->model,
                  "Model directory (Hugging Face layout), or default: the cached "
                  "SmolLM2-135M-Instruct. Only tokenizer, chat template and configuration are "
                  "read; the workers must serve the same model.");
  flags.AddHostPortList("prefill-workers", &config->prefill_workers,
                        "Comma-separated HOST:PORT of prefill workers. Decode workers dial none of "
                        "them; without one alive, decode workers prefill.");
  flags.AddHostPortList("decode-workers", &config->decode_workers,
                        "Comma-separated HOST:PORT of decode workers, as prefill workers reach "
                        "them. At least one.");
  flags.AddInt("max-model-len", &config->max_model_len, 0, kMaxTokens,
               "Most tokens of prompt and completion together; 0: what the model was made for. "
               "Lower bounds what one request can hold.");
  flags.AddInt("max-concurrency", &config->max_concurrency, 1, 65536,
               "Most requests in work at once. More keeps workers busier, and waits inside them.");
  flags.AddInt("max-queue", &config->max_queue, 0, 1 << 20,
               "Most requests that wait for a place; beyond, RESOURCE_EXHAUSTED. Longer refuses "
               "less and lets clients wait longer.");
  flags.AddDuration("default-deadline", &config->default_deadline,
                    "Deadline of a call that comes without one.");
  return flags;
}

FlagSet WorkerFlags(const std::string& program, WorkerConfig* config) {
  const bool decode = program == "winnow-decode-worker";
  FlagSet flags(program + " [flags]",
                decode ? "Decodes: takes over sequences from prefill workers, or prefills itself, "
                         "and streams their tokens to the router."
                       : "Prefills prompts, returns the first token and ships the KV cache to the "
                         "decode worker that the router names.");
  AddServerFlags(&flags, &config->server);
  flags.AddString("model", &config->model,
                  "Model directory (Hugging Face layout), or default: the cached "
                  "SmolLM2-135M-Instruct.");
  flags.AddString("adapter", &config->adapter, kAdapterHelp);
  flags.AddChoice("kv-mode", &config->kv_mode, KvModeNames(),
                  "How keys and values are kept: with or without eviction, in which format. All "
                  "workers of one router must agree.");
  flags.AddChoice("kv-format", &config->kv_format, KvFormatNames(),
                  "Takes the place of the format in --kv-mode. best: the least error in 8 bits.");
  flags.AddOptionalFloat("dms-threshold", &config->dms_threshold, -1e6f, 1e6f, kThresholdHelp);
  flags.AddBytes("kv-budget", &config->kv_budget_bytes,
                 "Memory of the KV cache, allocated at start, e.g. 512MiB. Bounds how many and how "
                 "long sequences run at once.");
  flags.AddInt("prefill-chunk", &config->prefill_chunk, 1, 65536,
               "Tokens of one prefill step. Larger prefills faster; smaller delays running "
               "sequences less and needs less memory.");
  flags.AddInt("max-num-seqs", &config->max_num_seqs, 1, 4096,
               "Most sequences in one batch. More gives more tokens a second in all, each slower.");
  flags.AddInt("max-waiting", &config->max_waiting, 0, 1 << 20,
               "Most requests that wait for a place in the batch; beyond, RESOURCE_EXHAUSTED.");
  flags.AddInt("max-model-len", &config->max_model_len, 0, kMaxTokens,
               "Most tokens of prompt and completion together; 0: what the model was made for.");
  flags.AddInt("threads", &config->threads, 0, 1024,
               "Threads that compute; 0: one a core. Changes no token, only the speed.");
  return flags;
}

}  // namespace winnow::config
