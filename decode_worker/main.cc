// winnow-decode-worker: takes sequences over from prefill workers, or prefills them
// itself, and streams their tokens.

#include <memory>

#include "common/base/clock.h"
#include "common/worker/worker_base.h"
#include "decode_worker/decode_loop.h"
#include "decode_worker/decode_service.h"
#include "decode_worker/kv_transfer_service.h"

namespace winnow::decode {
namespace {

constexpr char kProgram[] = "winnow-decode-worker";

int Main(int argc, char** argv) {
  config::WorkerConfig config;
  config.server.listen = "127.0.0.1:50053";
  if (auto code = ParseWorkerFlags(kProgram, "decode", argc, argv, &config)) return *code;

  absl::StatusOr<WorkerBase> base = MakeWorkerBase(config);
  if (!base.ok()) return FailMain(kProgram, base.status());
  const SystemClock clock;
  MetricsRegistry metrics;
  const int max_open = MaxOpenRequests(config);
  DecodeLoop loop({.max_open = max_open, .receiver = {.max_transfers = max_open}}, &clock,
                  base->runtime.get(), base->ring.get(), &metrics);
  DecodeService decode(&loop);
  KvTransferService transfer(base->layout, loop.MakeTransferContext(*base), 2 * max_open,
                             {.open = [&](auto t) { return loop.receiver()->Open(std::move(t)); },
                              .draining = [&] { return loop.draining(); }});
  return ServeWorker(config.server, v1::WORKER_ROLE_DECODE, *base,
                     {{v1::Decode::service_full_name(), &decode},
                      {v1::KvTransfer::service_full_name(), &transfer}},
                     {.load = [&] { return loop.load(); },
                      .start_draining = [&] { loop.StartDraining(); },
                      .draining = [&] { return loop.draining(); },
                      .open_requests = [&] { return loop.open_requests(); }},
                     &metrics);
}

}  // namespace
}  // namespace winnow::decode

int main(int argc, char** argv) { return winnow::decode::Main(argc, argv); }
