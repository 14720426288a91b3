#include "decode_worker/decode_loop.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/log.h"
#include "common/rpc/grpc_status.h"
#include "common/worker/reason.h"

namespace winnow::decode {
namespace {

// Longest sleep without a wake: stage deadlines are noticed this late at most.
constexpr absl::Duration kIdleWait = absl::Milliseconds(50);

}  // namespace

DecodeLoop::DecodeLoop(const Options& options, const Clock* clock, Runtime* runtime,
                       StagingRing* ring, MetricsRegistry* metrics)
    : options_(options),
      max_num_seqs_(runtime->options().max_num_seqs),
      clock_(clock),
      cache_(runtime->cache()),
      receiver_(options.receiver, clock, runtime->cache(), ring, this),
      engine_(runtime->NewEngine(this, options.max_open)),
      intake_(options.max_open),
      tokens_total_(metrics->Counter("winnow_decode_tokens_total", "Tokens generated")),
      transferred_total_(metrics->Counter("winnow_kv_transfer_bytes_total",
                                          "Payload bytes of KV transfers that completed")),
      preemptions_total_(metrics->Counter("winnow_decode_preemptions_total",
                                          "Sequences that gave back their memory for others")),
      step_seconds_(metrics->Histogram("winnow_decode_step_seconds", "Duration of an engine step",
                                       StageBuckets())) {
  PublishLoad();
  thread_ = std::thread([this] { Run(); });
}

DecodeLoop::~DecodeLoop() {
  intake_.Stop();
  thread_.join();
}

TransferContext DecodeLoop::MakeTransferContext(const WorkerBase& base) {
  return {.limits = base.limits,
          .deadlines = options_.deadlines,
          .incarnation = base.incarnation,
          .clock = clock_,
          .ring = base.ring.get(),
          .max_pages =
              [cache = cache_](uint64_t layer_bytes, int num_tokens) {
                return MaxLayerPages(*cache, layer_bytes, num_tokens);
              },
          .knows_peer = nullptr,  // the service's
          .wake = [this] { Wake(); }};
}

absl::StatusOr<uint64_t> DecodeLoop::Submit(SequenceRequest request,
                                            std::shared_ptr<TokenSink> sink) {
  auto open = std::make_unique<Open>();
  open->request = std::move(request);
  open->sink = std::move(sink);
  return intake_.Submit(std::move(open));
}

void DecodeLoop::Run() {
  while (!intake_.stopping()) {
    bool worked = false;
    // First the cancels: their requests were pushed before, so they are started below.
    const std::vector<uint64_t> cancels = intake_.TakeCancels();
    for (OpenPtr& open : intake_.PopAll(absl::ZeroDuration())) {
      Start(std::move(open));
      worked = true;
    }
    for (uint64_t id : cancels) EndEverywhere(id, absl::CancelledError("the call was cancelled"));
    const EngineStats stats = engine_->stats();
    receiver_.Poll({.sequences = max_num_seqs_ - stats.running,
                    .reserved_pages = engine_->ReservedPages(),
                    .idle = stats.running == 0 && stats.waiting == 0});
    if (!engine_->idle()) {
      const absl::Time start = absl::Now();
      if (engine_->Step()) {
        step_seconds_->Observe(absl::ToDoubleSeconds(absl::Now() - start));
        worked = true;
      }
    }
    PublishLoad();
    if (worked || intake_.stopping()) continue;
    for (OpenPtr& open : intake_.PopAll(kIdleWait)) Start(std::move(open));
  }
  const absl::Status why = absl::UnavailableError("the worker is shutting down");
  intake_.FailQueued(why);
  receiver_.Close();
  while (!open_requests_.empty()) {
    EndEverywhere(open_requests_.begin()->first, why);
  }
  PublishLoad();
}

void DecodeLoop::Start(OpenPtr open) {
  const uint64_t id = open->id;
  SequenceRequest& request = open->request;
  absl::Status status;
  if (status = engine_->Validate(request.request); absl::IsResourceExhausted(status)) {
    status = WithReason(status, v1::ERROR_REASON_KV_NEVER_FITS);
  } else if (status.ok() && request.transfer_id.empty()) {
    status = engine_->Add(std::move(request.request));
  } else if (status.ok()) {
    status =
        receiver_.Expect(id, request.transfer_id, static_cast<int>(request.request.prompt.size()));
  }
  open_requests_.emplace(id, std::move(open));
  if (!status.ok()) End(id, status);
}

void DecodeLoop::EndEverywhere(uint64_t id, const absl::Status& why) {
  receiver_.Forget(id, why);
  End(id, why);
  engine_->Cancel(id);
}

void DecodeLoop::End(uint64_t id, const absl::Status& status) {
  const auto it = open_requests_.find(id);
  if (it == open_requests_.end()) return;
  const OpenPtr open = std::move(it->second);
  open_requests_.erase(it);
  intake_.Ended();
  LogLine(absl::IsCancelled(status) ? LogLevel::kInfo : LogLevel::kWarning, "request_failed",
          absl::StrCat(LogField("request_id", open->request.request_id),
                       LogField("status", StatusText(status))));
  open->sink->OnFailed(status);
}

void DecodeLoop::OnToken(uint64_t id, int index, int32_t token, const KvUsage& usage) {
  tokens_total_->Increment();
  const auto it = open_requests_.find(id);
  if (it == open_requests_.end()) return;
  it->second->sink->OnToken(index, token, usage, it->second->transferred_bytes);
}

void DecodeLoop::OnFinished(uint64_t id, FinishReason reason, const KvUsage& usage) {
  const auto it = open_requests_.find(id);
  if (it == open_requests_.end()) return;
  const OpenPtr open = std::move(it->second);
  open_requests_.erase(it);
  intake_.Ended();
  open->sink->OnFinished(reason, usage, open->transferred_bytes);
}

void DecodeLoop::OnFailed(uint64_t id, absl::Status status) {
  // Alone, it did not fit.
  if (absl::IsResourceExhausted(status)) {
    status = WithReason(status, v1::ERROR_REASON_KV_NEVER_FITS);
  }
  End(id, status);
}

absl::Status DecodeLoop::OnArrived(uint64_t id, SequenceCache cache, int32_t first_token,
                                   uint64_t bytes) {
  const auto it = open_requests_.find(id);
  if (it == open_requests_.end()) return absl::CancelledError("the Decode call has ended");
  it->second->transferred_bytes = bytes;
  absl::Status status =
      engine_->Attach(std::move(it->second->request.request), std::move(cache), first_token);
  if (!status.ok()) {
    End(id, status);
    return status;
  }
  transferred_total_->Increment(static_cast<double>(bytes));
  return absl::OkStatus();
}

void DecodeLoop::OnTransferFailed(uint64_t id, absl::Status status) { End(id, status); }

void DecodeLoop::PublishLoad() {
  const EngineStats stats = engine_->stats();
  preemptions_total_->Increment(static_cast<double>(stats.preemptions - preemptions_seen_));
  preemptions_seen_ = stats.preemptions;
  load_.Set({.running = stats.running + receiver_.receiving(),
             .waiting = stats.waiting + receiver_.claims() - receiver_.receiving(),
             .kv_used_bytes = cache_->bytes_held(),
             .pending_prompt_tokens = stats.pending_prompt_tokens,
             .transfer_bytes = receiver_.received_bytes()});
}

}  // namespace winnow::decode
