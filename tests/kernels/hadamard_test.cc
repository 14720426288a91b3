#include "kernels/hadamard.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/cpu/cpu_path.h"
#include "kernels/kv_format.h"

namespace winnow::kernels {
namespace {

std::vector<float> Random(int n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = normal(rng);
  return x;
}

// Row i of the block-diagonal matrix times x, in double.
double Naive(const std::vector<float>& x, int i, int block) {
  double sum = 0.0;
  const int first = i / block * block;
  for (int j = 0; j < block; ++j) {
    const bool odd = std::popcount(static_cast<unsigned>((i - first) & j)) % 2 != 0;
    sum += (odd ? -1.0 : 1.0) * double{x[static_cast<size_t>(first + j)]};
  }
  return sum / std::sqrt(double(block));
}

TEST(Hadamard, BlocksAreTheLargestPowersOfTwo) {
  const int want[] = {16, 32, 16, 64, 16, 32, 16, 128};
  for (int i = 0; i < 8; ++i) EXPECT_EQ(HadamardBlock(16 * (i + 1)), want[i]);
  EXPECT_EQ(HadamardBlock(192), 64);
  EXPECT_EQ(HadamardBlock(256), 256);
}

// log2(n) additions and one product of a rounded factor: an element errs by at most
// (log2(n) + 2) 2^-24 of sum |x| / sqrt(n).
TEST(Hadamard, EqualsTheMatrix) {
  for (int dim = 16; dim <= kMaxHeadDim; dim += 16) {
    const std::vector<float> x = Random(dim, static_cast<uint32_t>(dim));
    std::vector<float> y = x;
    HadamardRotate(dim, y.data());
    const int block = HadamardBlock(dim);
    double sum = 0.0;
    for (const float value : x) sum += std::fabs(double{value});
    const double bound = (std::log2(block) + 2) * 0x1p-24 * sum / std::sqrt(double(block));
    for (int i = 0; i < dim; ++i) {
      ASSERT_NEAR(y[static_cast<size_t>(i)], Naive(x, i, block), bound) << dim << " " << i;
    }
    HadamardRotate(dim, y.data());
    for (size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(y[i], x[i], 1e-5) << dim;
  }
}

TEST(Hadamard, VectorWidthChangesNoBit) {
  const CpuPath widest = ActiveCpuPath();
  for (int dim = 16; dim <= kMaxHeadDim; dim += 16) {
    const std::vector<float> x = Random(dim, 7);
    std::vector<float> want = x;
    HadamardRotate(dim, want.data());
    for (const CpuPath path : {CpuPath::kScalar, CpuPath::kAvx2, CpuPath::kAvx512}) {
      if (!SetCpuPathForTest(path)) continue;
      std::vector<float> got = x;
      HadamardRotate(dim, got.data());
      EXPECT_EQ(got, want) << dim << " " << CpuPathName(path);
    }
    ASSERT_TRUE(SetCpuPathForTest(widest));
  }
}

TEST(Hadamard, SpreadsAnOutlier) {
  std::vector<float> x(64, 0.0f);
  x[13] = 8.0f;
  HadamardRotate(64, x.data());
  for (const float value : x) EXPECT_EQ(std::fabs(value), 1.0f);
}

}  // namespace
}  // namespace winnow::kernels
