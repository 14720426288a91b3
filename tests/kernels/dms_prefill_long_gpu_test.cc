// The sparse prefill of very many rows: what the other tests hold against the CPU is too long for
// it here. Some rows of long sequences against attention in double, and tensors of more than 2^31
// elements.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/dms_prefill.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/dms_prefill_case.h"

namespace winnow::kernels {
namespace {

// Device memory of which the host sees parts alone.
template <typename T>
class Tensor {
 public:
  explicit Tensor(size_t size) { EXPECT_EQ(cudaMalloc(&data_, size * sizeof(T)), cudaSuccess); }
  ~Tensor() { cudaFree(data_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  T* get() const { return data_; }
  void Put(size_t at, const std::vector<T>& x) {
    EXPECT_EQ(cudaMemcpy(data_ + at, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  std::vector<T> Get(size_t at, size_t n) const {
    std::vector<T> x(n);
    EXPECT_EQ(cudaMemcpy(x.data(), data_ + at, n * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return x;
  }

 private:
  T* data_ = nullptr;
};

struct Result {
  std::vector<Bf16> out, band_k, last_head;  // last_head: its compact keys
  std::vector<uint8_t> rows;
  bool operator==(const Result&) const = default;
};

float Scale(const PrefillCase& c) { return 1.0f / std::sqrt(static_cast<float>(c.head_dim)); }

// Both ops on one sequence without a prefix, at these rows of the tensors.
Result RunAt(const PrefillCase& c, const PrefillInputs& in, const DmsPrefillSequence& at,
             bool portable) {
  const size_t heads = Size(c.kv_heads), dim = Size(c.head_dim), kv = heads * dim;
  const size_t width = Size(c.group) * kv, row_bytes = heads * TokenBytes(c.format, c.head_dim);
  const size_t tokens = Size(at.num_tokens), row = Size(at.row);
  const int rows = at.row + at.num_tokens, compact_rows = at.compact_row + at.num_tokens + 8;
  const int band_rows = std::max(at.band_row + at.num_tokens, rows);
  Tensor<Bf16> q(Size(rows) * width), out(Size(rows) * width), k(Size(rows) * kv),
      v(Size(rows) * kv), band_k(Size(band_rows) * kv), band_v(Size(band_rows) * kv),
      compact_k(Size(compact_rows) * kv), compact_v(Size(compact_rows) * kv);
  Tensor<uint8_t> decisions(Size(rows) * heads), flat(Size(rows) * row_bytes);
  q.Put(row * width, in.q);
  k.Put(row * kv, in.k);
  v.Put(row * kv, in.v);
  decisions.Put(row * heads, in.decisions);
  Tensor<DmsPrefillSequence> sequences(1);
  sequences.Put(0, {at});
  DmsPrefillBatch batch{.sequences = sequences.get(),
                        .band_k = band_k.get(),
                        .band_v = band_v.get(),
                        .compact_k = compact_k.get(),
                        .compact_v = compact_v.get(),
                        .batch = 1,
                        .num_kv_heads = c.kv_heads,
                        .group = c.group,
                        .head_dim = c.head_dim,
                        .window = c.window,
                        .shift = c.shift,
                        .num_rows = rows,
                        .band_rows = band_rows,
                        .compact_rows = compact_rows,
                        .max_band = at.num_tokens};
  const Tensor<uint8_t> scratch(DmsPrefillScratchBytes(batch));
  batch.scratch = scratch.get();
  absl::Status status = LaunchDmsPrefillCompact({.batch = batch,
                                                 .format = c.format,
                                                 .k = k.get(),
                                                 .v = v.get(),
                                                 .kv_stride = static_cast<int64_t>(kv),
                                                 .decisions = decisions.get(),
                                                 .rows = flat.get()},
                                                nullptr);
  EXPECT_TRUE(status.ok()) << status;
  status = LaunchDmsPrefillAttention({.batch = batch,
                                      .q = q.get(),
                                      .q_stride = static_cast<int64_t>(width),
                                      .out = out.get(),
                                      .scale = Scale(c),
                                      .portable = portable},
                                     nullptr);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  const size_t last = (heads - 1) * Size(compact_rows) + Size(at.compact_row);
  return {.out = out.Get(row * width, tokens * width),
          .band_k = band_k.Get(Size(at.band_row) * kv, tokens * kv),
          .last_head = compact_k.Get(last * dim, 16 * dim),
          .rows = flat.Get(row * row_bytes, tokens * row_bytes)};
}

class DmsPrefillLong : public testing::TestWithParam<PrefillCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

// Of the bound of dms_prefill_gpu_test.cc, but for the sums: of the weights a thread adds every
// fourth one by one, 2^-24 each; the tensor core adds 16 keys at once, and loses up to 2^-22.
TEST_P(DmsPrefillLong, SomeRowsAreNearAttentionInDouble) {
  const PrefillCase& c = GetParam();
  const int tokens = c.sequences[0].chunk;
  const size_t dim = Size(c.head_dim), group = Size(c.group);
  const PrefillInputs in = MakePrefillInputs(c, tokens, 5);
  const Result got = RunAt(c, in, {.num_tokens = tokens}, false);
  EXPECT_TRUE(got.rows == in.rows);
  for (const Bf16 x : got.out) ASSERT_TRUE(std::isfinite(ToFloat(x)));
  const double scale{Scale(c)};
  std::vector<double> weight, k(in.stored_k.size()), v(k.size());
  std::transform(in.stored_k.begin(), in.stored_k.end(), k.begin(),
                 [](Bf16 x) { return ToFloat(x); });
  std::transform(in.stored_v.begin(), in.stored_v.end(), v.begin(),
                 [](Bf16 x) { return ToFloat(x); });
  const auto length = [dim](const auto& x, size_t at, auto value) {
    double sum = 0.0;
    for (size_t d = at; d < at + dim; ++d) sum += std::pow(double{value(x[d])}, 2);
    return std::sqrt(sum);
  };
  double longest = 0.0;
  for (size_t i = 0; i < k.size(); i += dim) {
    longest = std::max(longest, length(k, i, [](double x) { return x; }));
  }
  std::mt19937 rng(3);
  for (int n = 0; n < 40; ++n) {
    const size_t t = n == 0   ? Size(tokens - 1)
                     : n == 1 ? Size(c.window)
                     : n == 2 ? Size(c.window + 1)
                              : rng() % Size(tokens);
    const size_t at = (t * group + rng() % group) * dim;
    const double score_error =
        static_cast<double>(dim) * 0x1p-23 * scale * length(in.q, at, ToFloat) * longest;
    double largest = -INFINITY, sum = 0.0, keys = 0.0;
    weight.assign(t + 1, -INFINITY);
    for (size_t j = 0; j <= t; ++j) {
      const size_t own = j + Size(c.shift);
      if (t - j > Size(c.window) && own < Size(tokens) && in.decisions[own] != 0) continue;
      weight[j] = 0.0;
      for (size_t d = 0; d < dim; ++d) weight[j] += double{ToFloat(in.q[at + d])} * k[j * dim + d];
      weight[j] *= scale;
      largest = std::max(largest, weight[j]);
      ++keys;
    }
    for (double& w : weight) sum += w = std::exp(w - largest);
    const double relative =
        0x1p-8 + 2.0 * score_error + keys * (0x1p-24 / 4 + 0x1p-22 / 16) + 0x1p-20;
    for (size_t d = 0; d < dim; ++d) {
      double want = 0.0, carried = 0.0;
      for (size_t j = 0; j <= t; ++j) {
        want += weight[j] * v[j * dim + d] / sum;
        carried += weight[j] * std::fabs(v[j * dim + d]) / sum;
      }
      ASSERT_NEAR(ToFloat(got.out[at + d]), want, relative * carried + 0x1p-8 * std::fabs(want))
          << "token " << t << " channel " << d;
    }
  }
}

const PrefillCase kLong[] = {
    {.name = "d128_131072", .sequences = {{0, 131072}}, .kv_heads = 1},
    {.name = "d64_100003", .sequences = {{0, 100003}}, .head_dim = 64, .kv_heads = 1, .group = 3},
    {.name = "keep_all_33333",
     .sequences = {{0, 33333}},
     .kv_heads = 1,
     .group = 1,
     .window = 1,
     .evict_rate = 0.0},
};

INSTANTIATE_TEST_SUITE_P(All, DmsPrefillLong, testing::ValuesIn(kLong),
                         [](const auto& c) { return c.param.name; });

// Queries and outputs, the band, the survivors: 2.2 * 2^30 elements each before the sequence.
TEST(DmsPrefillFar, BitsDoNotDependOnThePlace) {
  RequireGpu();
  if (testing::Test::IsSkipped() || testing::Test::HasFatalFailure()) return;
  struct Place {
    int head_dim, kv_heads, group;
    DmsPrefillSequence at;
  };
  constexpr int kTokens = 333, kFar = 1'150'000;
  for (const Place& p : {Place{128, 1, 16, {.row = kFar, .num_tokens = kTokens}},
                         Place{64, 2, 16, {.row = kFar, .num_tokens = kTokens, .band_row = kFar}},
                         Place{128, 8, 2, {.num_tokens = kTokens, .band_row = 2 * kFar}},
                         Place{64, 16, 1, {.num_tokens = kTokens, .compact_row = 2 * kFar}}}) {
    const PrefillCase c{
        .head_dim = p.head_dim, .kv_heads = p.kv_heads, .group = p.group, .window = 40};
    const PrefillInputs in = MakePrefillInputs(c, kTokens, 5);
    for (const bool portable : {true, false}) {
      EXPECT_TRUE(RunAt(c, in, p.at, portable) == RunAt(c, in, {.num_tokens = kTokens}, portable))
          << "row " << p.at.row << " band " << p.at.band_row << " compact " << p.at.compact_row;
    }
  }
}

}  // namespace
}  // namespace winnow::kernels
