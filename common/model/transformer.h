#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "common/base/thread_pool.h"
#include "common/kv/kv_cache.h"
#include "common/kv/sequence_cache.h"
#include "common/model/backend.h"
#include "common/model/model.h"

namespace winnow {

// What GEMM inputs are rounded to. Sums are float32 either way.
enum class ActivationType { kBf16, kFloat32 };

// Runs the decoder over one step's batch. Owned by the engine thread; scratch for
// `max_tokens` rows is allocated once at construction.
class Transformer {
 public:
  struct Options {
    int max_tokens = 512;   // most rows of one Forward()
    int max_positions = 0;  // longest sequence; 0: the model's max_position_embeddings
    ActivationType activations = ActivationType::kBf16;
    Backend* backend = nullptr;  // not owned, must outlive *this; null: a CpuBackend
    // Added to the model's own offset: a token is evicted iff u * scale - offset is above
    // this. Higher keeps more, lower evicts more; 0 is as the model was trained.
    float dms_threshold = 0;
  };

  // Consecutive tokens of one sequence: `tokens` take the positions from
  // cache->length() on, and are appended to the cache.
  struct Item {
    SequenceCache* cache = nullptr;
    absl::Span<const int32_t> tokens;
    // Where the logits go, [n, vocab] float; null: not computed. n is 1 (the last
    // token's) or, with all_logits, tokens.size().
    float* logits = nullptr;
    bool all_logits = false;
    // Where the tokens' own eviction bits go, [num_layers, n, num_kv_heads] (1: evict);
    // null: not wanted. Left alone in the dense modes.
    uint8_t* decisions = nullptr;
  };

  // Called after layer `layer` of every item has been appended to its cache.
  using LayerDone = std::function<void(int layer)>;

  // `model`, `cache` and `pool` are not owned and must outlive *this.
  Transformer(const Model* model, KvCache* cache, ThreadPool* pool, Options options);
  ~Transformer();

  // What evicts, the threshold included. A dense cache evicts nothing, but may zero a channel.
  const kernels::DecisionRule& decision_rule() const;

  // One step. Pages for it must have been reserved (KvCache). On error no item's
  // cache can be used further.
  //   INVALID_ARGUMENT  more rows than max_tokens; an empty item; a token outside the
  //                     vocabulary; a position past the longest sequence's. Then
  //                     nothing was run.
  absl::Status Forward(absl::Span<const Item> items, const LayerDone& layer_done = nullptr);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace winnow
