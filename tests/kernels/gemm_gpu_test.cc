// LaunchGemv against sums in double, with the bound of what a float sum may lose; on integers
// exactly.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/base/fp8.h"
#include "kernels/cuda/gemv.h"
#include "kernels/cuda/gemv_sm90.h"
#include "tests/kernels/device_memory.h"

namespace winnow::kernels {
namespace {

struct GemvCase {
  std::string name;
  int m = 1, n = 1, k = 16;
  GemvWeights weights = GemvWeights::kBf16;
  GemvEpilogue epilogue = GemvEpilogue::kStore;
  bool bf16_out = false;
  int pad = 0;     // elements past each row of x (8 times as many) and of out
  int offset = 0;  // 16 bytes each: where x and w begin
  // x and w are integers of one sign a row, never 0, up to 7 (e4m3: x to 63, which has both of its
  // e4m3 parts, and w to 2): all that is summed, in any order, is an integer below 2^22 (e4m3: of
  // 128 and a part below 2^13 of its unit) and exact, and 16 bytes that are lost or read twice
  // change every sum.
  bool integers = false;
  int exponent = 0;  // of two, x's; past 0 weights are below 2^-5, so that sums stay finite

  friend void PrintTo(const GemvCase& c, std::ostream* os) { *os << c.name; }
};

// Random inputs on the host and the device, and what they give in double.
class GemvRun {
 public:
  explicit GemvRun(const GemvCase& c)
      : c_(c),
        e4m3_(c.weights == GemvWeights::kE4m3),
        columns_(c.epilogue == GemvEpilogue::kSiluMul ? c.n / 2 : c.n),
        ldx_(c.k + 8 * c.pad),
        ldo_(columns_ + c.pad),
        x_(Size(c.m) * Size(ldx_) + Offset(8)),
        w_(Size(c.n) * Size(c.k) * (e4m3_ ? 1 : 2) + Offset(16)),
        scale_(Size(c.n)),
        out_((Size(c.m) * Size(ldo_)) * (c.bf16_out ? 2 : 4)) {
    std::mt19937 rng(static_cast<unsigned>(c.m * 7919 + c.n * 31 + c.k));
    const bool silu = c.epilogue == GemvEpilogue::kSiluMul;  // of less than -100 it is 0: no sign
    std::normal_distribution<float> normal;
    // What lies past the rows is NaN.
    std::vector<Bf16> x(x_.size(), Bf16{0xffff});
    x_values_.resize(Size(c.m) * Size(c.k));
    for (int i = 0; i < c.m; ++i) {
      for (int j = 0; j < c.k; ++j) {
        const float drawn = c.integers ? Integer(rng(), e4m3_ ? 63 : 7, i % 2 != 0 && !silu)
                                       : std::ldexp(normal(rng), i - 4 + c.exponent);
        const Bf16 value = ToBf16(drawn);
        x[Offset(8) + Size(i) * Size(ldx_) + Size(j)] = value;
        x_values_[Size(i) * Size(c.k) + Size(j)] = ToFloat(value);
      }
    }
    x_.Set(x);
    std::vector<uint8_t> w(w_.size(), 0xff);
    std::vector<float> scale(Size(c.n), 1.0f);
    w_values_.resize(Size(c.n) * Size(c.k));
    for (int j = 0; j < c.n; ++j) {
      if (e4m3_) scale[Size(j)] = 0.01f * (1.0f + static_cast<float>(rng() % 1000) / 500.0f);
      if (e4m3_ && c.integers) scale[Size(j)] = std::exp2(static_cast<float>(j % 4 - 2));
    }
    for (size_t i = 0; i < w_values_.size(); ++i) {
      const size_t row = i / Size(c.k);
      const float integer = c.integers ? Integer(rng(), e4m3_ ? 2 : 7,
                                                 row % 3 == 2 && !(silu && row < Size(columns_)))
                                       : 0.0f;
      if (e4m3_) {
        uint8_t code = static_cast<uint8_t>(rng());  // every one, subnormals too, but NaN
        if ((code & 0x7f) == 0x7f) code ^= 1;
        if (c.integers) code = ToE4m3(integer);
        if (c.exponent > 0) code &= 0x8f;
        w[Offset(16) + i] = code;
        w_values_[i] = E4m3ToFloat(code);
      } else {
        const Bf16 value = ToBf16(c.integers ? integer : normal(rng));
        std::memcpy(&w[Offset(16) + 2 * i], &value, 2);
        w_values_[i] = ToFloat(value);
      }
    }
    w_.Set(w);
    scale_.Set(scale);
    const auto rows_of = [&](const std::vector<float>& values, bool largest) {
      std::vector<double> rows(values.size() / Size(c.k));
      for (size_t i = 0; i < values.size(); ++i) {
        double& row = rows[i / Size(c.k)];
        const double value = std::abs(values[i]);
        row = largest ? std::max(row, value) : row + value;
      }
      return rows;
    };
    weight_sizes_ = rows_of(w_values_, false);
    largest_x_ = rows_of(x_values_, true);
    scale_values_ = scale;
    old_.resize(Size(c.m) * Size(ldo_));
    for (float& value : old_) {
      value = c.integers ? static_cast<float>(rng() % 1000) - 500.0f : normal(rng);
    }
  }

  // Rows [first, first + m) of the product, as floats, [m, columns]; m rows are launched. What
  // lies past a row of `out` must stay.
  std::vector<float> Launch(int first, int m, bool portable) {
    out_.Fill(0xff);
    if (c_.epilogue == GemvEpilogue::kAdd) SetOld(first);
    const absl::Status status =
        LaunchGemv({.x = x_.get() + Offset(8) + Size(first) * Size(ldx_),
                    .w = w_.get() + Offset(16),
                    .w_scale = e4m3_ ? scale_.get() : nullptr,
                    .out_f32 = c_.bf16_out ? nullptr : reinterpret_cast<float*>(out_.get()),
                    .out_bf16 = c_.bf16_out ? reinterpret_cast<Bf16*>(out_.get()) : nullptr,
                    .m = m,
                    .n = c_.n,
                    .k = c_.k,
                    .ldx = ldx_,
                    .ldo = ldo_,
                    .weights = c_.weights,
                    .epilogue = c_.epilogue,
                    .portable = portable},
                   nullptr);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<uint8_t> bytes = out_.Get();
    std::vector<float> rows;
    for (int i = 0; i < c_.m; ++i) {
      for (int j = 0; j < ldo_; ++j) {
        const size_t at = Size(i) * Size(ldo_) + Size(j);
        uint32_t bits = 0;
        std::memcpy(&bits, &bytes[at * (c_.bf16_out ? 2 : 4)], c_.bf16_out ? 2 : 4);
        const float value =
            c_.bf16_out ? ToFloat(Bf16{static_cast<uint16_t>(bits)}) : std::bit_cast<float>(bits);
        if (i < m && j < columns_) {
          rows.push_back(value);
        } else {
          EXPECT_TRUE(std::isnan(value) || c_.epilogue == GemvEpilogue::kAdd)
              << "row " << i << " column " << j << " was written";
        }
      }
    }
    return rows;
  }

  void ExpectClose(const std::vector<float>& got, bool portable) const {
    ASSERT_EQ(got.size(), Size(c_.m) * Size(columns_));
    double squares = 0, expected_squares = 0;
    for (int i = 0; i < c_.m; ++i) {
      for (int j = 0; j < columns_; ++j) {
        const Sum y = SumOf(i, j, portable);
        Sum want = y;
        if (c_.epilogue == GemvEpilogue::kAdd) {
          want.value += old_[Size(i) * Size(ldo_) + Size(j)];
          if (!c_.integers) want.error += std::abs(want.value) * 0x1p-24;
        } else if (c_.epilogue == GemvEpilogue::kSiluMul) {
          const Sum up = SumOf(i, columns_ + j, portable);
          const double silu = y.value / (1.0 + std::exp(-y.value));
          want.value = silu * up.value;
          // |silu'| < 1.1; exp, sum, quotient and product: less than 16 roundings.
          want.error = 1.1 * y.error * (std::abs(up.value) + up.error) + std::abs(silu) * up.error +
                       std::abs(want.value) * 0x1p-20;
        }
        if (c_.bf16_out) want.error += (std::abs(want.value) + want.error) * 0x1p-8;
        const double value = got[Size(i) * Size(columns_) + Size(j)];
        ASSERT_LE(std::abs(value - want.value), want.error)
            << c_.name << " row " << i << " column " << j << ": " << value << " for " << want.value;
        squares += (value - want.value) * (value - want.value);
        expected_squares += y.variance;
      }
    }
    // Of one output the bound above is far more than what is lost; of many it is less.
    if (columns_ * c_.m >= 256 && expected_squares > 0 && !c_.bf16_out &&
        c_.epilogue == GemvEpilogue::kStore) {
      EXPECT_LE(squares, expected_squares) << c_.name;
    }
  }

 private:
  struct Sum {
    double value = 0, error = 0, variance = 0;
  };

  static size_t Size(int n) { return static_cast<size_t>(n); }
  static float Integer(uint32_t random, uint32_t largest, bool negative) {
    const float value = static_cast<float>(1 + random % largest);
    return negative ? -value : value;
  }
  size_t Offset(size_t elements) const { return Size(c_.offset) * elements; }
  void SetOld(int first) {
    std::vector<uint8_t> bytes(out_.size());
    const size_t from = Size(first) * Size(ldo_);
    std::memcpy(bytes.data(), old_.data() + from, (old_.size() - from) * sizeof(float));
    out_.Set(bytes);
  }

  // Products are exact in float. A tensor core's sum of 16 products and what was there loses at
  // most 2^-23 of the largest for each; eight warps each sum an eighth of k, and what they and
  // both halves of k have is added by less than 16 roundings.
  Sum SumOf(int i, int j, bool portable) const {
    if (!c_.integers && e4m3_ && !portable && have_sm90_) return E4m3SumOf(i, j);
    double value = 0, size = 0;
    for (int k = 0; k < c_.k; ++k) {
      value += Product(i, j, k);
      size += std::abs(Product(i, j, k));
    }
    const double scale = scale_values_[Size(j)];
    if (c_.integers) return {value * scale, 0.0, 0.0};
    return {value * scale, size * (c_.k / 8 + 32 + 16) * 0x1p-23 * scale, 0.0};
  }

  // Of e4m3 products a tensor core drops what is under 2^-13 of the largest of the 32 that it adds
  // and what was there, and of their sum. That is of x rounded to 4 bits, off by 2^-4; of the rest
  // 2^-4 as much is dropped. What is dropped of random numbers are independent amounts, each in
  // the middle a third of the square. x is off by 2^-17 of its largest, and sums of 128 are added
  // in float.
  Sum E4m3SumOf(int i, int j) const {
    double value = 0, size = 0, error = 0, variance = 0;
    for (int chunk = 0; chunk < c_.k; chunk += 128) {
      double before = 0, before_size = 0;
      for (int start = chunk; start < std::min(chunk + 128, c_.k); start += 32) {
        double sum = 0, sum_size = 0, largest = 0;
        for (int k = start; k < std::min(start + 32, c_.k); ++k) {
          const double product = Product(i, j, k);
          sum += product;
          sum_size += std::abs(product);
          largest = std::max(largest, std::abs(product));
        }
        const double there = std::abs(before) + before_size * 0x1p-4;
        const double unit = 0x1p-13 * std::max(largest * (1 + 0x1p-4), there) * (1 + 0x1p-4);
        before += sum;
        before_size += sum_size;
        value += sum;
        size += sum_size;
        error += 33 * unit + 0x1p-13 * (std::abs(before) + before_size * 0x1p-4);
        variance += 34 * unit * unit / 3;
      }
    }
    const double scale = scale_values_[Size(j)];
    error += weight_sizes_[Size(j)] * std::max(largest_x_[Size(i)] * 0x1p-17, 0x1p-136);
    error += size * (c_.k / 128 + 16) * 0x1p-24;
    return {value * scale, error * scale, variance * scale * scale};
  }

  double Product(int i, int j, int k) const {
    return double{x_values_[Size(i) * Size(c_.k) + Size(k)]} *
           double{w_values_[Size(j) * Size(c_.k) + Size(k)]};
  }

  const GemvCase c_;
  const bool e4m3_, have_sm90_ = internal::HaveGemvSm90Code();
  const int columns_, ldx_, ldo_;
  DeviceArray<Bf16> x_;
  DeviceArray<uint8_t> w_;
  DeviceArray<float> scale_;
  DeviceArray<uint8_t> out_;
  std::vector<float> x_values_, w_values_, scale_values_, old_;
  std::vector<double> weight_sizes_, largest_x_;
};

class GemvGpu : public testing::TestWithParam<GemvCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

bool SameBits(const std::vector<float>& a, const float* b) {
  return std::memcmp(a.data(), b, a.size() * sizeof(float)) == 0;
}

TEST_P(GemvGpu, IsWithinTheBoundAndARowStandsAlone) {
  const GemvCase& c = GetParam();
  GemvRun run(c);
  for (const bool portable : {false, true}) {
    const std::vector<float> got = run.Launch(0, c.m, portable);
    run.ExpectClose(got, portable);
    if (HasFatalFailure()) return;
    EXPECT_TRUE(SameBits(run.Launch(0, c.m, portable), got.data())) << "a second run differs";
    const size_t columns = got.size() / static_cast<size_t>(c.m);
    for (const int row : {0, c.m / 2, c.m - 1}) {
      EXPECT_TRUE(SameBits(run.Launch(row, 1, portable), &got[static_cast<size_t>(row) * columns]))
          << "row " << row << " alone differs";
    }
  }
}

std::vector<GemvCase> GemvCases() {
  std::vector<GemvCase> cases;
  for (const GemvWeights weights : {GemvWeights::kBf16, GemvWeights::kE4m3}) {
    const bool e4m3 = weights == GemvWeights::kE4m3;
    const auto add = [&](int m, int n, int k, GemvEpilogue epilogue = GemvEpilogue::kStore,
                         bool bf16_out = false, int pad = 0, int offset = 0) {
      const char* names[] = {"", "_add", "_silu"};
      cases.push_back({.name = std::string(e4m3 ? "e4m3" : "bf16") + "_m" + std::to_string(m) +
                               "_n" + std::to_string(n) + "_k" + std::to_string(k) +
                               names[static_cast<int>(epilogue)] + (bf16_out ? "_to_bf16" : "") +
                               (pad + offset > 0 ? "_apart" : ""),
                       .m = m,
                       .n = n,
                       .k = k,
                       .weights = weights,
                       .epilogue = epilogue,
                       .bf16_out = bf16_out,
                       .pad = pad,
                       .offset = offset});
    };
    add(1, 1, e4m3 ? 16 : 8);
    for (int m = 1; m <= kMaxGemvRows; ++m) add(m, 37, 208);
    for (const int n : {15, 16, 17, 31, 2113}) add(3, n, 64);
    // Around a step of 64 bytes, a stage, and the k from which BF16 has two blocks a sum.
    for (const int k :
         {48, 80, 496, 512, 528, 1008, 1024, 1040, 2064, 4080, 4096, 4112, 8208, 12288, 32768}) {
      add(5, 19, k);
      add(9, 50, k);
    }
    // Blocks with many tiles, also of a cluster.
    add(2, 9511, 512);
    add(2, 9511, 8192);
    add(16, 1000, 12288);
    // e4m3: whole parts of k, of an odd number of chunks and an even one.
    for (const int k : {1024, 2048, 3072, 5120}) {
      add(1, 33, k);
      add(4, 49, k);
      add(7, 35, k);
      add(16, 65, k);
      add(3, 2 * 21, k, GemvEpilogue::kSiluMul);
      add(13, 2 * 37, k, GemvEpilogue::kSiluMul);
    }
    // e4m3: more tiles than blocks, one a tile and two, which do not hold all of x.
    add(2, 8600, 1024, GemvEpilogue::kSiluMul, true, 1, 1);
    add(1, 8600, 2048, GemvEpilogue::kAdd, false, 3, 1);
    add(4, 8500, 512);
    add(8, 8500, 512);
    add(16, 8500, 1024);
    add(9, 4300, 8192);
    // Clusters of two with more tiles than sums on their way; one block a tile by 3 and 8 rows;
    // x streamed for several tiles of a block.
    if (e4m3) {
      add(9, 21500, 4096);
      add(9, 2 * 10750, 4096, GemvEpilogue::kSiluMul, true, 1, 1);
      add(3, 9000, 2048);
      add(5, 9000, 4096);
      add(2, 4096, kMaxGemvK);
    }
    // Where x's power of two ends, and rows of numbers that are too small to be normal; near the
    // largest of all.
    const auto add_scaled = [&](int m, int exponent) {
      add(m, 37, 400);
      cases.back().name += exponent < 0 ? "_tiny" : "_huge";
      cases.back().exponent = exponent;
    };
    if (e4m3) {
      for (const int exponent : {-121, 121}) add_scaled(3, exponent);
      for (const int exponent : {-130, 113}) add_scaled(16, exponent);
    }
    // e4m3: x does not fit, and is streamed.
    for (const int k : {14336, 17408, 18944, 25600, 28672, 29568, kMaxGemvK}) {
      add(15, 21, k);
      add(16, 50, k);
    }
    add(8, 200, 16384);
    for (const int m : {1, 7, 16}) {
      add(m, 2113, 576, GemvEpilogue::kAdd, false, 3, 1);
      add(m, 2 * 1063, 576, GemvEpilogue::kSiluMul, true, 1, 3);
      add(m, 2 * 13, 4112, GemvEpilogue::kSiluMul, false, 5);
      add(m, 261, 4112, GemvEpilogue::kAdd);
      add(m, 77, 8208, GemvEpilogue::kStore, true, 2, 5);
    }
    const auto add_exact = [&](int m, int n, int k) {
      for (const GemvEpilogue epilogue :
           {GemvEpilogue::kStore, GemvEpilogue::kAdd, GemvEpilogue::kSiluMul}) {
        add(m, epilogue == GemvEpilogue::kSiluMul ? 2 * n : n, k, epilogue, false, 1, 1);
        cases.back().name += "_exact";
        cases.back().integers = true;
      }
    };
    for (const int m : {1, 2, 8, 15, 16}) {
      for (const int k : {144, 4112, 8192, 12288}) add_exact(m, 37, k);
    }
    for (const int m : {1, 2, 8}) add_exact(m, 35, kMaxGemvK);
    add_exact(16, 21, kMaxGemvK);
    add_exact(2, 2129, 12288);  // more tiles than SMs
    add_exact(13, 4300, 512);
    if (!e4m3) {  // blocks with more tiles than sums, also of a cluster
      for (const int m : {2, 9}) add_exact(m, 26003, 144);
      add(9, 13003, 4112, GemvEpilogue::kAdd, false, 1, 1);
      cases.back().name += "_exact";
      cases.back().integers = true;
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, GemvGpu, testing::ValuesIn(GemvCases()),
                         [](const auto& c) { return c.param.name; });

// In e4m3 x has no infinity: what is not finite must not become a number.
TEST(GemvGpuNotFinite, MakesItsRowsNaN) {
  RequireGpu();
  if (testing::Test::IsSkipped()) return;
  constexpr int kRows = 3, kN = 20, kK = 1040;
  std::vector<Bf16> x(kRows * kK, ToBf16(1.0f));
  x[5] = Bf16{0x7f80};              // infinity
  x[2 * kK + 1039] = Bf16{0xffc1};  // NaN
  const DeviceArray<Bf16> d_x(x);
  const DeviceArray<uint8_t> w(std::vector<uint8_t>(kN * kK, 0x38));
  const DeviceArray<float> scale(std::vector<float>(kN, 1.0f));
  DeviceArray<float> out(kRows * kN);
  for (const bool portable : {false, true}) {
    out.Fill(0);
    const absl::Status status = LaunchGemv({.x = d_x.get(),
                                            .w = w.get(),
                                            .w_scale = scale.get(),
                                            .out_f32 = out.get(),
                                            .m = kRows,
                                            .n = kN,
                                            .k = kK,
                                            .ldx = kK,
                                            .ldo = kN,
                                            .weights = GemvWeights::kE4m3,
                                            .portable = portable},
                                           nullptr);
    ASSERT_TRUE(status.ok()) << status;
    const std::vector<float> got = out.Get();
    for (int i = 0; i < kRows * kN; ++i) {
      if (i / kN == 1) {
        EXPECT_EQ(got[static_cast<size_t>(i)], 1040.0f);
      } else {
        EXPECT_FALSE(std::isfinite(got[static_cast<size_t>(i)])) << i;
      }
    }
  }
}

// Without it every case above would run the portable kernel twice.
TEST(GemvSm90, CodeIsThere) {
  RequireGpu();
  if (testing::Test::IsSkipped()) return;
  int major = 0;
  ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  if (major != 9 || std::getenv("CUDA_FORCE_PTX_JIT") != nullptr) GTEST_SKIP();
  EXPECT_TRUE(internal::HaveGemvSm90Code());
}

TEST(Gemv, RefusesWhatItCannotDo) {
  alignas(16) Bf16 x[64]{};
  alignas(16) Bf16 w[64]{};
  float out[64]{};
  const GemvParams good{
      .x = x, .w = w, .out_f32 = out, .m = 1, .n = 2, .k = 16, .ldx = 16, .ldo = 2};
  EXPECT_TRUE(ValidateGemv(good).ok());
  const auto refused = [&](auto change) {
    GemvParams p = good;
    change(p);
    return ValidateGemv(p).code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused([](auto& p) { p.m = 17; }));
  EXPECT_TRUE(refused([](auto& p) { p.m = -1; }));
  EXPECT_TRUE(refused([](auto& p) { p.n = 0; }));
  EXPECT_TRUE(refused([](auto& p) { p.k = 12; }));
  EXPECT_TRUE(refused([](auto& p) { p.ldx = 8; }));
  EXPECT_TRUE(refused([](auto& p) { p.ldx = 20; }));
  EXPECT_TRUE(refused([](auto& p) { p.ldo = 1; }));
  EXPECT_TRUE(refused([](auto& p) { p.x = nullptr; }));
  EXPECT_TRUE(refused([&](auto& p) { p.x = x + 1; }));
  EXPECT_TRUE(refused([](auto& p) { p.w = nullptr; }));
  EXPECT_TRUE(refused([](auto& p) { p.out_f32 = nullptr; }));
  EXPECT_TRUE(refused([&](auto& p) { p.out_bf16 = x; }));
  EXPECT_TRUE(refused([&](auto& p) { p.w_scale = out; }));
  EXPECT_TRUE(refused([](auto& p) { p.weights = GemvWeights::kE4m3; }));
  EXPECT_TRUE(refused([](auto& p) {
    p.n = 3;
    p.ldo = 3;
    p.epilogue = GemvEpilogue::kSiluMul;
  }));
  EXPECT_TRUE(refused([&](auto& p) {
    p.epilogue = GemvEpilogue::kAdd;
    p.out_f32 = nullptr;
    p.out_bf16 = x;
  }));
  GemvParams large = good;
  large.k = kMaxGemvK + 16;
  large.ldx = large.k;
  EXPECT_EQ(ValidateGemv(large).code(), absl::StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace winnow::kernels
