// winnow-prefill-worker: prefills prompts, returns the first token and ships the KV
// cache to a decode worker.

#include <algorithm>

#include "common/base/clock.h"
#include "common/rpc/channel_pool.h"
#include "common/worker/worker_base.h"
#include "prefill_worker/kv_sender.h"
#include "prefill_worker/prefill_loop.h"
#include "prefill_worker/prefill_service.h"

namespace winnow::prefill {
namespace {

constexpr char kProgram[] = "winnow-prefill-worker";

int Main(int argc, char** argv) {
  config::WorkerConfig config;
  config.server.listen = "127.0.0.1:50052";
  if (auto code = ParseWorkerFlags(kProgram, "prefill", argc, argv, &config)) return *code;

  absl::StatusOr<WorkerBase> base = MakeWorkerBase(config);
  if (!base.ok()) return FailMain(kProgram, base.status());
  const SystemClock clock;
  MetricsRegistry metrics;
  ChannelPool channels;
  PrefillLoop loop({.max_open = MaxOpenRequests(config),
                    .max_staged_segments = std::max(1, base->ring->num_slots() / 2)},
                   base->runtime.get(), base->ring.get(), &metrics);
  KvSender sender({.layout = base->layout, .incarnation = base->incarnation},
                  {.num_layers = base->limits.num_layers,
                   .deadlines = {},
                   .clock = &clock,
                   .ring = base->ring.get(),
                   .wake = [&] { loop.Wake(); }},
                  &channels);
  loop.Start(&sender);
  PrefillService prefill(&loop);
  const int code = ServeWorker(config.server, v1::WORKER_ROLE_PREFILL, *base,
                               {{v1::Prefill::service_full_name(), &prefill}},
                               {.load = [&] { return loop.load(); },
                                .start_draining = [&] { loop.StartDraining(); },
                                .draining = [&] { return loop.draining(); },
                                .open_requests = [&] { return loop.open_requests(); }},
                               &metrics);
  loop.Stop();
  return code;
}

}  // namespace
}  // namespace winnow::prefill

int main(int argc, char** argv) { return winnow::prefill::Main(argc, argv); }
