// Embedding, RMSNorm and SwiGLU on the device against their CPU twins, bit for bit: the order of
// every sum and the place of every rounding are the CPU's.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/base/thread_pool.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/swiglu.h"
#include "kernels/embedding.h"
#include "kernels/gemm.h"
#include "kernels/rms_norm.h"
#include "kernels/swiglu.h"
#include "tests/kernels/device_memory.h"

namespace winnow::kernels {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> Random(size_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

std::vector<Bf16> ToBf16s(const std::vector<float>& x) {
  std::vector<Bf16> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = ToBf16(x[i]);
  return y;
}

float AsFloat(float x) { return x; }
float AsFloat(Bf16 x) { return ToFloat(x); }

// Bit for bit, but any NaN equals any other: hosts and devices differ in its payload.
template <typename T>
void ExpectSame(const std::vector<T>& got, const std::vector<T>& want, const char* what) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const float a = AsFloat(got[i]), b = AsFloat(want[i]);
    if (std::isnan(a) && std::isnan(b)) continue;
    ASSERT_EQ(std::bit_cast<uint32_t>(a), std::bit_cast<uint32_t>(b))
        << what << "[" << i << "]: " << a << " instead of " << b;
  }
}

// Device copies that start `offset` elements past an aligned address.
template <typename T>
class Shifted {
 public:
  Shifted(const std::vector<T>& values, size_t offset) : Shifted(values.size(), offset) {
    EXPECT_EQ(cudaMemcpy(get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  Shifted(size_t size, size_t offset) : array_(size + offset), offset_(offset) {}
  T* get() const { return array_.get() + offset_; }
  std::vector<T> Get() const {
    std::vector<T> all = array_.Get();
    return {all.begin() + static_cast<std::ptrdiff_t>(offset_), all.end()};
  }

 private:
  DeviceArray<T> array_;
  const size_t offset_;
};

class TokenOps : public testing::Test {
 protected:
  void SetUp() override { RequireGpu(); }
  static void Sync() { ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess); }
  ThreadPool pool_{1};
};

TEST_F(TokenOps, EmbeddingIsTheTable) {
  for (const auto& [vocab, hidden, num_tokens, offset] : {std::tuple{7, 1, 3, size_t{0}},
                                                          {101, 31, 257, size_t{0}},
                                                          {300, 576, 64, size_t{0}},
                                                          {300, 576, 9, size_t{1}},
                                                          {50, 4096, 1, size_t{0}}}) {
    const auto table = ToBf16s(Random(static_cast<size_t>(vocab) * static_cast<size_t>(hidden), 1));
    std::vector<int32_t> tokens(static_cast<size_t>(num_tokens));
    std::mt19937 rng(2);
    for (int32_t& t : tokens) t = static_cast<int32_t>(rng() % static_cast<uint32_t>(vocab));
    tokens[0] = vocab - 1;
    const PackedMatrix packed = PackedMatrix::Pack(table.data(), vocab, hidden);
    std::vector<float> want(tokens.size() * static_cast<size_t>(hidden));
    ASSERT_TRUE(EmbeddingCpu({.table = &packed,
                              .tokens = tokens.data(),
                              .out = want.data(),
                              .num_tokens = num_tokens},
                             &pool_)
                    .ok());
    const Shifted<Bf16> d_table(table, offset);
    const DeviceArray<int32_t> d_tokens(tokens);
    const Shifted<float> out(want.size(), offset);
    ASSERT_TRUE(LaunchEmbedding({.table = d_table.get(),
                                 .tokens = d_tokens.get(),
                                 .out = out.get(),
                                 .num_tokens = num_tokens,
                                 .vocab = vocab,
                                 .hidden = hidden},
                                nullptr)
                    .ok());
    ExpectSame(out.Get(), want, "out");
  }
}

TEST_F(TokenOps, EmbeddingOfManyTokensAndOfUnknownOnes) {
  constexpr int kTokens = 70'001, kHidden = 6;
  const auto table = ToBf16s(Random(5 * kHidden, 3));
  std::vector<int32_t> tokens(kTokens);
  for (int i = 0; i < kTokens; ++i) tokens[static_cast<size_t>(i)] = i % 7 - 1;  // -1 and 5 too
  const DeviceArray<Bf16> d_table(table);
  const DeviceArray<int32_t> d_tokens(tokens);
  const DeviceArray<float> out(size_t{kTokens} * kHidden);
  ASSERT_TRUE(LaunchEmbedding({.table = d_table.get(),
                               .tokens = d_tokens.get(),
                               .out = out.get(),
                               .num_tokens = kTokens,
                               .vocab = 5,
                               .hidden = kHidden},
                              nullptr)
                  .ok());
  std::vector<float> want(out.size(), kNan);
  for (size_t i = 0; i < want.size(); ++i) {
    const int32_t token = tokens[i / kHidden];
    if (token >= 0 && token < 5) {
      want[i] = ToFloat(table[static_cast<size_t>(token) * kHidden + i % kHidden]);
    }
  }
  ExpectSame(out.Get(), want, "out");
}

struct NormCase {
  int m, n;
  int64_t ldx;
  int add;        // 0: none, 1: float, 2: BF16
  size_t offset;  // of all arrays, in elements
};

TEST_F(TokenOps, RmsNormEqualsTheCpu) {
  const NormCase cases[] = {
      {1, 1, 1, 1, 0},          {3, 15, 17, 2, 0},        {5, 16, 16, 1, 0},
      {2, 17, 19, 0, 1},        {64, 576, 576, 2, 0},     {7, 1023, 1024, 1, 0},
      {7, 1024, 1024, 1, 0},    {3, 1025, 1028, 2, 0},    {64, 4096, 4096, 1, 0},
      {5, 4096, 4096, 0, 0},    {9, 4096, 4100, 1, 1},    {2, 12288, 12288, 2, 0},
      {2, 12289, 12290, 2, 0},  {1, 32768, 32768, 1, 0},  {1500, 64, 64, 0, 0},
      {1100, 1025, 1028, 2, 0}, {1030, 2052, 2052, 1, 0}, {1025, 4100, 4104, 1, 1},
  };
  for (const NormCase& c : cases) {
    SCOPED_TRACE("m=" + std::to_string(c.m) + " n=" + std::to_string(c.n));
    const size_t size = static_cast<size_t>(c.m) * static_cast<size_t>(c.n);
    const auto ld = static_cast<size_t>(c.ldx), n = static_cast<size_t>(c.n);
    auto x = Random(static_cast<size_t>(c.m) * ld, 5, 3.0f);
    if (c.m > 4) {
      x[ld] = kInf;      // row 1: zeros and a NaN
      x[2 * ld] = kNan;  // row 2: NaN
      for (size_t i = 0; i < n; ++i) x[3 * ld + i] = 0.0f;
      for (size_t i = 0; i < n; ++i) x[4 * ld + i] *= 1e-30f;  // squares vanish
    }
    const auto weight = Random(n, 6);
    const auto add = Random(size, 7);
    const auto add_bf16 = ToBf16s(add);
    // The CPU's sum is the accumulation of a GEMM: one addition.
    std::vector<float> y = x;
    for (size_t i = 0; c.add != 0 && i < size; ++i) {
      y[i / n * ld + i % n] += c.add == 1 ? add[i] : ToFloat(add_bf16[i]);
    }
    std::vector<Bf16> want_bf16(size);
    std::vector<float> want(size);
    ASSERT_TRUE(RmsNormCpu({.x = y.data(),
                            .weight = weight.data(),
                            .out_bf16 = want_bf16.data(),
                            .out_f32 = want.data(),
                            .m = c.m,
                            .n = c.n,
                            .ldx = c.ldx,
                            .eps = 1e-6f},
                           &pool_)
                    .ok());
    const Shifted<float> d_x(x, c.offset), d_weight(weight, c.offset), d_add(add, c.offset);
    const Shifted<Bf16> d_add_bf16(add_bf16, c.offset), out_bf16(size, c.offset);
    const Shifted<float> out(size, c.offset);
    RmsNormCudaParams p = {.x = d_x.get(),
                           .add_f32 = c.add == 1 ? d_add.get() : nullptr,
                           .add_bf16 = c.add == 2 ? d_add_bf16.get() : nullptr,
                           .weight = d_weight.get(),
                           .out_bf16 = out_bf16.get(),
                           .out_f32 = out.get(),
                           .m = c.m,
                           .n = c.n,
                           .ldx = c.ldx,
                           .eps = 1e-6f};
    ASSERT_TRUE(LaunchRmsNorm(p, nullptr).ok());
    ExpectSame(out.Get(), want, "out_f32");
    ExpectSame(out_bf16.Get(), want_bf16, "out_bf16");
    ExpectSame(d_x.Get(), x, "x, which is not written");
    // In place, one output.
    p.residual = d_x.get();
    p.out_f32 = nullptr;
    ASSERT_TRUE(LaunchRmsNorm(p, nullptr).ok());
    ExpectSame(out_bf16.Get(), want_bf16, "out_bf16 again");
    ExpectSame(d_x.Get(), y, "residual");
  }
}

TEST_F(TokenOps, SwiGluEqualsTheCpu) {
  struct Case {
    int m, n;
    int64_t ldx;
    size_t offset;
  };
  for (const Case& c : {Case{1, 1, 2, 0},
                        {3, 7, 15, 0},
                        {2, 1023, 2048, 0},
                        {5, 2048, 4096, 0},
                        {3, 2049, 4100, 0},
                        {3, 2052, 4104, 1},
                        {64, 12288, 24576, 0},
                        {70'000, 3, 6, 0},
                        {2, 1536, 3072, 0}}) {
    SCOPED_TRACE("m=" + std::to_string(c.m) + " n=" + std::to_string(c.n));
    const size_t size = static_cast<size_t>(c.m) * static_cast<size_t>(c.n);
    auto x = Random(static_cast<size_t>(c.m) * static_cast<size_t>(c.ldx), 8, 4.0f);
    // Where exp() is cut off, and what is not finite.
    const float edges[] = {-86.9f, -87.0f, -87.1f, 88.7f, 88.72f, 88.8f, 1e30f,
                           -1e30f, kInf,   -kInf,  kNan,  0.0f,   -0.0f, 1e-40f};
    for (size_t i = 0; i < std::size(edges) && i < x.size(); ++i) x[i] = edges[i];
    for (const bool bf16 : {false, true}) {
      const std::vector<Bf16> narrow = ToBf16s(x);
      std::vector<float> in = x;
      for (size_t i = 0; bf16 && i < in.size(); ++i) in[i] = ToFloat(narrow[i]);
      std::vector<Bf16> want_bf16(size);
      std::vector<float> want(size);
      ASSERT_TRUE(SwiGluCpu({.x = in.data(),
                             .out_bf16 = want_bf16.data(),
                             .out_f32 = want.data(),
                             .m = c.m,
                             .intermediate = c.n,
                             .ldx = c.ldx},
                            &pool_)
                      .ok());
      const Shifted<float> d_f32(in, c.offset), out(size, c.offset);
      const Shifted<Bf16> d_bf16(narrow, c.offset), out_bf16(size, c.offset);
      ASSERT_TRUE(LaunchSwiGlu({.x_f32 = bf16 ? nullptr : d_f32.get(),
                                .x_bf16 = bf16 ? d_bf16.get() : nullptr,
                                .out_bf16 = out_bf16.get(),
                                .out_f32 = out.get(),
                                .m = c.m,
                                .intermediate = c.n,
                                .ldx = c.ldx},
                               nullptr)
                      .ok());
      ExpectSame(out.Get(), want, "out_f32");
      ExpectSame(out_bf16.Get(), want_bf16, "out_bf16");
    }
  }
}

TEST(TokenOpsParams, BadOnesAreRefused) {
  float f[4] = {};
  Bf16 h[4] = {};
  int32_t id = 0;
  const auto bad = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  };
  bad(LaunchEmbedding({.table = h, .tokens = &id, .num_tokens = 1, .vocab = 1, .hidden = 1},
                      nullptr));
  bad(LaunchEmbedding(
      {.table = h, .tokens = &id, .out = f, .num_tokens = 1, .vocab = 0, .hidden = 1}, nullptr));
  bad(LaunchRmsNorm({.x = f, .weight = f, .m = 1, .n = 1, .ldx = 1}, nullptr));
  bad(LaunchRmsNorm({.x = f, .weight = f, .out_f32 = f, .m = 1, .n = 2, .ldx = 1}, nullptr));
  bad(LaunchRmsNorm(
      {.x = f, .add_f32 = f, .add_bf16 = h, .weight = f, .out_f32 = f, .m = 1, .n = 1, .ldx = 1},
      nullptr));
  bad(LaunchRmsNorm({.x = f,
                     .weight = f,
                     .out_f32 = f,
                     .m = 1,
                     .n = kMaxRmsNormCuda + 1,
                     .ldx = kMaxRmsNormCuda + 1},
                    nullptr));
  bad(LaunchSwiGlu({.x_f32 = f, .m = 1, .intermediate = 1, .ldx = 2}, nullptr));
  bad(LaunchSwiGlu({.x_f32 = f, .x_bf16 = h, .out_f32 = f, .m = 1, .intermediate = 1, .ldx = 2},
                   nullptr));
  bad(LaunchSwiGlu({.x_f32 = f, .out_f32 = f, .m = 1, .intermediate = 1, .ldx = 1}, nullptr));
  // Counts that 32 bits hold, but not with a step more.
  constexpr int kTooMany = (1 << 30) + 1;
  const auto swiglu = [&](int n) {
    return ValidateSwiGluCuda(
        {.x_f32 = f, .out_f32 = f, .m = 1, .intermediate = n, .ldx = 2 * int64_t{n}});
  };
  bad(swiglu(kTooMany));
  EXPECT_TRUE(swiglu(kTooMany - 1).ok());
  const auto embedding = [&](int tokens, int hidden) {
    return ValidateEmbeddingCuda(
        {.table = h, .tokens = &id, .out = f, .num_tokens = tokens, .vocab = 1, .hidden = hidden});
  };
  bad(embedding(kTooMany, 1));
  bad(embedding(1, kTooMany));
  EXPECT_TRUE(embedding(kTooMany - 1, kTooMany - 1).ok());
}

// sm_89 gives a block 101,376 bytes; needs no device.
TEST(TokenOpsParams, RmsNormSaysWhatDoesNotFit) {
  EXPECT_TRUE(CheckRmsNormSharedBytes(25340, 101376).ok());
  EXPECT_EQ(CheckRmsNormSharedBytes(25341, 101376),
            absl::UnimplementedError("rms_norm: n=25341 needs 101380 bytes of shared memory a "
                                     "block, and the device has 101376"));
  EXPECT_TRUE(CheckRmsNormSharedBytes(kMaxRmsNormCuda, 166912).ok());  // sm_80
}

}  // namespace
}  // namespace winnow::kernels
