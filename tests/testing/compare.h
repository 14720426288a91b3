#pragma once

#include <cstdint>
#include <initializer_list>

#include "absl/types/span.h"
#include "gtest/gtest.h"

namespace winnow::testing {

// How far `actual` may be from `expected`: every element within
// atol + rtol * |expected|, and 1 - cosine of the two whole arrays at most
// `cosine`. Whoever sets one says where it comes from.
struct Tolerance {
  double atol = 0.0;
  double rtol = 0.0;
  double cosine = 1e-6;
};

// For a sum of `terms` products of magnitude up to `magnitude` in float, in any
// order: each addition rounds by half an ulp (2^-24) of a partial sum, which is
// at most terms * magnitude.
Tolerance FloatSumTolerance(int terms, double magnitude);

// Compares row-major arrays of shape `dims` (the product is both sizes): NaN and
// infinities at exactly the same places, all other elements within `tolerance`,
// none excused. A failure names the worst element by its coordinates.
//   EXPECT_TRUE(AllClose(out, expected, {m, n}, tolerance));
::testing::AssertionResult AllClose(absl::Span<const float> actual,
                                    absl::Span<const float> expected,
                                    std::initializer_list<int64_t> dims,
                                    const Tolerance& tolerance);

// The same bits everywhere; -0 differs from 0 and a NaN equals itself.
::testing::AssertionResult BitEqual(absl::Span<const float> actual,
                                    absl::Span<const float> expected,
                                    std::initializer_list<int64_t> dims);

}  // namespace winnow::testing
