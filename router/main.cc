#include <cstdio>

#include "common/base/log.h"
#include "common/config/config.h"
#include "common/metrics/http_endpoint.h"
#include "common/rpc/server_runner.h"
#include "router/inference_service.h"

namespace winnow::router {
namespace {

// How long a router that has its decode worker waits for a prefill worker before it
// serves without.
constexpr absl::Duration kPrefillGrace = absl::Seconds(15);

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "winnow-router: %s\n", std::string(status.message()).c_str());
  return 1;
}

// Serving means that a decode worker is alive; the first time, a whole pair, or no
// prefill worker within the grace.
class Readiness {
 public:
  Readiness(const WorkerRegistry* registry, bool wants_prefill, ServerRunner* server)
      : registry_(registry), wants_prefill_(wants_prefill), server_(server) {}

  // Main thread, a few times a second.
  void Tick() {
    const bool decode = !registry_->Decode().empty();
    if (decode && decode_since_ == absl::InfiniteFuture()) decode_since_ = absl::Now();
    const bool pair = decode && (!wants_prefill_ || !registry_->Prefill().empty());
    const bool first_time_ok = pair || absl::Now() - decode_since_ > kPrefillGrace;
    const bool serving = announced_ ? decode : decode && first_time_ok;
    if (serving != server_->serving()) server_->SetServing(serving);
    if (serving && !announced_) {
      announced_ = true;
      server_->AnnounceReady();
    }
  }

 private:
  const WorkerRegistry* const registry_;
  const bool wants_prefill_;
  ServerRunner* const server_;
  absl::Time decode_since_ = absl::InfiniteFuture();
  bool announced_ = false;
};

int Main(int argc, char** argv) {
  BlockShutdownSignals();
  SetLogRole("router");
  config::RouterConfig config;
  config::FlagSet flags = config::RouterFlags(&config);
  if (auto code = config::ParseOrExitCode(&flags, "winnow-router", argc, argv, 1)) return *code;
  if (config.decode_workers.empty()) {
    std::fprintf(stderr, "winnow-router: --decode-workers names no worker (see --help)\n");
    return 2;
  }
  LogLine(LogLevel::kInfo, "config", flags.Effective());

  if (absl::Status status = CheckListen(config.server); !status.ok()) return Fail(status);
  absl::StatusOr<std::unique_ptr<ServedModel>> model =
      ServedModel::Load(config::ResolveModelDir(config.model), config.max_model_len);
  if (!model.ok()) return Fail(model.status());
  MetricsRegistry registry;
  AddBuildInfo(&registry, "router");
  RouterMetrics metrics(&registry, (*model)->name());
  ChannelPool channels;
  WorkerRegistry workers(config.prefill_workers, config.decode_workers, &channels, &registry);
  Admission admission(config.max_concurrency, config.max_queue);
  InferenceService service({.model = model->get(),
                            .registry = &workers,
                            .channels = &channels,
                            .admission = &admission,
                            .metrics = &metrics},
                           config.default_deadline);
  absl::StatusOr<std::unique_ptr<ServerRunner>> server =
      ServerRunner::Start(config.server, {{v1::Inference::service_full_name(), &service}});
  if (!server.ok()) return Fail(server.status());
  std::unique_ptr<HttpEndpoint> http;
  if (!config.server.metrics.empty()) {
    auto started = HttpEndpoint::Start({.address = config.server.metrics,
                                        .metrics = &registry,
                                        .ready = [s = server->get()] { return s->serving(); },
                                        .before_scrape =
                                            [&] {
                                              metrics.running->Set(admission.running());
                                              metrics.waiting->Set(admission.waiting());
                                            }});
    if (!started.ok()) return Fail(started.status());
    http = *std::move(started);
  }
  Readiness readiness(&workers, !config.prefill_workers.empty(), server->get());
  (*server)->RunUntilSignal([&] { readiness.Tick(); },
                            [&](absl::Time deadline) {
                              service.Drain(deadline, [] { return ServerRunner::Interrupted(); });
                            });
  return 0;
}

}  // namespace
}  // namespace winnow::router

int main(int argc, char** argv) { return winnow::router::Main(argc, argv); }
