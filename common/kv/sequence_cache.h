#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "common/kv/kv_cache.h"
#include "kernels/kv_span.h"

namespace winnow {

// One sequence's spans, [layer][KV head]. Move-only; gives its pages back when
// destroyed. Owned by the engine thread.
//
// A step of n tokens: BeginStep(n), then for each layer in order
//   prefill: attention over spans(layer) and the chunk's rows, then Append();
//   decode (n = 1): StepSpans(layer) to DecodePrepare, then attention.
// Both leave the same state. After BeginStep() succeeded nothing in the step can
// run out of pages. A step that is abandoned half-way leaves layers of unequal
// length: then the sequence can only be destroyed.
class SequenceCache {
 public:
  SequenceCache(SequenceCache&& other) noexcept;
  SequenceCache& operator=(SequenceCache&& other) noexcept;
  ~SequenceCache();

  // Logical tokens of the whole sequence (of the last layer), and of a layer.
  int length() const;
  int length(int layer) const;
  // The layer's spans, [num_kv_heads]; what the ops read.
  const kernels::Span* spans(int layer) const;
  const kernels::Span& span(int layer, int head) const { return spans(layer)[head]; }

  // Live tokens of a span, and of all spans.
  int live_tokens(int layer, int head) const;
  int64_t live_tokens() const;
  int64_t pages_held() const { return pages_held_; }
  // Pages, page-table segments, flat rows, ring flags and span descriptors.
  size_t bytes_held() const;
  size_t peak_bytes() const { return peak_bytes_; }

  // Reserves what the next n >= 1 tokens can take: exactly it for n = 1, an
  // upper bound (nothing evicted) for more. RESOURCE_EXHAUSTED if the pool has
  // less: nothing is changed. What an earlier step left over is released.
  absl::Status BeginStep(int num_tokens);
  // The pages BeginStep(num_tokens) would reserve.
  int64_t StepPages(int num_tokens) const;

  // Appends tokens to a layer. rows [num_tokens, num_kv_heads, TokenBytes];
  // decisions [num_tokens, num_kv_heads] (1: evict), null: all keep. Takes
  // exactly the pages needed. RESOURCE_EXHAUSTED (only without BeginStep) before
  // anything is changed. After the last layer the rest of the reservation is released.
  absl::Status Append(int layer, const uint8_t* rows, const uint8_t* decisions, int num_tokens);

  // Attaches the pages that one token takes in this layer and returns its spans
  // [num_kv_heads] for DecodePrepare, which must follow. REQUIRES: BeginStep(1).
  kernels::Span* StepSpans(int layer);

  // One layer as canonical bytes (kernels/kv_pack.h). REQUIRES: length(layer) >= 1.
  size_t ExportBytes(int layer) const;
  void Export(int layer, uint8_t* out) const;
  // Fills an empty layer with bytes from a peer; the sequence has num_tokens
  // tokens. Takes exactly the pages needed. INVALID_ARGUMENT or DATA_LOSS for bad
  // bytes, RESOURCE_EXHAUSTED for lack of pages, FAILED_PRECONDITION if the layer
  // is not empty; then nothing is changed.
  absl::Status Import(int layer, int num_tokens, const uint8_t* data, size_t size);
  // Pages that Import() of these bytes takes; same errors for bad bytes.
  absl::StatusOr<int64_t> ImportPages(int num_tokens, const uint8_t* data, size_t size) const;

 private:
  friend class KvCache;
  explicit SequenceCache(KvCache* cache);

  kernels::Span* MutableSpans(int layer);
  // Turns reserved or available pages into ones that may be taken.
  absl::Status Draw(int64_t num_pages);
  void Attach(kernels::PageTable* table, int num_pages);
  // Attaches the pages that num_tokens tokens with these bits take.
  absl::Status AttachFor(int layer, const uint8_t* decisions, int num_tokens);
  void EndLayer(int layer);
  void UpdateBytes();
  void Release();
  void MoveFrom(SequenceCache* other);

  KvCache* cache_ = nullptr;          // null: moved from
  std::vector<kernels::Span> spans_;  // [num_layers * num_kv_heads]
  std::vector<uint8_t> memory_;       // flat rows, then ring flags
  int64_t pages_held_ = 0;
  int64_t segments_held_ = 0;
  int64_t reserved_ = 0;
  size_t counted_bytes_ = 0;  // what the cache's total includes for us
  size_t peak_bytes_ = 0;
};

}  // namespace winnow
