// The copying primitives of the padded prefill path on the device against their CPU twins.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "kernels/prefill_primitives.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/random_shapes.h"

namespace winnow::kernels {
namespace {

using Bytes = std::vector<uint8_t>;
using Ints = std::vector<int32_t>;

struct Shape {
  const char* name;
  int batch, num_heads, seq;
  size_t row_bytes;
  friend void PrintTo(const Shape& c, std::ostream* os) {
    *os << c.name << " " << c.batch << " x " << c.num_heads << " x " << c.seq << " of "
        << c.row_bytes << " bytes";
  }
};

// Positions around 256 and 2048, the pieces of wide and of narrow rows.
const Shape kShapes[] = {
    {"one_byte", 1, 1, 1, 1},
    {"flags", 3, 1, 2047, 4},
    {"flags_two_chunks", 2, 2, 2049, 4},
    {"odd_bytes", 2, 3, 255, 3},
    {"bf16_head_64", 4, 8, 256, 128},
    {"bf16_head_128", 2, 8, 257, 256},
    {"prime_everything", 5, 1, 509, 31},
    {"hidden_4096", 2, 1, 300, 8192},
    {"long", 1, 1, 5000, 4},
    {"many_planes", 70'000, 1, 3, 4},
    {"no_batch", 0, 2, 5, 16},
    {"no_positions", 3, 2, 0, 16},
};

class Primitives : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override { RequireGpu(); }

  static size_t Size(const Shape& c) {
    return static_cast<size_t>(c.batch) * static_cast<size_t>(c.num_heads) *
           static_cast<size_t>(c.seq) * c.row_bytes;
  }
  // Never empty, so that its address is not null.
  static Bytes Random(size_t n, uint32_t seed) {
    std::mt19937 rng(seed);
    Bytes bytes(std::max<size_t>(n, 1));
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(rng());
    return bytes;
  }
  // Rows: all, none, the last alone, then at random, a third.
  static Bytes Mask(int rows, int seq, uint32_t seed) {
    Bytes mask = Random(static_cast<size_t>(rows) * static_cast<size_t>(seq), seed);
    for (int r = 0; r < rows; ++r) {
      for (int s = 0; s < seq; ++s) {
        uint8_t& bit =
            mask[static_cast<size_t>(r) * static_cast<size_t>(seq) + static_cast<size_t>(s)];
        bit = r == 0 ? 1 : r == 1 ? 0 : r == 2 ? s + 1 == seq : bit % 3 == 0 ? bit | 1 : 0;
      }
    }
    return mask;
  }
};

TEST_P(Primitives, BoolGatherLeftPadEqualsTheCpuAndScatterBringsItBack) {
  const Shape& c = GetParam();
  const Bytes in = Random(Size(c), 1), mask = Mask(c.batch, c.seq, 2);
  Bytes want(in.size());
  Ints want_idx(mask.size()), want_counts(static_cast<size_t>(c.batch) + 1);
  BoolGatherLeftPadParams p = {.in = in.data(),
                               .mask = mask.data(),
                               .out = want.data(),
                               .idx = want_idx.data(),
                               .counts = want_counts.data(),
                               .batch = c.batch,
                               .num_heads = c.num_heads,
                               .seq = c.seq,
                               .row_bytes = c.row_bytes};
  ASSERT_TRUE(BoolGatherLeftPadCpu(p).ok());
  for (const size_t shift : {size_t{0}, size_t{1}}) {
    Bytes moved(shift);
    moved.insert(moved.end(), in.begin(), in.end());
    const DeviceArray<uint8_t> d_in(moved), d_mask(mask), out(in.size());
    const DeviceArray<int32_t> idx(mask.size()), counts(want_counts.size());
    p.in = d_in.get() + shift;
    p.mask = d_mask.get();
    p.out = out.get();
    p.idx = idx.get();
    p.counts = counts.get();
    ASSERT_TRUE(LaunchBoolGatherLeftPad(p, nullptr).ok());
    const auto whole = [](auto v, size_t n) { return v.resize(n), v; };
    EXPECT_EQ(whole(out.Get(), Size(c)), whole(want, Size(c)));
    const size_t positions = static_cast<size_t>(c.batch) * static_cast<size_t>(c.seq);
    EXPECT_EQ(whole(idx.Get(), positions), whole(want_idx, positions));
    EXPECT_EQ(whole(counts.Get(), static_cast<size_t>(c.batch)),
              whole(want_counts, static_cast<size_t>(c.batch)));
    // Back, each head as a sequence of its own.
    const size_t seq = static_cast<size_t>(c.seq), heads = static_cast<size_t>(c.num_heads);
    Ints idx_of_head(positions * heads + 1), count_of_head(want_counts.size() * heads);
    for (size_t i = 0; i < positions * heads; ++i) {
      idx_of_head[i] = want_idx[i / seq / heads * seq + i % seq];
    }
    for (size_t i = 0; i < count_of_head.size(); ++i) count_of_head[i] = want_counts[i / heads];
    const DeviceArray<int32_t> d_idx(idx_of_head), d_counts(count_of_head);
    const DeviceArray<uint8_t> back(in.size());
    ASSERT_TRUE(LaunchScatterByIndex({.in = out.get(),
                                      .idx = d_idx.get(),
                                      .lens = d_counts.get(),
                                      .out = back.get(),
                                      .batch = c.batch * c.num_heads,
                                      .in_seq = c.seq,
                                      .out_seq = c.seq,
                                      .max_len = c.seq,
                                      .row_bytes = c.row_bytes},
                                     nullptr)
                    .ok());
    Bytes kept = in;
    for (size_t i = 0; i < Size(c); ++i) {
      const size_t position = i / c.row_bytes;
      if (mask[position / seq / heads * seq + position % seq] == 0) kept[i] = 0;
    }
    EXPECT_EQ(whole(back.Get(), Size(c)), whole(kept, Size(c)));
  }
}

TEST_P(Primitives, CompactByBoolEqualsTheCpu) {
  const Shape& c = GetParam();
  const int rows = c.batch * c.num_heads;
  const Bytes in = Random(Size(c), 3), mask = Mask(rows, c.seq, 4);
  Bytes want(in.size());
  Ints want_counts(static_cast<size_t>(rows) + 1);
  CompactByBoolParams p = {.in = in.data(),
                           .mask = mask.data(),
                           .out = want.data(),
                           .counts = want_counts.data(),
                           .num_rows = rows,
                           .seq = c.seq,
                           .row_bytes = c.row_bytes};
  ASSERT_TRUE(CompactByBoolCpu(p).ok());
  const DeviceArray<uint8_t> d_in(in), d_mask(mask), out(in.size());
  const DeviceArray<int32_t> counts(want_counts.size());
  p.in = d_in.get();
  p.mask = d_mask.get();
  p.out = out.get();
  p.counts = counts.get();
  ASSERT_TRUE(LaunchCompactByBool(p, nullptr).ok());
  const auto whole = [](auto v, size_t n) { return v.resize(n), v; };
  EXPECT_EQ(whole(out.Get(), Size(c)), whole(want, Size(c)));
  EXPECT_EQ(whole(counts.Get(), static_cast<size_t>(rows)),
            whole(want_counts, static_cast<size_t>(rows)));
}

// Into other lengths than it came from, indices in any order.
TEST_P(Primitives, ScatterByIndexEqualsTheCpu) {
  const Shape& c = GetParam();
  const int batch = c.batch * c.num_heads, out_seq = c.seq + 300, max_len = c.seq + 7;
  std::mt19937 rng(5);
  Ints idx(static_cast<size_t>(batch) * static_cast<size_t>(max_len) + 1, -1000);
  Ints lens(static_cast<size_t>(batch) + 1);
  Ints order(static_cast<size_t>(out_seq));
  for (int b = 0; b < batch; ++b) {
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    for (size_t i = 0; i < static_cast<size_t>(c.seq); ++i) {  // the first c.seq of a shuffle
      std::swap(order[i], order[i + rng() % (order.size() - i)]);
      idx[static_cast<size_t>(b) * static_cast<size_t>(max_len) + i] = order[i];
    }
    lens[static_cast<size_t>(b)] = b == 0   ? c.seq
                                   : b == 1 ? 0
                                            : static_cast<int32_t>(rng() % (c.seq + 1u));
  }
  const Bytes in = Random(Size(c), 6);
  const size_t size = static_cast<size_t>(batch) * static_cast<size_t>(out_seq) * c.row_bytes;
  Bytes want(size + 1);
  ScatterByIndexParams p = {.in = in.data(),
                            .idx = idx.data(),
                            .lens = lens.data(),
                            .out = want.data(),
                            .batch = batch,
                            .in_seq = c.seq,
                            .out_seq = out_seq,
                            .max_len = max_len,
                            .row_bytes = c.row_bytes};
  ASSERT_TRUE(ScatterByIndexCpu(p).ok());
  want.resize(size);
  const DeviceArray<uint8_t> d_in(in), out(std::max<size_t>(size, 1));
  const DeviceArray<int32_t> d_idx(idx), d_lens(lens);
  p.in = d_in.get();
  p.idx = d_idx.get();
  p.lens = d_lens.get();
  p.out = out.get();
  ASSERT_TRUE(LaunchScatterByIndex(p, nullptr).ok());
  Bytes got = out.Get();
  got.resize(size);
  EXPECT_EQ(got, want);
}

std::vector<Shape> RandomCases() {
  RandomShapes shapes(4);
  std::vector<Shape> cases;
  for (int i = 0; i < 30; ++i) {
    Shape c{"", shapes.Log(1, 30), shapes.In(1, 6), shapes.Log(1, 3000), 1};
    const int most = 4'000'000 / (c.batch * c.num_heads * c.seq);
    c.row_bytes = static_cast<size_t>(shapes.Log(1, std::clamp(most, 1, 1200)));
    if (shapes.OneIn(2)) c.row_bytes = (c.row_bytes + 15) / 16 * 16;
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, Primitives, testing::ValuesIn(kShapes),
                         [](const auto& c) { return std::string(c.param.name); });
INSTANTIATE_TEST_SUITE_P(Random, Primitives, testing::ValuesIn(RandomCases()));

class PrimitivesGolden : public testing::Test {
 protected:
  void SetUp() override { RequireGpu(); }
};

// What the device cannot refuse it skips, and writes nothing outside.
TEST_F(PrimitivesGolden, ScatterSkipsIndicesOutsideAndClampsLengths) {
  const DeviceArray<int32_t> in(Ints{1, 2, 3}), idx(Ints{5, -1, 0, 3}), lens(Ints{9}), out(4);
  ASSERT_TRUE(LaunchScatterByIndex({.in = in.get(),
                                    .idx = idx.get(),
                                    .lens = lens.get(),
                                    .out = out.get(),
                                    .batch = 1,
                                    .in_seq = 3,
                                    .out_seq = 4,
                                    .max_len = 4,
                                    .row_bytes = 4},
                                   nullptr)
                  .ok());
  EXPECT_EQ(out.Get(), (Ints{3, 0, 0, 0}));
}

TEST_F(PrimitivesGolden, AllFour) {
  const DeviceArray<int32_t> in(Ints{10, 11, 12, 13, 14});
  const DeviceArray<uint8_t> mask(Bytes{0, 1, 1, 0, 1});
  const DeviceArray<int32_t> out(5), idx(5), counts(1), back(5), compact(5), compact_count(1);
  ASSERT_TRUE(LaunchBoolGatherLeftPad({.in = in.get(),
                                       .mask = mask.get(),
                                       .out = out.get(),
                                       .idx = idx.get(),
                                       .counts = counts.get(),
                                       .batch = 1,
                                       .num_heads = 1,
                                       .seq = 5,
                                       .row_bytes = 4},
                                      nullptr)
                  .ok());
  EXPECT_EQ(out.Get(), (Ints{0, 0, 11, 12, 14}));
  EXPECT_EQ(idx.Get(), (Ints{1, 2, 4, -1, -1}));
  EXPECT_EQ(counts.Get(), (Ints{3}));
  ASSERT_TRUE(LaunchScatterByIndex({.in = out.get(),
                                    .idx = idx.get(),
                                    .lens = counts.get(),
                                    .out = back.get(),
                                    .batch = 1,
                                    .in_seq = 5,
                                    .out_seq = 5,
                                    .max_len = 5,
                                    .row_bytes = 4},
                                   nullptr)
                  .ok());
  EXPECT_EQ(back.Get(), (Ints{0, 11, 12, 0, 14}));
  ASSERT_TRUE(LaunchCompactByBool({.in = in.get(),
                                   .mask = mask.get(),
                                   .out = compact.get(),
                                   .counts = compact_count.get(),
                                   .num_rows = 1,
                                   .seq = 5,
                                   .row_bytes = 4},
                                  nullptr)
                  .ok());
  EXPECT_EQ(compact.Get(), (Ints{11, 12, 14, 13, 14}));
  EXPECT_EQ(compact_count.Get(), (Ints{3}));
  const DeviceArray<int32_t> short_row(Ints{1, 2, 3, 0}), len(Ints{3}), padded(4);
  ASSERT_TRUE(LaunchLeftPad2d({short_row.get(), len.get(), padded.get(), 1, 4, 4}, nullptr).ok());
  EXPECT_EQ(padded.Get(), (Ints{0, 1, 2, 3}));
}

TEST(PrimitivesParams, BadOnesAreRefused) {
  uint8_t x = 0;
  int32_t i = 0;
  const auto bad = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  };
  bad(LaunchScatterByIndex({&x, nullptr, &i, &x, 1, 1, 1, 1, 1}, nullptr));
  bad(LaunchScatterByIndex({&x, &i, &i, &x, 1, 1, -1, 1, 1}, nullptr));
  bad(LaunchBoolGatherLeftPad({&x, &x, &x, &i, nullptr, 1, 1, 1, 1}, nullptr));
  bad(LaunchBoolGatherLeftPad({&x, &x, &x, &i, &i, 1, -1, 1, 1}, nullptr));
  bad(LaunchCompactByBool({&x, &x, &x, &i, 1, 1, 0}, nullptr));
  bad(LaunchCompactByBool({&x, nullptr, &x, &i, 1, 1, 1}, nullptr));
}

}  // namespace
}  // namespace winnow::kernels
