#include "common/kv/sequence_cache.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"
#include "kernels/kv_pack.h"

namespace winnow {

using kernels::KvLayout;
using kernels::PageNeed;
using kernels::Span;

SequenceCache::SequenceCache(KvCache* cache)
    : cache_(cache), spans_(static_cast<size_t>(cache->num_spans())) {
  const KvLayout& layout = cache->layout();
  const size_t row_bytes = kernels::TokenBytes(layout.format, layout.head_dim);
  const size_t window = static_cast<size_t>(layout.window);
  memory_.resize(spans_.size() * (row_bytes + window));
  uint8_t* rows = memory_.data();
  uint8_t* flags = rows + spans_.size() * row_bytes;
  for (Span& span : spans_) {
    span.newest = rows;
    span.ring_evict = flags;
    rows += row_bytes;
    flags += window;
  }
  ++cache->num_sequences_;
  UpdateBytes();
}

SequenceCache::SequenceCache(SequenceCache&& other) noexcept { MoveFrom(&other); }

SequenceCache& SequenceCache::operator=(SequenceCache&& other) noexcept {
  if (this != &other) {
    Release();
    MoveFrom(&other);
  }
  return *this;
}

SequenceCache::~SequenceCache() { Release(); }

void SequenceCache::MoveFrom(SequenceCache* other) {
  cache_ = std::exchange(other->cache_, nullptr);
  spans_ = std::move(other->spans_);  // the memory stays where it is
  memory_ = std::move(other->memory_);
  pages_held_ = std::exchange(other->pages_held_, 0);
  segments_held_ = std::exchange(other->segments_held_, 0);
  reserved_ = std::exchange(other->reserved_, 0);
  counted_bytes_ = std::exchange(other->counted_bytes_, 0);
  peak_bytes_ = std::exchange(other->peak_bytes_, 0);
}

void SequenceCache::Release() {
  if (cache_ == nullptr) return;
  for (Span& span : spans_) {
    cache_->ReleaseTable(&span.survivors);
    cache_->ReleaseTable(&span.ring);
  }
  cache_->pool_.Unreserve(reserved_);
  cache_->AddBytes(-static_cast<int64_t>(counted_bytes_));
  --cache_->num_sequences_;
  cache_ = nullptr;
}

int SequenceCache::length() const { return length(cache_->options().num_layers - 1); }

int SequenceCache::length(int layer) const { return spans(layer)[0].num_tokens; }

const Span* SequenceCache::spans(int layer) const {
  WINNOW_CHECK(cache_ != nullptr && layer >= 0 && layer < cache_->options().num_layers);
  return spans_.data() + static_cast<int64_t>(layer) * cache_->options().num_kv_heads;
}

Span* SequenceCache::MutableSpans(int layer) { return const_cast<Span*>(spans(layer)); }

int SequenceCache::live_tokens(int layer, int head) const { return span(layer, head).num_live(); }

int64_t SequenceCache::live_tokens() const {
  int64_t live = 0;
  for (const Span& span : spans_) live += span.num_live();
  return live;
}

size_t SequenceCache::bytes_held() const {
  return static_cast<size_t>(pages_held_) * cache_->page_bytes() +
         static_cast<size_t>(segments_held_) * sizeof(kernels::PageSegment) +
         cache_->SequenceFixedBytes();
}

void SequenceCache::UpdateBytes() {
  const size_t bytes = bytes_held();
  cache_->AddBytes(static_cast<int64_t>(bytes) - static_cast<int64_t>(counted_bytes_));
  counted_bytes_ = bytes;
  peak_bytes_ = std::max(peak_bytes_, bytes);
}

int64_t SequenceCache::StepPages(int num_tokens) const {
  int64_t pages = 0;
  for (const Span& span : spans_) {
    // No decisions: the tokens to come count as kept. One token moves out only
    // what is decided already, so that its count is exact.
    const PageNeed need = CountPageNeed(cache_->layout(), span, num_tokens, nullptr, 0);
    pages += need.ring + need.survivors;
  }
  return pages;
}

absl::Status SequenceCache::BeginStep(int num_tokens) {
  if (num_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("BeginStep: num_tokens=", num_tokens));
  }
  const int64_t pages = StepPages(num_tokens);
  PagePool& pool = cache_->pool_;
  if (pages > reserved_ && !pool.Reserve(pages - reserved_)) {
    return absl::ResourceExhaustedError(absl::StrCat("a step of ", num_tokens, " tokens may take ",
                                                     pages, " KV pages, ",
                                                     pool.available() + reserved_, " are free"));
  }
  if (pages < reserved_) pool.Unreserve(reserved_ - pages);
  reserved_ = pages;
  return absl::OkStatus();
}

absl::Status SequenceCache::Draw(int64_t num_pages) {
  PagePool& pool = cache_->pool_;
  const int64_t beyond = num_pages - reserved_;
  if (beyond > pool.available()) {
    return absl::ResourceExhaustedError(absl::StrCat("layer takes ", num_pages, " KV pages, ",
                                                     pool.available() + reserved_, " are free"));
  }
  const int64_t drawn = std::min(num_pages, reserved_);
  pool.Unreserve(drawn);
  reserved_ -= drawn;
  return absl::OkStatus();
}

void SequenceCache::Attach(kernels::PageTable* table, int num_pages) {
  for (int i = 0; i < num_pages; ++i) segments_held_ += cache_->AttachPage(table);
  pages_held_ += num_pages;
}

void SequenceCache::EndLayer(int layer) {
  if (layer == cache_->options().num_layers - 1) {
    cache_->pool_.Unreserve(reserved_);
    reserved_ = 0;
  }
  UpdateBytes();
}

absl::Status SequenceCache::AttachFor(int layer, const uint8_t* decisions, int num_tokens) {
  const KvLayout& layout = cache_->layout();
  const int num_kv_heads = cache_->options().num_kv_heads;
  Span* spans = MutableSpans(layer);
  // Count, then take: nothing is changed if there is too little.
  const auto need_of = [&](int g) {
    return CountPageNeed(layout, spans[g], num_tokens,
                         decisions == nullptr ? nullptr : decisions + g, num_kv_heads);
  };
  int64_t pages = 0;
  for (int g = 0; g < num_kv_heads; ++g) {
    const PageNeed need = need_of(g);
    pages += need.ring + need.survivors;
  }
  WINNOW_RETURN_IF_ERROR(Draw(pages));
  for (int g = 0; pages > 0 && g < num_kv_heads; ++g) {
    const PageNeed need = need_of(g);
    Attach(&spans[g].ring, need.ring);
    Attach(&spans[g].survivors, need.survivors);
  }
  return absl::OkStatus();
}

absl::Status SequenceCache::Append(int layer, const uint8_t* rows, const uint8_t* decisions,
                                   int num_tokens) {
  WINNOW_RETURN_IF_ERROR(AttachFor(layer, decisions, num_tokens));
  const KvLayout& layout = cache_->layout();
  const int64_t num_kv_heads = cache_->options().num_kv_heads;
  const int64_t row_bytes =
      static_cast<int64_t>(kernels::TokenBytes(layout.format, layout.head_dim));
  Span* spans = MutableSpans(layer);
  for (int64_t g = 0; g < num_kv_heads; ++g) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t at = t * num_kv_heads + g;
      AdvanceSpan(layout, &spans[g], rows + at * row_bytes,
                  decisions == nullptr ? uint8_t{0} : decisions[at]);
    }
  }
  EndLayer(layer);
  return absl::OkStatus();
}

Span* SequenceCache::StepSpans(int layer) {
  const absl::Status attached = AttachFor(layer, nullptr, 1);
  WINNOW_CHECK(attached.ok());  // BeginStep(1) reserved them
  EndLayer(layer);
  return MutableSpans(layer);
}

size_t SequenceCache::ExportBytes(int layer) const {
  return kernels::KvPackBytes(cache_->layout(), spans(layer), cache_->options().num_kv_heads);
}

void SequenceCache::Export(int layer, uint8_t* out) const {
  kernels::KvPackCpu(cache_->layout(), spans(layer), cache_->options().num_kv_heads, out);
}

namespace {

int64_t PackedPages(const KvLayout& layout, const std::vector<kernels::PackedHead>& heads) {
  const int64_t slots = layout.slots_per_page;
  int64_t pages = 0;
  for (const kernels::PackedHead& head : heads) {
    pages += (head.num_survivors + slots - 1) / slots + (head.num_ring + slots - 1) / slots;
  }
  return pages;
}

}  // namespace

absl::StatusOr<int64_t> SequenceCache::ImportPages(int num_tokens, const uint8_t* data,
                                                   size_t size) const {
  const int num_kv_heads = cache_->options().num_kv_heads;
  std::vector<kernels::PackedHead> heads(static_cast<size_t>(num_kv_heads));
  WINNOW_RETURN_IF_ERROR(
      kernels::ParsePacked(cache_->layout(), num_kv_heads, num_tokens, data, size, heads.data()));
  return PackedPages(cache_->layout(), heads);
}

absl::Status SequenceCache::Import(int layer, int num_tokens, const uint8_t* data, size_t size) {
  const KvLayout& layout = cache_->layout();
  const int num_kv_heads = cache_->options().num_kv_heads;
  if (length(layer) != 0) {
    return absl::FailedPreconditionError(absl::StrCat("layer ", layer, " is not empty"));
  }
  std::vector<kernels::PackedHead> heads(static_cast<size_t>(num_kv_heads));
  WINNOW_RETURN_IF_ERROR(
      kernels::ParsePacked(layout, num_kv_heads, num_tokens, data, size, heads.data()));
  WINNOW_RETURN_IF_ERROR(Draw(PackedPages(layout, heads)));
  const int slots = layout.slots_per_page;
  Span* spans = MutableSpans(layer);
  for (int g = 0; g < num_kv_heads; ++g) {
    const kernels::PackedHead& head = heads[static_cast<size_t>(g)];
    Attach(&spans[g].survivors, (static_cast<int>(head.num_survivors) + slots - 1) / slots);
    Attach(&spans[g].ring, (static_cast<int>(head.num_ring) + slots - 1) / slots);
  }
  kernels::KvUnpackCpu(layout, num_kv_heads, num_tokens, data, heads.data(), spans);
  UpdateBytes();
  return absl::OkStatus();
}

}  // namespace winnow
