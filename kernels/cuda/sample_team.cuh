#pragma once

#include <cooperative_groups.h>

#include <cstdint>
#include <limits>

#include "common/sampling/sample_math.h"

// What the blocks that sample a row share, and how they add up. See sample.cu.
namespace winnow::kernels::sample_device {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 2048, kDigits = 256;
constexpr int kList = 1024;  // most tokens sorted at once
constexpr float kInf = std::numeric_limits<float>::infinity();

// Ascending: larger logits first, equals (so 0 and -0) by ascending id.
__device__ __forceinline__ uint64_t RankKey(float logit, int id) {
  const uint32_t u = __float_as_uint(__fadd_rn(logit, 0.0f));
  const uint32_t ascending = (u >> 31) != 0 ? ~u : u | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}
__device__ __forceinline__ float LogitOf(uint64_t rank_key) {
  const uint32_t ascending = ~static_cast<uint32_t>(rank_key >> 32);
  return __uint_as_float((ascending >> 31) != 0 ? ascending & 0x7fffffffu : ~ascending);
}

template <int kSize>
struct Histogram {
  // `high` and `low`: a sum of weights. Behind the bins a place for each lane of a warp, which
  // takes what has none: adding nothing is cheaper than a branch around an addition.
  uint32_t count[kSize + 32], low[kSize + 32], high[kSize + 32];

  __device__ static int Nowhere() { return kSize + static_cast<int>(threadIdx.x) % 32; }
  __device__ uint64_t Weight(int i) const { return static_cast<uint64_t>(high[i]) << 32 | low[i]; }
  // Counts kNum tokens, and their weights, in bins, Nowhere() if in none; a whole warp. Adds of
  // 32 bits are native in shared memory, of 64 they are not.
  template <int kNum, bool kWeights>
  __device__ __forceinline__ void Add(const int (&bin)[kNum], const uint64_t (&weight)[kNum]) {
    bool any = false;
#pragma unroll
    for (int j = 0; j < kNum; ++j) any |= bin[j] < kSize;
    if (!__any_sync(0xffffffffu, any)) return;
    uint32_t before[kNum];
#pragma unroll
    for (int j = 0; j < kNum; ++j) {
      atomicAdd(&count[bin[j]], 1);
      if constexpr (kWeights) {
        before[j] = atomicAdd(&low[bin[j]], static_cast<uint32_t>(weight[j]));
      }
    }
    if constexpr (kWeights) {
#pragma unroll
      for (int j = 0; j < kNum; ++j) {
        const uint32_t add = static_cast<uint32_t>(weight[j]);
        const uint32_t carry = before[j] + add < add ? 1 : 0;
        const uint32_t add_high = static_cast<uint32_t>(weight[j] >> 32) + carry;
        atomicAdd(&high[add_high != 0 ? bin[j] : Nowhere()], add_high);
      }
    }
  }
};

struct Sum {
  uint64_t weight = 0;
  uint32_t count = 0;
};

// The first bin with which the sum, of weights or of tokens, exceeds a limit.
struct Place {
  int bin = -1;  // -1: even all together do not
  Sum before;
  Sum total;  // of all bins
};

struct Extremes {
  uint64_t best = ~uint64_t{0};  // rank key
  float least = kInf;            // of the logits that are not -inf
  int bad = std::numeric_limits<int>::max();
};

struct Found {
  int id;
  uint64_t weight;  // of the tokens up to this one, in rank
};

struct Shared {
  Histogram<kBins> bins;
  Histogram<kDigits> digits;
  uint64_t key[kList];
  uint64_t sum[kList];
  double powers[kNumSamplePowers];
  Sum warp_sum[kWarps];
  Extremes warp_extremes[kWarps];
  Extremes extremes;
  Place place;
  int list_size;
  Found found;
};

// The blocks of a row.
struct Team {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  __device__ int rank() const { return static_cast<int>(cluster.block_rank()); }
  __device__ int size() const { return static_cast<int>(cluster.num_blocks()); }
  __device__ void Sync() const { cluster.sync(); }
  __device__ Shared& Peer(Shared& own, int rank) const {
    return *cluster.map_shared_rank(&own, static_cast<unsigned>(rank));
  }
#else
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void Sync() const { __syncthreads(); }
  __device__ Shared& Peer(Shared& own, int) const { return own; }
#endif
};

__device__ Sum InclusiveWarpSum(Sum x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t weight = __shfl_up_sync(0xffffffffu, x.weight, step);
    const uint32_t count = __shfl_up_sync(0xffffffffu, x.count, step);
    if (lane >= step) {
      x.weight += weight;
      x.count += count;
    }
  }
  return x;
}

// Of the block's values, those of the threads before this one; and all.
__device__ Sum ExclusiveBlockSum(Sum x, Sum* warp_sum, Sum* total) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const Sum in_warp = InclusiveWarpSum(x);
  __syncthreads();
  if (lane == 31) warp_sum[warp] = in_warp;
  __syncthreads();
  Sum before{in_warp.weight - x.weight, in_warp.count - x.count};
  *total = {};
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) {
      before.weight += total->weight;
      before.count += total->count;
    }
    total->weight += warp_sum[w].weight;
    total->count += warp_sum[w].count;
  }
  return before;
}

}  // namespace winnow::kernels::sample_device
