// The front half of a prefill layer, and its way from and to the cache: JSON lines of
// microseconds and of the bytes that must move, beside a device copy of the same run.
// Medians of runs that find the L2 cache flushed, on random data.
//   dms_prepare_bench [part of the case names] [runs]
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/kernels/bench_memory.cuh"
#include "kernels/cuda/dms_logits.h"
#include "kernels/cuda/dms_prepare.h"
#include "kernels/cuda/prefix_cache.h"
#include "kernels/rope.h"

namespace winnow::kernels {
namespace {

constexpr int kKvHeads = 8, kGroup = 4, kWindow = 256;
constexpr double kKeep = 0.125;

// Values in (-4, 4), dense in the middle; any grid.
__global__ void FillRandom(Bf16* x, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += gridDim.x * int64_t{blockDim.x}) {
    uint64_t h = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15ull + seed;
    h = (h ^ (h >> 31)) * 0xbf58476d1ce4e5b9ull;
    const float sum = static_cast<float>(h >> 48) + static_cast<float>((h >> 32) & 0xffff) -
                      static_cast<float>((h >> 16) & 0xffff) - static_cast<float>(h & 0xffff);
    x[i].bits = static_cast<uint16_t>(__float_as_uint(sum * 0x1p-15f) >> 16);
  }
}

class Bench {
 public:
  Bench(std::string part, int runs) : part_(std::move(part)), timer_(runs) {}

  // From QKV rows of one sequence, Qwen3's rule (head_dim 128) or Llama's; the layout of the
  // survivors beside it.
  void Prepare(const std::string& name, int head_dim, int seq, KvFormatId format) {
    if (!Wanted(name)) return;
    BenchMemory memory;
    const bool norm = head_dim == 128;
    const size_t kv = size_t{kKvHeads} * static_cast<size_t>(head_dim), row = (kGroup + 2) * kv;
    const size_t tokens = static_cast<size_t>(seq);
    Bf16* qkv = memory.Allocate<Bf16>(tokens * row);
    FillRandom<<<1024, 256>>>(qkv, static_cast<int64_t>(tokens * row), 3);
    const DmsPrefillBatch batch = Batch(memory, head_dim, {.num_tokens = seq}, 0);
    const size_t row_bytes = TokenBytes(format, head_dim);
    const absl::StatusOr<RopeTable> rope = BuildRopeTable(head_dim, seq, 1e6f);
    Check(rope.status());
    const float* weight = memory.Upload(std::vector<float>(static_cast<size_t>(head_dim), 1.25f));
    std::vector<int32_t> positions(tokens);
    std::iota(positions.begin(), positions.end(), 0);
    uint8_t* decisions = memory.Allocate<uint8_t>(tokens * kKvHeads);
    const DmsPrepareParams prepare{
        .batch = batch,
        .format = format,
        .q = qkv,
        .k = qkv + kGroup * kv,
        .v = qkv + (kGroup + 1) * kv,
        .q_stride = static_cast<int64_t>(row),
        .kv_stride = static_cast<int64_t>(row),
        .q_norm = norm ? weight : nullptr,
        .k_norm = norm ? weight : nullptr,
        .positions = memory.Upload(positions),
        .rope_cos = memory.Upload(rope->cos),
        .rope_sin = memory.Upload(rope->sin),
        // About one token in eight is kept.
        .rule = {.source = DecisionSource::kBorrowedAfterQNorm, .scale = 1.0f, .offset = -1.3f},
        .q_out = memory.Allocate<Bf16>(tokens * kv * kGroup),
        .q_out_stride = static_cast<int64_t>(kGroup * kv),
        .decisions = decisions,
        .rows = memory.Allocate<uint8_t>(tokens * kKvHeads * row_bytes)};
    const double us = timer_.Median([&] { Check(LaunchDmsPrepare(prepare, nullptr)); });
    const DmsPrefillCompactParams compact{.batch = batch, .format = format, .decisions = decisions};
    const double lay_out = timer_.Median([&] { Check(LaunchDmsPrefillCompact(compact, nullptr)); });
    // QKV read; queries, band and stored rows written; tables and positions once.
    const double bytes = static_cast<double>(tokens) *
                         (2.0 * 2.0 * static_cast<double>(row) +
                          kKvHeads * (static_cast<double>(row_bytes) + 1.0) + 4.0 * head_dim + 4.0);
    Print(name, us, bytes);
    std::printf(", \"lay_out_us\": %.2f}\n", lay_out);
    std::fflush(stdout);
  }

  // Of a separate projection, eight heads.
  void Logits(const std::string& name, int m, int hidden) {
    if (!Wanted(name)) return;
    BenchMemory memory;
    const size_t rows = static_cast<size_t>(m), columns = static_cast<size_t>(hidden);
    Bf16* x = memory.Allocate<Bf16>(rows * columns);
    FillRandom<<<1024, 256>>>(x, static_cast<int64_t>(rows * columns), 3);
    const DmsLogitsCudaParams logits{
        .x = x,
        .x_stride = hidden,
        .weight = memory.Upload(std::vector<float>(kKvHeads * columns, 0.01f)),
        .out = memory.Allocate<float>(kKvHeads * rows),
        .m = m,
        .hidden = hidden,
        .num_kv_heads = kKvHeads};
    Print(name, timer_.Median([&] { Check(LaunchDmsLogits(logits, nullptr)); }),
          2.0 * static_cast<double>(rows * columns));
    std::printf("}\n");
    std::fflush(stdout);
  }

  // A cached sequence of `seq` tokens to where the prefill reads it, and a chunk of as many to
  // an empty cache.
  void Cache(const std::string& size, int head_dim, int seq) {
    const std::string load = "prefix_load/" + size, append = "cache_append/" + size;
    if (!Wanted(load) && !Wanted(append)) return;
    BenchMemory memory;
    const KvFormatId format = KvFormatId::kFp8;
    const size_t tokens = static_cast<size_t>(seq), row_bytes = TokenBytes(format, head_dim);
    std::mt19937 rng(5);
    std::bernoulli_distribution kept(kKeep);
    std::vector<uint8_t> decisions(tokens * kKvHeads);
    for (uint8_t& evict : decisions) evict = kept(rng) ? 0 : 1;
    double survivors = 0.0;  // those that leave the ring
    for (size_t i = kKvHeads; i < decisions.size() - kWindow * kKvHeads; ++i) {
      survivors += decisions[i] == 0 ? 1.0 : 0.0;
    }
    const int slots = SlotsPerPage(format, head_dim);
    const int max_pages = (seq / slots + 4) / 4 * 4, ring_pages = (kWindow + slots - 1) / slots;
    const size_t num_pages = static_cast<size_t>(kKvHeads * (max_pages + ring_pages));
    DeviceSpans spans{.format = format,
                      .head_dim = head_dim,
                      .window = kWindow,
                      .num_layers = 1,
                      .max_sequences = 1,
                      .num_kv_heads = kKvHeads,
                      .max_survivor_pages = max_pages};
    spans.pages = memory.Allocate<uint8_t>(num_pages * PageBytes(head_dim));
    spans.state = memory.Upload(std::vector<SpanState>(kKvHeads));
    spans.survivor_pages =
        memory.Allocate<int32_t>(static_cast<size_t>(kKvHeads) * static_cast<size_t>(max_pages));
    spans.ring_pages =
        memory.Allocate<int32_t>(static_cast<size_t>(kKvHeads) * static_cast<size_t>(ring_pages));
    spans.newest = memory.Allocate<uint8_t>(kKvHeads * static_cast<size_t>(spans.newest_stride()));
    spans.ring_evict =
        memory.Allocate<uint8_t>(kKvHeads * static_cast<size_t>(spans.evict_stride()));
    std::vector<int32_t> free(num_pages);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), rng);
    const DevicePagePool pool{memory.Upload(free),
                              memory.Upload<int32_t>({static_cast<int32_t>(num_pages)}),
                              memory.Upload<int32_t>({0})};
    const int32_t* slot = memory.Upload<int32_t>({0});
    uint8_t* rows = memory.Allocate<uint8_t>(tokens * kKvHeads * row_bytes);
    Check(cudaMemset(rows, 0x21, tokens * kKvHeads * row_bytes));
    const DmsPrefillBatch batch = Batch(memory, head_dim, {.num_tokens = seq}, 0);
    const DmsPrefillCompactParams compact{
        .batch = batch, .format = format, .decisions = memory.Upload(decisions)};
    Check(LaunchDmsPrefillCompact(compact, nullptr));
    const CacheAppendParams add{
        .batch = batch, .spans = spans, .pool = pool, .slots = slot, .rows = rows};
    const DecodeStepParams release{.spans = spans, .pool = pool, .slots = slot, .num_seqs = 1};
    const double append_us =
        timer_.Median([&] { Check(LaunchCacheAppend(add, nullptr)); },
                      [&] { Check(LaunchReleaseSequences(release, nullptr)); });
    int32_t exhausted = 1;
    Check(cudaMemcpy(&exhausted, pool.exhausted, sizeof(exhausted), cudaMemcpyDeviceToHost));
    if (exhausted != 0) std::exit(1);
    // Marks read, and the stored rows of survivors and ring read and written.
    const double cached = survivors + kKvHeads * (kWindow + 1.0);
    Print(append, append_us,
          4.0 * static_cast<double>(tokens) * kKvHeads +
              2.0 * cached * static_cast<double>(row_bytes));
    std::printf("}\n");

    DmsPrefillBatch next =
        Batch(memory, head_dim, {.num_tokens = 1, .num_prefix = kWindow + 1}, seq);
    int32_t* num_survivors = memory.Allocate<int32_t>(kKvHeads);
    const PrefixLoadParams get{
        .batch = next,
        .spans = spans,
        .slots = slot,
        .num_survivors = num_survivors,
        .prefix_evict = memory.Allocate<uint8_t>(static_cast<size_t>(next.band_rows) * kKvHeads)};
    const double load_us = timer_.Median([&] { Check(LaunchPrefixLoad(get, nullptr)); });
    Print(load, load_us, cached * (static_cast<double>(row_bytes) + 4.0 * head_dim));
    std::printf("}\n");
    std::fflush(stdout);
  }

 private:
  bool Wanted(const std::string& name) const { return name.find(part_) != std::string::npos; }

  // One sequence, `older` rows more than its band in the survivors.
  static DmsPrefillBatch Batch(BenchMemory& memory, int head_dim,
                               const DmsPrefillSequence& sequence, int older) {
    const int band = sequence.num_prefix + sequence.num_tokens;
    const size_t kv = size_t{kKvHeads} * static_cast<size_t>(head_dim);
    const size_t band_size = static_cast<size_t>(band) * kv;
    const size_t compact_size = static_cast<size_t>(older + band + 8) * kv;
    DmsPrefillBatch batch{.sequences = memory.Upload<DmsPrefillSequence>({sequence}),
                          .band_k = memory.Allocate<Bf16>(band_size),
                          .band_v = memory.Allocate<Bf16>(band_size),
                          .compact_k = memory.Allocate<Bf16>(compact_size),
                          .compact_v = memory.Allocate<Bf16>(compact_size),
                          .batch = 1,
                          .num_kv_heads = kKvHeads,
                          .group = kGroup,
                          .head_dim = head_dim,
                          .window = kWindow,
                          .num_rows = sequence.num_tokens,
                          .band_rows = band,
                          .compact_rows = older + band + 8,
                          .max_band = band};
    batch.scratch = memory.Allocate<uint8_t>(DmsPrefillScratchBytes(batch));
    return batch;
  }

  // All of a JSON line but its end.
  void Print(const std::string& name, double us, double bytes) {
    const double copy = timer_.CopyUs(bytes);
    std::printf(
        "{\"case\": \"%s\", \"ours_us\": %.2f, \"bytes\": %.6g, \"peer\": \"device copy\", "
        "\"peer_us\": %.2f",
        name.c_str(), us, bytes, copy);
  }

  const std::string part_;
  BenchTimer timer_;
};

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) {
  using winnow::kernels::KvFormatId;
  winnow::kernels::Bench bench(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : 25);
  bench.Prepare("dms_prepare/d128/8k", 128, 8192, KvFormatId::kFp8);
  bench.Prepare("dms_prepare/d128/32k", 128, 32768, KvFormatId::kFp8);
  bench.Prepare("dms_prepare/d64/32k", 64, 32768, KvFormatId::kFp8);
  bench.Prepare("dms_prepare_int8h/d128/32k", 128, 32768, KvFormatId::kInt8H);
  bench.Logits("dms_logits/h4096/m1", 1, 4096);
  bench.Logits("dms_logits/h4096/8k", 8192, 4096);
  bench.Cache("d128/8k", 128, 8192);
  bench.Cache("d128/32k", 128, 32768);
  bench.Cache("d128/128k", 128, 131072);
  return 0;
}
