#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace {

using internal::NumExpirable;
using internal::PrefillScratch;
using internal::PrefillTile;

// ---------------------------------------------------------------------------
// Marks: one block a (KV head, sequence) scans the band's keep bits. Grid
// (num_kv_heads, batch), kScanThreads threads of kScanTokens tokens each and turn.

constexpr int kScanThreads = 1024, kScanTokens = 8;

// The bit of band token `i` of a band of `band`, 1: evict.
__device__ bool Evicted(const DmsPrefillCompactParams& p, const DmsPrefillSequence& s, int head,
                        int i, int band) {
  const int own = i + p.batch.shift;  // the token whose decision it is
  if (own < s.num_prefix) {
    return p.prefix_evict != nullptr &&
           p.prefix_evict[int64_t{s.band_row + i} * p.batch.num_kv_heads + head] != 0;
  }
  if (own >= band || p.decisions == nullptr) return false;
  return p.decisions[int64_t{s.row + own - s.num_prefix} * p.batch.num_kv_heads + head] != 0;
}

// Zeros in rows [first, first + 8) of x, but none from `end` on. All threads.
__device__ void ZeroRows(Bf16* x, int64_t row_stride, int first, int end, int head_dim) {
  const int n = min(8, end - first) * head_dim;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    x[(first + i / head_dim) * row_stride + i % head_dim] = Bf16{0};
  }
}

__global__ void __launch_bounds__(kScanThreads)
    MarkKernel(const DmsPrefillCompactParams p, const PrefillScratch scratch) {
  __shared__ int warp_sums[kScanThreads / 32];
  __shared__ int expired;
  const DmsPrefillBatch& b = p.batch;
  const int head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int band = s.num_prefix + s.num_tokens, expirable = NumExpirable(band, b.window);
  int before = b.num_survivors == nullptr ? 0 : b.num_survivors[blockIdx.y * b.num_kv_heads + head];
  if (threadIdx.x == 0) expired = before;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *scratch.ticket = 0;
  int32_t* marks = scratch.marks + int64_t{head} * b.band_rows + s.band_row;
  static_assert(kScanThreads == 32 * 32);
  for (int base = 0; base < band; base += kScanThreads * kScanTokens) {
    const int first = base + static_cast<int>(threadIdx.x) * kScanTokens;
    int keep[kScanTokens], sum = 0;
#pragma unroll
    for (int i = 0; i < kScanTokens; ++i) {
      keep[i] = first + i < band && !Evicted(p, s, head, first + i, band) ? 1 : 0;
      sum += keep[i];
    }
    int inclusive = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, inclusive, step);
      if (lane >= step) inclusive += left;
    }
    __syncthreads();  // the last turn's sums are read
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    // Every warp scans the 32 warps' sums for itself.
    int warps = warp_sums[lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, warps, step);
      if (lane >= step) warps += left;
    }
    const int total = __shfl_sync(~0u, warps, 31);
    const int up_to_mine = __shfl_sync(~0u, warps, warp);
    const int own = __shfl_sync(~0u, inclusive, 31);
    int rank = before + up_to_mine - own + inclusive - sum;
#pragma unroll
    for (int i = 0; i < kScanTokens; ++i) {
      if (first + i < band) marks[first + i] = 2 * rank + keep[i];
      rank += keep[i];
      if (first + i + 1 == expirable) expired = rank;
    }
    before += total;
  }
  __syncthreads();
  const int64_t compact = (int64_t{head} * b.compact_rows) * b.head_dim;
  ZeroRows(b.compact_k + compact, b.head_dim, s.compact_row + expired, b.compact_rows, b.head_dim);
  ZeroRows(b.compact_v + compact, b.head_dim, s.compact_row + expired, b.compact_rows, b.head_dim);
  const int64_t stride = int64_t{b.num_kv_heads} * b.head_dim;
  const int end = s.band_row + band;
  ZeroRows(b.band_k + head * b.head_dim, stride, end, b.band_rows, b.head_dim);
  ZeroRows(b.band_v + head * b.head_dim, stride, end, b.band_rows, b.head_dim);
}

// ---------------------------------------------------------------------------
// Plan: the tiles, longest first, by a counting sort on the boxes of keys. One block of
// kThreads, whose work hides behind the other blocks' of its kernel.

constexpr int kStoreWarps = 8, kStoreThreads = 32 * kStoreWarps;
constexpr int kBuckets = 2048, kBoxKeys = 128;

template <int kThreads>
__device__ void Plan(const DmsPrefillBatch& b, const PrefillScratch& scratch, int positions,
                     int (&counts)[kBuckets], int (&warp_sums)[kThreads / 32]) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  for (int i = tid; i < kBuckets; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int turn = 0; turn < 2; ++turn) {  // count, then place
    for (int sequence = 0; sequence < b.batch; ++sequence) {
      const DmsPrefillSequence s = b.sequences[sequence];
      const int tiles = (s.num_tokens + positions - 1) / positions * b.num_kv_heads;
      for (int i = tid; i < tiles; i += kThreads) {
        PrefillTile tile{.sequence = sequence,
                         .head = i % b.num_kv_heads,
                         .first = i / b.num_kv_heads * positions};
        const int expired = s.num_prefix + tile.first - b.window;
        if (expired > 0) {
          tile.num_survivors =
              scratch.marks[int64_t{tile.head} * b.band_rows + s.band_row + expired] >> 1;
        } else if (b.num_survivors != nullptr) {
          tile.num_survivors = b.num_survivors[sequence * b.num_kv_heads + tile.head];
        } else {
          tile.num_survivors = 0;
        }
        const int keys = tile.num_survivors + min(b.window, s.num_prefix + tile.first) + positions;
        const int bucket = kBuckets - 1 - min(keys / kBoxKeys, kBuckets - 1);
        const int at = atomicAdd(&counts[bucket], 1);
        if (turn == 1) scratch.tiles[at] = tile;
      }
    }
    __syncthreads();
    if (turn == 1) break;
    // Counts to first places: each thread's run of buckets, then a scan over threads.
    constexpr int kRun = kBuckets / kThreads;
    int sum = 0;
    for (int i = 0; i < kRun; ++i) sum += counts[kRun * tid + i];
    int inclusive = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int left = __shfl_up_sync(~0u, inclusive, step);
      if (lane >= step) inclusive += left;
    }
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    int place = inclusive - sum;
    for (int i = 0; i < warp; ++i) place += warp_sums[i];
    if (tid == kThreads - 1) *scratch.num_tiles = place + sum;
    for (int i = 0; i < kRun; ++i) {
      const int count = counts[kRun * tid + i];
      counts[kRun * tid + i] = place;
      place += count;
    }
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------
// Store: eight lanes a K or V of one token and head, a warp two such rows of
// [tokens, heads]. Lane l of the eight holds dims 16 i + 2 l and 16 i + 2 l + 1, so
// that the error's sixteen partial sums are the CPU's. Grid (1 + pieces of the longest
// band, batch); the first block plans. Shared memory: the partial sums, the flat rows on
// their way out, and the plan's counts.

struct Quarter {
  int lane;       // in the eight
  uint32_t mask;  // of the eight in the warp
};

__device__ uint32_t MaxOfQuarter(uint32_t x, const Quarter& quarter) {
#pragma unroll
  for (int step = 1; step < 8; step *= 2) x = max(x, __shfl_xor_sync(quarter.mask, x, step));
  return x;
}

__device__ float FromHalf(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ uint16_t RoundToHalf(float x) { return __half_as_ushort(__float2half_rn(x)); }

// |x| <= 448 rounded to e4m3, both halves.
__device__ float2 RoundedToE4m3(float x, float y) {
  const __nv_fp8x2_storage_t codes =
      __nv_cvt_float2_to_fp8x2(make_float2(x, y), __NV_SATFINITE, __NV_E4M3);
  return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
}

// kv_format's ScaleFor().
__device__ uint16_t ScaleFor(uint32_t amax_bits, float max_code) {
  constexpr uint16_t kHalfNan = 0x7e00, kHalfMax = 0x7bff;
  if (amax_bits >= 0x7f800000u) return kHalfNan;
  const float amax = __uint_as_float(amax_bits);
  uint16_t scale = min(RoundToHalf(__fdiv_rn(amax, max_code)), kHalfMax);
  if (scale == 0 || (scale < kHalfMax && __fmul_rn(FromHalf(scale), max_code) < amax)) ++scale;
  return scale;
}

// kv_format's E4m3ScaleFor(): `smallest` or sqrt(2) times it. `sums` [2][16] is the
// eight lanes' own.
template <int kPairs>
__device__ uint16_t BetterE4m3Scale(const float2 (&x)[kPairs], uint16_t smallest,
                                    const Quarter& quarter, float* sums) {
  const uint16_t other =
      min(RoundToHalf(__fmul_rn(FromHalf(smallest), 1.41421356237309504880f)), uint16_t{0x7bff});
#pragma unroll
  for (int candidate = 0; candidate < 2; ++candidate) {
    const float inverse = __frcp_rn(FromHalf(candidate == 0 ? smallest : other));
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = fabsf(__fmul_rn(x[i].x, inverse)), b = fabsf(__fmul_rn(x[i].y, inverse));
      const float2 rounded = RoundedToE4m3(a, b);
      const float ea = __fsub_rn(a, rounded.x), eb = __fsub_rn(b, rounded.y);
      sum.x = __fadd_rn(sum.x, __fmul_rn(ea, ea));
      sum.y = __fadd_rn(sum.y, __fmul_rn(eb, eb));
    }
    *reinterpret_cast<float2*>(sums + 16 * candidate + 2 * quarter.lane) = sum;
  }
  __syncwarp(quarter.mask);
  // Even lanes add up the first candidate's sums in order, odd ones the second's.
  const int mine = quarter.lane & 1;
  const float4* parts = reinterpret_cast<const float4*>(sums + 16 * mine);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 part = parts[i];
    total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, part.x), part.y), part.z), part.w);
  }
  const float scale = FromHalf(mine == 0 ? smallest : other);
  total = __fmul_rn(__fmul_rn(total, scale), scale);
  const float others = __shfl_xor_sync(quarter.mask, total, 1);
  __syncwarp(quarter.mask);  // the sums are read
  return (mine == 0 ? others < total : total < others) ? other : smallest;
}

// x / s correctly rounded wherever a code's rounding can tell: x has 8 bits and s 11, so
// a quotient is a code's tie exactly (and then the residual is 0) or off it by 2^-20.
__device__ float Divide(float x, float s, float inverse) {
  const float q = __fmul_rn(x, inverse);
  return copysignf(__fmaf_rn(__fmaf_rn(-q, s, x), inverse, q), x);
}

// Quantizes the eight lanes' vector: its codes and scale go to the staged row, and x
// becomes what they stand for.
template <KvElement kElement, int kPairs>
__device__ void StoreVector(float2 (&x)[kPairs], const Quarter& quarter, float* sums,
                            uint8_t* codes_out, uint8_t* scale_out) {
  if constexpr (kElement == KvElement::kBf16) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      *reinterpret_cast<uint32_t*>(codes_out + 4 * (8 * i + quarter.lane)) =
          ptx::PackBf16(x[i].x, x[i].y);
    }
  } else {
    constexpr float kMaxCode = KvElementTraits<kElement>::kMaxCode;
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      amax = max(amax,
                 max(__float_as_uint(x[i].x) & 0x7fffffffu, __float_as_uint(x[i].y) & 0x7fffffffu));
    }
    uint16_t half = ScaleFor(MaxOfQuarter(amax, quarter), kMaxCode);
    const bool finite = half != 0x7e00;
    if constexpr (kElement == KvElement::kE4m3) {
      const uint16_t better = BetterE4m3Scale(x, half, quarter, sums);
      if (finite) half = better;
    }
    const float scale = FromHalf(half), inverse = __frcp_rn(scale);
    if (quarter.lane == 0) *reinterpret_cast<uint16_t*>(scale_out) = half;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float a = Divide(x[i].x, scale, inverse), b = Divide(x[i].y, scale, inverse);
      uint16_t codes;
      float2 value;
      if constexpr (kElement == KvElement::kE4m3) {
        codes = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
        value = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
      } else {
        const int ia = __float2int_rn(fminf(fmaxf(a, -127.0f), 127.0f));
        const int ib = __float2int_rn(fminf(fmaxf(b, -127.0f), 127.0f));
        codes = static_cast<uint16_t>((ia & 0xff) | (ib & 0xff) << 8);
        value = make_float2(static_cast<float>(ia), static_cast<float>(ib));
      }
      *reinterpret_cast<uint16_t*>(codes_out + 2 * (8 * i + quarter.lane)) =
          finite ? codes : uint16_t{0};
      x[i] = finite ? make_float2(__fmul_rn(scale, value.x), __fmul_rn(scale, value.y))
                    : make_float2(scale, scale);
    }
  }
}

template <int kDim, KvElement kK, KvElement kV>
__global__ void __launch_bounds__(kStoreThreads)
    StoreKernel(const DmsPrefillCompactParams p, const PrefillScratch scratch, int positions) {
  constexpr int kPairs = kDim / 16;
  constexpr int kKBytes = kDim * static_cast<int>(KvElementBytes(kK));
  constexpr int kVBytes = kDim * static_cast<int>(KvElementBytes(kV));
  constexpr int kScaleAt = kKBytes + kVBytes;
  constexpr int kTokenBytes =
      kScaleAt + static_cast<int>(KvScaleBytes(kK)) + static_cast<int>(KvScaleBytes(kV));
  static_assert(kTokenBytes % 4 == 0);
  __shared__ alignas(16) float sums[kStoreWarps][4][32];
  __shared__ alignas(16) uint8_t staged[kStoreWarps][2][kTokenBytes];
  __shared__ int counts[kBuckets];
  __shared__ int warp_sums[kStoreWarps];
  const DmsPrefillBatch& b = p.batch;
  ptx::WaitForPredecessors();
  if (blockIdx.x == 0) {
    if (blockIdx.y == 0) Plan<kStoreThreads>(b, scratch, positions, counts, warp_sums);
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int band = s.num_prefix + s.num_tokens;
  const int first = 2 * (static_cast<int>(blockIdx.x - 1) * kStoreWarps + warp);
  const int in_warp = lane / 16, is_v = lane / 8 % 2;
  const int item = first + in_warp;  // of [band, num_kv_heads]
  const int i = item / b.num_kv_heads, head = item - i * b.num_kv_heads;
  const Quarter quarter{.lane = lane % 8, .mask = 0xffu << (lane & ~7)};
  uint8_t* row = staged[warp][in_warp];
  if (i < band) {
    const int64_t band_at =
        (int64_t{s.band_row + i} * b.num_kv_heads + head) * kDim + 2 * quarter.lane;
    Bf16* band_out = (is_v ? b.band_v : b.band_k) + band_at;
    const bool fresh = i >= s.num_prefix;
    const Bf16* in = fresh ? (is_v ? p.v : p.k) + (s.row + i - s.num_prefix) * p.kv_stride +
                                 head * kDim + 2 * quarter.lane
                           : band_out;
    uint32_t packed[kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) packed[n] = *reinterpret_cast<const uint32_t*>(in + 16 * n);
    const int mark = scratch.marks[int64_t{head} * b.band_rows + s.band_row + i];
    if (fresh) {
      float2 x[kPairs];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        x[n] =
            make_float2(__uint_as_float(packed[n] << 16), __uint_as_float(packed[n] & 0xffff0000u));
      }
      float* own_sums = sums[warp][lane / 8];
      uint8_t* codes = is_v ? row + kKBytes : row;
      uint8_t* scale = row + kScaleAt + (is_v ? static_cast<int>(KvScaleBytes(kK)) : 0);
      if (kK == kV || !is_v) {  // one path for all lanes if the elements are of one kind
        StoreVector<kK>(x, quarter, own_sums, codes, scale);
      } else {
        StoreVector<kV>(x, quarter, own_sums, codes, scale);
      }
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        packed[n] = ptx::PackBf16(x[n].x, x[n].y);
        *reinterpret_cast<uint32_t*>(band_out + 16 * n) = packed[n];
      }
    }
    if ((mark & 1) != 0 && i < NumExpirable(band, b.window)) {
      Bf16* out = (is_v ? b.compact_v : b.compact_k) +
                  (int64_t{head} * b.compact_rows + s.compact_row + (mark >> 1)) * kDim +
                  2 * quarter.lane;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) *reinterpret_cast<uint32_t*>(out + 16 * n) = packed[n];
    }
  }
  if (p.rows == nullptr) return;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int out = first + n - s.num_prefix * b.num_kv_heads;  // of [num_tokens, num_kv_heads]
    if (out < 0 || out >= s.num_tokens * b.num_kv_heads) continue;
    auto* to =
        reinterpret_cast<uint32_t*>(p.rows + (int64_t{s.row} * b.num_kv_heads + out) * kTokenBytes);
    const auto* from = reinterpret_cast<const uint32_t*>(staged[warp][n]);
    for (int word = lane; word < kTokenBytes / 4; word += 32) to[word] = from[word];
  }
}

template <int kDim, KvElement kK, KvElement kV>
absl::Status EnqueueStore(const DmsPrefillCompactParams& p, const PrefillScratch& scratch,
                          StreamHandle stream) {
  const int64_t items = int64_t{p.batch.max_band} * p.batch.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(1 + (items + 2 * kStoreWarps - 1) / (2 * kStoreWarps)),
                  static_cast<unsigned>(p.batch.batch));
  return LaunchEarly(StoreKernel<kDim, kK, kV>, grid, kStoreThreads, 0, stream, p, scratch,
                     internal::TilePositions(kDim, p.batch.group));
}

// ---------------------------------------------------------------------------
// Lay out: the band is stored already; a warp copies the survivors among 32 band tokens of
// a head, half a warp K, half V. Grid (1 + pieces of the longest band, batch, num_kv_heads);
// the first block plans, with more threads as there is less to hide behind.

constexpr int kLayOutThreads = 1024;

template <int kDim>
__global__ void __launch_bounds__(kLayOutThreads)
    LayOutKernel(const DmsPrefillBatch b, const PrefillScratch scratch, int positions) {
  __shared__ int counts[kBuckets];
  __shared__ int warp_sums[kLayOutThreads / 32];
  ptx::WaitForPredecessors();
  if (blockIdx.x == 0) {
    if (blockIdx.y == 0 && blockIdx.z == 0)
      Plan<kLayOutThreads>(b, scratch, positions, counts, warp_sums);
    return;
  }
  using Lane = std::conditional_t<kDim == 128, uint4, uint2>;  // a vector is 16 of them
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.z;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int first = (static_cast<int>(blockIdx.x - 1) * (kLayOutThreads / 32) + warp) * 32;
  const int expirable = NumExpirable(s.num_prefix + s.num_tokens, b.window);
  if (first >= expirable) return;
  const int mark = first + lane < expirable
                       ? scratch.marks[int64_t{head} * b.band_rows + s.band_row + first + lane]
                       : 0;
  const bool is_v = lane >= 16;
  const Bf16* from =
      (is_v ? b.band_v : b.band_k) + (int64_t{s.band_row + first} * b.num_kv_heads + head) * kDim;
  Bf16* to =
      (is_v ? b.compact_v : b.compact_k) + (int64_t{head} * b.compact_rows + s.compact_row) * kDim;
  for (uint32_t kept = __ballot_sync(~0u, (mark & 1) != 0); kept != 0; kept &= kept - 1) {
    const int i = __ffs(static_cast<int>(kept)) - 1;
    const int rank = __shfl_sync(~0u, mark, i) >> 1;
    reinterpret_cast<Lane*>(to + int64_t{rank} * kDim)[lane % 16] =
        reinterpret_cast<const Lane*>(from + int64_t{i} * b.num_kv_heads * kDim)[lane % 16];
  }
}

template <int kDim>
absl::Status EnqueueLayOut(const DmsPrefillBatch& b, const PrefillScratch& scratch,
                           StreamHandle stream) {
  const int expirable = NumExpirable(b.max_band, b.window);
  const dim3 grid(1 + static_cast<unsigned>((expirable + kLayOutThreads - 1) / kLayOutThreads),
                  static_cast<unsigned>(b.batch), static_cast<unsigned>(b.num_kv_heads));
  return LaunchEarly(LayOutKernel<kDim>, grid, kLayOutThreads, 0, stream, b, scratch,
                     internal::TilePositions(kDim, b.group));
}

template <int kDim>
absl::Status EnqueueStore(const DmsPrefillCompactParams& p, const PrefillScratch& scratch,
                          StreamHandle stream) {
  switch (p.format) {
    case KvFormatId::kBf16:
      return EnqueueStore<kDim, KvElement::kBf16, KvElement::kBf16>(p, scratch, stream);
    case KvFormatId::kFp8:
      return EnqueueStore<kDim, KvElement::kE4m3, KvElement::kE4m3>(p, scratch, stream);
    case KvFormatId::kInt8:
    case KvFormatId::kInt8H:
      return EnqueueStore<kDim, KvElement::kInt8, KvElement::kInt8>(p, scratch, stream);
    case KvFormatId::kK8V8:
      return EnqueueStore<kDim, KvElement::kInt8, KvElement::kE4m3>(p, scratch, stream);
  }
  return absl::InternalError("dms_prefill: unknown format");
}

}  // namespace

absl::Status LaunchDmsPrefillCompact(const DmsPrefillCompactParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillCompact(params));
  const DmsPrefillBatch& b = params.batch;
  if (b.batch == 0) return absl::OkStatus();
  const PrefillScratch scratch = internal::ScratchOf(b);
  const dim3 heads(static_cast<unsigned>(b.num_kv_heads), static_cast<unsigned>(b.batch));
  MarkKernel<<<heads, kScanThreads, 0, stream>>>(params, scratch);
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetLastError()));
  if (params.k == nullptr) {
    return b.head_dim == 64 ? EnqueueLayOut<64>(b, scratch, stream)
                            : EnqueueLayOut<128>(b, scratch, stream);
  }
  return b.head_dim == 64 ? EnqueueStore<64>(params, scratch, stream)
                          : EnqueueStore<128>(params, scratch, stream);
}

}  // namespace winnow::kernels
