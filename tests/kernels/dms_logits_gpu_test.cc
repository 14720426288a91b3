// LaunchDmsLogits against DmsLogitsCpu on the same BF16 rows, bit for bit.
#include <cmath>
#include <random>
#include <tuple>

#include "kernels/cuda/dms_logits.h"
#include "kernels/dms_logits.h"
#include "tests/kernels/device_memory.h"

namespace winnow::kernels {
namespace {

// Rows, hidden, heads, bias, elements between rows.
using Shape = std::tuple<int, int, int, bool, int>;

class DmsLogitsGpu : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override { RequireGpu(); }
};

TEST_P(DmsLogitsGpu, HasTheCpusBits) {
  const auto [m, hidden, heads, has_bias, pad] = GetParam();
  const int stride = hidden + pad;
  const auto size = [](int a, int b) { return static_cast<size_t>(a) * static_cast<size_t>(b); };
  std::mt19937 rng(static_cast<uint32_t>(m + hidden));
  std::normal_distribution<float> normal;
  std::vector<Bf16> x(size(m, stride), Bf16{0xffff});
  std::vector<float> x_float(size(m, hidden)), weight(size(heads, hidden)),
      bias(static_cast<size_t>(heads)), want(size(m, heads));
  for (int i = 0; i < m; ++i) {
    for (int h = 0; h < hidden; ++h) {
      const Bf16 value = ToBf16(normal(rng));
      x[size(i, stride) + static_cast<size_t>(h)] = value;
      x_float[size(i, hidden) + static_cast<size_t>(h)] = ToFloat(value);
    }
  }
  for (float& w : weight) w = normal(rng);
  for (float& value : bias) value = normal(rng);
  absl::Status status = DmsLogitsCpu({.x = x_float.data(),
                                      .weight = weight.data(),
                                      .bias = has_bias ? bias.data() : nullptr,
                                      .out = want.data(),
                                      .m = m,
                                      .hidden = hidden,
                                      .num_kv_heads = heads},
                                     nullptr);
  ASSERT_TRUE(status.ok()) << status;
  DeviceArray<Bf16> d_x(x);
  DeviceArray<float> d_weight(weight), d_bias(bias), out(want.size());
  status = LaunchDmsLogits({.x = d_x.get(),
                            .x_stride = stride,
                            .weight = d_weight.get(),
                            .bias = has_bias ? d_bias.get() : nullptr,
                            .out = out.get(),
                            .m = m,
                            .hidden = hidden,
                            .num_kv_heads = heads},
                           nullptr);
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<float> got = out.Get();
  ASSERT_EQ(std::memcmp(got.data(), want.data(), want.size() * sizeof(float)), 0);
}

TEST(DmsLogitsParams, RefusesWhatItCannotDo) {
  static float memory[4];
  const DmsLogitsCudaParams good{.x = reinterpret_cast<const Bf16*>(memory),
                                 .x_stride = 4,
                                 .weight = memory,
                                 .out = memory,
                                 .m = 1,
                                 .hidden = 4,
                                 .num_kv_heads = 1};
  ASSERT_TRUE(ValidateDmsLogitsCuda(good).ok());
  const auto code = [&](auto change) {
    DmsLogitsCudaParams params = good;
    change(params);
    return ValidateDmsLogitsCuda(params).code();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& p) { p.hidden = 0; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.x_stride = 3; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.m = -1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.m = (1 << 30) + 1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.weight = nullptr; }), invalid);
}

INSTANTIATE_TEST_SUITE_P(Shapes, DmsLogitsGpu,
                         testing::Values(Shape{1, 1, 1, false, 3}, Shape{1, 4096, 8, true, 3},
                                         Shape{3, 15, 2, true, 0}, Shape{2, 8199, 3, true, 1},
                                         Shape{64, 2048, 8, false, 8}, Shape{512, 16, 8, true, 3},
                                         Shape{513, 17, 8, true, 3}, Shape{513, 8, 8, true, 0},
                                         Shape{530, 136, 3, false, 8}, Shape{577, 4104, 8, true, 0},
                                         Shape{700, 577, 5, true, 0},
                                         Shape{1000, 1024, 11, false, 3},
                                         Shape{1000, 1024, 11, false, 8}));

}  // namespace
}  // namespace winnow::kernels
