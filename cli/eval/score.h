#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/types/span.h"
#include "common/base/thread_pool.h"
#include "common/kv/sequence_cache.h"

namespace winnow::cli {

// What one prediction of the base is worth: log-sum-exp and the most likely token.
struct RowStats {
  double log_sum = 0;
  int top = 0;
};
RowStats Summarize(absl::Span<const float> logits);

// One prediction of a mode beside the base's. nats.
struct RowScore {
  double nll = 0, nll_base = 0;  // of the text's next token
  double kld = 0;                // KL(base || mode)
  bool same_top = false;         // the same most likely token
};
RowScore ScoreRow(absl::Span<const float> base, const RowStats& base_stats,
                  absl::Span<const float> mode, int32_t target);

// Sums over scored positions.
struct PositionSums {
  double nll = 0, nll_base = 0, kld = 0;
  int64_t same_top = 0, positions = 0;

  void Add(const RowScore& row);
  // "nll", "nll_base", "ppl", "ppl_base", "kld", "top1", "positions": means over the positions.
  nlohmann::ordered_json ToJson() const;
};

// What the cache held when a window had reached `tokens` tokens; sums over windows.
struct MemorySums {
  int tokens = 0;
  int64_t windows = 0;
  double live = 0, kv_bytes = 0, kv_bytes_base = 0;
};

// All that is known of one mode: sums over the windows so far. Holds everything that a
// later run needs to go on (conversion to and from JSON is exact).
struct Score {
  PositionSums total;
  std::vector<PositionSums> by_position;  // bucket i: positions [512 * 2^(i-1), 512 * 2^i)
  std::vector<MemorySums> memory;         // every kMemoryStep tokens, and at the end
  std::vector<int64_t> kept;              // [layers * KV heads] tokens flagged to keep
  std::vector<int64_t> kept_first;        // likewise, first window
  std::vector<int64_t> live;              // [layers * KV heads] at the windows' ends
  int64_t logical = 0;                    // tokens of a span, summed over the windows
  double kv_bytes = 0, kv_bytes_base = 0;
  int64_t windows = 0;

  // One prediction of the token at `position`.
  void AddRow(int position, const RowScore& row);
  void AddMemory(int tokens, const SequenceCache& mode, const SequenceCache& base);
  // At a window's end.
  void AddWindow(int num_spans, int num_kv_heads, const SequenceCache& mode,
                 const SequenceCache& base);
  // The report, documented at Evaluate().
  nlohmann::ordered_json ToJson(int num_kv_heads) const;
};

inline constexpr int kMemoryStep = 512;

void to_json(nlohmann::json& json, const Score& score);
void from_json(const nlohmann::json& json, Score& score);

}  // namespace winnow::cli
