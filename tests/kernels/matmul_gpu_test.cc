// Rows to e4m3, bit by bit, and cuBLASLt's products, on integers exactly.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/base/fp8.h"
#include "common/base/thread_pool.h"
#include "kernels/cuda/cublaslt_matmul.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/matmul_quantize.h"
#include "kernels/swiglu.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/random_shapes.h"

namespace winnow::kernels {
namespace {

// Rows of x of every size: zeros, subnormals, large ones, one NaN, one infinity.
std::vector<Bf16> RowsToQuantize(int m, int ldx) {
  std::mt19937 rng(static_cast<unsigned>(m + ldx));
  std::normal_distribution<float> normal;
  std::vector<Bf16> x(static_cast<size_t>(m) * static_cast<size_t>(ldx));
  const float sizes[] = {1.0f, 0.0f, 0x1p-130f, 0x1p-20f, 0x1p100f, 3.0f, 0.01f};
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = ToBf16(normal(rng) * sizes[i / static_cast<size_t>(ldx) % std::size(sizes)]);
  }
  return x;
}

struct QuantizeCase {
  int m, k, pad;
  friend void PrintTo(const QuantizeCase& c, std::ostream* os) { *os << c.m << "x" << c.k; }
};

class QuantizeRowsGpu : public testing::TestWithParam<QuantizeCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

// Quantizes rows of values `v` [m, k], which `x` stands for, and compares with the definition.
void ExpectBitsOfTheDefinition(const QuantizeCase& c, const std::vector<Bf16>& x, int ldx,
                               bool silu_mul, const std::vector<float>& v) {
  const size_t m = static_cast<size_t>(c.m), k = static_cast<size_t>(c.k);
  DeviceArray<Bf16> d_x(x);
  DeviceArray<uint8_t> codes(m * k);
  DeviceArray<float> scale(m);
  const absl::Status status = LaunchQuantizeRows({.x = d_x.get(),
                                                  .codes = codes.get(),
                                                  .scale = scale.get(),
                                                  .m = c.m,
                                                  .k = c.k,
                                                  .ldx = ldx,
                                                  .silu_mul = silu_mul},
                                                 nullptr);
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<uint8_t> got = codes.Get();
  const std::vector<float> got_scale = scale.Get();
  for (size_t i = 0; i < m; ++i) {
    float top = 0x1p-100f;
    bool finite = true;
    for (size_t j = 0; j < k; ++j) {
      finite = finite && std::isfinite(v[i * k + j]);
      top = std::max(top, std::abs(v[i * k + j]));
    }
    if (!finite) {
      EXPECT_TRUE(std::isnan(got_scale[i]));
      for (size_t j = 0; j < k; ++j) ASSERT_EQ(got[i * k + j], 0);
      continue;
    }
    const float s = top / 448.0f;
    ASSERT_EQ(got_scale[i], s) << "row " << i;
    for (size_t j = 0; j < k; ++j) {
      const float value = v[i * k + j];
      ASSERT_EQ(got[i * k + j], ToE4m3(value / s)) << "row " << i << " column " << j;
      ASSERT_LE(std::abs(double{value} - double{s} * E4m3ToFloat(got[i * k + j])),
                std::max(std::abs(value) * 0x1p-4, s * 0x1p-10) + std::abs(value) * 0x1p-23);
    }
  }
}

TEST_P(QuantizeRowsGpu, HasTheBitsOfItsDefinition) {
  const QuantizeCase& c = GetParam();
  const size_t m = static_cast<size_t>(c.m), k = static_cast<size_t>(c.k);
  const int ldx = c.k + 8 * c.pad;
  const size_t stride = static_cast<size_t>(ldx);
  std::vector<Bf16> x = RowsToQuantize(c.m, ldx);
  if (c.m > 8) {
    x[7 * stride + k - 1] = Bf16{0x7fc1};
    x[8 * stride] = Bf16{0xff80};
  }
  std::vector<float> v(m * k);
  for (size_t i = 0; i < m; ++i) {
    for (size_t j = 0; j < k; ++j) v[i * k + j] = ToFloat(x[i * stride + j]);
    std::fill(&x[i * stride + k], x.data() + (i + 1) * stride, Bf16{0xffff});  // nobody's
  }
  ExpectBitsOfTheDefinition(c, x, ldx, false, v);
}

// Of the values that the SwiGLU of the CPU gives; some products are not finite.
TEST_P(QuantizeRowsGpu, MultipliesBySilu) {
  const QuantizeCase& c = GetParam();
  const size_t m = static_cast<size_t>(c.m), k = static_cast<size_t>(c.k);
  const int ldx = 2 * c.k + 8 * c.pad;
  const std::vector<Bf16> x = RowsToQuantize(c.m, ldx);
  std::vector<float> in(x.size()), v(m * k);
  std::transform(x.begin(), x.end(), in.begin(), [](Bf16 y) { return ToFloat(y); });
  ThreadPool pool(1);
  const absl::Status status = SwiGluCpu(
      {.x = in.data(), .out_f32 = v.data(), .m = c.m, .intermediate = c.k, .ldx = ldx}, &pool);
  ASSERT_TRUE(status.ok()) << status;
  ExpectBitsOfTheDefinition(c, x, ldx, true, v);
}

INSTANTIATE_TEST_SUITE_P(All, QuantizeRowsGpu,
                         testing::Values(QuantizeCase{1, 8, 0}, QuantizeCase{7, 24, 1},
                                         QuantizeCase{17, 2040, 0}, QuantizeCase{9, 2048, 3},
                                         QuantizeCase{9, 2056, 0}, QuantizeCase{14, 12288, 1}));

TEST(QuantizeRows, RefusesWhatItCannotDo) {
  alignas(16) Bf16 x[64]{};
  alignas(16) uint8_t codes[64]{};
  float scale[8]{};
  const QuantizeRowsParams good{.x = x, .codes = codes, .scale = scale, .m = 2, .k = 16, .ldx = 24};
  EXPECT_TRUE(ValidateQuantizeRows(good).ok());
  const auto refused = [&](auto change) {
    QuantizeRowsParams p = good;
    change(p);
    return ValidateQuantizeRows(p).code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused([](auto& p) { p.m = -1; }));
  EXPECT_TRUE(refused([](auto& p) { p.k = 12; }));
  EXPECT_TRUE(refused([](auto& p) { p.k = 0; }));
  EXPECT_TRUE(refused([](auto& p) { p.ldx = 20; }));
  EXPECT_TRUE(refused([](auto& p) { p.silu_mul = true; }));
  EXPECT_TRUE(refused([](auto& p) { p.codes = nullptr; }));
  EXPECT_TRUE(refused([](auto& p) { p.scale = nullptr; }));
  EXPECT_TRUE(refused([&](auto& p) { p.x = x + 1; }));
}

struct MatmulCase {
  std::string name;
  int m, n, k;
  MatmulType type = MatmulType::kBf16;
  MatmulScales scales = MatmulScales::kPerTensor;
  bool bf16_out = false, accumulate = false;
  int pad = 0;     // 16 elements each, past the rows of x and of out
  int offset = 0;  // bytes: where x, w and out begin, past a multiple of 256
  friend void PrintTo(const MatmulCase& c, std::ostream* os) { *os << c.name; }
};

class MatmulGpu : public testing::Test {
 protected:
  void SetUp() override {
    RequireGpu();
    if (IsSkipped()) return;
    absl::StatusOr<std::unique_ptr<CublasLt>> made = CublasLt::Create();
    ASSERT_TRUE(made.ok()) << made.status();
    lt_ = *std::move(made);
  }
  std::unique_ptr<CublasLt> lt_;
};

class MatmulGpuCases : public MatmulGpu, public testing::WithParamInterface<MatmulCase> {};

// Values are small integers, so that every sum is one too, below 2^13: exact in any order, also
// where FP8 tensor cores keep 14 bits of it.
TEST_P(MatmulGpuCases, IsExactOnIntegersAndRepeats) {
  const MatmulCase& c = GetParam();
  const bool e4m3 = c.type == MatmulType::kE4m3;
  const size_t m = static_cast<size_t>(c.m), n = static_cast<size_t>(c.n),
               k = static_cast<size_t>(c.k), size = e4m3 ? 1 : 2;
  const size_t ldx = k + 16 * static_cast<size_t>(c.pad),
               ldo = (n + 7) / 8 * 8 + 16 * static_cast<size_t>(c.pad);
  std::mt19937 rng(static_cast<unsigned>(c.m + c.n * 3 + c.k));
  std::vector<int> x(m * k), w(n * k);
  for (int& v : x) v = static_cast<int>(rng() % 5) - 2;
  for (int& v : w) v = static_cast<int>(rng() % 5) - 2;
  std::vector<uint8_t> x_bytes(m * ldx * size, 0xff), w_bytes(n * k * size);
  const auto put = [&](std::vector<uint8_t>& to, size_t at, int v) {
    const Bf16 bf16 = ToBf16(static_cast<float>(v));
    if (e4m3) {
      to[at] = ToE4m3(static_cast<float>(v));
    } else {
      std::memcpy(&to[2 * at], &bf16, 2);
    }
  };
  for (size_t i = 0; i < m; ++i) {
    for (size_t j = 0; j < k; ++j) put(x_bytes, i * ldx + j, x[i * k + j]);
  }
  for (size_t i = 0; i < w.size(); ++i) put(w_bytes, i, w[i]);
  std::vector<float> x_scale(c.scales == MatmulScales::kPerRow ? m : 1), w_scale = x_scale;
  w_scale.resize(c.scales == MatmulScales::kPerRow ? n : 1);
  for (float& v : x_scale) v = 0.5f + static_cast<float>(rng() % 100) / 100.0f;
  for (float& v : w_scale) v = 0.5f + static_cast<float>(rng() % 100) / 100.0f;
  const size_t out_size = c.bf16_out ? 2 : 4;
  std::vector<float> old(m * ldo);
  for (float& v : old) v = RoundToBf16(static_cast<float>(rng() % 1000) - 500.0f);
  std::vector<uint8_t> old_bytes(m * ldo * out_size);
  for (size_t i = 0; i < old.size(); ++i) {
    const Bf16 bf16 = ToBf16(old[i]);
    std::memcpy(&old_bytes[i * out_size], c.bf16_out ? static_cast<const void*>(&bf16) : &old[i],
                out_size);
  }
  const size_t offset = static_cast<size_t>(c.offset);
  for (auto* bytes : {&x_bytes, &w_bytes, &old_bytes}) bytes->insert(bytes->begin(), offset, 0xff);
  DeviceArray<uint8_t> d_x(x_bytes), d_w(w_bytes), out(old_bytes.size()),
      workspace(size_t{8} << 20);
  uint8_t* const to = out.get() + offset;
  DeviceArray<float> d_x_scale(x_scale), d_w_scale(w_scale);
  const MatmulParams params{.x = d_x.get() + offset,
                            .w = d_w.get() + offset,
                            .x_scale = e4m3 ? d_x_scale.get() : nullptr,
                            .w_scale = e4m3 ? d_w_scale.get() : nullptr,
                            .out_f32 = c.bf16_out ? nullptr : reinterpret_cast<float*>(to),
                            .out_bf16 = c.bf16_out ? reinterpret_cast<Bf16*>(to) : nullptr,
                            .workspace = workspace.get(),
                            .workspace_bytes = workspace.size(),
                            .m = c.m,
                            .n = c.n,
                            .k = c.k,
                            .ldx = static_cast<int64_t>(ldx),
                            .ldo = static_cast<int64_t>(ldo),
                            .type = c.type,
                            .scales = c.scales,
                            .accumulate = c.accumulate};
  // Outright, then from a graph; both are one plan.
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  std::vector<uint8_t> got[2];
  for (int run = 0; run < 2; ++run) {
    out.Fill(0xff);
    if (c.accumulate) out.Set(old_bytes);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    if (run == 1) {
      ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    }
    const absl::Status status = lt_->Launch(params, stream);
    if (run == 1) {
      ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
      ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    }
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    if (run == 1) {
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
    }
    got[run] = out.Get();
    for (size_t i = 0; i < offset; ++i) ASSERT_EQ(got[run][i], 0xff) << "before out";
    got[run].erase(got[run].begin(), got[run].begin() + c.offset);
  }
  cudaStreamDestroy(stream);
  EXPECT_EQ(got[0], got[1]);
  EXPECT_EQ(lt_->num_plans(), 1u);
  for (size_t i = 0; i < m; ++i) {
    for (size_t j = 0; j < ldo; ++j) {
      const size_t at = (i * ldo + j) * out_size;
      if (j >= n) {
        if (!c.accumulate) {
          ASSERT_EQ(got[0][at], 0xff) << "past row " << i;
        }
        continue;
      }
      int sum = 0;
      for (size_t l = 0; l < k; ++l) sum += x[i * k + l] * w[j * k + l];
      double want = sum;
      if (e4m3) {
        want *= double{x_scale[x_scale.size() == 1 ? 0 : i]} *
                double{w_scale[w_scale.size() == 1 ? 0 : j]};
      }
      double size_of = std::abs(want);
      if (c.accumulate) {
        want += old[i * ldo + j];
        size_of += std::abs(old[i * ldo + j]);
      }
      float value;
      if (c.bf16_out) {
        Bf16 bits;
        std::memcpy(&bits, &got[0][at], 2);
        value = ToFloat(bits);
      } else {
        std::memcpy(&value, &got[0][at], 4);
      }
      // Two scales and an addition in float; BF16 rounds once more.
      ASSERT_NEAR(value, want, size_of * 0x1p-22 + (c.bf16_out ? std::abs(want) * 0x1p-8 : 0))
          << "row " << i << " column " << j;
    }
  }
}

std::vector<MatmulCase> MatmulCases() {
  std::vector<MatmulCase> cases;
  for (const int m : {1, 16, 17, 129}) {
    const std::string tail = "_m" + std::to_string(m);
    cases.push_back({.name = "bf16" + tail, .m = m, .n = 200, .k = 264});
    cases.push_back({.name = "bf16_to_bf16" + tail, .m = m, .n = 72, .k = 1024, .bf16_out = true});
    cases.push_back({.name = "bf16_add_apart" + tail,
                     .m = m,
                     .n = 136,
                     .k = 512,
                     .accumulate = true,
                     .pad = 1});
    for (const MatmulScales scales : {MatmulScales::kPerTensor, MatmulScales::kPerRow}) {
      const std::string name =
          (scales == MatmulScales::kPerRow ? "e4m3_rows" : "e4m3_tensor") + tail;
      const MatmulCase base{
          .name = name, .m = m, .n = 208, .k = 272, .type = MatmulType::kE4m3, .scales = scales};
      cases.push_back(base);
      cases.push_back(base);
      cases.back().name = name + "_to_bf16_apart";
      cases.back().bf16_out = true;
      cases.back().pad = 2;
      cases.push_back(base);
      cases.back().name = name + "_add";
      cases.back().k = 1024;
      cases.back().accumulate = true;
    }
  }
  // Pointers that are multiples of 16 bytes alone.
  const size_t aligned = cases.size();
  for (size_t i = 0; i < aligned; ++i) {
    cases.push_back(cases[i]);
    cases.back().name += "_offset16";
    cases.back().offset = 16;
  }
  return cases;
}

std::vector<MatmulCase> RandomCases() {
  RandomShapes shapes(9);
  std::vector<MatmulCase> cases;
  for (int i = 0; i < 24; ++i) {
    const bool e4m3 = shapes.OneIn(2);
    MatmulCase c{
        .name = "number_" + std::to_string(i),
        .m = shapes.Log(1, 200),
        .n = e4m3 ? 16 * shapes.Log(1, 20) : shapes.Log(1, 300),
        .k = e4m3 ? 16 * shapes.Log(1, 60) : 8 * shapes.Log(1, 120),
        .type = e4m3 ? MatmulType::kE4m3 : MatmulType::kBf16,
        .scales = e4m3 && shapes.OneIn(2) ? MatmulScales::kPerRow : MatmulScales::kPerTensor,
        .bf16_out = shapes.OneIn(2),
        .pad = shapes.In(0, 2),
        .offset = 16 * shapes.In(0, 3)};
    c.accumulate = !c.bf16_out && shapes.OneIn(2);
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Random, MatmulGpuCases, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(All, MatmulGpuCases, testing::ValuesIn(MatmulCases()),
                         [](const auto& c) { return c.param.name; });

// The same small integers on both sides of kMaxGemvRows and kMaxGemvK, where e4m3 codes of x are
// exact too. Of a large k most of x is 0, so that sums stay small.
TEST_F(MatmulGpu, LinearIsExactOnIntegersOnBothSides) {
  constexpr int kN = 208;
  std::mt19937 rng(5);
  for (const GemvWeights weights : {GemvWeights::kBf16, GemvWeights::kE4m3}) {
    const bool e4m3 = weights == GemvWeights::kE4m3;
    for (const auto& [m, k] : std::initializer_list<std::pair<int, int>>{{1, 272},
                                                                         {16, 272},
                                                                         {17, 272},
                                                                         {100, 272},
                                                                         {1, kMaxGemvK + 16},
                                                                         {16, kMaxGemvK + 16}}) {
      const auto columns = static_cast<size_t>(k);
      const size_t size = static_cast<size_t>(m) * kN;
      std::vector<Bf16> x(static_cast<size_t>(m) * columns);
      for (Bf16& v : x) {
        const bool some = k <= kMaxGemvK || rng() % 128 == 0;
        v = ToBf16(some ? static_cast<float>(rng() % 3) - 1.0f : 0.0f);
      }
      std::vector<int> w(kN * columns);
      std::vector<uint8_t> w_bytes(w.size() * (e4m3 ? 1 : 2));
      for (size_t i = 0; i < w.size(); ++i) {
        w[i] = static_cast<int>(rng() % 5) - 2;
        const Bf16 bf16 = ToBf16(static_cast<float>(w[i]));
        if (e4m3) {
          w_bytes[i] = ToE4m3(static_cast<float>(w[i]));
        } else {
          std::memcpy(&w_bytes[2 * i], &bf16, 2);
        }
      }
      std::vector<float> scale(kN), old(size);
      for (float& v : scale) v = e4m3 ? 0.5f + static_cast<float>(rng() % 100) / 100.0f : 1.0f;
      for (float& v : old) v = static_cast<float>(rng() % 100);
      DeviceArray<Bf16> d_x(x);
      DeviceArray<uint8_t> d_w(w_bytes), workspace(LinearWorkspaceBytes(m, k, weights));
      DeviceArray<float> d_scale(scale), out(old);
      const LinearParams params{.x = d_x.get(),
                                .w = d_w.get(),
                                .w_scale = e4m3 ? d_scale.get() : nullptr,
                                .out_f32 = out.get(),
                                .workspace = workspace.get(),
                                .workspace_bytes = workspace.size(),
                                .m = m,
                                .n = kN,
                                .k = k,
                                .ldx = k,
                                .ldo = kN,
                                .weights = weights,
                                .accumulate = true};
      const absl::Status status = LaunchLinear(params, lt_.get(), nullptr);
      ASSERT_TRUE(status.ok()) << status;
      const std::vector<float> got = out.Get();
      for (size_t i = 0; i < size; ++i) {
        int sum = 0;
        for (size_t j = 0; j < columns; ++j) {
          sum += static_cast<int>(ToFloat(x[i / kN * columns + j])) * w[i % kN * columns + j];
        }
        const double want = double{scale[i % kN]} * sum + old[i];
        // Scales and an addition in float.
        ASSERT_NEAR(got[i], want, (std::abs(want) + 2.0 * std::abs(sum)) * 0x1p-22)
            << m << " rows of " << k << ", " << i;
      }
      if (m > kMaxGemvRows || k > kMaxGemvK) {
        LinearParams less = params;
        --less.workspace_bytes;
        EXPECT_EQ(LaunchLinear(less, lt_.get(), nullptr).code(),
                  absl::StatusCode::kInvalidArgument);
      }
    }
  }
}

TEST(Matmul, RefusesWhatItCannotDo) {
  alignas(256) Bf16 x[256]{};
  alignas(16) float out[256]{};
  const MatmulParams good{
      .x = x, .w = x, .out_f32 = out, .m = 2, .n = 16, .k = 16, .ldx = 16, .ldo = 16};
  EXPECT_TRUE(ValidateMatmul(good).ok());
  const auto refused = [&](auto change) {
    MatmulParams p = good;
    change(p);
    return ValidateMatmul(p).code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused([](auto& p) { p.m = -1; }));
  EXPECT_TRUE(refused([](auto& p) { p.n = 0; }));
  EXPECT_TRUE(refused([](auto& p) { p.k = 12; }));
  EXPECT_TRUE(refused([](auto& p) { p.ldx = 8; }));
  EXPECT_TRUE(refused([](auto& p) { p.ldo = 18; }));
  EXPECT_TRUE(refused([](auto& p) { p.w = nullptr; }));
  EXPECT_TRUE(refused([&](auto& p) { p.x = x + 1; }));
  EXPECT_TRUE(refused([&](auto& p) { p.x_scale = out; }));
  EXPECT_TRUE(refused([](auto& p) { p.type = MatmulType::kE4m3; }));
  EXPECT_TRUE(refused([](auto& p) { p.out_f32 = nullptr; }));
  EXPECT_TRUE(refused([&](auto& p) { p.out_bf16 = x; }));
  EXPECT_TRUE(refused([&](auto& p) {
    p.out_f32 = nullptr;
    p.out_bf16 = x;
    p.accumulate = true;
  }));
  EXPECT_TRUE(refused([](auto& p) { p.workspace_bytes = 1; }));
  EXPECT_TRUE(refused([&](auto& p) { p.workspace = x + 8; }));
}

}  // namespace
}  // namespace winnow::kernels
