#include "router/routing_policy.h"

#include <algorithm>
#include <tuple>

namespace winnow::router {
namespace {

// The index with the smallest key; ties go to the first from `rotation` on.
template <typename Key>
int PickSmallest(absl::Span<const Candidate> candidates, uint64_t rotation, Key key) {
  const size_t n = candidates.size();
  int best = -1;
  for (size_t i = 0; i < n; ++i) {
    const size_t at = (rotation + i) % n;
    if (best < 0 || key(candidates[at]) < key(candidates[static_cast<size_t>(best)])) {
      best = static_cast<int>(at);
    }
  }
  return best;
}

}  // namespace

int PickPrefill(absl::Span<const Candidate> candidates, uint64_t rotation) {
  return PickSmallest(candidates, rotation, [](const Candidate& c) {
    return std::make_tuple(std::max<uint64_t>(c.load.pending_prompt_tokens(),
                                              static_cast<uint64_t>(c.in_flight_prompt_tokens)),
                           c.in_flight);
  });
}

int PickDecode(absl::Span<const Candidate> candidates, uint64_t rotation) {
  return PickSmallest(candidates, rotation, [](const Candidate& c) {
    const double total = std::max<double>(1.0, static_cast<double>(c.load.kv_total_bytes()));
    const double used = static_cast<double>(c.load.kv_used_bytes());
    const int sixteenths = static_cast<int>(std::min(16.0, 16.0 * used / total));
    return std::make_tuple(sixteenths, std::max(c.in_flight, c.load.running() + c.load.waiting()));
  });
}

}  // namespace winnow::router
