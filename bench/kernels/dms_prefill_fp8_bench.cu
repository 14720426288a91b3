// The FP8 variant of the sparse prefill beside the BF16 one, from the same roped BF16 Q, K
// and V: JSON lines of microseconds and of what their outputs differ by. Medians of runs
// that find the L2 cache flushed, on random data, the two taking turns.
//   dms_prefill_fp8_bench [part of the case names] [runs]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "bench/kernels/bench_memory.cuh"
#include "bench/kernels/fill_random.cuh"
#include "bench/kernels/prefill_work.h"
#include "kernels/cuda/dms_prefill_fp8.h"

namespace winnow::kernels {
namespace {

// Adds (sum of squares of a - b, of b, most of |a - b|) over n values to out[3]. Any grid.
__global__ void Compare(const __nv_bfloat16* a, const __nv_bfloat16* b, int64_t n, double* out) {
  double square = 0.0, of = 0.0, most = 0.0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += gridDim.x * int64_t{blockDim.x}) {
    const double x = __bfloat162float(a[i]), y = __bfloat162float(b[i]);
    square += (x - y) * (x - y);
    of += y * y;
    most = fmax(most, fabs(x - y));
  }
  atomicAdd(&out[0], square);
  atomicAdd(&out[1], of);
  atomicMax(reinterpret_cast<long long*>(&out[2]), __double_as_longlong(most));
}

// Multiplies n values, in place. Any grid.
__global__ void Scale(__nv_bfloat16* x, int64_t n, float by) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += gridDim.x * int64_t{blockDim.x}) {
    x[i] = __float2bfloat16(__bfloat162float(x[i]) * by);
  }
}

struct BenchCase {
  const char* name;
  int seq;
  double keep;
  float sharper;  // queries are as many times larger
};

constexpr BenchCase kCases[] = {
    {"prefill_fp8/d128/8k", 8192, 0.125, 1.0f},
    {"prefill_fp8/d128/32k", 32768, 0.125, 1.0f},
    {"prefill_fp8/d128/128k", 131072, 0.125, 1.0f},
    {"prefill_fp8_peaky/d128/32k", 32768, 0.125, 4.0f},
    {"prefill_fp8_dense/d128/32k", 32768, 1.0, 1.0f},
};

constexpr int kKvHeads = 8, kGroup = 4, kDim = kPrefillFp8Dim, kMostTokens = 131072, kWindow = 256;

class Bench {
 public:
  Bench() {
    const size_t rows = size_t{kMostTokens} * kKvHeads, kv = rows * kDim;
    for (Bf16** x : {&q_, &out_, &out_fp8_}) *x = memory_.Allocate<Bf16>(kv * kGroup);
    for (Bf16** x : {&k_, &v_, &band_k_, &band_v_}) *x = memory_.Allocate<Bf16>(kv);
    for (Bf16** x : {&compact_k_, &compact_v_}) {
      *x = memory_.Allocate<Bf16>(kv + size_t{64} * kKvHeads * kDim);
    }
    for (DmsPrefillFp8Rows* x : {&band_, &compact_}) {
      *x = {.k = memory_.Allocate<uint8_t>(kv),
            .v = memory_.Allocate<uint8_t>(rows * kPrefillFp8Channels),
            .scales = memory_.Allocate<uint16_t>(2 * rows)};
    }
    rows_ = memory_.Allocate<uint8_t>(rows * TokenBytes(KvFormatId::kFp8, kDim));
    decisions_ = memory_.Allocate<uint8_t>(rows);
    sequence_ = memory_.Allocate<DmsPrefillSequence>(1);
    differences_ = memory_.Allocate<double>(3);
  }

  void Run(const BenchCase& c, int runs) {
    const int64_t kv = int64_t{kKvHeads} * kDim, values = c.seq * kv;
    uint32_t seed = 1;
    for (Bf16* x : {q_, k_, v_}) {
      FillNormal<<<1024, 256>>>(reinterpret_cast<__nv_bfloat162*>(x),
                                values * (x == q_ ? kGroup : 1) / 2, seed++);
    }
    Scale<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(q_), values * kGroup, c.sharper);
    std::mt19937 rng(7);
    std::uniform_real_distribution<double> uniform;
    std::vector<uint8_t> decisions(static_cast<size_t>(c.seq) * kKvHeads);
    for (uint8_t& x : decisions) x = uniform(rng) < c.keep ? 0 : 1;
    Check(cudaMemcpy(decisions_, decisions.data(), decisions.size(), cudaMemcpyHostToDevice));
    const DmsPrefillSequence sequence{.num_tokens = c.seq};
    Check(cudaMemcpy(sequence_, &sequence, sizeof(sequence), cudaMemcpyHostToDevice));
    DmsPrefillBatch batch{.sequences = sequence_,
                          .band_k = band_k_,
                          .band_v = band_v_,
                          .compact_k = compact_k_,
                          .compact_v = compact_v_,
                          .batch = 1,
                          .num_kv_heads = kKvHeads,
                          .group = kGroup,
                          .head_dim = kDim,
                          .window = kWindow,
                          .shift = 1,
                          .num_rows = c.seq,
                          .band_rows = c.seq,
                          .compact_rows = c.seq + 16,
                          .max_band = c.seq};
    BenchMemory scratch;
    batch.scratch = scratch.Allocate<uint8_t>(
        std::max(DmsPrefillScratchBytes(batch), DmsPrefillFp8ScratchBytes(batch)));
    const float scale = 1.0f / std::sqrt(float(kDim));
    const DmsPrefillCompactParams compact{.batch = batch,
                                          .format = KvFormatId::kFp8,
                                          .k = k_,
                                          .v = v_,
                                          .kv_stride = kv,
                                          .decisions = decisions_,
                                          .rows = rows_};
    const DmsPrefillCudaParams attention{
        .batch = batch, .q = q_, .q_stride = kv * kGroup, .out = out_, .scale = scale};
    const DmsPrefillFp8Batch fp8{.rows = batch, .band = band_, .compact = compact_};
    const DmsPrefillFp8CompactParams compact_fp8{
        .batch = fp8, .k = k_, .v = v_, .kv_stride = kv, .decisions = decisions_, .rows = rows_};
    const DmsPrefillFp8CudaParams attention_fp8{
        .batch = fp8, .q = q_, .q_stride = kv * kGroup, .out = out_fp8_, .scale = scale};
    timer_.set_runs(runs);
    const std::vector<double> us =
        timer_.Medians({[&] {
                          Check(LaunchDmsPrefillCompact(compact, nullptr));
                          Check(LaunchDmsPrefillAttention(attention, nullptr));
                        },
                        [&] { Check(LaunchDmsPrefillCompact(compact, nullptr)); },
                        [&] {
                          Check(LaunchDmsPrefillFp8Compact(compact_fp8, nullptr));
                          Check(LaunchDmsPrefillFp8Attention(attention_fp8, nullptr));
                        },
                        [&] { Check(LaunchDmsPrefillFp8Compact(compact_fp8, nullptr)); }});
    Check(cudaMemset(differences_, 0, 3 * sizeof(double)));
    Compare<<<1024, 256>>>(reinterpret_cast<const __nv_bfloat16*>(out_fp8_),
                           reinterpret_cast<const __nv_bfloat16*>(out_), values * kGroup,
                           differences_);
    double differences[3];
    Check(cudaMemcpy(differences, differences_, sizeof(differences), cudaMemcpyDeviceToHost));
    const PrefillWork work = WorkOfPrefill(c.seq, kWindow, kDim, kKvHeads, kGroup, decisions);
    std::printf(
        "{\"case\": \"%s\", \"ours_us\": %.2f, \"compact_us\": %.2f, \"flop_fp8\": %.6g, "
        "\"bytes\": %.6g, \"peer\": \"our BF16 kernel\", \"peer_us\": %.2f, \"ratio\": %.4f, "
        "\"bf16_compact_us\": %.2f, "
        "\"rms_difference\": %.3g, \"rms_output\": %.3g, \"most_difference\": %.3g}\n",
        c.name, us[2], us[3], work.flop, work.compact_bytes + work.attention_bytes, us[0],
        us[0] / us[2], us[1], std::sqrt(differences[0] / double(values * kGroup)),
        std::sqrt(differences[1] / double(values * kGroup)), differences[2]);
    std::fflush(stdout);
  }

 private:
  BenchMemory memory_;
  BenchTimer timer_;
  Bf16 *q_, *k_, *v_, *out_, *out_fp8_, *band_k_, *band_v_, *compact_k_, *compact_v_;
  DmsPrefillFp8Rows band_, compact_;
  uint8_t *rows_, *decisions_;
  double* differences_;
  DmsPrefillSequence* sequence_;
};

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  const int runs = argc > 2 ? std::max(1, std::atoi(argv[2])) : 15;
  winnow::kernels::Bench bench;
  for (const auto& c : winnow::kernels::kCases) {
    if (std::string(c.name).find(part) != std::string::npos) {
      bench.Run(c, c.seq > 100000 ? runs / 3 + 1 : runs);
    }
  }
}
