#include "common/worker/worker_base.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/log.h"
#include "common/base/status_macros.h"
#include "common/config/flags.h"
#include "common/metrics/http_endpoint.h"
#include "common/transport/fingerprint.h"
#include "common/worker/worker_service.h"
#include "kernels/cpu/cpu_path.h"

namespace winnow {
namespace {

constexpr uint64_t kMaxSlots = 256;

uint64_t DrawIncarnation() {
  std::random_device device;
  uint64_t incarnation = 0;
  while (incarnation == 0) incarnation = (uint64_t{device()} << 32) | device();
  return incarnation;
}

// Gauges that follow the load snapshot, brought up to date before each scrape.
class LoadGauges {
 public:
  LoadGauges(MetricsRegistry* metrics, std::function<v1::LoadSnapshot()> snapshot)
      : snapshot_(std::move(snapshot)),
        running_(metrics->Gauge("winnow_requests_running", "Sequences in work")),
        waiting_(metrics->Gauge("winnow_requests_waiting", "Requests that hold no KV memory yet")),
        used_(metrics->Gauge("winnow_kv_used_bytes", "KV memory that sequences hold")),
        total_(metrics->Gauge("winnow_kv_total_bytes", "KV memory allocated at start")),
        free_(metrics->Gauge("winnow_staging_slots_free", "Free staging slots")),
        quarantined_(metrics->Gauge("winnow_staging_slots_quarantined",
                                    "Staging slots of failed transfers, not quiet yet")) {}

  void Update() {
    const v1::LoadSnapshot snapshot = snapshot_();
    running_->Set(snapshot.running());
    waiting_->Set(snapshot.waiting());
    used_->Set(static_cast<double>(snapshot.kv_used_bytes()));
    total_->Set(static_cast<double>(snapshot.kv_total_bytes()));
    free_->Set(snapshot.staging_slots_free());
    quarantined_->Set(snapshot.staging_slots_quarantined());
  }

 private:
  const std::function<v1::LoadSnapshot()> snapshot_;
  prometheus::Gauge* const running_;
  prometheus::Gauge* const waiting_;
  prometheus::Gauge* const used_;
  prometheus::Gauge* const total_;
  prometheus::Gauge* const free_;
  prometheus::Gauge* const quarantined_;
};

}  // namespace

absl::StatusOr<WorkerBase> MakeWorkerBase(const config::WorkerConfig& config) {
  // Loading takes seconds and memory: an address in use is said before it.
  WINNOW_RETURN_IF_ERROR(CheckListen(config.server));
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  WINNOW_ASSIGN_OR_RETURN(
      std::unique_ptr<Runtime> runtime,
      Runtime::Create({.model_dir = config::ResolveModelDir(config.model),
                       .adapter_dir = config::ResolveAdapterDir(config.model, config.adapter),
                       .kv_mode = config.kv_mode,
                       .kv_format = config.kv_format,
                       .kv_budget_bytes = config.kv_budget_bytes,
                       .prefill_chunk = config.prefill_chunk,
                       .max_num_seqs = config.max_num_seqs,
                       .max_model_len = config.max_model_len,
                       .threads = config.threads == 0 ? cores : config.threads,
                       .dms_threshold = config.dms_threshold.value_or(0)}));
  return MakeWorkerBase(std::move(runtime));
}

absl::StatusOr<WorkerBase> MakeWorkerBase(std::unique_ptr<Runtime> runtime,
                                          const StagingOptions& staging) {
  WorkerBase base;
  const KvCacheOptions& cache = runtime->cache()->options();
  const int max_tokens = runtime->options().max_model_len;
  // A slot holds the largest layer whole where that is small.
  const uint64_t slot_bytes =
      std::min(LimitsOf(cache, max_tokens, /*slot_bytes=*/0).MaxLayerBytes(max_tokens),
               staging.max_slot_bytes);
  const uint64_t num_slots = std::clamp<uint64_t>(staging.bytes / slot_bytes, 2, kMaxSlots);
  WINNOW_ASSIGN_OR_RETURN(base.ring, StagingRing::Create(static_cast<int>(num_slots), slot_bytes));
  base.limits = LimitsOf(cache, max_tokens, slot_bytes);
  const Model& model = runtime->model();
  base.layout = MakeFingerprint(
      cache, KvModeName(runtime->kv_mode()), DescribeRule(runtime->transformer()->decision_rule()),
      model.digest(), model.config().architecture, kernels::CpuPathName(kernels::ActiveCpuPath()));
  base.incarnation = DrawIncarnation();
  base.runtime = std::move(runtime);
  LogLine(LogLevel::kInfo, "staging",
          absl::StrCat(LogField("slots", num_slots), LogField("slot_bytes", slot_bytes)));
  return base;
}

int MaxOpenRequests(const config::WorkerConfig& config) {
  return config.max_num_seqs + config.max_waiting;
}

v1::LoadSnapshot MakeSnapshot(v1::WorkerRole role, const WorkerBase& base,
                              const WorkerHooks& hooks) {
  const WorkerLoad load = hooks.load();
  v1::LoadSnapshot out;
  out.set_role(role);
  out.set_incarnation(base.incarnation);
  *out.mutable_layout() = base.layout;
  out.set_draining(hooks.draining());
  out.set_running(load.running);
  out.set_waiting(load.waiting);
  out.set_kv_used_bytes(load.kv_used_bytes);
  out.set_kv_total_bytes(base.runtime->cache()->allocated_bytes());
  out.set_max_model_len(base.runtime->options().max_model_len);
  out.set_pending_prompt_tokens(static_cast<uint64_t>(load.pending_prompt_tokens));
  out.set_kv_transfer_bytes(load.transfer_bytes);
  out.set_staging_slots_free(base.ring->free_slots());
  out.set_staging_slots_quarantined(base.ring->quarantined_slots());
  return out;
}

int ServeWorker(const config::ServerConfig& config, v1::WorkerRole role, const WorkerBase& base,
                const std::vector<ServedService>& services, const WorkerHooks& hooks,
                MetricsRegistry* metrics) {
  const bool decode = role == v1::WORKER_ROLE_DECODE;
  const char* const program = decode ? "winnow-decode-worker" : "winnow-prefill-worker";
  const auto snapshot = [&] { return MakeSnapshot(role, base, hooks); };
  AddBuildInfo(metrics, decode ? "decode" : "prefill");
  LoadGauges gauges(metrics, snapshot);
  WorkerService worker({.snapshot = snapshot,
                        .start_draining = hooks.start_draining,
                        .open_requests = hooks.open_requests});

  std::vector<ServedService> all = services;
  all.push_back({v1::Worker::service_full_name(), &worker});
  absl::StatusOr<std::unique_ptr<ServerRunner>> runner = ServerRunner::Start(config, all);
  if (!runner.ok()) return FailMain(program, runner.status());
  std::unique_ptr<HttpEndpoint> endpoint;
  if (!config.metrics.empty()) {
    absl::StatusOr<std::unique_ptr<HttpEndpoint>> started =
        HttpEndpoint::Start({.address = config.metrics,
                             .metrics = metrics,
                             .ready = [&] { return (*runner)->serving() && !hooks.draining(); },
                             .before_scrape = [&] { gauges.Update(); }});
    if (!started.ok()) return FailMain(program, started.status());
    endpoint = *std::move(started);
  }
  (*runner)->SetServing(true);
  (*runner)->AnnounceReady();
  (*runner)->RunUntilSignal(
      [&] {
        worker.Tick();
        if (hooks.draining()) (*runner)->SetServing(false);
      },
      [&](absl::Time deadline) {
        hooks.start_draining();
        while (hooks.open_requests() > 0 && absl::Now() < deadline &&
               !ServerRunner::Interrupted()) {
          worker.Tick();
          absl::SleepFor(absl::Milliseconds(20));
        }
        worker.Tick();
        worker.CloseWatches();
      });
  endpoint.reset();
  runner->reset();
  LogLine(LogLevel::kInfo, "stopped");
  return 0;
}

std::optional<int> ParseWorkerFlags(const char* program, const char* role, int argc, char** argv,
                                    config::WorkerConfig* config) {
  BlockShutdownSignals();
  config::FlagSet flags = config::WorkerFlags(program, config);
  if (std::optional<int> code = config::ParseOrExitCode(&flags, program, argc, argv, 1)) {
    return code;
  }
  SetLogRole(role);
  LogLine(LogLevel::kInfo, "configuration", flags.Effective());
  return std::nullopt;
}

int FailMain(const char* program, const absl::Status& status) {
  std::fprintf(stderr, "%s: %s\n", program, std::string(status.message()).c_str());
  return 1;
}

}  // namespace winnow
