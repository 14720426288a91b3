#include "kernels/gemm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_path.h"
#include "tests/testing/compare.h"

namespace winnow::kernels {
namespace {

using ::winnow::testing::AllClose;
using ::winnow::testing::BitEqual;
using ::winnow::testing::FloatSumTolerance;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> RandomFloats(size_t size, uint32_t seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(size);
  for (float& value : values) value = uniform(rng);
  return values;
}

std::vector<Bf16> Round(const std::vector<float>& values) {
  std::vector<Bf16> rounded(values.size());
  for (size_t i = 0; i < values.size(); ++i) rounded[i] = ToBf16(values[i]);
  return rounded;
}

std::vector<float> Widen(const std::vector<Bf16>& values) {
  std::vector<float> wide(values.size());
  for (size_t i = 0; i < values.size(); ++i) wide[i] = ToFloat(values[i]);
  return wide;
}

// One GEMM's operands, contiguous, and what a double loop makes of them.
struct Case {
  int m, n, k;
  bool bf16_activations;
  std::vector<float> a;
  std::vector<Bf16> a_bf16, w;
  PackedMatrix packed;

  Case(int m_in, int n_in, int k_in, bool bf16)
      : m(m_in), n(n_in), k(k_in), bf16_activations(bf16) {
    a = RandomFloats(static_cast<size_t>(m) * k, 1);
    a_bf16 = Round(a);
    if (bf16) a = Widen(a_bf16);
    w = Round(RandomFloats(static_cast<size_t>(n) * k, 2));
    packed = PackedMatrix::Pack(w.data(), n, k);
  }

  std::vector<float> Expected() const {
    std::vector<float> out(static_cast<size_t>(m) * n);
    for (int row = 0; row < m; ++row) {
      for (int col = 0; col < n; ++col) {
        double sum = 0.0;
        for (int i = 0; i < k; ++i) {
          sum += static_cast<double>(a[row * k + i]) * ToFloat(w[col * k + i]);
        }
        out[row * n + col] = static_cast<float>(sum);
      }
    }
    return out;
  }

  // Rows [begin, end) alone, into a NaN-filled output.
  std::vector<float> Run(int begin, int end, ThreadPool* pool) const {
    std::vector<float> out(static_cast<size_t>(end - begin) * n, kNan);
    GemmParams params;
    if (bf16_activations) {
      params.a_bf16 = a_bf16.data() + static_cast<int64_t>(begin) * k;
    } else {
      params.a_f32 = a.data() + static_cast<int64_t>(begin) * k;
    }
    params.w = &packed;
    params.out = out.data();
    params.m = end - begin;
    params.lda = k;
    params.ldo = n;
    EXPECT_TRUE(GemmCpu(params, pool).ok());
    return out;
  }
};

struct PathCase {
  CpuPath path;
  bool bf16_activations;
};
void PrintTo(const PathCase& c, std::ostream* os) {
  *os << CpuPathName(c.path) << (c.bf16_activations ? "_bf16" : "_f32");
}

// Every path that the host has, with both kinds of activations.
class GemmPathTest : public ::testing::TestWithParam<PathCase> {
 protected:
  void SetUp() override {
    widest_ = ActiveCpuPath();
    if (!SetCpuPathForTest(GetParam().path)) GTEST_SKIP() << "not on this host";
  }
  void TearDown() override { SetCpuPathForTest(widest_); }
  CpuPath widest_ = CpuPath::kScalar;
};

TEST_P(GemmPathTest, EqualsADoubleLoop) {
  ThreadPool pool(2);
  struct Shape {
    int m, n, k;
  };
  for (const Shape& s : {Shape{1, 1, 1},
                         {1, 16, 2},
                         {2, 17, 3},
                         {5, 15, 31},
                         {6, 64, 64},
                         {7, 65, 63},
                         {13, 97, 101},
                         {49, 130, 37},
                         {100, 33, 576}}) {
    SCOPED_TRACE(::testing::Message() << s.m << "x" << s.n << "x" << s.k);
    const Case c(s.m, s.n, s.k, GetParam().bf16_activations);
    // |a * w| <= 1.
    EXPECT_TRUE(
        AllClose(c.Run(0, s.m, &pool), c.Expected(), {s.m, s.n}, FloatSumTolerance(s.k, 1.0)));
  }
}

TEST_P(GemmPathTest, ARowHasTheSameBitsInEveryBatch) {
  constexpr int kM = 100, kN = 147, kK = 93;
  const Case c(kM, kN, kK, GetParam().bf16_activations);
  ThreadPool one(1), two(2);
  const std::vector<float> all = c.Run(0, kM, &one);
  EXPECT_TRUE(BitEqual(c.Run(0, kM, &two), all, {kM, kN}));
  for (const int m : {1, 2, 3, 5, 7, 16, 17, 64}) {
    for (const int begin : {0, 1, 11, kM - m}) {
      if (begin + m > kM) continue;
      SCOPED_TRACE(::testing::Message() << "rows " << begin << " + " << m);
      const std::vector<float> expected(all.begin() + begin * kN, all.begin() + (begin + m) * kN);
      EXPECT_TRUE(BitEqual(c.Run(begin, begin + m, &one), expected, {m, kN}));
      EXPECT_TRUE(BitEqual(c.Run(begin, begin + m, &two), expected, {m, kN}));
    }
  }
}

TEST_P(GemmPathTest, PermutedRowsGivePermutedRows) {
  constexpr int kM = 23, kN = 40, kK = 50;
  Case c(kM, kN, kK, GetParam().bf16_activations);
  ThreadPool pool(2);
  const std::vector<float> before = c.Run(0, kM, &pool);
  // Row r moves to 5 r mod 23.
  Case moved(kM, kN, kK, GetParam().bf16_activations);
  for (int row = 0; row < kM; ++row) {
    const int to = 5 * row % kM;
    std::copy_n(c.a.begin() + row * kK, kK, moved.a.begin() + to * kK);
    std::copy_n(c.a_bf16.begin() + row * kK, kK, moved.a_bf16.begin() + to * kK);
  }
  const std::vector<float> after = moved.Run(0, kM, &pool);
  for (int row = 0; row < kM; ++row) {
    const int to = 5 * row % kM;
    EXPECT_TRUE(BitEqual(absl::MakeSpan(after).subspan(to * kN, kN),
                         absl::MakeSpan(before).subspan(row * kN, kN), {kN}));
  }
}

// A column of W has the same bits whatever stands beside it: a fused q|k|v matrix
// equals three separate ones.
TEST_P(GemmPathTest, AColumnHasTheSameBitsInEveryMatrix) {
  constexpr int kM = 9, kN = 150, kK = 77, kBegin = 37, kCols = 21;
  Case c(kM, kN, kK, GetParam().bf16_activations);
  ThreadPool pool(2);
  const std::vector<float> all = c.Run(0, kM, &pool);
  c.packed = PackedMatrix::Pack(c.w.data() + kBegin * kK, kCols, kK);
  c.n = kCols;
  const std::vector<float> part = c.Run(0, kM, &pool);
  for (int row = 0; row < kM; ++row) {
    EXPECT_TRUE(BitEqual(absl::MakeSpan(part).subspan(row * kCols, kCols),
                         absl::MakeSpan(all).subspan(row * kN + kBegin, kCols), {kCols}));
  }
}

TEST_P(GemmPathTest, StridesAndAccumulate) {
  constexpr int kM = 11, kN = 35, kK = 29, kLda = 41, kLdo = 53;
  const Case c(kM, kN, kK, GetParam().bf16_activations);
  ThreadPool pool(2);
  const std::vector<float> plain = c.Run(0, kM, &pool);
  // Between the rows of `a` lies NaN, which must not be read into a sum.
  std::vector<float> a(kM * kLda, kNan);
  for (int row = 0; row < kM; ++row) std::copy_n(c.a.begin() + row * kK, kK, &a[row * kLda]);
  const std::vector<Bf16> a_bf16 = Round(a);
  std::vector<float> out = RandomFloats(kM * kLdo, 3);
  const std::vector<float> before = out;
  GemmParams params;
  if (c.bf16_activations) {
    params.a_bf16 = a_bf16.data();
  } else {
    params.a_f32 = a.data();
  }
  params.w = &c.packed;
  params.out = out.data();
  params.m = kM;
  params.lda = kLda;
  params.ldo = kLdo;
  params.accumulate = true;
  ASSERT_TRUE(GemmCpu(params, &pool).ok());
  std::vector<float> expected = before;  // nothing written between the rows
  for (int row = 0; row < kM; ++row) {
    for (int col = 0; col < kN; ++col) expected[row * kLdo + col] += plain[row * kN + col];
  }
  EXPECT_TRUE(BitEqual(out, expected, {kM, kLdo}));
}

INSTANTIATE_TEST_SUITE_P(
    Paths, GemmPathTest,
    ::testing::Values(PathCase{CpuPath::kScalar, true}, PathCase{CpuPath::kScalar, false},
                      PathCase{CpuPath::kAvx2, true}, PathCase{CpuPath::kAvx2, false},
                      PathCase{CpuPath::kAvx512, true}, PathCase{CpuPath::kAvx512, false},
                      PathCase{CpuPath::kAvx512Bf16, true}, PathCase{CpuPath::kAvx512Bf16, false}),
    ::testing::PrintToStringParamName());

// With fused multiply-adds the width of a vector changes no bit.
TEST(GemmTest, FloatPathsAgreeInEveryBit) {
  const CpuPath widest = ActiveCpuPath();
  if (widest < CpuPath::kAvx512) GTEST_SKIP() << "one float path on this host";
  const Case c(13, 75, 61, /*bf16=*/false);
  ThreadPool pool(2);
  const std::vector<float> wide = c.Run(0, 13, &pool);
  ASSERT_TRUE(SetCpuPathForTest(CpuPath::kAvx2));
  EXPECT_TRUE(BitEqual(c.Run(0, 13, &pool), wide, {13, 75}));
  SetCpuPathForTest(widest);
}

TEST(GemmTest, PackedRowsComeBack) {
  constexpr int kN = 37, kK = 21;
  const std::vector<Bf16> w = Round(RandomFloats(kN * kK, 4));
  const PackedMatrix packed = PackedMatrix::Pack(w.data(), kN, kK);
  EXPECT_EQ(packed.bytes(), size_t{3 * 16 * 22 * 2});
  for (int row = 0; row < kN; ++row) {
    std::vector<float> out(kK, kNan);
    packed.Row(row, out.data());
    for (int i = 0; i < kK; ++i) ASSERT_EQ(out[i], ToFloat(w[row * kK + i]));
  }
}

TEST(GemmTest, PackedInAnArenaIsTheSame) {
  constexpr int kM = 3, kN = 700, kK = 500;  // 0.7 MB: some fifty share a chunk
  Case c(kM, kN, kK, /*bf16=*/true);
  ThreadPool pool(2);
  const std::vector<float> expected = c.Run(0, kM, &pool);
  WeightArena arena;
  std::vector<PackedMatrix> matrices;
  for (int i = 0; i < 60; ++i) {  // more than one chunk
    matrices.push_back(PackedMatrix::Pack(c.w.data(), kN, kK, &arena));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(matrices.back().data()) % 64, 0u);
  }
  for (PackedMatrix& matrix : matrices) {
    c.packed = std::move(matrix);
    ASSERT_TRUE(BitEqual(c.Run(0, kM, &pool), expected, {kM, kN}));
  }
  // One larger than a chunk.
  const std::vector<Bf16> big = Round(RandomFloats(20000 * 1000, 5));
  const PackedMatrix packed = PackedMatrix::Pack(big.data(), 20000, 1000, &arena);
  std::vector<float> row(1000);
  packed.Row(19999, row.data());
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(row[i], ToFloat(big[19999 * 1000 + i]));
}

TEST(GemmTest, RefusesBadParamsByName) {
  const Case c(2, 3, 4, /*bf16=*/false);
  ThreadPool pool(1);
  std::vector<float> out(6);
  GemmParams good;
  good.a_f32 = c.a.data();
  good.w = &c.packed;
  good.out = out.data();
  good.m = 2;
  good.lda = 4;
  good.ldo = 3;
  ASSERT_TRUE(GemmCpu(good, &pool).ok());
  const auto message = [&](auto change) {
    GemmParams params = good;
    change(&params);
    const absl::Status status = GemmCpu(params, &pool);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_EQ(message([](GemmParams* p) { p->w = nullptr; }), "gemm: w is null or empty");
  EXPECT_EQ(message([](GemmParams* p) { p->out = nullptr; }), "gemm: out is null");
  EXPECT_EQ(message([](GemmParams* p) { p->a_f32 = nullptr; }),
            "gemm: exactly one of a_bf16 and a_f32 must be set");
  EXPECT_EQ(message([&](GemmParams* p) { p->a_bf16 = c.a_bf16.data(); }),
            "gemm: exactly one of a_bf16 and a_f32 must be set");
  EXPECT_EQ(message([](GemmParams* p) { p->m = -1; }), "gemm: m=-1 < 0");
  EXPECT_EQ(message([](GemmParams* p) { p->lda = 3; }), "gemm: lda=3 is below k=4");
  EXPECT_EQ(message([](GemmParams* p) { p->ldo = 2; }), "gemm: ldo=2 is below n=3");
  good.m = 0;
  EXPECT_TRUE(GemmCpu(good, &pool).ok());
}

}  // namespace
}  // namespace winnow::kernels
