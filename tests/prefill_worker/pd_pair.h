#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "common/rpc/channel_pool.h"
#include "common/worker/worker_base.h"
#include "decode_worker/decode_loop.h"
#include "decode_worker/decode_service.h"
#include "decode_worker/kv_transfer_service.h"
#include "prefill_worker/kv_sender.h"
#include "prefill_worker/prefill_loop.h"
#include "prefill_worker/prefill_service.h"

namespace winnow::testing {

inline WorkerBase MakeTestBase(const RuntimeOptions& options, const StagingOptions& staging) {
  absl::StatusOr<std::unique_ptr<Runtime>> runtime = Runtime::Create(options);
  EXPECT_TRUE(runtime.ok()) << runtime.status();
  absl::StatusOr<WorkerBase> base = MakeWorkerBase(*std::move(runtime), staging);
  EXPECT_TRUE(base.ok()) << base.status();
  return *std::move(base);
}

inline std::unique_ptr<grpc::Server> Serve(const std::vector<grpc::Service*>& services,
                                           std::string* address) {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  *address = "127.0.0.1:" + std::to_string(port);
  return server;
}

// A decode worker in this process, behind a real server on loopback.
class DecodeWorker {
 public:
  explicit DecodeWorker(const RuntimeOptions& options, const StagingOptions& staging = {},
                        const decode::DecodeLoop::Options& loop_options = {})
      : base(MakeTestBase(options, staging)),
        loop(loop_options, &clock, base.runtime.get(), base.ring.get(), &metrics),
        decode(&loop),
        transfer(base.layout, loop.MakeTransferContext(base), 64,
                 {.open = [this](auto t) { return loop.receiver()->Open(std::move(t)); },
                  .draining = [this] { return loop.draining(); }}) {
    server = Serve({&decode, &transfer}, &address);
    stub = v1::Decode::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  }
  ~DecodeWorker() { Kill(); }
  // Ends the server at once, as a crash does to its peers.
  void Kill() {
    if (server != nullptr) server->Shutdown(std::chrono::system_clock::now());
    server.reset();
  }
  // True if nothing is held, within a second.
  bool Empty() { return EmptyWithin(absl::Seconds(1)); }
  bool EmptyWithin(absl::Duration timeout) {
    const absl::Time end = absl::Now() + timeout;
    for (;;) {
      if (loop.load().kv_used_bytes == 0 && loop.open_requests() == 0 &&
          base.ring->free_slots() == base.ring->num_slots()) {
        return true;
      }
      if (absl::Now() > end) return false;
      absl::SleepFor(absl::Milliseconds(5));
    }
  }

  SystemClock clock;
  MetricsRegistry metrics;
  WorkerBase base;
  decode::DecodeLoop loop;
  decode::DecodeService decode;
  decode::KvTransferService transfer;
  std::string address;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<v1::Decode::Stub> stub;
};

// Likewise a prefill worker.
class PrefillWorker {
 public:
  explicit PrefillWorker(const RuntimeOptions& options, const StagingOptions& staging = {},
                         const StageDeadlines& deadlines = {})
      : base(MakeTestBase(options, staging)),
        loop({.max_open = 64, .max_staged_segments = 4}, base.runtime.get(), base.ring.get(),
             &metrics),
        sender({.layout = base.layout,
                .incarnation = base.incarnation,
                .hello_timeout = absl::Seconds(1)},
               {.num_layers = base.limits.num_layers,
                .deadlines = deadlines,
                .clock = &clock,
                .ring = base.ring.get(),
                .wake = [this] { loop.Wake(); }},
               &channels),
        prefill(&loop) {
    loop.Start(&sender);
    server = Serve({&prefill}, &address);
    stub = v1::Prefill::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  }
  ~PrefillWorker() {
    server->Shutdown(std::chrono::system_clock::now());
    loop.Stop();
  }
  bool Empty() {
    for (int i = 0; i < 400; ++i) {
      if (loop.load().kv_used_bytes == 0 && loop.open_requests() == 0 &&
          base.ring->free_slots() == base.ring->num_slots()) {
        return true;
      }
      absl::SleepFor(absl::Milliseconds(5));
    }
    return false;
  }

  SystemClock clock;
  MetricsRegistry metrics;
  ChannelPool channels;
  WorkerBase base;
  prefill::PrefillLoop loop;
  prefill::KvSender sender;
  prefill::PrefillService prefill;
  std::string address;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<v1::Prefill::Stub> stub;
};

}  // namespace winnow::testing
