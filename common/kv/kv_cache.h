#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/kv/page_pool.h"
#include "kernels/kv_span.h"

namespace winnow {

class SequenceCache;

struct KvCacheOptions {
  kernels::KvFormatId format = kernels::KvFormatId::kFp8;
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int window = 0;           // DMS window; 0: dense, every token is kept
  int shift = 1;            // DMS decision shift; unused when dense
  size_t budget_bytes = 0;  // pages and page tables together
  int max_sequences = 64;   // that live at once
  bool poison = false;      // tests: free pages hold NaN and come in a scrambled order
};

// The memory of a worker's KV cache: pages and page-table segments, allocated
// once. Sequences draw on it. Not thread-safe: owned by the engine thread; ops
// may read and write spans of different heads from pool threads.
class KvCache {
 public:
  // INVALID_ARGUMENT, naming the field, for a bad option or a budget below one
  // page a span; UNIMPLEMENTED for a head_dim the format refuses.
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(const KvCacheOptions& options);
  // REQUIRES: all its sequences are gone.
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvCacheOptions& options() const { return options_; }
  const kernels::KvLayout& layout() const { return layout_; }
  const PagePool& pool() const { return pool_; }
  int num_spans() const { return options_.num_layers * options_.num_kv_heads; }
  int num_sequences() const { return num_sequences_; }
  size_t page_bytes() const { return layout_.page_bytes; }
  // All that Create() allocated for pages and tables.
  size_t allocated_bytes() const;
  // What the live sequences hold: the sum of their bytes_held().
  size_t bytes_held() const { return bytes_held_; }
  size_t peak_bytes_held() const { return peak_bytes_held_; }

  // An empty sequence; takes no pages. RESOURCE_EXHAUSTED at max_sequences.
  // *this must outlive it.
  absl::StatusOr<SequenceCache> NewSequence();

  // Most pages that a sequence of `num_tokens` tokens can hold (nothing evicted).
  int64_t PagesUpperBound(int64_t num_tokens) const;
  // Most bytes of such a sequence, all that bytes_held() counts.
  size_t BytesUpperBound(int64_t num_tokens) const;
  // Pages that admission keeps free so that the next step of `num_sequences`
  // running sequences cannot fail: one a span.
  int64_t StepReservePages(int num_sequences) const;

 private:
  friend class SequenceCache;
  KvCache(const KvCacheOptions& options, int num_pages, int num_segments);

  // Bytes of a sequence beside pages and segments.
  size_t SequenceFixedBytes() const;
  // Appends a page to `table`; returns the segments that took (0 or 1).
  // REQUIRES: pool().free() > 0.
  int AttachPage(kernels::PageTable* table);
  // Gives all pages and segments of `table` back and empties it.
  void ReleaseTable(kernels::PageTable* table);
  void AddBytes(int64_t delta);

  struct Free {
    void operator()(uint8_t* p) const;
  };
  const KvCacheOptions options_;
  kernels::KvLayout layout_;
  PagePool pool_;
  std::unique_ptr<uint8_t[], Free> pages_;
  std::vector<kernels::PageSegment> segments_;
  kernels::PageSegment* free_segments_ = nullptr;
  int num_sequences_ = 0;
  size_t bytes_held_ = 0;
  size_t peak_bytes_held_ = 0;
};

}  // namespace winnow
