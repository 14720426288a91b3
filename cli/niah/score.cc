#include "cli/niah/score.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/check.h"

namespace winnow::cli {
namespace {

using Json = nlohmann::ordered_json;

// The sums behind one row.
struct Group {
  int64_t tasks = 0, base_found = 0, found = 0, both = 0;
  int64_t prompt_tokens = 0, decoded_tokens = 0;
  double ttft_s = 0, decode_s = 0;
  double live = 0, logical = 0, kv_bytes = 0, kv_bytes_dense_bf16 = 0;

  void Add(const NiahResult& base, const NiahResult& result) {
    ++tasks;
    base_found += base.found;
    found += result.found;
    both += base.found && result.found;
    prompt_tokens += result.prompt_tokens;
    decoded_tokens += result.new_tokens - 1;
    ttft_s += result.ttft_s;
    decode_s += result.total_s - result.ttft_s;
    live += static_cast<double>(result.live_tokens);
    logical += static_cast<double>(result.logical_tokens);
    kv_bytes += static_cast<double>(result.kv_bytes);
    kv_bytes_dense_bf16 += static_cast<double>(result.kv_bytes_dense_bf16);
  }

  Json ToJson() const {
    const auto ratio = [](double a, double b) { return b > 0 ? Json(a / b) : Json(nullptr); };
    const double n = static_cast<double>(tasks);
    const Interval rate = WilsonInterval(found, tasks);
    const Interval of_base = WilsonInterval(both, base_found);
    return {{"tasks", tasks},
            {"base_found", base_found},
            {"found", found},
            {"rate", ratio(static_cast<double>(found), n)},
            {"rate_low", rate.low},
            {"rate_high", rate.high},
            {"found_of_base", both},
            {"of_base", ratio(static_cast<double>(both), static_cast<double>(base_found))},
            {"of_base_low", of_base.low},
            {"of_base_high", of_base.high},
            {"live_ratio", ratio(logical, live)},
            {"kv_bytes", ratio(kv_bytes, n)},
            {"kv_bytes_dense_bf16", ratio(kv_bytes_dense_bf16, n)},
            {"ttft_s", ratio(ttft_s, n)},
            {"prefill_tokens_per_s", ratio(static_cast<double>(prompt_tokens), ttft_s)},
            {"decode_tokens_per_s", ratio(static_cast<double>(decoded_tokens), decode_s)}};
  }
};

// One group for each value of `key` (sort value, name).
using Key = std::pair<double, std::string>;
Json GroupBy(absl::Span<const NiahTask> tasks, const NiahModeResults& base,
             const NiahModeResults& mode, const std::function<Key(const NiahTask&)>& key) {
  std::map<Key, Group> groups;
  for (size_t i = 0; i < tasks.size(); ++i) {
    groups[key(tasks[i])].Add(base.results[i], mode.results[i]);
  }
  Json json = Json::object();
  for (const auto& [name, group] : groups) json[name.second] = group.ToJson();
  return json;
}

std::string Rate(const Json& group, const char* count, const char* of, const char* rate) {
  if (group[rate].is_null()) return "-";
  const std::string stem(rate);
  return absl::StrFormat("%d/%d %5.1f%% [%.1f, %.1f]", group[count].get<int64_t>(),
                         group[of].get<int64_t>(), 100 * group[rate].get<double>(),
                         100 * group[stem + "_low"].get<double>(),
                         100 * group[stem + "_high"].get<double>());
}

std::string Row(const std::string& mode, const std::string& name, const Json& group) {
  const auto value = [&](const char* field) {
    return group[field].is_null() ? 0.0 : group[field].get<double>();
  };
  return absl::StrFormat("%-11s %-7s %-28s %-28s %6.2fx %10.2f %8.2f %8.1f\n", mode, name,
                         Rate(group, "found", "tasks", "rate"),
                         Rate(group, "found_of_base", "base_found", "of_base"), value("live_ratio"),
                         value("kv_bytes") / 1e6, value("ttft_s"), value("decode_tokens_per_s"));
}

}  // namespace

Interval WilsonInterval(int64_t successes, int64_t trials) {
  WINNOW_CHECK(0 <= successes && successes <= trials);
  if (trials == 0) return {};
  constexpr double kZ = 1.959963984540054;  // the normal distribution's 97.5 % point
  const double n = static_cast<double>(trials), p = static_cast<double>(successes) / n;
  const double scale = 1 + kZ * kZ / n;
  const double middle = (p + kZ * kZ / (2 * n)) / scale;
  const double half = kZ * std::sqrt(p * (1 - p) / n + kZ * kZ / (4 * n * n)) / scale;
  // Exact at the ends, where rounding would leave a trace.
  return {.low = successes == 0 ? 0 : std::max(0.0, middle - half),
          .high = successes == trials ? 1 : std::min(1.0, middle + half)};
}

Json ResultJson(const NiahResult& r) {
  return {{"found", r.found},
          {"text", r.text},
          {"prompt_tokens", r.prompt_tokens},
          {"new_tokens", r.new_tokens},
          {"ttft_s", r.ttft_s},
          {"total_s", r.total_s},
          {"live_tokens", r.live_tokens},
          {"logical_tokens", r.logical_tokens},
          {"kv_bytes", r.kv_bytes},
          {"kv_bytes_dense_bf16", r.kv_bytes_dense_bf16}};
}

Json Summarize(absl::Span<const NiahTask> tasks, absl::Span<const NiahModeResults> modes) {
  Json out = Json::object();
  for (const NiahModeResults& mode : modes) {
    WINNOW_CHECK(mode.results.size() == tasks.size());
    const NiahModeResults& base = modes.front();
    const auto by = [&](const std::function<Key(const NiahTask&)>& key) {
      return GroupBy(tasks, base, mode, key);
    };
    Json row;
    row["all"] = by([](const NiahTask&) { return Key(0, "all"); }).value("all", Json());
    row["by_length"] =
        by([](const NiahTask& t) { return Key(t.context, absl::StrCat(t.context)); });
    row["by_kind"] = by([](const NiahTask& t) { return Key(0, t.kind); });
    row["by_depth"] = by(
        [](const NiahTask& t) { return Key(t.depth, absl::StrFormat("%.4g%%", 100 * t.depth)); });
    out[mode.mode] = std::move(row);
  }
  return out;
}

std::string NiahTable(const Json& modes) {
  std::string table = absl::StrFormat("%-11s %-7s %-28s %-28s %7s %10s %8s %8s\n", "mode", "tasks",
                                      "found [95 % interval]", "of those the base finds", "live",
                                      "KV MB", "TTFT s", "tokens/s");
  for (const char* part : {"by_length", "by_kind", "by_depth"}) {
    if (modes.empty() || modes.front()[part].size() < 2) {
      if (std::string_view(part) != "by_length") continue;
    }
    for (const auto& item : modes.front()[part].items()) {
      for (const auto& mode : modes.items()) {
        table += Row(mode.key(), item.key(), mode.value()[part][item.key()]);
      }
    }
    table += "\n";
  }
  for (const auto& mode : modes.items()) table += Row(mode.key(), "all", mode.value()["all"]);
  return table;
}

}  // namespace winnow::cli
