#include "common/kv/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status_macros.h"
#include "common/kv/sequence_cache.h"

namespace winnow {
namespace {

constexpr size_t kAlign = 64;
// Fills every page of a poisoned cache: NaN as BF16, as float16 and as e4m3.
constexpr int kPoison = 0xff;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough segments for any division of the pages over the tables: each of the
// 2 * num_spans tables has at most one segment that is not full.
int64_t SegmentsFor(int64_t num_pages, int64_t num_spans) {
  return std::min(num_pages, num_pages / kernels::kSegmentPages + 2 * num_spans);
}

absl::Status CheckRange(const char* field, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("kv cache: ", field, "=", value, " is outside [", min, ", ", max, "]"));
}

}  // namespace

void KvCache::Free::operator()(uint8_t* p) const {
  ::operator delete[](p, std::align_val_t{kAlign});
}

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Create(const KvCacheOptions& o) {
  WINNOW_RETURN_IF_ERROR(kernels::ValidateHeadDim(o.head_dim));
  WINNOW_RETURN_IF_ERROR(CheckRange("num_layers", o.num_layers, 1, 4096));
  WINNOW_RETURN_IF_ERROR(CheckRange("num_kv_heads", o.num_kv_heads, 1, 4096));
  WINNOW_RETURN_IF_ERROR(CheckRange("window", o.window, 0, 1 << 20));
  WINNOW_RETURN_IF_ERROR(CheckRange("shift", o.shift, 0, 1));
  WINNOW_RETURN_IF_ERROR(CheckRange("max_sequences", o.max_sequences, 1, 1 << 20));
  const int64_t page_bytes = static_cast<int64_t>(kernels::PageBytes(o.head_dim));
  const int64_t segment_bytes = sizeof(kernels::PageSegment);
  const int64_t budget = static_cast<int64_t>(std::min<size_t>(o.budget_bytes, size_t{1} << 60));
  const int64_t spans_per_sequence = int64_t{o.num_layers} * o.num_kv_heads;
  const int64_t num_spans = spans_per_sequence * o.max_sequences;
  const auto bytes_of = [&](int64_t pages) {
    return pages * page_bytes + SegmentsFor(pages, num_spans) * segment_bytes;
  };
  // bytes_of() rises with each page, by a page or a page and a segment.
  int64_t low = 0, high = std::min<int64_t>(budget / page_bytes, INT32_MAX);
  while (low < high) {
    const int64_t mid = low + (high - low + 1) / 2;
    if (bytes_of(mid) <= budget) {
      low = mid;
    } else {
      high = mid - 1;
    }
  }
  if (low < spans_per_sequence) {
    return absl::InvalidArgumentError(absl::StrCat("kv cache: budget_bytes=", o.budget_bytes,
                                                   " holds ", low, " pages; one sequence needs ",
                                                   spans_per_sequence));
  }
  return std::unique_ptr<KvCache>(
      new KvCache(o, static_cast<int>(low), static_cast<int>(SegmentsFor(low, num_spans))));
}

KvCache::KvCache(const KvCacheOptions& options, int num_pages, int num_segments)
    : options_(options), pool_(num_pages), segments_(static_cast<size_t>(num_segments)) {
  layout_.format = options.format;
  layout_.head_dim = options.head_dim;
  layout_.window = options.window;
  layout_.shift = options.shift;
  layout_.page_bytes = kernels::PageBytes(options.head_dim);
  layout_.slots_per_page = kernels::SlotsPerPage(options.format, options.head_dim);
  const size_t bytes = static_cast<size_t>(num_pages) * layout_.page_bytes;
  pages_.reset(static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{kAlign})));
  layout_.pages = pages_.get();
  for (kernels::PageSegment& segment : segments_) {
    segment.next = free_segments_;
    free_segments_ = &segment;
  }
  if (options.poison) {
    std::memset(pages_.get(), kPoison, bytes);
    pool_.Shuffle(/*seed=*/12345);
  }
}

KvCache::~KvCache() { WINNOW_CHECK(num_sequences_ == 0); }

size_t KvCache::allocated_bytes() const {
  return static_cast<size_t>(pool_.total()) * layout_.page_bytes +
         segments_.size() * sizeof(kernels::PageSegment);
}

absl::StatusOr<SequenceCache> KvCache::NewSequence() {
  if (num_sequences_ >= options_.max_sequences) {
    return absl::ResourceExhaustedError(
        absl::StrCat("kv cache: max_sequences=", options_.max_sequences, " are live"));
  }
  return SequenceCache(this);
}

int64_t KvCache::PagesUpperBound(int64_t num_tokens) const {
  const int64_t entered = std::max<int64_t>(num_tokens - 1, 0);
  const int64_t ring = std::min<int64_t>(layout_.window, entered);
  return num_spans() *
         (CeilDiv(ring, layout_.slots_per_page) + CeilDiv(entered - ring, layout_.slots_per_page));
}

size_t KvCache::BytesUpperBound(int64_t num_tokens) const {
  const int64_t entered = std::max<int64_t>(num_tokens - 1, 0);
  const int64_t ring = std::min<int64_t>(layout_.window, entered);
  const int64_t slots = layout_.slots_per_page;
  const int64_t segments =
      num_spans() * (CeilDiv(CeilDiv(ring, slots), kernels::kSegmentPages) +
                     CeilDiv(CeilDiv(entered - ring, slots), kernels::kSegmentPages));
  return static_cast<size_t>(PagesUpperBound(num_tokens)) * layout_.page_bytes +
         static_cast<size_t>(segments) * sizeof(kernels::PageSegment) + SequenceFixedBytes();
}

size_t KvCache::SequenceFixedBytes() const {
  return static_cast<size_t>(num_spans()) *
         (sizeof(kernels::Span) + kernels::TokenBytes(layout_.format, layout_.head_dim) +
          static_cast<size_t>(layout_.window));
}

int64_t KvCache::StepReservePages(int num_sequences) const {
  return int64_t{num_sequences} * num_spans();
}

int KvCache::AttachPage(kernels::PageTable* table) {
  const int in_segment = table->num_pages % kernels::kSegmentPages;
  int new_segments = 0;
  if (in_segment == 0) {
    kernels::PageSegment* segment = free_segments_;
    WINNOW_CHECK(segment != nullptr);  // SegmentsFor() covers every division
    free_segments_ = segment->next;
    segment->next = nullptr;
    if (table->tail != nullptr) {
      table->tail->next = segment;
    } else {
      table->head = segment;
    }
    table->tail = segment;
    new_segments = 1;
  }
  table->tail->page[in_segment] = pool_.Take();
  ++table->num_pages;
  return new_segments;
}

void KvCache::ReleaseTable(kernels::PageTable* table) {
  int left = table->num_pages;
  for (kernels::PageSegment* segment = table->head; segment != nullptr;) {
    const int n = std::min(left, kernels::kSegmentPages);
    for (int i = 0; i < n; ++i) {
      if (options_.poison) {
        std::memset(layout_.Page(segment->page[i]), kPoison, layout_.page_bytes);
      }
      pool_.Give(segment->page[i]);
    }
    left -= n;
    kernels::PageSegment* next = segment->next;
    segment->next = free_segments_;
    free_segments_ = segment;
    segment = next;
  }
  *table = {};
}

void KvCache::AddBytes(int64_t delta) {
  bytes_held_ = static_cast<size_t>(static_cast<int64_t>(bytes_held_) + delta);
  peak_bytes_held_ = std::max(peak_bytes_held_, bytes_held_);
}

}  // namespace winnow
