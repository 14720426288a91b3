#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "common/sampling/sample_math.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/sample_team.cuh"

// A row is sampled by a team of blocks, a cluster where there are clusters, else one block; each
// has a part of the vocabulary. Weights are integers, so whatever is added up in whatever order
// gives the CPU's sums:
//   1. the largest logit, the least finite one, and whether one is NaN or +inf;
//   2. a histogram by distance from the largest logit: tokens of each bin, and their weights;
//   3. for each limit (top-k's count, top-p's sum, the draw) the bin in which it falls, whose
//      tokens are gathered and sorted. A bin too full for that is first cut by the bits of the
//      rank key, a byte at a time.
// Tokens whose weight is surely 0 lie beyond the last bin; they come last in rank.
namespace winnow::kernels {
namespace {

using namespace sample_device;  // NOLINT: its other half

constexpr int kMaxTeam = 8;
constexpr int kVec = 4, kBatch = 4;  // loads of 4 logits in flight

template <bool kAligned>
struct Row {
  const float* logits;  // this block's part
  int part, first_id;   // its length, its first token
  Team team;
  Shared& s;
  float max = 0;
  double scale = 0;
  float bins_per_logit = 0;

  // Logits of the part from `begin` on, this thread's; -inf past the end.
  __device__ __forceinline__ void Load(int begin, float (&x)[kBatch][kVec]) const {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int at = begin + (k * kThreads + static_cast<int>(threadIdx.x)) * kVec;
      if (kAligned && at + kVec <= part) {
        const float4 v = *reinterpret_cast<const float4*>(logits + at);
        x[k][0] = v.x, x[k][1] = v.y, x[k][2] = v.z, x[k][3] = v.w;
      } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) x[k][j] = at + j < part ? logits[at + j] : -kInf;
      }
    }
  }

  // Calls fn(logits [kVec], id of the first) for the tokens of the part, and with -inf for some
  // that do not exist, all lanes of a warp together.
  template <typename Fn>
  __device__ __forceinline__ void ForEach(Fn fn) const {
    constexpr int kStep = kThreads * kVec * kBatch;
    float next[kBatch][kVec];
    Load(0, next);
    for (int begin = 0; begin < part; begin += kStep) {
      float x[kBatch][kVec];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) x[k][j] = next[k][j];
      }
      if (begin + kStep < part) Load(begin + kStep, next);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int id = first_id + begin + (k * kThreads + static_cast<int>(threadIdx.x)) * kVec;
        fn(x[k], id);
      }
    }
  }

  // kBins or more: beyond the last bin.
  __device__ __forceinline__ float Bin(float logit) const {
    return __fmul_rn(__fsub_rn(max, logit), bins_per_logit);
  }
  __device__ __forceinline__ uint64_t Weight(float logit) const {
    return SampleWeight(logit, max, scale, s.powers);
  }

  __device__ Extremes FindExtremes() {
    float best = -kInf;
    Extremes e;
    int best_id = -1;
    ForEach([&](const float(&x)[kVec], int id) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (!(x[j] < kInf)) e.bad = min(e.bad, id + j);
        if (x[j] > best) {
          best = x[j];
          best_id = id + j;
        }
        if (x[j] > -kInf) e.least = fminf(e.least, x[j]);
      }
    });
    if (best_id >= 0) e.best = RankKey(best, best_id);
    const auto add = [](Extremes* a, const Extremes& b) {
      a->best = min(a->best, b.best);
      a->least = fminf(a->least, b.least);
      a->bad = min(a->bad, b.bad);
    };
    for (int step = 16; step > 0; step /= 2) {
      add(&e, {.best = __shfl_xor_sync(0xffffffffu, e.best, step),
               .least = __shfl_xor_sync(0xffffffffu, e.least, step),
               .bad = __shfl_xor_sync(0xffffffffu, e.bad, step)});
    }
    if (threadIdx.x % 32 == 0) s.warp_extremes[threadIdx.x / 32] = e;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) add(&e, s.warp_extremes[w]);
      s.extremes = e;
    }
    team.Sync();
    e = {};
    for (int r = 0; r < team.size(); ++r) add(&e, team.Peer(s, r).extremes);
    return e;
  }

  // Adds the team's histograms up and gives every block the sums.
  template <bool kWeights, int kSize>
  __device__ void Reduce(Histogram<kSize> Shared::*member) {
    team.Sync();
    if (team.size() == 1) return;
    const int slice = kSize / team.size();  // a power of two
    for (int i = static_cast<int>(threadIdx.x); i < slice; i += kThreads) {
      const int bin = team.rank() * slice + i;
      Sum sum;
#pragma unroll
      for (int r = 0; r < kMaxTeam; ++r) {
        if (r >= team.size()) continue;
        const Histogram<kSize>& h = team.Peer(s, r).*member;
        sum.count += h.count[bin];
        if constexpr (kWeights) sum.weight += h.Weight(bin);
      }
#pragma unroll
      for (int r = 0; r < kMaxTeam; ++r) {
        if (r >= team.size()) continue;
        Histogram<kSize>& h = team.Peer(s, r).*member;
        h.count[bin] = sum.count;
        if constexpr (!kWeights) continue;
        h.low[bin] = static_cast<uint32_t>(sum.weight);
        h.high[bin] = static_cast<uint32_t>(sum.weight >> 32);
      }
    }
    team.Sync();
  }

  template <int kSize>
  __device__ static void Clear(Histogram<kSize>& h) {
    for (int i = static_cast<int>(threadIdx.x); i < kSize; i += kThreads) {
      h.count[i] = h.low[i] = h.high[i] = 0;
    }
    __syncthreads();
  }

  template <bool kWeights>
  __device__ void FillBins() {
    Clear(s.bins);
    ForEach([&](const float(&x)[kVec], int) {
      uint64_t weight[kVec] = {};
      int bin[kVec];
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float place = Bin(x[j]);
        bin[j] = place < kBins ? static_cast<int>(place) : s.bins.Nowhere();
        if constexpr (kWeights) weight[j] = Weight(x[j]);
      }
      s.bins.template Add<kVec, kWeights>(bin, weight);
    });
    Reduce<kWeights>(&Shared::bins);
  }

  template <int kSize>
  __device__ Place Locate(const Histogram<kSize>& h, bool by_count, uint64_t limit) {
    constexpr int kEach = (kSize + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * kEach;
    Sum own;
    for (int i = first; i < min(first + kEach, kSize); ++i) {
      own.weight += h.Weight(i);
      own.count += h.count[i];
    }
    Place place;
    Sum before = ExclusiveBlockSum(own, s.warp_sum, &place.total);
    if (threadIdx.x == 0) s.place = place;
    __syncthreads();
    const auto measure = [by_count](const Sum& x) { return by_count ? x.count : x.weight; };
    for (int i = first; i < min(first + kEach, kSize); ++i) {
      const Sum through{before.weight + h.Weight(i), before.count + h.count[i]};
      if (measure(before) <= limit && measure(through) > limit) {
        s.place.bin = i;
        s.place.before = before;
      }
      before = through;
    }
    __syncthreads();
    place = s.place;
    __syncthreads();
    return place;
  }

  // Puts the rank keys of the tokens for which wanted(logit, id) holds into the first block's
  // list. REQUIRES: they are at most kList.
  template <typename Wanted>
  __device__ void Gather(Wanted wanted) {
    if (team.rank() == 0 && threadIdx.x == 0) s.list_size = 0;
    team.Sync();
    Shared& first = team.Peer(s, 0);
    const uint32_t below = (1u << (threadIdx.x % 32)) - 1u;
    ForEach([&](const float(&x)[kVec], int id) {
      bool mine[kVec], any = false;
#pragma unroll
      for (int j = 0; j < kVec; ++j) any |= mine[j] = wanted(x[j], id + j);
      if (!__any_sync(0xffffffffu, any)) return;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const uint32_t ballot = __ballot_sync(0xffffffffu, mine[j]);
        if (ballot == 0) continue;
        const int leader = __ffs(static_cast<int>(ballot)) - 1;
        int place = 0;
        if (static_cast<int>(threadIdx.x) % 32 == leader) {
          place = atomicAdd(&first.list_size, __popc(ballot));
        }
        place = __shfl_sync(0xffffffffu, place, leader) + __popc(ballot & below);
        if (mine[j]) first.key[place] = RankKey(x[j], id + j);
      }
    });
    team.Sync();
  }

  // The first block's: sorts the list, and sums its weights from `before` on.
  __device__ void SortList(int size, uint64_t before) {
    int padded = 2;
    while (padded < size) padded *= 2;
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = size + thread; i < padded; i += kThreads) s.key[i] = ~uint64_t{0};
    __syncthreads();
    for (int run = 2; run <= padded; run *= 2) {
      for (int step = run / 2; step > 0; step /= 2) {
        for (int i = thread; i < padded / 2; i += kThreads) {
          const int low = i / step * 2 * step + i % step, high = low + step;
          const uint64_t a = s.key[low], b = s.key[high];
          if ((a > b) == ((low & run) == 0)) {
            s.key[low] = b;
            s.key[high] = a;
          }
        }
        __syncthreads();
      }
    }
    constexpr int kEach = kList / kThreads;
    uint64_t weight[kEach];
    Sum own, total;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = thread * kEach + j;
      weight[j] = i < size ? Weight(LogitOf(s.key[i])) : 0;
      own.weight += weight[j];
    }
    uint64_t sum = before + ExclusiveBlockSum(own, s.warp_sum, &total).weight;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      sum += weight[j];
      if (thread * kEach + j < size) s.sum[thread * kEach + j] = sum;
    }
    __syncthreads();
  }

  // The first block's, of the sorted list: the first token whose sum exceeds the limit.
  __device__ Found FindInList(int size, uint64_t limit) {
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
      if (s.sum[i] > limit && (i == 0 || s.sum[i - 1] <= limit)) {
        s.found = {.id = static_cast<int>(static_cast<uint32_t>(s.key[i])), .weight = s.sum[i]};
      }
    }
    __syncthreads();
    const Found found = s.found;
    __syncthreads();
    return found;
  }

  // The token with which the sum, by rank, of weights or of tokens exceeds the limit.
  // REQUIRES: there is one, and the bins have both sums.
  __device__ Found Select(bool by_count, uint64_t limit) {
    const Place place = Locate(s.bins, by_count, limit);
    const float bin = static_cast<float>(place.bin);
    const auto in_bin = [&](float x) { return truncf(Bin(x)) == bin; };
    Sum before = place.before;
    int size = static_cast<int>(s.bins.count[place.bin]);
    uint64_t prefix = 0;
    int shift = 64;
    while (size > kList) {
      shift -= 8;
      const auto matches = [&](uint64_t key) { return shift == 56 || key >> shift >> 8 == prefix; };
      Clear(s.digits);
      ForEach([&](const float(&x)[kVec], int id) {
        uint64_t weight[kVec];
        int digit[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const uint64_t key = RankKey(x[j], id + j);
          const bool mine = in_bin(x[j]) && matches(key);
          digit[j] = mine ? static_cast<int>(key >> shift & (kDigits - 1)) : s.digits.Nowhere();
          weight[j] = Weight(x[j]);
        }
        s.digits.template Add<kVec, true>(digit, weight);
      });
      Reduce<true>(&Shared::digits);
      const Place part =
          Locate(s.digits, by_count, limit - (by_count ? before.count : before.weight));
      before.weight += part.before.weight;
      before.count += part.before.count;
      prefix = prefix << 8 | static_cast<uint64_t>(part.bin);
      size = static_cast<int>(s.digits.count[part.bin]);
      team.Sync();  // before the digits are cleared
    }
    Gather([&](float x, int id) {
      return in_bin(x) && (shift == 64 || RankKey(x, id) >> shift == prefix);
    });
    if (team.rank() == 0) {
      SortList(size, before.weight);
      Found found;
      if (by_count) {
        const int i = static_cast<int>(limit) - static_cast<int>(before.count);
        found = {.id = static_cast<int>(static_cast<uint32_t>(s.key[i])), .weight = s.sum[i]};
      } else {
        found = FindInList(size, limit);
      }
      Tell(found);
    }
    team.Sync();
    return s.found;
  }

  // Gives the first block's answer to all.
  __device__ void Tell(Found found) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < team.size()) {
      team.Peer(s, static_cast<int>(threadIdx.x)).found = found;
    }
  }

  // The token of the sorted list that the draw chooses after top-p; `kept` of top-k.
  __device__ int DrawInList(int kept, float top_p, uint64_t bits) {
    uint64_t total = s.sum[kept - 1];
    if (top_p < 1.0f) total = FindInList(kept, SampleEnough(top_p, total) - 1).weight;
    return FindInList(kept, SampleTarget(bits, total)).id;
  }

  // The token for temperature > 0, given to the first block.
  __device__ int Draw(const Extremes& extremes, const SamplingParams& p, int vocab, uint64_t bits) {
    max = LogitOf(extremes.best);
    scale = SampleScale(p.temperature);
    // Bins reach the least logit or, if that is nearer, an octave past the last weight.
    const float reach =
        fminf(max - extremes.least, static_cast<float>((kSampleCutoff + 16) / scale));
    bins_per_logit = fminf(kBins * 0.9999f / reach, 1e30f);
    if (threadIdx.x < kNumSamplePowers) {
      s.powers[threadIdx.x] = SamplePower(static_cast<int>(threadIdx.x));
    }
    uint64_t total = 0;
    const bool few = p.top_k > 0 && p.top_k <= kList;
    if (few) {
      FillBins<false>();
      const Place place = Locate(s.bins, true, static_cast<uint64_t>(p.top_k) - 1);
      const int last = place.bin < 0 ? kBins - 1 : place.bin;
      const int size = static_cast<int>(
          place.bin < 0 ? place.total.count : place.before.count + s.bins.count[place.bin]);
      if (size <= kList) {
        Gather([&](float x, int) { return Bin(x) < static_cast<float>(last + 1); });
        if (team.rank() != 0) return 0;
        SortList(size, 0);
        return DrawInList(min(p.top_k, size), p.top_p, bits);
      }
      team.Sync();  // before the bins are cleared
    }
    FillBins<true>();
    const bool by_rank = p.top_k > 0 && p.top_k < vocab;
    const Place place =
        Locate(s.bins, by_rank, by_rank ? static_cast<uint64_t>(p.top_k) - 1 : ~uint64_t{0});
    total = place.total.weight;
    // One piece of code for all three limits: top-k's count, top-p's sum, the draw.
    enum { kTopK, kTopP, kDraw };
#pragma unroll 1
    for (int limit_of = by_rank && place.bin >= 0 ? kTopK : kTopP;; ++limit_of) {
      if (limit_of == kTopP && p.top_p >= 1.0f) continue;
      const uint64_t limit = limit_of == kTopK   ? static_cast<uint64_t>(p.top_k) - 1
                             : limit_of == kTopP ? SampleEnough(p.top_p, total) - 1
                                                 : SampleTarget(bits, total);
      const Found found = Select(limit_of == kTopK, limit);
      if (limit_of == kDraw) return found.id;
      total = found.weight;
    }
  }
};

// Grid (blocks of a team, rows), block kThreads; a block an SM.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) SampleKernel(const SampleCudaParams p) {
  __shared__ Shared s;
  const Team team;
  const int64_t row_idx = blockIdx.y;
  const int step = (p.vocab + team.size() * kVec - 1) / (team.size() * kVec) * kVec;
  const int first = min(team.rank() * step, p.vocab);
  Row<kAligned> row{.logits = p.logits + row_idx * p.ld + first,
                    .part = min(step, p.vocab - first),
                    .first_id = first,
                    .team = team,
                    .s = s};
  const SamplingParams params = p.params[row_idx];
  const SampleKey key = p.keys[row_idx];
  const bool valid = params.temperature >= 0.0f && params.temperature <= 100.0f &&
                     params.top_k >= 0 && params.top_k <= p.vocab && params.top_p > 0.0f &&
                     params.top_p <= 1.0f;
  int token = kSampleBadParams;
  if (valid) {
    const Extremes extremes = row.FindExtremes();
    if (extremes.bad < p.vocab) {
      token = SampleBadLogit(extremes.bad);
    } else if (extremes.best == ~uint64_t{0}) {
      token = kSampleAllMinusInfinity;
    } else if (params.temperature == 0.0f || params.top_k == 1) {
      token = static_cast<int>(static_cast<uint32_t>(extremes.best));
    } else {
      token =
          row.Draw(extremes, params, p.vocab, SampleBits(key.seed, key.position, key.sample_index));
    }
  }
  team.Sync();  // no block leaves while another may look into its memory
  if (team.rank() == 0 && threadIdx.x == 0) {
    p.tokens[row_idx] = token;
    if (p.advance) p.keys[row_idx].position = key.position + 1;
  }
}

// Blocks for a row, a power of two: as many as give each SM one, and each something to do; 1 where
// code without clusters would run.
absl::Status TeamSize(const SampleCudaParams& p, int* size) {
  cudaFuncAttributes attributes;
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaFuncGetAttributes(&attributes, SampleKernel<true>)));
  WINNOW_ASSIGN_OR_RETURN(const int num_sms, NumSms());
  *size = 1;
  if (attributes.ptxVersion < 90) return absl::OkStatus();
  while (*size < kMaxTeam && p.vocab / *size > 4096 && 2 * *size * p.num_rows <= num_sms) {
    *size *= 2;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateSampleCuda(const SampleCudaParams& p) {
  if (p.logits == nullptr || p.params == nullptr || p.keys == nullptr || p.tokens == nullptr) {
    return absl::InvalidArgumentError("sample: logits, params, keys or tokens is null");
  }
  if (p.num_rows < 0 || p.num_rows > 65535 || p.vocab < 1 || p.vocab > kMaxSampleVocab ||
      p.ld < p.vocab) {
    return absl::InvalidArgumentError(
        absl::StrCat("sample: bad shape num_rows=", p.num_rows, " vocab=", p.vocab, " ld=", p.ld));
  }
  return absl::OkStatus();
}

absl::Status LaunchSample(const SampleCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateSampleCuda(p));
  if (p.num_rows == 0) return absl::OkStatus();
  int team = 1;
  WINNOW_RETURN_IF_ERROR(TeamSize(p, &team));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(team), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(team), static_cast<unsigned>(p.num_rows));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = team > 1 ? 1 : 0;
  const bool aligned = p.ld % kVec == 0 && Aligned(p.logits, 16);
  return CudaStatus(
      cudaLaunchKernelEx(&config, aligned ? SampleKernel<true> : SampleKernel<false>, p));
}

}  // namespace winnow::kernels
