#include "cli/eval/score.h"

#include <algorithm>
#include <cmath>

namespace winnow::cli {
namespace {

constexpr int kFirstBucket = 512;

// Tokens of a span whose bit says keep, the newest included.
int Kept(const kernels::Span& span) {
  int kept = span.num_survivors + (span.num_tokens > 0 ? 1 : 0);
  for (int i = 0; i < span.num_ring; ++i) {
    // The ring has as many slots as the window; before it is full it starts at 0.
    kept += span.ring_evict[i] ? 0 : 1;
  }
  return kept;
}

nlohmann::ordered_json ByLayer(const std::vector<int64_t>& values, int num_kv_heads,
                               double divisor) {
  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  for (size_t i = 0; i < values.size(); ++i) {
    if (i % static_cast<size_t>(num_kv_heads) == 0) {
      layers.push_back(nlohmann::ordered_json::array());
    }
    if (divisor == 1) {
      layers.back().push_back(values[i]);
    } else {
      layers.back().push_back(static_cast<double>(values[i]) / divisor);
    }
  }
  return layers;
}

int64_t Sum(const std::vector<int64_t>& values) {
  int64_t sum = 0;
  for (int64_t value : values) sum += value;
  return sum;
}

}  // namespace

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(PositionSums, nll, nll_base, kld, same_top, positions)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(MemorySums, tokens, windows, live, kv_bytes, kv_bytes_base)

void to_json(nlohmann::json& json, const Score& score) {
  json = {{"total", score.total},
          {"by_position", score.by_position},
          {"memory", score.memory},
          {"kept", score.kept},
          {"kept_first", score.kept_first},
          {"live", score.live},
          {"logical", score.logical},
          {"kv_bytes", score.kv_bytes},
          {"kv_bytes_base", score.kv_bytes_base},
          {"windows", score.windows}};
}

void from_json(const nlohmann::json& json, Score& score) {
  json.at("total").get_to(score.total);
  json.at("by_position").get_to(score.by_position);
  json.at("memory").get_to(score.memory);
  json.at("kept").get_to(score.kept);
  json.at("kept_first").get_to(score.kept_first);
  json.at("live").get_to(score.live);
  json.at("logical").get_to(score.logical);
  json.at("kv_bytes").get_to(score.kv_bytes);
  json.at("kv_bytes_base").get_to(score.kv_bytes_base);
  json.at("windows").get_to(score.windows);
}

RowStats Summarize(absl::Span<const float> logits) {
  const auto top = std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(x - *top);
  return {.log_sum = std::log(sum) + *top, .top = static_cast<int>(top - logits.begin())};
}

RowScore ScoreRow(absl::Span<const float> base, const RowStats& base_stats,
                  absl::Span<const float> mode, int32_t target) {
  const RowStats stats = Summarize(mode);
  double kld = 0;
  const float base_log_sum = static_cast<float>(base_stats.log_sum);
  const double shift = stats.log_sum - base_stats.log_sum;
  for (size_t i = 0; i < base.size(); ++i) {
    kld += static_cast<double>(std::exp(base[i] - base_log_sum)) *
           (static_cast<double>(base[i] - mode[i]) + shift);
  }
  const size_t t = static_cast<size_t>(target);
  return {.nll = stats.log_sum - mode[t],
          .nll_base = base_stats.log_sum - base[t],
          .kld = kld,
          .same_top = stats.top == base_stats.top};
}

void PositionSums::Add(const RowScore& row) {
  nll += row.nll;
  nll_base += row.nll_base;
  kld += row.kld;
  same_top += row.same_top ? 1 : 0;
  ++positions;
}

nlohmann::ordered_json PositionSums::ToJson() const {
  const double n = static_cast<double>(positions);
  return {{"nll", nll / n},           {"nll_base", nll_base / n},
          {"ppl", std::exp(nll / n)}, {"ppl_base", std::exp(nll_base / n)},
          {"kld", kld / n},           {"top1", static_cast<double>(same_top) / n},
          {"positions", positions}};
}

void Score::AddRow(int position, const RowScore& row) {
  total.Add(row);
  size_t bucket = 0;
  for (int end = kFirstBucket; position >= end; end *= 2) ++bucket;
  if (by_position.size() <= bucket) by_position.resize(bucket + 1);
  by_position[bucket].Add(row);
}

void Score::AddMemory(int tokens, const SequenceCache& mode, const SequenceCache& base) {
  auto it = std::find_if(memory.begin(), memory.end(),
                         [&](const MemorySums& sums) { return sums.tokens == tokens; });
  if (it == memory.end()) {
    memory.push_back({.tokens = tokens});
    it = std::prev(memory.end());
  }
  ++it->windows;
  it->live += static_cast<double>(mode.live_tokens());
  it->kv_bytes += static_cast<double>(mode.bytes_held());
  it->kv_bytes_base += static_cast<double>(base.bytes_held());
}

void Score::AddWindow(int num_spans, int num_kv_heads, const SequenceCache& mode,
                      const SequenceCache& base) {
  const size_t spans = static_cast<size_t>(num_spans);
  kept.resize(spans);
  live.resize(spans);
  if (windows == 0) kept_first.resize(spans);
  for (int i = 0; i < num_spans; ++i) {
    const kernels::Span& span = mode.span(i / num_kv_heads, i % num_kv_heads);
    const size_t at = static_cast<size_t>(i);
    kept[at] += Kept(span);
    live[at] += span.num_live();
    if (windows == 0) kept_first[at] = Kept(span);
  }
  logical += mode.length();
  kv_bytes += static_cast<double>(mode.bytes_held());
  kv_bytes_base += static_cast<double>(base.bytes_held());
  ++windows;
}

nlohmann::ordered_json Score::ToJson(int num_kv_heads) const {
  const double all = static_cast<double>(logical) * static_cast<double>(kept.size());
  const double n = static_cast<double>(windows);
  nlohmann::ordered_json json = total.ToJson();
  json["evict_rate"] = 1.0 - static_cast<double>(Sum(kept)) / all;
  json["live_ratio"] = all / static_cast<double>(Sum(live));
  json["kv_bytes"] = kv_bytes / n;
  json["kv_bytes_dense_bf16"] = kv_bytes_base / n;
  json["windows"] = windows;
  json["by_position"] = nlohmann::ordered_json::array();
  int begin = 0, end = kFirstBucket;
  for (const PositionSums& sums : by_position) {
    if (sums.positions > 0) {
      nlohmann::ordered_json row = {{"from", begin}, {"to", end}};
      row.update(sums.ToJson());
      json["by_position"].push_back(std::move(row));
    }
    begin = end;
    end *= 2;
  }
  json["memory"] = nlohmann::ordered_json::array();
  for (const MemorySums& sums : memory) {
    const double count = static_cast<double>(sums.windows);
    json["memory"].push_back({{"tokens", sums.tokens},
                              {"live_tokens", sums.live / count},
                              {"kv_bytes", sums.kv_bytes / count},
                              {"kv_bytes_dense_bf16", sums.kv_bytes_base / count}});
  }
  json["keep_rate"] = ByLayer(kept, num_kv_heads, static_cast<double>(logical));
  json["live_per_layer_head"] = ByLayer(live, num_kv_heads, n == 1 ? 1.0 : n);
  json["kept_per_layer_head"] = ByLayer(kept_first, num_kv_heads, 1);
  return json;
}

}  // namespace winnow::cli
