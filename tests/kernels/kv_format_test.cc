#include "kernels/kv_format.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/base/bf16.h"
#include "common/base/fp8.h"

namespace winnow::kernels {
namespace {

constexpr int kDim = 64;

struct Stored {
  std::vector<uint8_t> row;
  float k[kDim], v[kDim];
};

Stored StoreAndLoad(KvFormatId format, const std::vector<float>& k, const std::vector<float>& v) {
  Stored s;
  s.row.resize(TokenBytes(format, kDim));
  StoreRow(format, kDim, k.data(), v.data(), s.row.data());
  const TokenRef token = RowToken(format, kDim, s.row.data());
  LoadK(format, kDim, token, s.k);
  LoadV(format, kDim, token, s.v);
  return s;
}

float ScaleOf(const Stored& s, int part) {
  uint16_t half;
  std::memcpy(&half, s.row.data() + 2 * kDim + 2 * part, 2);
  return HalfToFloat(half);
}

TEST(KvFormat, Names) {
  for (const KvFormat& format : kKvFormats) {
    EXPECT_EQ(KvFormatOf(format.id).name, format.name);
    EXPECT_EQ(*ParseKvFormat(format.name), format.id);
  }
  EXPECT_EQ(*ParseKvFormat("k8v8"), KvFormatId::kK8V8);
  EXPECT_EQ(KvFormatName(KvFormatId::kInt8H), "int8h");
  EXPECT_EQ(KvFormatName(*ParseKvFormat("best")), "int8h");
  const absl::Status status = ParseKvFormat("int4").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "kv format \"int4\" is none of bf16, fp8, int8, int8h, k8v8, best");
}

TEST(KvFormat, Sizes) {
  EXPECT_EQ(TokenBytes(KvFormatId::kFp8, 128), 260u);
  EXPECT_EQ(TokenBytes(KvFormatId::kBf16, 128), 512u);
  EXPECT_EQ(PageBytes(128), 8320u);
  for (int dim = 16; dim <= kMaxHeadDim; dim += 16) {
    EXPECT_TRUE(ValidateHeadDim(dim).ok());
    for (const KvFormat& format : kKvFormats) {
      const int bf16_slots = dim == 16 ? 18 : dim == 32 ? 17 : 16;
      EXPECT_EQ(SlotsPerPage(format.id, dim), format.id == KvFormatId::kBf16 ? bf16_slots : 32);
      EXPECT_LE(TokenBytes(format.id, dim), kMaxTokenBytes);
    }
  }
  for (const int dim : {-16, 0, 8, 24, 100, 272}) {
    EXPECT_EQ(ValidateHeadDim(dim).code(), absl::StatusCode::kUnimplemented) << dim;
  }
}

TEST(KvFormat, EveryCodeDecodesAsE4m3) {
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) {
      EXPECT_EQ(DecodeE4m3(static_cast<uint8_t>(code)), code == 0x7f ? 480.0f : -480.0f);
    } else {
      EXPECT_EQ(DecodeE4m3(static_cast<uint8_t>(code)), E4m3ToFloat(static_cast<uint8_t>(code)));
    }
  }
}

// The smallest scale that saturates nothing.
double SmallestScale(float amax, double max_code) {
  uint16_t half = ToHalf(amax / static_cast<float>(max_code));
  while (half > 0 && HalfToFloat(half) * max_code >= double{amax}) --half;
  while (half == 0 || HalfToFloat(half) * max_code < double{amax}) ++half;
  return HalfToFloat(half);
}

double E4m3Error(const std::vector<float>& x, double scale) {
  double sum = 0.0;
  for (const float value : x) {
    const float quotient = value / static_cast<float>(scale);
    const double error = E4m3ToFloat(ToE4m3(quotient)) * scale - value;
    sum += error * error;
  }
  return sum;
}

TEST(KvFormat, Fp8CodesAreE4m3OfTheQuotientAndScaleIsTheBetterOfTwo) {
  int larger = 0, total = 0;
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 3000; ++i) {
    std::vector<float> k(kDim), v(kDim);
    const float size = std::ldexp(1.0f, static_cast<int>(rng() % 60) - 40);
    for (float& x : k) x = size * normal(rng);
    for (float& x : v) x = normal(rng) * normal(rng) * normal(rng);
    const Stored s = StoreAndLoad(KvFormatId::kFp8, k, v);
    for (const int part : {0, 1}) {
      const std::vector<float>& x = part == 0 ? k : v;
      float amax = 0.0f;
      for (const float value : x) amax = std::max(amax, std::fabs(value));
      const float scale = ScaleOf(s, part);
      const double smallest = SmallestScale(amax, 448.0);
      const double other = HalfToFloat(ToHalf(static_cast<float>(smallest * std::sqrt(2.0))));
      const double errors[] = {E4m3Error(x, smallest), E4m3Error(x, other)};
      ASSERT_TRUE(scale == smallest || scale == other) << scale << " " << smallest;
      // The sums are in float32; a draw may go either way.
      ASSERT_LE(E4m3Error(x, scale), std::min(errors[0], errors[1]) * (1 + 1e-5));
      larger += scale != smallest;
      ++total;
      for (int d = 0; d < kDim; ++d) {
        const size_t at = static_cast<size_t>(d);
        const uint8_t code = s.row[at + static_cast<size_t>(part * kDim)];
        ASSERT_EQ(code, ToE4m3(x[at] / scale)) << x[at] << " / " << scale;
        ASSERT_EQ((part == 0 ? s.k : s.v)[d], E4m3ToFloat(code) * scale);
        ASSERT_LE(std::fabs((part == 0 ? s.k : s.v)[d] - x[at]),
                  std::max(std::fabs(x[at]) / 16.0f, scale * 0x1p-10f) * 1.0001f);
      }
    }
  }
  EXPECT_GT(larger, total / 5);
  EXPECT_LT(larger, total * 4 / 5);
}

// K is int8 in all of these, V int8 or e4m3. The bounds: half a step of the scale,
// whose quotient and product round once each, and the scale is 2^-10 above amax / 127
// at most where it is a normal float16.
TEST(KvFormat, Int8CodesAreTheNearest) {
  std::mt19937 rng(6);
  std::normal_distribution<float> normal;
  for (const KvFormatId id : {KvFormatId::kInt8, KvFormatId::kInt8H, KvFormatId::kK8V8}) {
    for (int i = 0; i < 1000; ++i) {
      std::vector<float> x(kDim);
      const float size = std::ldexp(1.0f, static_cast<int>(rng() % 60) - 40);
      float amax = 0.0f;
      for (float& value : x) value = size * normal(rng);
      for (const float value : x) amax = std::max(amax, std::fabs(value));
      const Stored s = StoreAndLoad(id, x, x);
      const float scale = ScaleOf(s, 0);
      EXPECT_EQ(scale, SmallestScale(amax, 127.0));
      if (scale >= 0x1p-14f) {
        EXPECT_LE(double{scale}, double{amax} / 127 * (1 + 0x1p-10));
      }
      for (size_t d = 0; d < kDim; ++d) {
        const int code = static_cast<int8_t>(s.row[d]);
        ASSERT_EQ(code, static_cast<int>(std::nearbyint(x[d] / scale)));
        ASSERT_LE(std::abs(code), 127);
        ASSERT_EQ(s.k[d], static_cast<float>(code) * scale);
        ASSERT_LE(std::fabs(double{s.k[d]} - double{x[d]}), double{scale} * (0.5 + 0x1p-16));
        if (id != KvFormatId::kK8V8) {
          ASSERT_EQ(s.v[d], s.k[d]);
        }
      }
      if (id != KvFormatId::kK8V8) {
        EXPECT_EQ(ScaleOf(s, 1), scale);
        continue;
      }
      const Stored fp8 = StoreAndLoad(KvFormatId::kFp8, x, x);
      EXPECT_TRUE(
          std::equal(s.row.begin() + kDim, s.row.begin() + 2 * kDim, fp8.row.begin() + kDim));
      EXPECT_TRUE(std::equal(s.v, s.v + kDim, fp8.v));
    }
  }
}

// 1.75 is 448 times a power of two, so it is stored exactly.
TEST(KvFormat, ZeroRowStoresZeros) {
  const std::vector<float> zero(kDim, 0.0f), one(kDim, 1.75f);
  const Stored s = StoreAndLoad(KvFormatId::kFp8, zero, one);
  EXPECT_GT(ScaleOf(s, 0), 0.0f);
  for (int d = 0; d < kDim; ++d) {
    EXPECT_EQ(s.row[static_cast<size_t>(d)], 0);
    EXPECT_EQ(s.k[d], 0.0f);
    EXPECT_EQ(s.v[d], 1.75f);
  }
}

TEST(KvFormat, HugeAndTinyValuesStayFinite) {
  std::vector<float> huge(kDim, 1e38f), tiny(kDim, 1e-38f);
  const Stored s = StoreAndLoad(KvFormatId::kFp8, huge, tiny);
  for (int d = 0; d < kDim; ++d) {
    EXPECT_EQ(s.k[d], 448.0f * 65504.0f);
    EXPECT_EQ(s.v[d], 0.0f);
  }
  const Stored int8 = StoreAndLoad(KvFormatId::kInt8, huge, tiny);
  for (int d = 0; d < kDim; ++d) {
    EXPECT_EQ(int8.k[d], 127.0f * 65504.0f);
    EXPECT_EQ(int8.v[d], 0.0f);
  }
}

TEST(KvFormat, NotFiniteReadsAsNan) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    std::vector<float> k(kDim, 1.0f), v(kDim, 1.75f);
    k[17] = bad;
    for (const KvFormatId id : {KvFormatId::kFp8, KvFormatId::kK8V8}) {
      const Stored s = StoreAndLoad(id, k, v);
      for (int d = 0; d < kDim; ++d) {
        EXPECT_TRUE(std::isnan(s.k[d]));
        EXPECT_EQ(s.v[d], 1.75f);
      }
    }
  }
}

TEST(KvFormat, Bf16RoundsToNearest) {
  std::mt19937 rng(4);
  std::normal_distribution<float> normal;
  std::vector<float> k(kDim), v(kDim);
  for (float& x : k) x = normal(rng);
  for (float& x : v) x = normal(rng);
  v[3] = std::numeric_limits<float>::infinity();
  const Stored s = StoreAndLoad(KvFormatId::kBf16, k, v);
  for (size_t d = 0; d < kDim; ++d) {
    EXPECT_EQ(s.k[d], RoundToBf16(k[d]));
    EXPECT_EQ(s.v[d], RoundToBf16(v[d]));
  }
}

TEST(KvFormat, SlotsOfAPageDoNotOverlap) {
  for (const auto& [format, name, k_element, v_element, rotated] : kKvFormats) {
    for (const int dim : {16, 64, 256}) {
      const int slots = SlotsPerPage(format, dim);
      const size_t bytes = TokenBytes(format, dim);
      std::mt19937 rng(5);
      std::vector<uint8_t> page(PageBytes(dim) + 1, 0xee);
      std::vector<std::vector<uint8_t>> rows(static_cast<size_t>(slots));
      for (int slot = slots - 1; slot >= 0; --slot) {
        std::vector<uint8_t>& row = rows[static_cast<size_t>(slot)];
        row.resize(bytes);
        for (uint8_t& byte : row) byte = static_cast<uint8_t>(rng());
        CopyRowToPage(format, dim, row.data(), page.data(), slot);
      }
      EXPECT_EQ(page.back(), 0xee);
      for (int slot = 0; slot < slots; ++slot) {
        std::vector<uint8_t> row(bytes);
        CopyPageToRow(format, dim, page.data(), slot, row.data());
        EXPECT_EQ(row, rows[static_cast<size_t>(slot)]) << slot;
        // K rows, then V rows, then K scales, then V scales.
        const TokenRef ref = PageToken(format, dim, page.data(), slot);
        const int64_t e = format == KvFormatId::kBf16 ? 2 : 1;
        EXPECT_EQ(ref.k - page.data(), slot * dim * e);
        EXPECT_EQ(ref.v - page.data(), (slots + slot) * dim * e);
        if (format != KvFormatId::kBf16) {
          EXPECT_EQ(ref.k_scale - page.data(), 2 * slots * dim + 2 * slot);
          EXPECT_EQ(ref.v_scale - page.data(), 2 * slots * dim + 2 * (slots + slot));
        }
      }
    }
  }
}

}  // namespace
}  // namespace winnow::kernels
