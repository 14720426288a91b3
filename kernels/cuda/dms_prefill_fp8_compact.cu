#include <cuda_runtime.h>

#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_prefill_fp8.h"
#include "kernels/cuda/dms_prefill_fp8_scales.h"
#include "kernels/cuda/dms_prefill_marks.cuh"
#include "kernels/cuda/dms_prefill_store.cuh"
#include "kernels/cuda/dms_prefill_tiles.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace {

using internal::kBuckets;
using internal::kMarkThreads;
using internal::NumExpirable;
using internal::PrefillFp8Octaves;
using internal::PrefillFp8Scale;
using internal::PrefillFp8Scales;
using internal::PrefillFp8ScalesOf;
using internal::PrefillFp8ShiftCode;
using internal::PrefillFp8SumCodes;
using internal::PrefillScratch;

constexpr int kDim = kPrefillFp8Dim, kChannels = kPrefillFp8Channels;
constexpr int kTokens = 64;  // of a KV head, a block of the store
constexpr int kTurns = 2, kStoreThreads = 8 * kTokens / kTurns;
constexpr int kStoreBlocks = 2 * kTurns;  // an SM
constexpr int kTokenBytes = static_cast<int>(TokenBytes(KvFormatId::kFp8, kDim));

struct CompactArgs {
  DmsPrefillCompactParams p;  // without the BF16 tensors
  DmsPrefillFp8Rows band, compact;
  const uint8_t* prefix_rows;
};

// A pointer of `rows` to the first row of a head.
__device__ DmsPrefillFp8Rows OfHead(const DmsPrefillFp8Rows& all, int64_t first_row) {
  return {.k = all.k + first_row * kDim,
          .v = all.v + first_row * kChannels,
          .scales = all.scales + first_row * 2};
}

// Marks, and zeros for the values that share the last survivors' 16 rows: a weight of 0
// meets them.
__global__ void __launch_bounds__(kMarkThreads, 1)
    MarkFp8Kernel(const CompactArgs args, const PrefillScratch scratch) {
  ptx::WaitForPredecessors();
  ptx::LetDependentsStart();
  const DmsPrefillBatch& b = args.p.batch;
  const int head = blockIdx.x;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int count = internal::MarkPiece(args.p, scratch, s);
  if (count < 0) return;
  const DmsPrefillFp8Rows compact = OfHead(args.compact, int64_t{head} * b.compact_rows);
  const int first = s.compact_row + count, past = -count & 15;
  for (int i = threadIdx.x; i < past * kChannels; i += kMarkThreads) {
    compact.v[PrefillFp8ValueByte(first + i / kChannels, i % kChannels)] = 0;
  }
  if (static_cast<int>(threadIdx.x) < past) {
    uint16_t* at = compact.scales + PrefillFp8ScaleAt(first + static_cast<int>(threadIdx.x));
    at[0] = at[2] = 1;
  }
}

// ---------------------------------------------------------------------------
// Store: a block of kStoreThreads takes kTokens tokens of one KV head: quantizes them,
// four lanes a vector, into shared memory, and writes them from there to the flat rows,
// the band and the survivors. Grid (1 + pieces of the longest band, batch); the first
// block plans.

constexpr int kStagedBytes = kDim + kChannels + 8;  // a token's; the 8 spread rows over the banks

struct Staged {
  alignas(16) uint8_t codes[kTokens][kStagedBytes];  // K, then V's channels
  alignas(4) uint16_t scales[kTokens][2];
  float v_scale[kTokens];     // as laid out
  int octaves[kTokens];       // that V's codes are made smaller by
  uint32_t largest;           // of V's scales, the bits of a float
  uint8_t survivor[kTokens];  // the token of the block's n-th survivor
};

__device__ void WriteScales(const DmsPrefillFp8Rows& to, int row, const Staged& staged, int token) {
  uint16_t* at = to.scales + PrefillFp8ScaleAt(row);
  const PrefillFp8Scales x = PrefillFp8ScalesOf(staged.scales[token][0], staged.v_scale[token]);
  at[0] = x.k;
  at[2] = x.v;
}

// Sixteen keys of a channel in the order of PrefillFp8ValueByte(); key k is token
// `token(k)`.
template <typename Token>
__device__ uint4 GatherValues(const Staged& staged, int channel, Token token) {
  uint32_t words[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    words[t] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = i / 2 * 8 + 2 * t + i % 2;
      words[t] |= static_cast<uint32_t>(staged.codes[token(key)][kDim + channel]) << (8 * i);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The tokens [first, first + 16 * blocks16) of the band; `row` is first's.
__device__ void WriteBand(const Staged& staged, const DmsPrefillFp8Rows& band, int row,
                          int blocks16) {
  auto* k = reinterpret_cast<uint4*>(band.k + int64_t{row} * kDim);
  auto* v = reinterpret_cast<uint4*>(band.v + int64_t{row} * kChannels);
  for (int i = threadIdx.x; i < blocks16 * 128; i += kStoreThreads) {
    const int token = i / 64 * 8 + i % 8, column = i / 8 % 8;
    k[i] = *reinterpret_cast<const uint4*>(&staged.codes[token][16 * column]);
  }
  for (int i = threadIdx.x; i < blocks16 * kChannels; i += kStoreThreads) {
    const int block = i / kChannels;
    v[i] = GatherValues(staged, i % kChannels, [&](int key) { return block * 16 + key; });
  }
  for (int i = threadIdx.x; i < blocks16 * 16; i += kStoreThreads) {
    WriteScales(band, row + i, staged, i);
  }
}

// The block's `count` survivors; `row` is the first one's.
__device__ void WriteSurvivors(const Staged& staged, const DmsPrefillFp8Rows& compact, int row,
                               int count) {
  for (int i = threadIdx.x; i < count * 8; i += kStoreThreads) {
    const int n = i / 8, column = i % 8;
    *reinterpret_cast<uint4*>(compact.k + PrefillFp8KeyByte(row + n, 16 * column)) =
        *reinterpret_cast<const uint4*>(&staged.codes[staged.survivor[n]][16 * column]);
  }
  // Whole blocks of 16 keys, then the rest byte by byte, as other blocks own what lies between;
  // lanes take one channel's keys, which are neighbours, before the next channel's.
  const int lead = min(count, -row & 15), whole = (count - lead) / 16, rest = count - 16 * whole;
  auto* v = reinterpret_cast<uint4*>(compact.v + int64_t{row + lead} * kChannels);
  for (int i = threadIdx.x; i < whole * kChannels; i += kStoreThreads) {
    const int n = lead + i / kChannels * 16;
    v[i] = GatherValues(staged, i % kChannels, [&](int key) { return staged.survivor[n + key]; });
  }
  const uint32_t inverse = ((1u << 20) + rest - 1) / max(rest, 1);  // exact: i < 2^12, rest < 32
  for (int i = threadIdx.x; i < rest * kChannels; i += kStoreThreads) {
    const int channel = static_cast<int>(static_cast<uint32_t>(i) * inverse >> 20);
    int n = i - channel * rest;
    if (n >= lead) n += 16 * whole;
    compact.v[PrefillFp8ValueByte(row + n, channel)] =
        staged.codes[staged.survivor[n]][kDim + channel];
  }
  for (int n = threadIdx.x; n < count; n += kStoreThreads) {
    WriteScales(compact, row + n, staged, staged.survivor[n]);
  }
}

// Quantizes (or for a prefix token copies, or past the band zeroes) four tokens, from `token` of
// the block's on, and writes those of the chunk to the flat rows, if wanted. All lanes of a warp.
__device__ __forceinline__ void Stage(const CompactArgs& args, const DmsPrefillSequence& s,
                                      int head, int first, int token, Staged& staged) {
  const DmsPrefillBatch& b = args.p.batch;
  const uint32_t lane = threadIdx.x % 32, four = lane % 4;
  const int is_v = lane / 4 % 2, own = token + static_cast<int>(lane / 8), i = first + own;
  const auto fresh = [&](int n) { return n >= s.num_prefix && n < s.num_prefix + s.num_tokens; };
  uint32_t x[kDim / 8] = {};  // of two values
  if (fresh(i)) {
    const Bf16* in = (is_v ? args.p.v : args.p.k) + (s.row + i - s.num_prefix) * args.p.kv_stride +
                     head * kDim + 8 * four;
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 4) {
      const uint4 piece = *reinterpret_cast<const uint4*>(in + 8 * n);
      x[n] = piece.x;
      x[n + 1] = piece.y;
      x[n + 2] = piece.z;
      x[n + 3] = piece.w;
    }
  }
  uint8_t* codes = staged.codes[own] + is_v * kDim;
  auto* scale = reinterpret_cast<uint8_t*>(&staged.scales[own][is_v]);
  internal::StoreVector<KvElement::kE4m3, ~0u>(x, four, codes, scale);  // all lanes go along
  if (!fresh(i)) {
    const uint8_t* from =
        args.prefix_rows + (int64_t{s.band_row + i} * b.num_kv_heads + head) * kTokenBytes;
    const bool prefix = i < s.num_prefix;
    for (int n = 0; n < kDim / 16; ++n) {  // the words that this thread has written
      const uint32_t at = 32 * (n / 2) + 8 * four + 4 * (n % 2);
      *reinterpret_cast<uint32_t*>(codes + at) =
          prefix ? *reinterpret_cast<const uint32_t*>(from + is_v * kDim + at) : 0;
    }
    if (four == 0) {
      staged.scales[own][is_v] =
          prefix ? reinterpret_cast<const uint16_t*>(from + 2 * kDim)[is_v] : 0;
    }
  }
  if (args.p.rows == nullptr) return;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int t = first + token + n;
    if (!fresh(t)) continue;
    auto* to = reinterpret_cast<uint32_t*>(
        args.p.rows + (int64_t{s.row + t - s.num_prefix} * b.num_kv_heads + head) * kTokenBytes);
    const auto* words = reinterpret_cast<const uint32_t*>(staged.codes[token + n]);
    to[lane] = words[lane];
    to[lane + 32] = words[lane + 32];
    if (lane == 0) to[64] = *reinterpret_cast<const uint32_t*>(staged.scales[token + n]);
  }
}

// Brings the block's scales of V together and sets what sums of weights need. All threads.
__device__ void LevelScales(Staged& staged) {
  const int tid = static_cast<int>(threadIdx.x);
  float scale = 0.0f;
  int own_octaves = 0;
  if (tid < kTokens) {
    scale = PrefillFp8Scale(staged.scales[tid][1]);
    if (scale < INFINITY) atomicMax(&staged.largest, __float_as_uint(scale));
  }
  __syncthreads();
  if (tid < kTokens) {
    own_octaves = PrefillFp8Octaves(scale, __uint_as_float(staged.largest));
    scale = ldexpf(scale, own_octaves);
    staged.octaves[tid] = own_octaves;
    staged.v_scale[tid] = scale;
    *reinterpret_cast<uint2*>(&staged.codes[tid][2 * kDim]) = PrefillFp8SumCodes(scale);
  }
  if (__syncthreads_or(own_octaves) == 0) return;
  for (int i = tid; i < kTokens * kDim; i += kStoreThreads) {
    const int octaves = staged.octaves[i / kDim];
    if (octaves == 0) continue;
    uint8_t& code = staged.codes[i / kDim][kDim + i % kDim];
    code = PrefillFp8ShiftCode(code, octaves);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kStoreThreads, kStoreBlocks)
    StoreFp8Kernel(const CompactArgs args, const PrefillScratch scratch, int positions) {
  __shared__ union {
    Staged staged;
    int counts[kBuckets];
  } memory;
  __shared__ int warp_sums[kStoreThreads / 32];
  const DmsPrefillBatch& b = args.p.batch;
  if (blockIdx.x == 0) {
    ptx::WaitForPredecessors();
    if (blockIdx.y == 0)
      internal::Plan<kStoreThreads>(b, scratch, positions, memory.counts, warp_sums);
    return;
  }
  Staged& staged = memory.staged;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int band = s.num_prefix + s.num_tokens;
  const int piece = static_cast<int>(blockIdx.x) - 1;
  const int head = piece % b.num_kv_heads, first = piece / b.num_kv_heads * kTokens;
  if (first >= band) return;
  if (threadIdx.x == 0) staged.largest = 0;
#pragma unroll  // ptxas spills hundreds of bytes in a loop
  for (int turn = 0; turn < kTurns; ++turn) {
    const int warp = static_cast<int>(threadIdx.x / 32);
    Stage(args, s, head, first, 4 * (turn * kStoreThreads / 32 + warp), staged);
  }
  ptx::WaitForPredecessors();
  const int32_t* marks = scratch.marks + int64_t{head} * b.band_rows + s.band_row + first;
  const int rank = marks[0] >> 1;  // of the first survivor from here on
  const int laid_out = min(kTokens, NumExpirable(band, b.window) - first);
  bool survives = false;
  if (static_cast<int>(threadIdx.x) < laid_out) {
    const int mark = marks[threadIdx.x];
    survives = (mark & 1) != 0;
    if (survives) staged.survivor[(mark >> 1) - rank] = static_cast<uint8_t>(threadIdx.x);
  }
  const int count = __syncthreads_count(survives);
  LevelScales(staged);
  WriteBand(staged, OfHead(args.band, int64_t{head} * b.band_rows), s.band_row + first,
            min(kTokens / 16, (band - first + 15) / 16));
  WriteSurvivors(staged, OfHead(args.compact, int64_t{head} * b.compact_rows), s.compact_row + rank,
                 count);
}

}  // namespace

absl::Status LaunchDmsPrefillFp8Compact(const DmsPrefillFp8CompactParams& params,
                                        StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillFp8Compact(params));
  const DmsPrefillBatch& b = params.batch.rows;
  if (b.batch == 0) return absl::OkStatus();
  const PrefillScratch scratch = internal::ScratchOf(b);
  const CompactArgs args{.p = {.batch = b,
                               .format = KvFormatId::kFp8,
                               .k = params.k,
                               .v = params.v,
                               .kv_stride = params.kv_stride,
                               .decisions = params.decisions,
                               .prefix_evict = params.prefix_evict,
                               .rows = params.rows},
                         .band = params.batch.band,
                         .compact = params.batch.compact,
                         .prefix_rows = params.prefix_rows};
  WINNOW_RETURN_IF_ERROR(
      LaunchEarly(MarkFp8Kernel, internal::MarkGrid(b), kMarkThreads, 0, stream, args, scratch));
  const int pieces = (b.max_band + kTokens - 1) / kTokens * b.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(1 + pieces), static_cast<unsigned>(b.batch));
  return LaunchEarly(StoreFp8Kernel, grid, kStoreThreads, 0, stream, args, scratch,
                     internal::TilePositions(kDim, b.group));
}

}  // namespace winnow::kernels
