#include "prefill_worker/prefill_loop.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/log.h"
#include "common/rpc/grpc_status.h"
#include "common/worker/reason.h"

namespace winnow::prefill {
namespace {

// Longest sleep without a wake: stage deadlines are noticed this late at most.
constexpr absl::Duration kIdleWait = absl::Milliseconds(50);
constexpr absl::Duration kLinger = absl::Seconds(1);

}  // namespace

PrefillLoop::PrefillLoop(const Options& options, Runtime* runtime, StagingRing* ring,
                         MetricsRegistry* metrics)
    : options_(options),
      cache_(runtime->cache()),
      ring_(ring),
      engine_(runtime->NewEngine(this, options.max_open)),
      intake_(options.max_open),
      prompt_tokens_total_(
          metrics->Counter("winnow_prefill_tokens_total", "Prompt tokens computed")),
      transferred_total_(metrics->Counter("winnow_kv_transfer_bytes_total",
                                          "Payload bytes of KV transfers that completed")),
      early_layers_total_(
          metrics->Counter("winnow_prefill_layers_acked_before_compute_end_total",
                           "Layers whose transfer was acknowledged while the prompt's last "
                           "layers were still being computed")),
      step_seconds_(metrics->Histogram("winnow_prefill_step_seconds", "Duration of an engine step",
                                       StageBuckets())) {
  PublishLoad();
}

void PrefillLoop::Start(KvSender* sender) {
  sender_ = sender;
  thread_ = std::thread([this] { Run(); });
}

PrefillLoop::~PrefillLoop() { Stop(); }

void PrefillLoop::Stop() {
  intake_.Stop();
  if (thread_.joinable()) thread_.join();
}

absl::StatusOr<uint64_t> PrefillLoop::Submit(PromptRequest request,
                                             std::shared_ptr<PromptSink> sink) {
  auto open = std::make_unique<Open>();
  open->request = std::move(request);
  open->request.request.prefill_only = true;
  open->sink = std::move(sink);
  return intake_.Submit(std::move(open));
}

void PrefillLoop::Run() {
  while (!intake_.stopping()) {
    bool worked = false;
    // First the cancels: their prompts were pushed before, so they are started below.
    const std::vector<uint64_t> cancels = intake_.TakeCancels();
    for (OpenPtr& open : intake_.PopAll(absl::ZeroDuration())) {
      StartPrompt(std::move(open));
      worked = true;
    }
    for (uint64_t id : cancels) End(id, absl::CancelledError("the call was cancelled"));
    AdvanceTransfers();
    DropNeedless(absl::Now());
    if (!engine_->idle()) {
      const absl::Time start = absl::Now();
      if (engine_->Step()) {
        step_seconds_->Observe(absl::ToDoubleSeconds(absl::Now() - start));
        worked = true;
      }
    }
    PublishLoad();
    if (worked || intake_.stopping()) continue;
    for (OpenPtr& open : intake_.PopAll(kIdleWait)) StartPrompt(std::move(open));
  }
  const absl::Status why = absl::UnavailableError("the worker is shutting down");
  intake_.FailQueued(why);
  while (!open_prompts_.empty()) End(open_prompts_.begin()->first, why);
  DropNeedless(absl::InfiniteFuture());
  PublishLoad();
}

void PrefillLoop::StartPrompt(OpenPtr open) {
  PromptRequest& request = open->request;
  const uint64_t id = open->id;
  const int prompt_tokens = static_cast<int>(request.request.prompt.size());
  const bool transfers = request.request.max_tokens > 1;
  absl::Status status = engine_->Validate(request.request);
  if (absl::IsResourceExhausted(status)) {
    status = WithReason(status, v1::ERROR_REASON_KV_NEVER_FITS);
  }
  if (status.ok()) status = engine_->Add(std::move(request.request));
  if (status.ok() && transfers) {
    open->transfer = sender_->Begin(request.transfer_id, prompt_tokens, request.decode_target,
                                    request.decode_incarnation);
  }
  open_prompts_.emplace(id, std::move(open));
  if (!status.ok()) End(id, status);
}

PrefillLoop::Open* PrefillLoop::Find(uint64_t id) {
  const auto it = open_prompts_.find(id);
  return it == open_prompts_.end() ? nullptr : it->second.get();
}

PrefillLoop::OpenPtr PrefillLoop::Remove(uint64_t id) {
  const auto it = open_prompts_.find(id);
  if (it == open_prompts_.end()) return nullptr;
  OpenPtr open = std::move(it->second);
  open_prompts_.erase(it);
  intake_.Ended();
  return open;
}

void PrefillLoop::End(uint64_t id, const absl::Status& status) {
  const OpenPtr open = Remove(id);
  if (open == nullptr) return;
  if (open->transfer != nullptr) open->transfer->Fail(status);
  open->cache.reset();
  engine_->Cancel(id);  // its OnFailed() finds nothing any more
  LogLine(absl::IsCancelled(status) ? LogLevel::kInfo : LogLevel::kWarning, "prompt_failed",
          absl::StrCat(LogField("request_id", open->request.request_id),
                       LogField("status", StatusText(status))));
  open->sink->OnFailed(status);
}

void PrefillLoop::Pack(Open* open, int end_layer, const SequenceCache& cache) {
  while (open->packed_layers < end_layer &&
         open->transfer->staged() < options_.max_staged_segments && PackSegment(open, cache)) {
  }
}

bool PrefillLoop::PackSegment(Open* open, const SequenceCache& cache) {
  const int layer = open->packed_layers;
  const uint64_t layer_bytes = cache.ExportBytes(layer);
  const std::optional<StagedSlot> slot = ring_->Take();
  if (!slot.has_value()) return false;
  TransferSender::Segment segment{
      .slot = *slot,
      .layer = layer,
      .layer_bytes = layer_bytes,
      .offset = open->layer_offset,
      .bytes = std::min<uint64_t>(layer_bytes - open->layer_offset, ring_->slot_bytes())};
  if (segment.bytes == layer_bytes) {
    cache.Export(layer, ring_->data(*slot));
  } else {
    if (open->layer.empty()) {
      open->layer.resize(layer_bytes);
      cache.Export(layer, open->layer.data());
    }
    std::memcpy(ring_->data(*slot), open->layer.data() + segment.offset, segment.bytes);
  }
  open->layer_offset += segment.bytes;
  if (open->layer_offset == layer_bytes) {
    open->layer.clear();
    open->layer_offset = 0;
    ++open->packed_layers;
  }
  open->transfer->Push(segment);
  return true;
}

void PrefillLoop::AdvanceTransfers() {
  std::vector<std::pair<uint64_t, absl::Status>> failed;
  std::vector<uint64_t> done;
  for (const auto& [id, open] : open_prompts_) {
    if (open->transfer == nullptr) continue;
    if (open->transfer->done()) {
      done.push_back(id);
      continue;
    }
    if (absl::Status status = open->transfer->Check(); !status.ok()) {
      failed.emplace_back(id, std::move(status));
    } else if (open->cache.has_value()) {
      Pack(open.get(), cache_->options().num_layers, *open->cache);
    }
  }
  for (uint64_t id : done) {
    const OpenPtr open = Remove(id);
    open->cache.reset();
    const uint64_t bytes = open->transfer->acked_bytes();
    sent_bytes_ += bytes;
    transferred_total_->Increment(static_cast<double>(bytes));
    open->sink->OnTransferred(bytes);
  }
  for (const auto& [id, status] : failed) End(id, status);
}

void PrefillLoop::DropNeedless(absl::Time now) {
  std::erase_if(needless_, [now](const Needless& needless) {
    if (needless.transfer->Check().ok() && now < needless.until) return false;
    needless.transfer->Fail(absl::CancelledError("the first token ended the generation"));
    return true;
  });
}

void PrefillLoop::OnToken(uint64_t id, int /*index*/, int32_t token, const KvUsage& usage) {
  Open* open = Find(id);
  if (open == nullptr) return;
  open->first_token = token;
  open->usage = usage;
}

void PrefillLoop::OnFinished(uint64_t id, FinishReason reason, const KvUsage& usage) {
  const OpenPtr open = Remove(id);
  if (open == nullptr) return;
  if (open->transfer != nullptr) {
    needless_.push_back({open->transfer, absl::Now() + kLinger});
  }
  open->sink->OnEnded(*open->first_token, reason, usage);
}

void PrefillLoop::OnFailed(uint64_t id, absl::Status status) {
  // From within the engine, which has forgotten the prompt already. Alone, it did not fit:
  if (absl::IsResourceExhausted(status)) {
    status = WithReason(status, v1::ERROR_REASON_KV_NEVER_FITS);
  }
  const OpenPtr open = Remove(id);
  if (open == nullptr) return;
  if (open->transfer != nullptr) open->transfer->Fail(status);
  open->sink->OnFailed(std::move(status));
}

void PrefillLoop::OnLayerFinal(uint64_t id, int layer, const SequenceCache& cache) {
  Open* open = Find(id);
  if (open != nullptr && open->transfer != nullptr) Pack(open, layer + 1, cache);
}

void PrefillLoop::OnPrefilled(uint64_t id, SequenceCache cache) {
  Open* open = Find(id);
  if (open == nullptr || open->transfer == nullptr) return;
  early_layers_total_->Increment(open->transfer->acked_layers());
  open->sink->OnFirstToken(*open->first_token, open->usage);
  open->cache.emplace(std::move(cache));
  Pack(open, cache_->options().num_layers, *open->cache);
  open->transfer->SetFirstToken(*open->first_token);
}

void PrefillLoop::PublishLoad() {
  const EngineStats stats = engine_->stats();
  prompt_tokens_total_->Increment(static_cast<double>(stats.prompt_tokens - prompt_tokens_seen_));
  prompt_tokens_seen_ = stats.prompt_tokens;
  int transferring = 0;
  for (const auto& [id, open] : open_prompts_) transferring += open->cache.has_value() ? 1 : 0;
  load_.Set({.running = stats.running + transferring,
             .waiting = stats.waiting,
             .kv_used_bytes = cache_->bytes_held(),
             .pending_prompt_tokens = stats.pending_prompt_tokens,
             .transfer_bytes = sent_bytes_});
}

}  // namespace winnow::prefill
