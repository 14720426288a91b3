#include "tests/testing/compare.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace winnow::testing {
namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

// "[2, 0, 17]".
std::string Coordinates(int64_t index, const std::vector<int64_t>& dims) {
  std::vector<int64_t> at(dims.size());
  for (size_t i = dims.size(); i-- > 0;) {
    at[i] = index % dims[i];
    index /= dims[i];
  }
  return absl::StrCat("[", absl::StrJoin(at, ", "), "]");
}

std::string Describe(int64_t index, const std::vector<int64_t>& dims, float actual,
                     float expected) {
  return absl::StrCat("at ", Coordinates(index, dims), ": actual ", actual, ", expected ",
                      expected);
}

AssertionResult SameShape(size_t actual, size_t expected, const std::vector<int64_t>& dims) {
  int64_t size = 1;
  for (const int64_t dim : dims) size *= dim;
  if (actual == static_cast<size_t>(size) && expected == actual) return AssertionSuccess();
  return AssertionFailure() << "sizes " << actual << " and " << expected << ", shape ["
                            << absl::StrJoin(dims, ", ") << "]";
}

}  // namespace

Tolerance FloatSumTolerance(int terms, double magnitude) {
  return Tolerance{.atol = terms * magnitude * terms * std::ldexp(1.0, -24), .rtol = 1e-6};
}

AssertionResult AllClose(absl::Span<const float> actual, absl::Span<const float> expected,
                         std::initializer_list<int64_t> dims_list, const Tolerance& tolerance) {
  const std::vector<int64_t> dims(dims_list);
  if (AssertionResult same = SameShape(actual.size(), expected.size(), dims); !same) return same;
  double worst = 0.0, dot = 0.0, norm_a = 0.0, norm_e = 0.0;
  int64_t worst_at = 0, num_bad = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = actual[i], e = expected[i];
    if (!std::isfinite(a) || !std::isfinite(e)) {
      if (a == e || (std::isnan(a) && std::isnan(e))) continue;
      return AssertionFailure() << "not finite in one only, "
                                << Describe(static_cast<int64_t>(i), dims, actual[i], expected[i]);
    }
    dot += a * e;
    norm_a += a * a;
    norm_e += e * e;
    const double excess = std::abs(a - e) - (tolerance.atol + tolerance.rtol * std::abs(e));
    if (excess > 0.0) ++num_bad;
    if (excess > worst) {
      worst = excess;
      worst_at = static_cast<int64_t>(i);
    }
  }
  if (num_bad > 0) {
    return AssertionFailure() << num_bad << " of " << actual.size() << " out of tolerance, worst "
                              << Describe(worst_at, dims, actual[worst_at], expected[worst_at]);
  }
  const double scale = std::sqrt(norm_a) * std::sqrt(norm_e);
  if (scale > 0.0 && 1.0 - dot / scale > tolerance.cosine) {
    return AssertionFailure() << "cosine difference " << 1.0 - dot / scale << " above "
                              << tolerance.cosine;
  }
  return AssertionSuccess();
}

AssertionResult BitEqual(absl::Span<const float> actual, absl::Span<const float> expected,
                         std::initializer_list<int64_t> dims_list) {
  const std::vector<int64_t> dims(dims_list);
  if (AssertionResult same = SameShape(actual.size(), expected.size(), dims); !same) return same;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::bit_cast<uint32_t>(actual[i]) == std::bit_cast<uint32_t>(expected[i])) continue;
    return AssertionFailure() << "bits differ, first "
                              << Describe(static_cast<int64_t>(i), dims, actual[i], expected[i]);
  }
  return AssertionSuccess();
}

}  // namespace winnow::testing
