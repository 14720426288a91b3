// rms_norm, swiglu, embedding, on every path that the host has.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_path.h"
#include "kernels/embedding.h"
#include "kernels/rms_norm.h"
#include "kernels/swiglu.h"
#include "tests/testing/compare.h"

namespace winnow::kernels {

void PrintTo(CpuPath path, std::ostream* os) { *os << CpuPathName(path); }

namespace {

using ::winnow::testing::AllClose;
using ::winnow::testing::BitEqual;
using ::winnow::testing::Tolerance;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> RandomFloats(size_t size, float range, uint32_t seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-range, range);
  std::vector<float> values(size);
  for (float& value : values) value = uniform(rng);
  return values;
}

class PathTest : public ::testing::TestWithParam<CpuPath> {
 protected:
  void SetUp() override {
    widest_ = ActiveCpuPath();
    if (!SetCpuPathForTest(GetParam())) GTEST_SKIP() << "not on this host";
  }
  void TearDown() override { SetCpuPathForTest(widest_); }
  CpuPath widest_ = CpuPath::kScalar;
};

struct Outputs {
  std::vector<float> f32;
  std::vector<Bf16> bf16;
};

// Every BF16 output is the float one, rounded once.
void ExpectRounded(const Outputs& out) {
  for (size_t i = 0; i < out.f32.size(); ++i) {
    ASSERT_EQ(out.bf16[i].bits, ToBf16(out.f32[i]).bits) << "element " << i;
  }
}

Outputs RunRmsNorm(const std::vector<float>& x, const std::vector<float>& weight, int m, int n,
                   int ldx, int threads) {
  Outputs out{std::vector<float>(m * n, kNan), std::vector<Bf16>(m * n, ToBf16(kNan))};
  ThreadPool pool(threads);
  RmsNormParams params;
  params.x = x.data();
  params.weight = weight.data();
  params.out_bf16 = out.bf16.data();
  params.out_f32 = out.f32.data();
  params.m = m;
  params.n = n;
  params.ldx = ldx;
  params.eps = 1e-5f;
  EXPECT_TRUE(RmsNormCpu(params, &pool).ok());
  return out;
}

TEST_P(PathTest, RmsNormEqualsADoubleLoop) {
  for (const int n : {1, 3, 15, 16, 17, 64, 101, 576}) {
    constexpr int kM = 5;
    const int ldx = n + 7;
    const std::vector<float> x = RandomFloats(kM * ldx, 3.0f, 1);
    const std::vector<float> weight = RandomFloats(n, 2.0f, 2);
    const Outputs out = RunRmsNorm(x, weight, kM, n, ldx, 1);
    std::vector<float> expected(kM * n);
    for (int row = 0; row < kM; ++row) {
      double sum = 0.0;
      for (int i = 0; i < n; ++i) sum += std::pow(x[row * ldx + i], 2.0);
      for (int i = 0; i < n; ++i) {
        expected[row * n + i] =
            static_cast<float>(x[row * ldx + i] / std::sqrt(sum / n + 1e-5) * weight[i]);
      }
    }
    // Positive terms in at most n/16 + 4 additions, then five roundings.
    const double rtol = (n / 16 + 9) * std::ldexp(1.0, -24);
    EXPECT_TRUE(AllClose(out.f32, expected, {kM, n}, Tolerance{.rtol = rtol})) << "n=" << n;
    ExpectRounded(out);
  }
}

TEST_P(PathTest, RmsNormRowIsIndependentOfItsBatch) {
  constexpr int kM = 200, kN = 333;
  const std::vector<float> x = RandomFloats(kM * kN, 3.0f, 3);
  const std::vector<float> weight = RandomFloats(kN, 2.0f, 4);
  const Outputs all = RunRmsNorm(x, weight, kM, kN, kN, 2);
  for (int row = 0; row < kM; ++row) {
    const std::vector<float> one(x.begin() + row * kN, x.begin() + (row + 1) * kN);
    EXPECT_TRUE(BitEqual(RunRmsNorm(one, weight, 1, kN, kN, 1).f32,
                         absl::MakeSpan(all.f32).subspan(row * kN, kN), {kN}));
  }
}

Outputs RunSwiGlu(const std::vector<float>& x, int m, int intermediate, int ldx, int threads) {
  Outputs out{std::vector<float>(m * intermediate, kNan),
              std::vector<Bf16>(m * intermediate, ToBf16(kNan))};
  ThreadPool pool(threads);
  SwiGluParams params;
  params.x = x.data();
  params.out_bf16 = out.bf16.data();
  params.out_f32 = out.f32.data();
  params.m = m;
  params.intermediate = intermediate;
  params.ldx = ldx;
  EXPECT_TRUE(SwiGluCpu(params, &pool).ok());
  return out;
}

TEST_P(PathTest, SwiGluEqualsDoubles) {
  for (const int n : {1, 5, 16, 33, 1536}) {
    constexpr int kM = 3;
    const int ldx = 2 * n + 3;
    const std::vector<float> x = RandomFloats(kM * ldx, 20.0f, 5);
    const Outputs out = RunSwiGlu(x, kM, n, ldx, 1);
    std::vector<float> expected(kM * n);
    for (int row = 0; row < kM; ++row) {
      for (int i = 0; i < n; ++i) {
        const double g = x[row * ldx + i], u = x[row * ldx + n + i];
        expected[row * n + i] = static_cast<float>(g / (1.0 + std::exp(-g)) * u);
      }
    }
    // exp within 2e-7 and three roundings of 6e-8.
    EXPECT_TRUE(AllClose(out.f32, expected, {kM, n}, Tolerance{.rtol = 4e-7})) << "n=" << n;
    ExpectRounded(out);
  }
}

// The polynomial exp at its edges, seen through silu with up = 1.
TEST_P(PathTest, SwiGluAtTheEdges) {
  const std::vector<float> gate = {0.0f, -0.0f, 200.0f, -86.9f, -200.0f, kInf, kNan, 1e-30f, 88.0f};
  const int n = static_cast<int>(gate.size());
  std::vector<float> x = gate;
  x.insert(x.end(), n, 1.0f);
  const std::vector<float> out = RunSwiGlu(x, 1, n, 2 * n, 1).f32;
  EXPECT_EQ(out[0], 0.0f);
  EXPECT_EQ(out[1], 0.0f);
  EXPECT_EQ(out[2], 200.0f);
  const double low = -86.9f;
  EXPECT_NEAR(out[3], low * std::exp(low), -low * std::exp(low) * 4e-7);
  EXPECT_EQ(out[4], 0.0f);
  EXPECT_EQ(out[5], kInf);
  EXPECT_TRUE(std::isnan(out[6]));
  EXPECT_EQ(out[7], 0.5e-30f);
  EXPECT_EQ(out[8], 88.0f);
}

TEST_P(PathTest, SwiGluElementIsIndependentOfItsPlace) {
  constexpr int kM = 40, kN = 601;
  const std::vector<float> x = RandomFloats(kM * 2 * kN, 10.0f, 6);
  const Outputs all = RunSwiGlu(x, kM, kN, 2 * kN, 2);
  for (const int row : {0, 7, 39}) {
    for (const int begin : {0, 1, 300}) {  // other lanes, other tails
      const int n = 37;
      std::vector<float> part(x.begin() + row * 2 * kN + begin,
                              x.begin() + row * 2 * kN + begin + n);
      const auto up = x.begin() + row * 2 * kN + kN + begin;
      part.insert(part.end(), up, up + n);
      EXPECT_TRUE(BitEqual(RunSwiGlu(part, 1, n, 2 * n, 1).f32,
                           absl::MakeSpan(all.f32).subspan(row * kN + begin, n), {n}));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Paths, PathTest,
                         ::testing::Values(CpuPath::kScalar, CpuPath::kAvx2, CpuPath::kAvx512,
                                           CpuPath::kAvx512Bf16),
                         [](const auto& param_info) { return CpuPathName(param_info.param); });

TEST(RmsNormTest, VectorWidthChangesNoBit) {
  const CpuPath widest = ActiveCpuPath();
  if (widest < CpuPath::kAvx512) GTEST_SKIP() << "one vector width on this host";
  const std::vector<float> x = RandomFloats(3 * 101, 3.0f, 7), weight = RandomFloats(101, 1.0f, 8);
  const Outputs wide = RunRmsNorm(x, weight, 3, 101, 101, 1);
  ASSERT_TRUE(SetCpuPathForTest(CpuPath::kAvx2));
  EXPECT_TRUE(BitEqual(RunRmsNorm(x, weight, 3, 101, 101, 1).f32, wide.f32, {3, 101}));
  SetCpuPathForTest(widest);
}

TEST(EmbeddingTest, CopiesRowsAndRefusesForeignIds) {
  constexpr int kVocab = 50, kHidden = 19;
  std::vector<Bf16> table(kVocab * kHidden);
  const std::vector<float> values = RandomFloats(table.size(), 1.0f, 9);
  std::transform(values.begin(), values.end(), table.begin(), ToBf16);
  const PackedMatrix packed = PackedMatrix::Pack(table.data(), kVocab, kHidden);
  std::vector<int32_t> tokens = {49, 0, 7, 7, 16};
  std::vector<float> out(tokens.size() * kHidden, kNan);
  ThreadPool pool(2);
  EmbeddingParams params;
  params.table = &packed;
  params.tokens = tokens.data();
  params.out = out.data();
  params.num_tokens = static_cast<int>(tokens.size());
  ASSERT_TRUE(EmbeddingCpu(params, &pool).ok());
  for (size_t t = 0; t < tokens.size(); ++t) {
    for (int i = 0; i < kHidden; ++i) {
      ASSERT_EQ(out[t * kHidden + i], ToFloat(table[tokens[t] * kHidden + i]));
    }
  }
  tokens[3] = 50;
  EXPECT_EQ(EmbeddingCpu(params, &pool).message(), "embedding: tokens[3]=50 is outside [0, 50)");
  tokens[3] = -1;
  EXPECT_EQ(EmbeddingCpu(params, &pool).message(), "embedding: tokens[3]=-1 is outside [0, 50)");
}

TEST(ElementwiseTest, RefusesBadParams) {
  ThreadPool pool(1);
  float x[4] = {}, out[4];
  RmsNormParams norm;
  norm.x = x;
  norm.weight = x;
  norm.m = 1;
  norm.n = norm.ldx = 4;
  EXPECT_EQ(RmsNormCpu(norm, &pool).message(), "rms_norm: no output is set");
  norm.out_f32 = out;
  EXPECT_TRUE(RmsNormCpu(norm, &pool).ok());
  norm.ldx = 3;
  EXPECT_EQ(RmsNormCpu(norm, &pool).message(), "rms_norm: bad shape m=1 n=4 ldx=3");
  SwiGluParams swiglu;
  swiglu.x = x;
  swiglu.m = 1;
  swiglu.intermediate = 2;
  swiglu.ldx = 4;
  EXPECT_EQ(SwiGluCpu(swiglu, &pool).message(), "swiglu: no output is set");
  swiglu.out_f32 = out;
  EXPECT_TRUE(SwiGluCpu(swiglu, &pool).ok());
  swiglu.intermediate = 3;
  EXPECT_EQ(SwiGluCpu(swiglu, &pool).message(), "swiglu: bad shape m=1 intermediate=3 ldx=4");
}

}  // namespace
}  // namespace winnow::kernels
