#include "common/sampling/sampler.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/sampling/sample_math.h"

namespace winnow {
namespace {

struct Candidate {
  float logit;
  int32_t id;
};

bool Before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// The index of the largest logit, the first among equals; INTERNAL as Sample() says.
absl::StatusOr<int32_t> ArgMax(absl::Span<const float> logits) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  int32_t best = -1;
  float best_logit = -kInf;
  bool finite = true;
  for (size_t i = 0; i < logits.size(); ++i) {
    finite &= logits[i] < kInf;  // false for NaN too
    if (logits[i] > best_logit) {
      best = static_cast<int32_t>(i);
      best_logit = logits[i];
    }
  }
  if (!finite) {
    const auto bad =
        std::find_if(logits.begin(), logits.end(), [](float x) { return !(x < kInf); });
    return absl::InternalError(
        absl::StrCat("the logit of token ", bad - logits.begin(), " is ", *bad));
  }
  if (best < 0) {
    return absl::InternalError(absl::StrCat("all ", logits.size(), " logits are -inf"));
  }
  return best;
}

// Candidates in the order of Before(), sorted only as far as they are asked for: a
// nucleus is mostly a few dozen of 150,000.
class SortedCandidates {
 public:
  explicit SortedCandidates(absl::Span<const float> logits) : all_(logits.size()) {
    for (size_t i = 0; i < all_.size(); ++i) all_[i] = {logits[i], static_cast<int32_t>(i)};
  }

  const Candidate& operator[](size_t rank) {
    if (rank >= num_sorted_) {
      const size_t end = std::min(all_.size(), std::max<size_t>(64, 8 * num_sorted_));
      const auto begin_it = all_.begin() + static_cast<std::ptrdiff_t>(num_sorted_);
      const auto end_it = all_.begin() + static_cast<std::ptrdiff_t>(end);
      if (end <= 1024) {  // one comparison for nearly every candidate; 3 times as fast here
        std::partial_sort(begin_it, end_it, all_.end(), Before);
      } else {
        std::nth_element(begin_it, end_it - 1, all_.end(), Before);
        std::sort(begin_it, end_it, Before);
      }
      num_sorted_ = end;
    }
    return all_[rank];
  }

 private:
  std::vector<Candidate> all_;
  size_t num_sorted_ = 0;
};

}  // namespace

absl::Status ValidateSamplingParams(const SamplingParams& params, int vocab) {
  if (!(params.temperature >= 0.0f && params.temperature <= 100.0f)) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature=", params.temperature, " is outside [0, 100]"));
  }
  if (params.top_k < 0 || params.top_k > vocab) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_k=", params.top_k, " is outside [0, ", vocab, "]"));
  }
  if (!(params.top_p > 0.0f && params.top_p <= 1.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("top_p=", params.top_p, " is outside (0, 1]"));
  }
  return absl::OkStatus();
}

absl::StatusOr<int32_t> Sample(absl::Span<const float> logits, const SamplingParams& params,
                               const SampleKey& key) {
  if (logits.empty()) return absl::InternalError("there are no logits");
  if (logits.size() > kMaxSampleVocab) {
    return absl::InvalidArgumentError(absl::StrCat(logits.size(), " logits: at most 2^20"));
  }
  WINNOW_RETURN_IF_ERROR(ValidateSamplingParams(params, static_cast<int>(logits.size())));
  WINNOW_ASSIGN_OR_RETURN(const int32_t best, ArgMax(logits));
  if (params.temperature == 0.0f || params.top_k == 1) return best;

  // Probabilities are never normalised; `total` is what they would be divided by. Sums are of
  // integers, see sample_math.h, so each walk ends where its `total` says.
  const double scale = SampleScale(params.temperature);
  const float max_logit = logits[static_cast<size_t>(best)];
  double powers[kNumSamplePowers];
  for (int j = 0; j < kNumSamplePowers; ++j) powers[j] = SamplePower(j);
  const auto weight = [&](float logit) { return SampleWeight(logit, max_logit, scale, powers); };
  SortedCandidates sorted(logits);
  const size_t num_kept = params.top_k > 0 ? static_cast<size_t>(params.top_k) : logits.size();
  uint64_t total = 0;
  if (num_kept < logits.size()) {
    for (size_t i = 0; i < num_kept; ++i) total += weight(sorted[i].logit);
  } else {
    for (const float logit : logits) total += weight(logit);
  }
  if (params.top_p < 1.0f) {
    const uint64_t enough = SampleEnough(params.top_p, total);
    total = 0;
    for (size_t i = 0; total < enough; ++i) total += weight(sorted[i].logit);
  }
  const uint64_t target = SampleTarget(SampleBits(key.seed, key.position, key.sample_index), total);
  uint64_t sum = 0;
  for (size_t i = 0;; ++i) {
    sum += weight(sorted[i].logit);
    if (sum > target) return sorted[i].id;
  }
}

}  // namespace winnow
