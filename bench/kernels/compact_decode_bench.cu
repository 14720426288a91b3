// Decode attention over spans in device memory: prints one JSON line a case, times in
// microseconds, and the share of this run's own read stream. Every case is a CUDA graph of
// several layers with KV of their own, which the L2 cache does not hold when it begins.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/kernels/bench_memory.cuh"
#include "bench/kernels/fill_random.cuh"
#include "bench/kernels/read_stream.cuh"
#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/cuda/decode_plan.h"
#include "kernels/cuda/decode_prepare.h"
#include "kernels/cuda/decode_step.h"

namespace winnow::kernels {
namespace {

// Random codes, none of them NaN, and scales of 2^-7 or so in the last 4 * slots bytes of
// each `stride`.
__global__ void FillTokens(uint8_t* out, int64_t n, int stride, int scale_offset) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    const int at = static_cast<int>(i % stride);
    const uint32_t r = Mix(static_cast<uint64_t>(i));
    out[i] = at < scale_offset ? (r & 0x7f) > 0x7e ? r & 0xfe : r & 0xff
             : at % 2 == 0     ? r & 0xff
                               : 0x20;
  }
}

__global__ void FillFloats(float* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    const float a = Mix(2 * i) * 0x1p-32f, b = Mix(2 * i + 1) * 0x1p-32f;
    out[i] = 2.0f * sqrtf(-2.0f * logf(a + 1e-7f)) * cospif(2.0f * b);
  }
}

struct BenchCase {
  std::string name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, num_seqs = 1, num_kv_heads = 8, group = 4, window = 256, layers = 36;
  std::vector<int> survivors;  // of each head
  bool with_plan = true;       // in the time
};

struct Result {
  double us = 0, plan_us = 0, overlapped_us = 0;  // a layer; plan: a step
  double bytes = 0;                               // a layer
};

Result RunCase(const BenchCase& c, cudaStream_t stream) {
  const int slots = SlotsPerPage(c.format, c.head_dim);
  const auto pages_of = [slots](int n) { return (n + slots - 1) / slots; };
  DeviceSpans spans{.format = c.format,
                    .head_dim = c.head_dim,
                    .window = c.window,
                    .num_layers = c.layers,
                    .max_sequences = c.num_seqs,
                    .num_kv_heads = c.num_kv_heads};
  const int64_t num_spans = spans.num_spans();
  const int ring_per_span = spans.ring_pages_per_span();
  int max_survivors = 0;
  for (const int n : c.survivors) max_survivors = std::max(max_survivors, n);
  spans.max_survivor_pages = (pages_of(max_survivors) + 7) / 4 * 4;
  Result result;
  int64_t num_pages = 0;
  std::vector<SpanState> states;
  for (int64_t i = 0; i < num_spans; ++i) {
    const int n = c.survivors[static_cast<size_t>(i % c.num_kv_heads)];
    states.push_back({n, c.window, 0, n + c.window + 1});
    num_pages += pages_of(n) + ring_per_span;
    result.bytes += (n + c.window + 1) * static_cast<double>(TokenBytes(c.format, c.head_dim));
  }
  result.bytes /= c.layers;
  std::vector<int32_t> free(static_cast<size_t>(num_pages));
  std::iota(free.begin(), free.end(), 0);
  std::shuffle(free.begin(), free.end(), std::mt19937(1));
  std::vector<int32_t> survivor_pages(static_cast<size_t>(num_spans * spans.max_survivor_pages),
                                      -1);
  std::vector<int32_t> ring_pages(static_cast<size_t>(num_spans * ring_per_span));
  for (int64_t i = 0; i < num_spans; ++i) {
    const int n = pages_of(states[static_cast<size_t>(i)].num_survivors);
    for (int j = 0; j < n + ring_per_span; ++j) {
      (j < n ? survivor_pages[static_cast<size_t>(i * spans.max_survivor_pages + j)]
             : ring_pages[static_cast<size_t>(i * ring_per_span + j - n)]) = free.back();
      free.pop_back();
    }
  }
  const int page_bytes = static_cast<int>(PageBytes(c.head_dim));
  DeviceBuffer<uint8_t> pages(static_cast<size_t>(num_pages) * static_cast<size_t>(page_bytes));
  DeviceBuffer<uint8_t> newest(static_cast<size_t>(num_spans * spans.newest_stride()));
  const int scales = static_cast<int>(KvScaleBytes(KvFormatOf(c.format).k));
  FillTokens<<<2048, 256, 0, stream>>>(pages.get(), num_pages * page_bytes, page_bytes,
                                       page_bytes - 2 * scales * slots);
  FillTokens<<<2048, 256, 0, stream>>>(
      newest.get(), num_spans * spans.newest_stride(), static_cast<int>(spans.newest_stride()),
      static_cast<int>(TokenBytes(c.format, c.head_dim)) - 2 * scales);
  DeviceBuffer<SpanState> state(states);
  DeviceBuffer<int32_t> device_survivors(survivor_pages), device_ring(ring_pages);
  spans.pages = pages.get();
  spans.state = state.get();
  spans.survivor_pages = device_survivors.get();
  spans.ring_pages = device_ring.get();
  spans.newest = newest.get();
  DeviceBuffer<uint8_t> evict(static_cast<size_t>(num_spans * spans.evict_stride()));
  spans.ring_evict = evict.get();

  const int rows = c.num_seqs * c.num_kv_heads;
  const int64_t max_pieces = MaxDecodePieces(rows, num_pages / c.layers);
  const size_t layers = static_cast<size_t>(c.layers), size = static_cast<size_t>(max_pieces);
  const size_t group = static_cast<size_t>(c.group);
  DeviceBuffer<DecodePiece> pieces(layers * size);
  DeviceBuffer<int32_t> counts(layers), next(2 * layers), arrivals(static_cast<size_t>(rows));
  DeviceBuffer<float> partial(size * group * static_cast<size_t>(c.head_dim)),
      norms(size * group * 2);
  Check(cudaMemset(next.get(), 0, 2 * layers * 4));
  Check(cudaMemset(arrivals.get(), 0, static_cast<size_t>(rows) * 4));
  DeviceBuffer<int32_t> overflow(std::vector<int32_t>{0});
  const DecodePlan plan{.pieces = pieces.get(),
                        .num_pieces = counts.get(),
                        .next_piece = next.get(),
                        .arrivals = arrivals.get(),
                        .partial_out = partial.get(),
                        .partial_norm = norms.get(),
                        .max_pieces = static_cast<int>(max_pieces),
                        .overflow = overflow.get()};
  std::vector<int32_t> slot_of(static_cast<size_t>(c.num_seqs));
  std::iota(slot_of.begin(), slot_of.end(), 0);
  DeviceBuffer<int32_t> device_slots(slot_of);
  const int64_t q_size = static_cast<int64_t>(rows) * c.group * c.head_dim;
  DeviceBuffer<float> q(static_cast<size_t>(q_size));
  DeviceBuffer<Bf16> out(static_cast<size_t>(q_size));
  FillFloats<<<256, 256, 0, stream>>>(q.get(), q_size);
  Check(cudaGetLastError());

  const auto enqueue_plan = [&] {
    Check(LaunchDecodePlan(
        {.spans = spans, .slots = device_slots.get(), .num_seqs = c.num_seqs, .plan = plan},
        stream));
  };
  const auto enqueue_layers = [&](bool overlap) {
    for (int layer = 0; layer < c.layers; ++layer) {
      Check(LaunchCompactDecodeAttention({.spans = spans,
                                          .plan = plan,
                                          .layer = layer,
                                          .q = q.get(),
                                          .out_bf16 = out.get(),
                                          .num_seqs = c.num_seqs,
                                          .num_heads = c.num_kv_heads * c.group,
                                          .scale = 0.088f,
                                          .overlap_launch = overlap && layer > 0},
                                         stream));
    }
  };
  BenchTimer timer(15, stream);
  result.plan_us = timer.GraphMedian([&] {
    for (int i = 0; i < 8; ++i) enqueue_plan();
  }) / 8;
  result.us = timer.GraphMedian([&] {
    if (c.with_plan) enqueue_plan();
    enqueue_layers(false);
  }) / c.layers;
  result.overlapped_us = timer.GraphMedian([&] {
    if (c.with_plan) enqueue_plan();
    enqueue_layers(true);
  }) / c.layers;
  Check(cudaStreamSynchronize(stream));
  return result;
}

// The plan of a step of 36 layers and 128 sequences of 8K; pages are not needed for it.
double PlanUs(cudaStream_t stream) {
  constexpr int kLayers = 36, kSeqs = 128, kHeads = 8, kSurvivors = 991, kWindow = 256;
  DeviceSpans spans{
      .window = kWindow, .num_layers = kLayers, .max_sequences = kSeqs, .num_kv_heads = kHeads};
  spans.head_dim = 128;
  const int slots = spans.slots_per_page();
  spans.max_survivor_pages = (kSurvivors / slots + 4) / 4 * 4;
  DeviceBuffer<SpanState> state(std::vector<SpanState>(static_cast<size_t>(spans.num_spans()),
                                                       {kSurvivors, kWindow, 7, 8192}));
  DeviceBuffer<int32_t> tables(1), slot_of(kSeqs), counts(kLayers);
  DeviceBuffer<uint8_t> bytes(1);
  spans.state = state.get();
  spans.survivor_pages = spans.ring_pages = tables.get();
  spans.pages = spans.newest = spans.ring_evict = bytes.get();
  std::vector<int32_t> ids(kSeqs);
  std::iota(ids.begin(), ids.end(), 0);
  Check(cudaMemcpy(slot_of.get(), ids.data(), kSeqs * 4, cudaMemcpyHostToDevice));
  const int64_t max_pieces =
      MaxDecodePieces(kSeqs * kHeads, int64_t{kSeqs} * kHeads *
                                          (spans.max_survivor_pages + spans.ring_pages_per_span()));
  DeviceBuffer<DecodePiece> pieces(static_cast<size_t>(kLayers * max_pieces));
  DeviceBuffer<int32_t> overflow(std::vector<int32_t>{0});
  const DecodePlanParams params{.spans = spans,
                                .slots = slot_of.get(),
                                .num_seqs = kSeqs,
                                .plan = {.pieces = pieces.get(),
                                         .num_pieces = counts.get(),
                                         .max_pieces = static_cast<int>(max_pieces),
                                         .overflow = overflow.get()}};
  constexpr int kTimes = 8;
  return BenchTimer(9, stream).Median([&] {
    for (int i = 0; i < kTimes; ++i) Check(LaunchDecodePlan(params, stream));
  }) / kTimes;
}

// The memory side of a step of 64 sequences of Qwen3-8B's shape, and one layer's
// decode_prepare: microseconds of one launch each.
void RunPrepare(cudaStream_t stream) {
  constexpr int kLayers = 36, kSeqs = 64, kHeads = 32, kKvHeads = 8, kDim = 128, kWindow = 256;
  constexpr int kSurvivors = 991, kSteps = 60;  // every span fills a page in the second step
  DeviceSpans spans{.head_dim = kDim,
                    .window = kWindow,
                    .num_layers = kLayers,
                    .max_sequences = kSeqs,
                    .num_kv_heads = kKvHeads};
  const int slots = spans.slots_per_page(), ring = spans.ring_pages_per_span();
  const int pages = (kSurvivors + slots - 1) / slots;
  spans.max_survivor_pages = (pages + kSteps / slots + 4) / 4 * 4;
  const size_t n = static_cast<size_t>(spans.num_spans());
  const size_t total = n * static_cast<size_t>(pages + ring + kSteps / slots + 1);
  std::vector<int32_t> free(total);
  std::iota(free.begin(), free.end(), 0);
  std::shuffle(free.begin(), free.end(), std::mt19937(1));
  std::vector<int32_t> survivor_ids(n * static_cast<size_t>(spans.max_survivor_pages), -1),
      ring_ids(n * static_cast<size_t>(ring));
  for (size_t i = 0; i < n; ++i) {
    for (int j = 0; j < pages + ring; ++j) {
      (j < pages ? survivor_ids[i * static_cast<size_t>(spans.max_survivor_pages) +
                                static_cast<size_t>(j)]
                 : ring_ids[i * static_cast<size_t>(ring) + static_cast<size_t>(j - pages)]) =
          free.back();
      free.pop_back();
    }
  }
  const int32_t left = static_cast<int32_t>(free.size());
  DeviceBuffer<uint8_t> memory(total * PageBytes(kDim));
  DeviceBuffer<uint8_t> newest(n * static_cast<size_t>(spans.newest_stride()));
  std::vector<uint8_t> flags(n * static_cast<size_t>(spans.evict_stride()));
  std::mt19937 rng(2);
  for (uint8_t& f : flags) f = rng() % 8 != 0;
  for (size_t i = 0; i < n; ++i) {  // the first two that leave are kept
    flags[i * static_cast<size_t>(spans.evict_stride())] = 0;
    flags[i * static_cast<size_t>(spans.evict_stride()) + 1] = 0;
  }
  DeviceBuffer<uint8_t> ring_evict(flags);
  DeviceBuffer<SpanState> state(std::vector<SpanState>(n, {kSurvivors, kWindow, 0, 8192}));
  DeviceBuffer<int32_t> d_survivors(survivor_ids), d_ring(ring_ids), d_free(free),
      num_free(std::vector<int32_t>{left}), exhausted(std::vector<int32_t>{0});
  spans.pages = memory.get();
  spans.state = state.get();
  spans.survivor_pages = d_survivors.get();
  spans.ring_pages = d_ring.get();
  spans.newest = newest.get();
  spans.ring_evict = ring_evict.get();
  std::vector<int32_t> slot_of(kSeqs), positions(kSeqs, 8192);
  std::iota(slot_of.begin(), slot_of.end(), 0);
  DeviceBuffer<int32_t> d_slots(slot_of), d_positions(positions);
  constexpr int kRow = (kHeads + 2 * kKvHeads) * kDim;
  DeviceBuffer<float> qkv(kSeqs * kRow), norm(kDim), table(9000 * kDim / 2),
      q_out(kSeqs * kHeads * kDim);
  for (const auto& [data, size] : {std::pair{qkv.get(), kSeqs * kRow}, std::pair{norm.get(), kDim},
                                   std::pair{table.get(), 9000 * kDim / 2}}) {
    FillFloats<<<256, 256, 0, stream>>>(data, size);
  }
  Check(cudaGetLastError());
  const double step_us = BenchTimer(40, stream).Median([&] {
    Check(LaunchDecodeStep({.spans = spans,
                            .pool = {d_free.get(), num_free.get(), exhausted.get()},
                            .slots = d_slots.get(),
                            .num_seqs = kSeqs},
                           stream));
  });
  const double prepare_us = BenchTimer(9, stream).Median([&] {
    for (int layer = 0; layer < kLayers; ++layer) {
      Check(
          LaunchDecodePrepare({.compact = {.q = qkv.get(),
                                           .k = qkv.get() + kHeads * kDim,
                                           .v = qkv.get() + (kHeads + kKvHeads) * kDim,
                                           .q_stride = kRow,
                                           .k_stride = kRow,
                                           .v_stride = kRow,
                                           .q_norm = norm.get(),
                                           .k_norm = norm.get(),
                                           .positions = d_positions.get(),
                                           .rope_cos = table.get(),
                                           .rope_sin = table.get(),
                                           .num_positions = 9000,
                                           .rule = {.source = DecisionSource::kBorrowedAfterQNorm},
                                           .q_out = q_out.get(),
                                           .num_tokens = kSeqs,
                                           .num_heads = kHeads,
                                           .num_kv_heads = kKvHeads,
                                           .head_dim = kDim},
                               .spans = spans,
                               .slots = d_slots.get(),
                               .layer = layer},
                              stream));
    }
  });
  int32_t was_exhausted = 0;
  Check(cudaMemcpy(&was_exhausted, exhausted.get(), 4, cudaMemcpyDeviceToHost));
  std::printf("{\"case\": \"decode_step/b64\", \"ours_us\": %.2f}\n", step_us);
  std::printf("{\"case\": \"decode_prepare/b64\", \"ours_us\": %.2f, \"exhausted\": %d}\n",
              prepare_us / kLayers, was_exhausted);
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";  // a part of a case's name; $ is its end
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const double gbs = MeasureReadStream(stream);
  std::printf("{\"case\": \"read_stream\", \"gbs\": %.1f}\n", gbs);
  const auto uniform = [](int n) { return std::vector<int>(8, n); };
  // Of a context of n tokens, window 256, an eighth of the older ones survives.
  const auto kept = [](int n) { return (n - 257) / 8; };
  std::vector<BenchCase> cases = {
      {.name = "decode_bw",
       .num_seqs = 128,
       .layers = 8,
       .survivors = uniform(kept(8192)),
       .with_plan = false},
      {.name = "decode_balanced",
       .num_seqs = 32,
       .window = 16,
       .layers = 16,
       .survivors = uniform(1233),
       .with_plan = false},
      {.name = "decode_imbalance",
       .num_seqs = 32,
       .window = 16,
       .layers = 16,
       .survivors = {6, 6, 33, 83, 283, 983, 3887, 4583},
       .with_plan = false},
      {.name = "decode_b1/d128/8k", .survivors = uniform(kept(8192))},
      {.name = "decode_b1/d64/8k", .head_dim = 64, .survivors = uniform(kept(8192))},
      {.name = "decode_b8/d128/8k", .num_seqs = 8, .survivors = uniform(kept(8192))},
      {.name = "decode_b8/d64/8k", .head_dim = 64, .num_seqs = 8, .survivors = uniform(kept(8192))},
      {.name = "decode/128k_b1", .survivors = uniform(kept(131072))},
      {.name = "decode/32k_b8", .num_seqs = 8, .layers = 16, .survivors = uniform(kept(32768))},
      {.name = "decode_bw/int8",
       .format = KvFormatId::kInt8,
       .num_seqs = 64,
       .layers = 8,
       .survivors = uniform(kept(8192)),
       .with_plan = false},
      {.name = "decode_bw/k8v8",
       .format = KvFormatId::kK8V8,
       .num_seqs = 64,
       .layers = 8,
       .survivors = uniform(kept(8192)),
       .with_plan = false},
      {.name = "decode_bw/bf16",
       .format = KvFormatId::kBf16,
       .num_seqs = 64,
       .layers = 8,
       .survivors = uniform(kept(8192)),
       .with_plan = false},
      {.name = "decode_bw/d64",
       .head_dim = 64,
       .num_seqs = 128,
       .layers = 8,
       .survivors = uniform(kept(8192)),
       .with_plan = false},
      {.name = "decode_dense/8k_b16",
       .num_seqs = 16,
       .window = 0,
       .layers = 4,
       .survivors = uniform(8191),
       .with_plan = false},
  };
  double balanced_us = 0;
  for (const BenchCase& c : cases) {
    if ((c.name + "$").find(filter) == std::string::npos) continue;
    const Result r = RunCase(c, stream);
    const double limit = r.bytes / gbs / 1e3;
    const double us = std::min(r.us, r.overlapped_us);
    std::printf(
        "{\"case\": \"%s\", \"ours_us\": %.2f, \"limit_us\": %.2f, \"pct_of_limit\": %.1f, "
        "\"without_overlap_us\": %.2f, \"plan_us\": %.2f, \"plan_share\": %.4f, \"layers\": %d",
        c.name.c_str(), us, limit, 100.0 * limit / us, r.us, r.plan_us, r.plan_us / us / c.layers,
        c.layers);
    if (c.name == "decode_balanced") balanced_us = us;
    if (c.name == "decode_imbalance" && balanced_us > 0) {
      std::printf(", \"ratio\": %.3f", us / balanced_us);
    }
    std::printf("}\n");
    std::fflush(stdout);
  }
  if (filter.empty() || filter == "plan") {
    std::printf("{\"case\": \"decode_plan/b128\", \"ours_us\": %.2f, \"layers\": 36}\n",
                PlanUs(stream));
  }
  if (filter.empty() || filter == "prepare") RunPrepare(stream);
  return 0;
}

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) { return winnow::kernels::Main(argc, argv); }
