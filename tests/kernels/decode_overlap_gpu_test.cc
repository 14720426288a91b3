// LaunchCompactDecodeAttention that starts while the kernel before it still writes: the bits are
// those of a launch that waits. The kernel before it is LaunchDecodePrepare, as in a decode step,
// and one that writes what decode_prepare would, but long after the attention may start.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>

#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/cuda/decode_prepare.h"
#include "kernels/cuda/decode_step.h"
#include "kernels/rope.h"
#include "tests/kernels/decode_plan_memory.h"
#include "tests/kernels/device_span_case.h"
#include "tests/kernels/late_writer.h"

namespace winnow::kernels {
namespace {

struct OverlapCase {
  std::string name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, window = 40, shift = 1;
  int num_sequences = 64, max_pages = 4;  // of survivors
  uint32_t seed = 1;

  friend void PrintTo(const OverlapCase& c, std::ostream* os) { *os << c.name; }
};

// 64 sequences are about as many rows as an H200 holds blocks: nearly every span's first pages
// are read early. Two and six are shared by clusters of eight and four blocks.
constexpr int kLayers = 4, kHeads = 4, kGroup = 4;
constexpr int kSteps = 45;     // more than a page's slots, and than most windows
constexpr int kDelayUs = 200;  // a launch takes some 5

// A third of the spans have rings that fill up during the steps, the others full ones, which
// start anywhere, and survivors around whole pages. A sequence's spans are alike in a layer only
// in whether the ring is full, as all have seen the same tokens.
std::vector<SpanLength> Lengths(const OverlapCase& c) {
  const int slots = SlotsPerPage(c.format, c.head_dim);
  std::mt19937 rng(c.seed);
  const auto below = [&](int n) { return static_cast<int>(rng() % static_cast<uint32_t>(n)); };
  std::vector<SpanLength> lengths(static_cast<size_t>(kLayers * c.num_sequences * kHeads));
  for (int s = 0; s < c.num_sequences; ++s) {
    const bool fills = s % 3 == 0;
    const int ring = fills ? std::max(c.window - 1 - below(kSteps), 0) : c.window;
    for (int l = 0; l < kLayers; ++l) {
      for (int g = 0; g < kHeads; ++g) {
        const int around = below(c.max_pages) * slots + below(3) - 1;
        lengths[static_cast<size_t>((l * c.num_sequences + s) * kHeads + g)] = {
            .survivors = fills ? 0 : std::max(around, 0), .ring = ring};
      }
    }
  }
  return lengths;
}

// A copy of an array on the device, to go back to.
template <typename T>
class Snapshot {
 public:
  explicit Snapshot(const DeviceArray<T>& of) : of_(of), copy_(of.size()) {}
  T* get() const { return copy_.get(); }
  void Take() { Copy(of_.get(), copy_.get()); }
  void Restore() { Copy(copy_.get(), of_.get()); }

 private:
  void Copy(const T* from, T* to) {
    ASSERT_EQ(cudaMemcpy(to, from, of_.size() * sizeof(T), cudaMemcpyDeviceToDevice), cudaSuccess);
  }
  const DeviceArray<T>& of_;
  DeviceArray<T> copy_;
};

class DecodeOverlapGpu : public testing::TestWithParam<OverlapCase> {
 protected:
  // Everything that a step writes and a later one reads.
  struct State {
    explicit State(const DecodeOverlapGpu& t)
        : pages(*t.spans_->pages),
          newest(*t.spans_->newest),
          flags(*t.spans_->ring_evict),
          spans(*t.spans_->state),
          survivor_pages(*t.spans_->survivor_pages),
          ring_pages(*t.spans_->ring_pages),
          num_free(*t.num_free_) {}
    void Take() {
      pages.Take();
      newest.Take();
      flags.Take();
      spans.Take();
      survivor_pages.Take();
      ring_pages.Take();
      num_free.Take();
    }
    void Restore() {
      pages.Restore();
      newest.Restore();
      flags.Restore();
      spans.Restore();
      survivor_pages.Restore();
      ring_pages.Restore();
      num_free.Restore();
    }
    Snapshot<uint8_t> pages, newest, flags;
    Snapshot<SpanState> spans;
    Snapshot<int32_t> survivor_pages, ring_pages, num_free;
  };

  void SetUp() override;
  void TearDown() override {
    if (stream_ == nullptr) return;
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
  }
  // Positions of a step, and poison where it writes.
  void Begin(int step);
  // Step, plan, and of each layer decode_prepare and attention, without a stop between.
  // `inputs` chooses the projections.
  void Enqueue(int inputs, bool overlap);
  // All of it, to the end.
  void Step(int step, bool overlap) {
    Begin(step);
    ASSERT_NO_FATAL_FAILURE(Enqueue(step, overlap));
    ASSERT_NO_FATAL_FAILURE(Synchronize());
  }
  void Attend(int layer, const float* q, float* out, bool overlap);
  float* Q(int layer) { return q_->get() + layer_size_ * static_cast<size_t>(layer); }
  float* Out(int layer) { return out_->get() + layer_size_ * static_cast<size_t>(layer); }
  void Synchronize() { ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess); }

  size_t layer_size_ = 0, row_ = 0;  // floats of q or out of a layer; of a projection row
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<DeviceSpanCase> spans_;
  std::unique_ptr<PlanMemory> plan_;
  std::unique_ptr<DeviceArray<int32_t>> free_pages_, num_free_, exhausted_, slots_, positions_;
  std::unique_ptr<DeviceArray<float>> norm_, cos_, sin_, random_, q_, out_;
};

void DecodeOverlapGpu::SetUp() {
  RequireGpu();
  if (IsSkipped() || HasFatalFailure()) return;
  const OverlapCase& c = GetParam();
  const int slots = SlotsPerPage(c.format, c.head_dim);
  // Both tables of a span grow by a page every `slots` steps at most.
  const int spare = kLayers * c.num_sequences * kHeads * 2 * (kSteps / slots + 1);
  spans_ = std::make_unique<DeviceSpanCase>(
      DeviceSpanShape{.format = c.format,
                      .head_dim = c.head_dim,
                      .window = c.window,
                      .shift = c.shift,
                      .num_layers = kLayers,
                      .num_kv_heads = kHeads,
                      .spare_pages = spare,
                      .max_survivors = c.max_pages * slots + kSteps,
                      .seed = c.seed},
      c.num_sequences, Lengths(c));
  plan_ = std::make_unique<PlanMemory>(c.num_sequences * kHeads, spans_->total_pages() + spare,
                                       kGroup, c.head_dim, kLayers);
  const size_t dim = static_cast<size_t>(c.head_dim);
  layer_size_ = static_cast<size_t>(c.num_sequences) * kHeads * kGroup * dim;
  row_ = size_t{kHeads} * (kGroup + 2) * dim;
  std::mt19937 rng(c.seed + 1);
  std::normal_distribution<float> normal;
  std::vector<float> random(static_cast<size_t>(c.num_sequences) * row_ + kSteps * kLayers * 4);
  for (float& x : random) x = normal(rng);
  std::vector<int32_t> all(static_cast<size_t>(c.num_sequences));
  for (int s = 0; s < c.num_sequences; ++s) all[static_cast<size_t>(s)] = c.num_sequences - 1 - s;
  const absl::StatusOr<RopeTable> rope = BuildRopeTable(c.head_dim, kSteps, 10000.0f);
  ASSERT_TRUE(rope.ok());
  const auto ints = [](const std::vector<int32_t>& x) {
    return std::make_unique<DeviceArray<int32_t>>(x);
  };
  const auto floats = [](const std::vector<float>& x) {
    return std::make_unique<DeviceArray<float>>(x);
  };
  free_pages_ = ints(spans_->spare_pages());
  num_free_ = ints({spare});
  exhausted_ = ints({0});
  slots_ = ints(all);
  positions_ = ints(std::vector<int32_t>(all.size(), 0));
  norm_ = floats(std::vector<float>(dim, 1.1f));
  cos_ = floats(rope->cos);
  sin_ = floats(rope->sin);
  random_ = floats(random);
  q_ = std::make_unique<DeviceArray<float>>(layer_size_ * kLayers);
  out_ = std::make_unique<DeviceArray<float>>(layer_size_ * kLayers);
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
}

void DecodeOverlapGpu::Attend(int layer, const float* q, float* out, bool overlap) {
  const absl::Status status = LaunchCompactDecodeAttention(
      {.spans = spans_->device(),
       .plan = plan_->plan(),
       .layer = layer,
       .q = q,
       .out_f32 = out,
       .num_seqs = GetParam().num_sequences,
       .num_heads = kHeads * kGroup,
       .scale = 1.0f / std::sqrt(static_cast<float>(GetParam().head_dim)),
       .overlap_launch = overlap},
      stream_);
  ASSERT_TRUE(status.ok()) << status;
}

void DecodeOverlapGpu::Begin(int step) {
  positions_->Set(std::vector<int32_t>(static_cast<size_t>(GetParam().num_sequences), step));
  q_->Fill(0xff);
  out_->Fill(0xff);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

void DecodeOverlapGpu::Enqueue(int inputs, bool overlap) {
  const OverlapCase& c = GetParam();
  const DeviceSpans spans = spans_->device();
  absl::Status status =
      LaunchDecodeStep({.spans = spans,
                        .pool = {free_pages_->get(), num_free_->get(), exhausted_->get()},
                        .slots = slots_->get(),
                        .num_seqs = GetParam().num_sequences},
                       stream_);
  ASSERT_TRUE(status.ok()) << status;
  status = LaunchDecodePlan({.spans = spans,
                             .slots = slots_->get(),
                             .num_seqs = GetParam().num_sequences,
                             .plan = plan_->plan()},
                            stream_);
  ASSERT_TRUE(status.ok()) << status;
  const int64_t stride = static_cast<int64_t>(row_);
  for (int l = 0; l < kLayers; ++l) {
    const float* qkv = random_->get() + 4 * (inputs * kLayers + l);
    const float* k = qkv + size_t{kHeads} * kGroup * static_cast<size_t>(c.head_dim);
    status =
        LaunchDecodePrepare({.compact = {.q = qkv,
                                         .k = k,
                                         .v = k + kHeads * c.head_dim,
                                         .q_stride = stride,
                                         .k_stride = stride,
                                         .v_stride = stride,
                                         .q_norm = norm_->get(),
                                         .k_norm = norm_->get(),
                                         .positions = positions_->get(),
                                         .rope_cos = cos_->get(),
                                         .rope_sin = sin_->get(),
                                         .num_positions = kSteps,
                                         .rule = {.source = DecisionSource::kBorrowedAfterQNorm,
                                                  .scale = 1.0f,
                                                  .offset = 0.1f},
                                         .format = c.format,
                                         .q_out = Q(l),
                                         .num_tokens = GetParam().num_sequences,
                                         .num_heads = kHeads * kGroup,
                                         .num_kv_heads = kHeads,
                                         .head_dim = c.head_dim},
                             .spans = spans,
                             .slots = slots_->get(),
                             .layer = l},
                            stream_);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_NO_FATAL_FAILURE(Attend(l, Q(l), Out(l), overlap));
  }
}

bool AllFinite(const std::vector<float>& x) {
  return std::all_of(x.begin(), x.end(), [](float value) { return std::isfinite(value); });
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Pages that nobody held are NaN, so a page just taken is until its token is in it; the newest
// rows and full rings have the step's before, which decode_prepare moves from there.
TEST_P(DecodeOverlapGpu, AfterPrepareHasTheBitsOfALaunchThatWaits) {
  State before(*this);
  for (int step = 0; step < kSteps; ++step) {
    before.Take();
    ASSERT_NO_FATAL_FAILURE(Step(step, /*overlap=*/false));
    const std::vector<float> want = out_->Get();
    ASSERT_TRUE(AllFinite(want)) << "step " << step;
    for (int again = 0; again < 5; ++again) {
      before.Restore();
      ASSERT_NO_FATAL_FAILURE(Step(step, /*overlap=*/true));
      ASSERT_TRUE(SameBits(out_->Get(), want)) << "step " << step << " run " << again;
    }
  }
  EXPECT_EQ(exhausted_->Get()[0], 0);
  EXPECT_EQ(plan_->overflow.Get()[0], 0);
}

// One graph, captured before the first step, serves all of them: it reads every length, page and
// position on the device.
TEST_P(DecodeOverlapGpu, AGraphServesStepsOfAllLengths) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  Enqueue(/*inputs=*/0, /*overlap=*/true);
  ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  State before(*this);
  std::vector<float> last;
  for (int step = 0; step < kSteps && !HasFailure(); ++step) {
    before.Take();
    Begin(step);
    Enqueue(/*inputs=*/0, /*overlap=*/false);
    Synchronize();
    const std::vector<float> want = out_->Get();
    EXPECT_TRUE(AllFinite(want)) << "step " << step;
    EXPECT_FALSE(SameBits(want, last)) << "step " << step;  // a token more is seen
    before.Restore();
    Begin(step);
    EXPECT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
    Synchronize();
    EXPECT_TRUE(SameBits(out_->Get(), want)) << "step " << step;
    last = want;
  }
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(exhausted_->Get()[0], 0);
}

// What decode_prepare writes, NaN until kDelayUs after the attention could start.
TEST_P(DecodeOverlapGpu, NothingThatTheStepWritesIsReadEarly) {
  State before(*this);
  Snapshot<uint8_t> pages(*spans_->pages), newest(*spans_->newest);
  Snapshot<float> q(*q_);
  const auto words = [](const auto& live, const auto& wanted) {
    return WordPair{reinterpret_cast<uint32_t*>(live.get()),
                    reinterpret_cast<const uint32_t*>(wanted.get()),
                    static_cast<int64_t>(live.size() * sizeof(*live.get()) / 4)};
  };
  const WordPair page_words = words(*spans_->pages, pages);
  const WordPair newest_words = words(*spans_->newest, newest);
  for (int step = 0; step < kSteps; ++step) {
    before.Take();
    ASSERT_NO_FATAL_FAILURE(Step(step, /*overlap=*/false));
    const std::vector<float> want = out_->Get();
    ASSERT_TRUE(AllFinite(want)) << "step " << step;
    pages.Take();
    newest.Take();
    q.Take();
    out_->Fill(0xff);
    for (int l = 0; l < kLayers; ++l) {
      // Counters, tables and plan stay those of the step.
      before.pages.Restore();
      before.newest.Restore();
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      ASSERT_TRUE(LaunchPoisonDifferences(page_words, stream_).ok());
      ASSERT_TRUE(LaunchPoisonDifferences(newest_words, stream_).ok());
      ASSERT_TRUE(LaunchLateWriter(page_words, newest_words, kDelayUs, stream_).ok());
      ASSERT_NO_FATAL_FAILURE(Attend(l, Q(l), Out(l), /*overlap=*/true));
      ASSERT_NO_FATAL_FAILURE(Synchronize());
    }
    ASSERT_TRUE(SameBits(out_->Get(), want)) << "step " << step;
    // The queries too are the kernel's before.
    q_->Fill(0xff);
    out_->Fill(0xff);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_TRUE(LaunchLateWriter(words(*q_, q), newest_words, kDelayUs, stream_).ok());
    ASSERT_NO_FATAL_FAILURE(Attend(0, Q(0), Out(0), /*overlap=*/true));
    ASSERT_NO_FATAL_FAILURE(Synchronize());
    const std::vector<float> got = out_->Get();
    ASSERT_EQ(std::memcmp(got.data(), want.data(), layer_size_ * sizeof(float)), 0)
        << "queries at step " << step;
  }
}

// The test above can fail: with all pages written late, pages that the step does not write
// are read before that, and without overlap_launch none is.
TEST_P(DecodeOverlapGpu, EarlyReadsAreSeen) {
  int device = 0, major = 0;
  ASSERT_EQ(cudaGetDevice(&device), cudaSuccess);
  ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), cudaSuccess);
  ASSERT_NO_FATAL_FAILURE(Step(0, /*overlap=*/false));
  const std::vector<float> want = out_->Get();
  Snapshot<uint8_t> pages(*spans_->pages), newest(*spans_->newest);
  pages.Take();
  newest.Take();
  const auto words = [](const DeviceArray<uint8_t>& live, const Snapshot<uint8_t>& wanted) {
    return WordPair{reinterpret_cast<uint32_t*>(live.get()),
                    reinterpret_cast<const uint32_t*>(wanted.get()),
                    static_cast<int64_t>(live.size() / 4)};
  };
  for (const bool overlap : {false, true}) {
    out_->Fill(0xff);
    for (int l = 0; l < kLayers; ++l) {
      spans_->pages->Fill(0xff);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      ASSERT_TRUE(LaunchLateWriter(words(*spans_->pages, pages), words(*spans_->newest, newest),
                                   kDelayUs, stream_)
                      .ok());
      ASSERT_NO_FATAL_FAILURE(Attend(l, Q(l), Out(l), overlap));
      ASSERT_NO_FATAL_FAILURE(Synchronize());
    }
    if (overlap && major != 9) return;  // only sm_90a's code can start early
    EXPECT_EQ(SameBits(out_->Get(), want), !overlap);
  }
}

std::vector<OverlapCase> Cases() {
  std::vector<OverlapCase> cases;
  for (const uint32_t seed : {1u, 2u, 3u}) {
    cases.push_back({.name = "fp8_d128_seed" + std::to_string(seed), .seed = seed});
  }
  cases.push_back({.name = "fp8_d64", .head_dim = 64, .seed = 4});
  cases.push_back({.name = "bf16_d128", .format = KvFormatId::kBf16, .seed = 5});
  cases.push_back({.name = "bf16_d64", .format = KvFormatId::kBf16, .head_dim = 64, .seed = 6});
  cases.push_back({.name = "int8h_d64", .format = KvFormatId::kInt8H, .head_dim = 64, .seed = 7});
  cases.push_back({.name = "k8v8_d128", .format = KvFormatId::kK8V8, .seed = 8});
  cases.push_back({.name = "whole_pages", .window = 64, .shift = 0, .seed = 9});
  cases.push_back({.name = "w1", .window = 1, .seed = 10});
  cases.push_back({.name = "w33", .head_dim = 64, .window = 33, .seed = 11});
  cases.push_back({.name = "shared_by_8", .num_sequences = 2, .max_pages = 24, .seed = 12});
  cases.push_back(
      {.name = "shared_by_4", .head_dim = 64, .num_sequences = 6, .max_pages = 24, .seed = 13});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, DecodeOverlapGpu, testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
