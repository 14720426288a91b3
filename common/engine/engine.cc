#include "common/engine/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"

namespace winnow {

struct Engine::Sequence {
  Request request;
  std::vector<int32_t> tokens;         // prompt, then what was generated
  std::optional<SequenceCache> cache;  // set while running
  uint64_t arrival = 0;
  size_t peak_bytes = 0;  // of earlier lives, before preemptions

  int generated() const { return static_cast<int>(tokens.size() - request.prompt.size()); }
  int computed() const { return cache.has_value() ? cache->length() : 0; }
  int uncomputed() const { return static_cast<int>(tokens.size()) - computed(); }
  bool decoding() const { return generated() > 0 && uncomputed() == 1; }
};

namespace {

// A cache that holds nothing and answers what a dense BF16 one of the same shape
// would hold.
std::unique_ptr<KvCache> DenseBf16Twin(const KvCacheOptions& options) {
  KvCacheOptions dense = options;
  dense.format = kernels::KvFormatId::kBf16;
  dense.window = 0;
  dense.max_sequences = 1;
  dense.budget_bytes = size_t{2} * static_cast<size_t>(options.num_layers) *
                       static_cast<size_t>(options.num_kv_heads) *
                       (kernels::PageBytes(options.head_dim) + sizeof(kernels::PageSegment));
  absl::StatusOr<std::unique_ptr<KvCache>> twin = KvCache::Create(dense);
  WINNOW_CHECK(twin.ok());
  return *std::move(twin);
}

}  // namespace

Engine::Engine(const EngineOptions& options, int vocab, KvCache* cache, Transformer* transformer,
               EventSink* sink)
    : options_(options),
      vocab_(vocab),
      cache_(cache),
      transformer_(transformer),
      sink_(sink),
      dense_bf16_(DenseBf16Twin(cache->options())),
      logits_(static_cast<size_t>(options.max_num_seqs) * static_cast<size_t>(vocab)) {
  WINNOW_CHECK(options.prefill_chunk >= 1 && options.max_num_seqs >= 1 &&
               options.max_model_len >= 1);
}

Engine::~Engine() = default;

absl::Status Engine::Validate(const Request& request) const {
  if (request.prompt.empty()) return absl::InvalidArgumentError("the prompt has no token");
  const size_t prompt_tokens = request.prompt.size();
  if (prompt_tokens + 1 > static_cast<size_t>(options_.max_model_len)) {
    return absl::InvalidArgumentError(absl::StrCat("a prompt of ", prompt_tokens,
                                                   " tokens leaves no room in a model length of ",
                                                   options_.max_model_len));
  }
  for (int32_t token : request.prompt) {
    if (token < 0 || token >= vocab_) {
      return absl::InvalidArgumentError(
          absl::StrCat("prompt token ", token, " is outside [0, ", vocab_, ")"));
    }
  }
  if (request.max_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens=", request.max_tokens, " is below 1"));
  }
  WINNOW_RETURN_IF_ERROR(ValidateSamplingParams(request.sampling, vocab_));
  // What the window alone holds is held whatever the model decides.
  const int window = cache_->options().window;
  const int64_t least_tokens =
      window == 0 ? static_cast<int64_t>(prompt_tokens)
                  : std::min<int64_t>(static_cast<int64_t>(prompt_tokens), window + 1);
  const int64_t least_pages = cache_->PagesUpperBound(least_tokens);
  if (least_pages > cache_->pool().total()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a prompt of ", prompt_tokens, " tokens needs at least ", least_pages,
                     " KV pages and the budget has ", cache_->pool().total()));
  }
  return absl::OkStatus();
}

absl::Status Engine::Add(Request request) {
  WINNOW_RETURN_IF_ERROR(Validate(request));
  if (static_cast<int>(waiting_.size()) >= options_.max_waiting) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: ", options_.max_waiting, " requests wait"));
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens = request.prompt;
  sequence->request = std::move(request);
  sequence->arrival = next_arrival_++;
  waiting_.push_back(std::move(sequence));
  return absl::OkStatus();
}

absl::Status Engine::Attach(Request request, SequenceCache cache, int32_t first_token) {
  WINNOW_RETURN_IF_ERROR(Validate(request));
  if (cache.length() != static_cast<int>(request.prompt.size())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the cache holds ", cache.length(), " tokens and the prompt has ", request.prompt.size()));
  }
  if (first_token < 0 || first_token >= vocab_) {
    return absl::InvalidArgumentError(
        absl::StrCat("first token ", first_token, " is outside [0, ", vocab_, ")"));
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens = request.prompt;
  sequence->tokens.push_back(first_token);
  sequence->request = std::move(request);
  sequence->cache.emplace(std::move(cache));
  sequence->arrival = next_arrival_++;
  running_.push_back(std::move(sequence));
  return absl::OkStatus();
}

void Engine::Cancel(uint64_t id) {
  const auto has_id = [id](const SequencePtr& s) { return s->request.id == id; };
  bool found = false;
  if (auto it = std::find_if(running_.begin(), running_.end(), has_id); it != running_.end()) {
    running_.erase(it);
    found = true;
  } else if (auto at = std::find_if(waiting_.begin(), waiting_.end(), has_id);
             at != waiting_.end()) {
    waiting_.erase(at);
    found = true;
  }
  if (found) sink_->OnFailed(id, absl::CancelledError("cancelled"));
}

int64_t Engine::ReservedPages() const {
  return cache_->StepReservePages(static_cast<int>(running_.size()));
}

EngineStats Engine::stats() const {
  EngineStats stats = totals_;
  stats.running = static_cast<int>(running_.size());
  stats.waiting = static_cast<int>(waiting_.size());
  for (const SequencePtr& s : waiting_) stats.pending_prompt_tokens += s->uncomputed();
  for (const SequencePtr& s : running_) {
    if (!s->decoding()) stats.pending_prompt_tokens += s->uncomputed();
  }
  return stats;
}

void Engine::AdmitWaiting() {
  while (!waiting_.empty() && static_cast<int>(running_.size()) < options_.max_num_seqs) {
    Sequence* next = waiting_.front().get();
    if (!running_.empty()) {
      // Its first chunk, undiminished, beside a step of everything that runs.
      const int first = std::min(options_.prefill_chunk, static_cast<int>(next->tokens.size()));
      const int64_t needed = cache_->PagesUpperBound(first) +
                             cache_->StepReservePages(static_cast<int>(running_.size()) + 1);
      if (needed > cache_->pool().available()) return;
    }
    absl::StatusOr<SequenceCache> cache = cache_->NewSequence();
    if (!cache.ok()) return;  // transfers hold the other sequences
    next->cache.emplace(*std::move(cache));
    const auto older = [next](const SequencePtr& s) { return s->arrival > next->arrival; };
    running_.insert(std::find_if(running_.begin(), running_.end(), older),
                    std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

bool Engine::PreemptNewest(const Sequence* keep) {
  // running_ is sorted by arrival.
  Sequence* victim = running_.back().get();
  if (victim == keep && running_.size() == 1) return false;
  std::erase_if(batch_, [victim](const Scheduled& item) { return item.sequence == victim; });
  victim->peak_bytes = std::max(victim->peak_bytes, victim->cache->peak_bytes());
  victim->cache.reset();
  waiting_.push_front(std::move(running_.back()));
  running_.pop_back();
  ++totals_.preemptions;
  return true;
}

// True if `sequence` may run `num_tokens` tokens in this step. False if it may not:
// it waits, was preempted, or has failed.
bool Engine::Reserve(Sequence* sequence, int num_tokens) {
  for (;;) {
    if (sequence->cache->BeginStep(num_tokens).ok()) return true;
    const bool newest = running_.back().get() == sequence;
    if (newest && running_.size() == 1) {
      // Nobody else computes. Transfers may hold memory; without any it never fits.
      if (cache_->num_sequences() > 1) return false;
      Fail(sequence,
           absl::ResourceExhaustedError(absl::StrCat(
               "a sequence of ", sequence->tokens.size(), " tokens does not fit the KV budget of ",
               cache_->pool().total(), " pages of ", cache_->page_bytes(), " bytes")));
      return false;
    }
    if (!PreemptNewest(sequence)) return false;
    if (newest) return false;
  }
}

void Engine::Schedule() {
  batch_.clear();
  // Indices, not iterators: Reserve() may remove sequences from the end.
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence* sequence = running_[i].get();
    if (!sequence->decoding()) continue;
    if (Reserve(sequence, 1)) {
      batch_.push_back({.sequence = sequence, .num_tokens = 1, .sample = true});
    } else if (i < running_.size() && running_[i].get() != sequence) {
      --i;  // it failed and was removed
    }
  }
  int budget = options_.prefill_chunk;
  for (size_t i = 0; i < running_.size() && budget > 0; ++i) {
    Sequence* sequence = running_[i].get();
    if (sequence->decoding()) continue;
    const int begin = sequence->computed();
    const int size = static_cast<int>(sequence->tokens.size());
    const int border = (begin / options_.prefill_chunk + 1) * options_.prefill_chunk;
    const int num_tokens = std::min(border, size) - begin;
    if (num_tokens > budget) break;  // in order: a later, shorter one must not overtake
    if (Reserve(sequence, num_tokens)) {
      batch_.push_back(
          {.sequence = sequence, .num_tokens = num_tokens, .sample = begin + num_tokens == size});
      budget -= num_tokens;
    } else if (i < running_.size() && running_[i].get() != sequence) {
      --i;
    }
  }
}

bool Engine::Step() {
  AdmitWaiting();
  if (running_.empty()) return false;
  Schedule();
  if (batch_.empty()) return false;

  std::vector<Transformer::Item> items;
  items.reserve(batch_.size());
  size_t rows = 0;
  for (const Scheduled& s : batch_) rows += s.sample ? 1 : 0;
  if (logits_.size() < rows * static_cast<size_t>(vocab_)) {
    logits_.resize(rows * static_cast<size_t>(vocab_));
  }
  rows = 0;
  for (const Scheduled& s : batch_) {
    Transformer::Item item{.cache = &*s.sequence->cache,
                           .tokens = absl::MakeConstSpan(s.sequence->tokens)
                                         .subspan(static_cast<size_t>(s.sequence->computed()),
                                                  static_cast<size_t>(s.num_tokens))};
    if (s.sample) item.logits = logits_.data() + static_cast<size_t>(vocab_) * rows++;
    items.push_back(item);
    if (!s.sequence->decoding()) totals_.prompt_tokens += s.num_tokens;
  }
  const auto layer_done = [this](int layer) {
    for (const Scheduled& s : batch_) {
      if (s.sample && s.sequence->request.prefill_only) {
        sink_->OnLayerFinal(s.sequence->request.id, layer, *s.sequence->cache);
      }
    }
  };
  if (absl::Status status = transformer_->Forward(items, layer_done); !status.ok()) {
    FailBatch(status);
    return true;
  }
  rows = 0;
  const std::vector<Scheduled> batch = std::exchange(batch_, {});
  for (const Scheduled& s : batch) {
    if (!s.sample) continue;
    const Request& request = s.sequence->request;
    const absl::Span<const float> logits(logits_.data() + static_cast<size_t>(vocab_) * rows++,
                                         static_cast<size_t>(vocab_));
    const absl::StatusOr<int32_t> token =
        Sample(logits, request.sampling,
               {.seed = request.seed, .position = s.sequence->tokens.size(), .sample_index = 0});
    if (token.ok()) {
      Sampled(s.sequence, *token);
    } else {
      Fail(s.sequence, token.status());
    }
  }
  return true;
}

void Engine::Sampled(Sequence* sequence, int32_t token) {
  const Request& request = sequence->request;
  sequence->tokens.push_back(token);
  ++totals_.generated_tokens;
  const KvUsage usage = UsageOf(*sequence);
  sink_->OnToken(request.id, sequence->generated() - 1, token, usage);
  const bool stop = std::find(request.stop_token_ids.begin(), request.stop_token_ids.end(),
                              token) != request.stop_token_ids.end();
  if (stop || sequence->generated() >= request.max_tokens ||
      static_cast<int>(sequence->tokens.size()) >= options_.max_model_len) {
    const uint64_t id = request.id;
    Remove(sequence);
    sink_->OnFinished(id, stop ? FinishReason::kStop : FinishReason::kLength, usage);
  } else if (request.prefill_only) {
    const uint64_t id = request.id;
    SequenceCache cache = std::move(*sequence->cache);
    Remove(sequence);
    sink_->OnPrefilled(id, std::move(cache));
  }
}

KvUsage Engine::UsageOf(const Sequence& sequence) const {
  const int length = sequence.computed();
  return {
      .peak_bytes = std::max(sequence.peak_bytes, sequence.cache->peak_bytes()),
      .dense_bf16_bytes = dense_bf16_->BytesUpperBound(length),
      .live_tokens = static_cast<uint64_t>(sequence.cache->live_tokens()),
      .logical_tokens = static_cast<uint64_t>(length) * static_cast<uint64_t>(cache_->num_spans())};
}

void Engine::Remove(const Sequence* sequence) {
  std::erase_if(running_, [sequence](const SequencePtr& s) { return s.get() == sequence; });
}

void Engine::Fail(Sequence* sequence, absl::Status status) {
  const uint64_t id = sequence->request.id;
  std::erase_if(batch_, [sequence](const Scheduled& s) { return s.sequence == sequence; });
  Remove(sequence);
  sink_->OnFailed(id, std::move(status));
}

// A failed step leaves its sequences with layers of unequal length: they end here.
void Engine::FailBatch(const absl::Status& status) {
  const std::vector<Scheduled> batch = std::exchange(batch_, {});
  for (const Scheduled& s : batch) Fail(s.sequence, status);
}

}  // namespace winnow
