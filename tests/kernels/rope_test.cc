#include "kernels/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace winnow::kernels {
namespace {

TEST(Rope, TableHoldsCosAndSinOfEveryAngle) {
  const auto table = BuildRopeTable(/*head_dim=*/8, /*num_positions=*/50, /*theta=*/10000.0f);
  ASSERT_TRUE(table.ok());
  ASSERT_EQ(table->cos.size(), 50u * 4);
  for (int p = 0; p < 50; ++p) {
    for (int i = 0; i < 4; ++i) {
      const double angle = p * std::pow(10000.0, -i / 4.0);
      EXPECT_NEAR(table->cos[static_cast<size_t>(p * 4 + i)], std::cos(angle), 4e-6);
      EXPECT_NEAR(table->sin[static_cast<size_t>(p * 4 + i)], std::sin(angle), 4e-6);
    }
  }
}

TEST(Rope, RotatesChannelsHalfAHeadApart) {
  const float cos[] = {0.0f, 1.0f}, sin[] = {1.0f, 0.0f};  // a quarter turn, none
  float x[] = {1.0f, 2.0f, 3.0f, 4.0f};
  ApplyRope(cos, sin, 4, x);
  EXPECT_EQ(x[0], -3.0f);
  EXPECT_EQ(x[1], 2.0f);
  EXPECT_EQ(x[2], 1.0f);
  EXPECT_EQ(x[3], 4.0f);
}

TEST(Rope, DotProductsDependOnDistanceAlone) {
  const auto table = *BuildRopeTable(16, 200, 500.0f);
  const auto dot_at = [&](size_t p, size_t q) {
    float a[16], b[16];
    for (int i = 0; i < 16; ++i) {
      a[i] = std::sin(1.0f + static_cast<float>(i));
      b[i] = std::cos(2.0f * static_cast<float>(i));
    }
    ApplyRope(&table.cos[p * 8], &table.sin[p * 8], 16, a);
    ApplyRope(&table.cos[q * 8], &table.sin[q * 8], 16, b);
    float dot = 0.0f;
    for (int i = 0; i < 16; ++i) dot += a[i] * b[i];
    return dot;
  };
  EXPECT_NEAR(dot_at(7, 3), dot_at(187, 183), 1e-4);
  EXPECT_GT(std::fabs(dot_at(7, 3) - dot_at(187, 180)), 1e-2);
}

// Llama 3.2 1B: head_dim 64, theta 500000, factor 32, 1 and 4, 8192. The angle
// of position 1 is the frequency.
TEST(Rope, Llama3Scaling) {
  const auto plain = *BuildRopeTable(64, 2, 500000.0f);
  const auto scaled = *BuildRopeTable(64, 2, 500000.0f,
                                      {.factor = 32.0f,
                                       .low_freq_factor = 1.0f,
                                       .high_freq_factor = 4.0f,
                                       .original_max_positions = 8192});
  for (size_t i = 0; i < 32; ++i) {
    const double f = std::pow(500000.0, -static_cast<double>(i) / 32.0);
    const double wavelength = 2.0 * 3.14159265358979 / f;
    double want = f;
    if (wavelength > 8192.0) {
      want = f / 32.0;
    } else if (wavelength > 2048.0) {
      const double smooth = (8192.0 / wavelength - 1.0) / 3.0;
      want = (1.0 - smooth) * f / 32.0 + smooth * f;
    }
    const double got = std::asin(double{scaled.sin[32 + i]});
    EXPECT_NEAR(std::asin(double{plain.sin[32 + i]}), i == 0 ? std::asin(std::sin(1.0)) : f,
                f * 1e-5);
    EXPECT_NEAR(got, i == 0 ? std::asin(std::sin(1.0)) : want, want * 1e-5) << i;
  }
}

TEST(Rope, BadArgumentsAreNamed) {
  const auto code = [](const absl::StatusOr<RopeTable>& table) { return table.status().code(); };
  constexpr auto kBad = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code(BuildRopeTable(7, 10, 1e4f)), kBad);
  EXPECT_EQ(code(BuildRopeTable(0, 10, 1e4f)), kBad);
  EXPECT_EQ(code(BuildRopeTable(8, 0, 1e4f)), kBad);
  EXPECT_EQ(code(BuildRopeTable(8, 10, 0.0f)), kBad);
  EXPECT_EQ(code(BuildRopeTable(8, 10, NAN)), kBad);
  EXPECT_EQ(code(BuildRopeTable(8, 10, 1e4f, {.factor = -1.0f})), kBad);
  EXPECT_EQ(code(BuildRopeTable(8, 10, 1e4f, {.factor = 8.0f, .low_freq_factor = 4.0f})), kBad);
  EXPECT_EQ(code(BuildRopeTable(8, 10, 1e4f, {.factor = 8.0f, .original_max_positions = 0})), kBad);
}

}  // namespace
}  // namespace winnow::kernels
