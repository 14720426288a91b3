// LaunchDmsPrepare against DmsCompactCpu on the same BF16 rows, bit for bit; then the
// survivors that LaunchDmsPrefillCompact lays out of what it wrote.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "kernels/cuda/dms_prepare.h"
#include "kernels/rope.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/random_shapes.h"
#include "tests/kernels/valid_prefill_batch.h"

namespace winnow::kernels {
namespace {

constexpr size_t Size(int n) { return static_cast<size_t>(n); }

struct Sequence {
  int prefix, chunk;
};

struct PrepareCase {
  std::string name;
  std::vector<Sequence> sequences = {{0, 150}, {7, 1}, {0, 33}, {3, 64}};
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, group = 4, num_kv_heads = 2, window = 20, shift = 1;
  DecisionRule rule = {
      .source = DecisionSource::kBorrowedAfterQNorm, .scale = 1.0f, .offset = 0.1f};
  bool norm = true, in_place = false;
  friend void PrintTo(const PrepareCase& c, std::ostream* os) {
    *os << c.name << ": " << KvFormatName(c.format) << " d" << c.head_dim << " group " << c.group
        << " heads " << c.num_kv_heads << " window " << c.window << " shift " << c.shift;
    for (const Sequence& s : c.sequences) *os << " " << s.prefix << "+" << s.chunk;
  }
};

// Rows of nobody between sequences.
constexpr int kGap = 3, kBandGap = 8;

struct Inputs {
  std::vector<DmsPrefillSequence> places;
  int rows = 0, band = 0, compact = 0, max_band = 0, num_positions = 0;
  size_t dim, kv, heads, row;  // elements: of a head, of all K heads, of all queries, of a row
  std::vector<Bf16> qkv;       // [rows, row]
  std::vector<float> q_norm, k_norm, logits;
  std::vector<int32_t> positions;
  std::vector<uint8_t> prefix_evict;
  std::vector<Bf16> band_k, band_v;  // prefix rows set, others poison
};

Inputs MakeInputs(const PrepareCase& c, const std::vector<Sequence>& sequences, uint32_t seed) {
  Inputs in;
  for (const Sequence& s : sequences) {
    in.places.push_back({in.rows, s.chunk, in.band, s.prefix, in.compact});
    in.rows += s.chunk + kGap;
    in.band += s.prefix + s.chunk + kBandGap;
    in.compact += s.prefix + s.chunk + 8;
    in.max_band = std::max(in.max_band, s.prefix + s.chunk);
  }
  in.dim = Size(c.head_dim);
  in.kv = Size(c.num_kv_heads) * in.dim;
  in.heads = in.kv * Size(c.group);
  in.row = in.heads + 2 * in.kv + 8;  // rows may be longer than what they hold
  in.num_positions = 3 * in.max_band + 5;
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  const auto random = [&](size_t n, float sigma) {
    std::vector<float> x(n);
    for (float& value : x) value = sigma * normal(rng);
    return x;
  };
  in.qkv.assign(Size(in.rows) * in.row, Bf16{0xffff});
  in.positions.assign(Size(in.rows), -1);
  in.q_norm = random(in.dim, 1.0f);
  in.k_norm = random(in.dim, 1.0f);
  in.logits.assign(Size(in.rows) * Size(c.num_kv_heads), std::nanf(""));
  in.prefix_evict.assign(Size(in.band) * Size(c.num_kv_heads), 0xff);
  in.band_k.assign(Size(in.band) * in.kv, Bf16{0xffff});
  in.band_v = in.band_k;
  int token = 0;
  for (const DmsPrefillSequence& at : in.places) {
    const int start = static_cast<int>(rng() % static_cast<uint32_t>(in.max_band));
    for (int t = 0; t < at.num_tokens; ++t, ++token) {
      const size_t row = Size(at.row + t);
      in.positions[row] = start + t;
      for (size_t i = 0; i < in.heads + 2 * in.kv; ++i) {
        in.qkv[row * in.row + i] = ToBf16(1.5f * normal(rng));
      }
      // Decisions at the threshold, and of what is no number.
      const float edges[] = {0.0f, -0.0f, 0.1f, std::nanf(""), INFINITY, -INFINITY};
      for (int g = 0; g < c.num_kv_heads; ++g) {
        in.logits[row * Size(c.num_kv_heads) + Size(g)] =
            token % 5 == 2 ? edges[(token / 5 + g) % 6] : normal(rng);
      }
      // Rows of zeros, large, small and not finite values are stored alike too.
      Bf16* k = &in.qkv[row * in.row + in.heads];
      if (token % 13 == 1) std::fill_n(&in.qkv[row * in.row], in.heads + 2 * in.kv, Bf16{});
      if (token % 13 == 3) k[3] = ToBf16(1e6f);
      if (token % 13 == 5) k[in.kv + 5] = ToBf16(3e30f);
      if (token % 13 == 7) std::fill_n(k, 2 * in.kv, Bf16{0x0001});
      if (token % 13 == 9) k[in.kv + 2] = Bf16{0x8000};
      if (token % 39 == 11 && c.format != KvFormatId::kBf16) k[in.kv + 1] = ToBf16(INFINITY);
    }
    for (int i = 0; i < at.num_prefix; ++i) {
      const size_t row = Size(at.band_row + i);
      for (size_t j = 0; j < in.kv; ++j) {
        in.band_k[row * in.kv + j] = ToBf16(normal(rng));
        in.band_v[row * in.kv + j] = ToBf16(normal(rng));
      }
      for (int g = 0; g < c.num_kv_heads; ++g) {
        in.prefix_evict[row * Size(c.num_kv_heads) + Size(g)] = rng() % 2;
      }
    }
  }
  return in;
}

struct Results {
  std::vector<Bf16> q, band_k, band_v, compact_k, compact_v;  // q: rows of the whole buffer
  std::vector<uint8_t> decisions, rows;
};

Results RunOnDevice(const PrepareCase& c, const Inputs& in, const RopeTable& rope) {
  DeviceArray<DmsPrefillSequence> places(in.places);
  DeviceArray<Bf16> qkv(in.qkv), q_out(Size(in.rows) * in.heads), band_k(in.band_k),
      band_v(in.band_v), compact_k(Size(in.compact) * in.kv), compact_v(Size(in.compact) * in.kv);
  DeviceArray<float> q_norm(in.q_norm), k_norm(in.k_norm), logits(in.logits), cos(rope.cos),
      sin(rope.sin);
  DeviceArray<int32_t> positions(in.positions);
  DeviceArray<uint8_t> prefix_evict(in.prefix_evict),
      decisions(Size(in.rows) * Size(c.num_kv_heads)),
      rows(Size(in.rows) * Size(c.num_kv_heads) * TokenBytes(c.format, c.head_dim));
  DmsPrefillBatch batch{.sequences = places.get(),
                        .band_k = band_k.get(),
                        .band_v = band_v.get(),
                        .compact_k = compact_k.get(),
                        .compact_v = compact_v.get(),
                        .batch = static_cast<int>(in.places.size()),
                        .num_kv_heads = c.num_kv_heads,
                        .group = c.group,
                        .head_dim = c.head_dim,
                        .window = c.window,
                        .shift = c.shift,
                        .num_rows = in.rows,
                        .band_rows = in.band,
                        .compact_rows = in.compact,
                        .max_band = in.max_band};
  DeviceArray<uint8_t> scratch(DmsPrefillScratchBytes(batch));
  batch.scratch = scratch.get();
  const int64_t stride = static_cast<int64_t>(in.row);
  absl::Status status =
      LaunchDmsPrepare({.batch = batch,
                        .format = c.format,
                        .q = qkv.get(),
                        .k = qkv.get() + in.heads,
                        .v = qkv.get() + in.heads + in.kv,
                        .q_stride = stride,
                        .kv_stride = stride,
                        .q_norm = c.norm ? q_norm.get() : nullptr,
                        .k_norm = c.norm ? k_norm.get() : nullptr,
                        .logit_inputs = logits.get(),
                        .logit_stride = c.num_kv_heads,
                        .positions = positions.get(),
                        .rope_cos = cos.get(),
                        .rope_sin = sin.get(),
                        .rule = c.rule,
                        .q_out = c.in_place ? qkv.get() : q_out.get(),
                        .q_out_stride = c.in_place ? stride : static_cast<int64_t>(in.heads),
                        .decisions = decisions.get(),
                        .rows = rows.get()},
                       nullptr);
  EXPECT_TRUE(status.ok()) << status;
  status = LaunchDmsPrefillCompact({.batch = batch,
                                    .format = c.format,
                                    .decisions = decisions.get(),
                                    .prefix_evict = prefix_evict.get()},
                                   nullptr);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  scratch.Get();
  Results out{.q = q_out.Get(),
              .band_k = band_k.Get(),
              .band_v = band_v.Get(),
              .compact_k = compact_k.Get(),
              .compact_v = compact_v.Get(),
              .decisions = decisions.Get(),
              .rows = rows.Get()};
  const std::vector<Bf16> all = qkv.Get();
  if (c.in_place) {
    out.q.assign(Size(in.rows) * in.heads, Bf16{0xffff});
    for (size_t r = 0; r < Size(in.rows); ++r) {
      if (in.positions[r] >= 0) std::copy_n(&all[r * in.row], in.heads, &out.q[r * in.heads]);
    }
  } else {
    EXPECT_TRUE(all == in.qkv) << "the input changed";
  }
  return out;
}

bool SameBits(const Bf16* a, const Bf16* b, size_t n) {  // any NaN is a NaN
  const auto nan = [](Bf16 x) { return (x.bits & 0x7fff) > 0x7f80; };
  for (size_t i = 0; i < n; ++i) {
    if (a[i] != b[i] && !(nan(a[i]) && nan(b[i]))) return false;
  }
  return true;
}

// The CPU's op on one sequence's rows: what the device must write there.
struct Wanted {
  std::vector<Bf16> q, k, v;
  std::vector<uint8_t> rows, decisions;
};

Wanted RunOnCpu(const PrepareCase& c, const Inputs& in, const DmsPrefillSequence& at,
                const RopeTable& rope) {
  const size_t n = Size(at.num_tokens), kv_heads = Size(c.num_kv_heads);
  std::vector<float> x(n * in.row), q(n * in.heads);
  for (size_t i = 0; i < x.size(); ++i) x[i] = ToFloat(in.qkv[Size(at.row) * in.row + i]);
  Wanted want;
  if (n == 0) return want;
  const size_t row_bytes = TokenBytes(c.format, c.head_dim);
  want.rows.resize(n * kv_heads * row_bytes);
  want.decisions.resize(n * kv_heads);
  const int64_t stride = static_cast<int64_t>(in.row);
  const absl::Status status = DmsCompactCpu({.q = x.data(),
                                             .k = x.data() + in.heads,
                                             .v = x.data() + in.heads + in.kv,
                                             .q_stride = stride,
                                             .k_stride = stride,
                                             .v_stride = stride,
                                             .q_norm = c.norm ? in.q_norm.data() : nullptr,
                                             .k_norm = c.norm ? in.k_norm.data() : nullptr,
                                             .logit_inputs = &in.logits[Size(at.row) * kv_heads],
                                             .logit_stride = c.num_kv_heads,
                                             .positions = &in.positions[Size(at.row)],
                                             .rope_cos = rope.cos.data(),
                                             .rope_sin = rope.sin.data(),
                                             .num_positions = rope.num_positions,
                                             .rule = c.rule,
                                             .format = c.format,
                                             .q_out = q.data(),
                                             .rows = want.rows.data(),
                                             .decisions = want.decisions.data(),
                                             .num_tokens = at.num_tokens,
                                             .num_heads = c.num_kv_heads * c.group,
                                             .num_kv_heads = c.num_kv_heads,
                                             .head_dim = c.head_dim},
                                            nullptr);
  EXPECT_TRUE(status.ok()) << status;
  for (const float value : q) want.q.push_back(ToBf16(value));
  std::vector<float> k(in.dim), v(in.dim);
  for (size_t i = 0; i < n * kv_heads; ++i) {
    const TokenRef token = RowToken(c.format, c.head_dim, &want.rows[i * row_bytes]);
    LoadK(c.format, c.head_dim, token, k.data());
    LoadV(c.format, c.head_dim, token, v.data());
    for (const float value : k) want.k.push_back(ToBf16(value));
    for (const float value : v) want.v.push_back(ToBf16(value));
  }
  return want;
}

class DmsPrepareGpu : public testing::TestWithParam<PrepareCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

TEST_P(DmsPrepareGpu, HasTheCpusBits) {
  const PrepareCase& c = GetParam();
  const Inputs in = MakeInputs(c, c.sequences, 5);
  const absl::StatusOr<RopeTable> rope = BuildRopeTable(c.head_dim, in.num_positions, 10000.0f);
  ASSERT_TRUE(rope.ok());
  const Results got = RunOnDevice(c, in, *rope);
  const size_t kv_heads = Size(c.num_kv_heads), row_bytes = TokenBytes(c.format, c.head_dim);
  int num_evicted = 0, num_decided = 0;
  for (size_t n = 0; n < in.places.size(); ++n) {
    SCOPED_TRACE("sequence " + std::to_string(n));
    const DmsPrefillSequence& at = in.places[n];
    const size_t row = Size(at.row), band_row = Size(at.band_row + at.num_prefix);
    const Wanted want = RunOnCpu(c, in, at, *rope);
    EXPECT_TRUE(SameBits(&got.q[row * in.heads], want.q.data(), want.q.size())) << "queries";
    EXPECT_EQ(
        std::memcmp(&got.decisions[row * kv_heads], want.decisions.data(), want.decisions.size()),
        0)
        << "decisions";
    EXPECT_EQ(
        std::memcmp(&got.rows[row * kv_heads * row_bytes], want.rows.data(), want.rows.size()), 0)
        << "flat rows";
    EXPECT_TRUE(SameBits(&got.band_k[band_row * in.kv], want.k.data(), want.k.size())) << "keys";
    EXPECT_TRUE(SameBits(&got.band_v[band_row * in.kv], want.v.data(), want.v.size())) << "values";
    EXPECT_EQ(
        std::memcmp(&got.band_k[Size(at.band_row) * in.kv], &in.band_k[Size(at.band_row) * in.kv],
                    Size(at.num_prefix) * in.kv * sizeof(Bf16)),
        0)
        << "the prefix changed";
    // Rows of nobody.
    const size_t end = row + Size(at.num_tokens);
    for (size_t i = end * in.heads; i < (end + kGap) * in.heads; ++i) {
      ASSERT_EQ(got.q[i].bits, 0xffff);
    }
    for (size_t i = end * kv_heads; i < (end + kGap) * kv_heads; ++i) {
      ASSERT_EQ(got.decisions[i], 0xff);
    }
    for (size_t i = end * kv_heads * row_bytes; i < (end + kGap) * kv_heads * row_bytes; ++i) {
      ASSERT_EQ(got.rows[i], 0xff);
    }
    // Survivors: kept, older than the window of the chunk's last query, oldest first.
    const int band = at.num_prefix + at.num_tokens, expirable = band - 1 - c.window;
    for (size_t g = 0; g < kv_heads; ++g) {
      std::vector<Bf16> k, v;
      for (int i = 0; i < expirable; ++i) {
        const int own = i + c.shift - at.num_prefix;
        const uint8_t evict = own < 0 ? in.prefix_evict[Size(at.band_row + i) * kv_heads + g]
                                      : want.decisions[Size(own) * kv_heads + g];
        if (evict != 0) continue;
        const auto* from_k = &got.band_k[Size(at.band_row + i) * in.kv + g * in.dim];
        const auto* from_v = &got.band_v[Size(at.band_row + i) * in.kv + g * in.dim];
        k.insert(k.end(), from_k, from_k + in.dim);
        v.insert(v.end(), from_v, from_v + in.dim);
      }
      k.resize(k.size() + 8 * in.dim);  // the op's zeros
      v.resize(v.size() + 8 * in.dim);
      const size_t room = (Size(band) + 8) * in.dim;
      k.resize(room, Bf16{0xffff});
      v.resize(room, Bf16{0xffff});
      const size_t at_compact = (g * Size(in.compact) + Size(at.compact_row)) * in.dim;
      EXPECT_TRUE(SameBits(&got.compact_k[at_compact], k.data(), room)) << "compact keys " << g;
      EXPECT_TRUE(SameBits(&got.compact_v[at_compact], v.data(), room)) << "compact values " << g;
    }
    for (const uint8_t evict : want.decisions) num_evicted += evict;
    num_decided += static_cast<int>(want.decisions.size());
  }
  if (c.rule.source != DecisionSource::kNone && num_decided > 20 * c.num_kv_heads) {
    EXPECT_GT(num_evicted, 0);
    EXPECT_LT(num_evicted, num_decided);
  }
  const Results again = RunOnDevice(c, in, *rope);
  EXPECT_TRUE(again.rows == got.rows && again.decisions == got.decisions);
  EXPECT_TRUE(SameBits(again.q.data(), got.q.data(), got.q.size()));
  EXPECT_TRUE(SameBits(again.compact_k.data(), got.compact_k.data(), got.compact_k.size()));
}

// Needs no device.
TEST(DmsPrepareParams, RefusesWhatItCannotDo) {
  alignas(256) static uint8_t memory[256];
  auto* values = reinterpret_cast<Bf16*>(memory);
  auto* floats = reinterpret_cast<float*>(memory);
  const DmsPrepareParams good{.batch = ValidPrefillBatch(memory),
                              .q = values,
                              .k = values,
                              .v = values,
                              .q_stride = 640,
                              .kv_stride = 640,
                              .positions = reinterpret_cast<int32_t*>(memory),
                              .rope_cos = floats,
                              .rope_sin = floats,
                              .q_out = values,
                              .q_out_stride = 640};
  ASSERT_TRUE(ValidateDmsPrepare(good).ok()) << ValidateDmsPrepare(good);
  const auto code = [&](auto change) {
    DmsPrepareParams params = good;
    change(params);
    return ValidateDmsPrepare(params).code();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& p) { p.batch.head_dim = 96; }), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code([](auto& p) { p.batch.group = 17; }), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code([](auto& p) { p.q_stride = 644; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.q_stride = 376; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.kv_stride = 120; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.q_out_stride = 648; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.k = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.v = p.v + 1; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.positions = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& p) { p.rows = reinterpret_cast<uint8_t*>(2); }), invalid);
  EXPECT_EQ(code([](auto& p) {
              p.rule.source = DecisionSource::kLogits;
              p.decisions = memory;
            }),
            invalid);
  // A batch whose bands are all empty has nothing to launch.
  DmsPrepareParams empty = good;
  empty.batch.max_band = 0;
  EXPECT_TRUE(LaunchDmsPrepare(empty, nullptr).ok()) << LaunchDmsPrepare(empty, nullptr);

  // sm_89 gives a block 101,376 bytes, sm_80 166,912.
  DmsPrepareParams wide = good;
  wide.batch.head_dim = 128;
  wide.batch.group = 11;
  EXPECT_TRUE(CheckDmsPrepareSharedBytes(wide, 101376).ok());
  wide.batch.group = 12;
  EXPECT_EQ(CheckDmsPrepareSharedBytes(wide, 101376),
            absl::UnimplementedError("dms_prepare: group=12 needs 108032 bytes of shared memory a "
                                     "block, and the device has 101376"));
  wide.batch.group = 16;
  EXPECT_TRUE(CheckDmsPrepareSharedBytes(wide, 166912).ok());
}

std::vector<PrepareCase> Cases() {
  std::vector<PrepareCase> cases;
  for (const KvFormat& format : kKvFormats) {
    for (const int dim : {64, 128}) {
      cases.push_back({.name = std::string(format.name) + "_d" + std::to_string(dim),
                       .format = format.id,
                       .head_dim = dim});
    }
  }
  for (const int group : {1, 2, 3, 8, 16}) {
    cases.push_back({.name = "group" + std::to_string(group),
                     .group = group,
                     .num_kv_heads = group == 3 ? 3 : 1});
  }
  cases.push_back({.name = "one_token", .sequences = {{0, 1}}});
  cases.push_back({.name = "many_heads", .sequences = {{0, 31}, {2, 5}}, .num_kv_heads = 8});
  cases.push_back({.name = "llama_shift0",
                   .head_dim = 64,
                   .window = 40,
                   .shift = 0,
                   .rule = {.source = DecisionSource::kBorrowedBeforeQNorm,
                            .zeroing = ChannelZeroing::kBeforeAndAfterRope,
                            .scale = 3.0f,
                            .offset = 0.5f},
                   .norm = false,
                   .in_place = true});
  cases.push_back({.name = "before_norm",
                   .rule = {.source = DecisionSource::kBorrowedBeforeQNorm,
                            .zeroing = ChannelZeroing::kBeforeRope,
                            .scale = 1.0f,
                            .offset = 0.1f}});
  cases.push_back({.name = "per_layer_zeroed_unrounded",
                   .group = 3,
                   .num_kv_heads = 3,
                   .rule = {.source = DecisionSource::kBorrowedAfterQNorm,
                            .zeroing = ChannelZeroing::kBeforeRope,
                            .scale = 1.0f,
                            .offset = 0.0f,
                            .per_layer = true,
                            .round_to_bf16 = false},
                   .in_place = true});
  cases.push_back({.name = "logits",
                   .head_dim = 64,
                   .group = 1,
                   .window = 1,
                   .rule = {.source = DecisionSource::kLogits, .scale = 1.0f, .offset = 0.2f}});
  cases.push_back(
      {.name = "logits_per_layer",
       .rule = {
           .source = DecisionSource::kLogits, .scale = 1.0f, .offset = 0.2f, .per_layer = true}});
  cases.push_back({.name = "keep_all", .rule = {.source = DecisionSource::kNone}});
  return cases;
}

std::vector<PrepareCase> RandomCases() {
  RandomShapes shapes(2);
  std::vector<PrepareCase> cases;
  for (int i = 0; i < 30; ++i) {
    PrepareCase c{.name = "number_" + std::to_string(i),
                  .sequences = {},
                  .format = shapes.Format(),
                  .head_dim = shapes.HeadDim(),
                  .group = shapes.In(1, 16),
                  .num_kv_heads = shapes.In(1, 8),
                  .window = shapes.Window(),
                  .shift = shapes.In(0, 1),
                  .rule = shapes.Rule(),
                  .norm = !shapes.OneIn(4),
                  .in_place = shapes.OneIn(3)};
    for (int n = shapes.In(1, 6); n > 0; --n) {
      const int prefix = shapes.OneIn(2) ? 0 : shapes.In(1, std::min(c.window + 1, 300));
      c.sequences.push_back({prefix, shapes.OneIn(8) ? 0 : shapes.Log(1, 260)});
    }
    c.sequences[0].chunk = std::max(c.sequences[0].chunk, 1);  // not all may be empty
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, DmsPrepareGpu, testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(Random, DmsPrepareGpu, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
