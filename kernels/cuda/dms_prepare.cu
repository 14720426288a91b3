#include <cuda_bf16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/device_limits.cuh"
#include "kernels/cuda/dms_prepare.h"
#include "kernels/cuda/head_vector.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/store_vector.cuh"

namespace winnow::kernels {
namespace {

using internal::HeadVector;
using internal::Quarter;

constexpr int kPairs = 32;  // (token, KV head) pairs of a block
constexpr int kMaxGroup = 16;
constexpr int kStoreWarps = 4;      // two for K, two for V, which cost more than queries
constexpr int kSumFloats = 4 * 32;  // of such a warp: partial sums of a quantization's error
constexpr unsigned kAll = 0xffffffffu;

// A tile is kPairs vectors, read, worked on and written in place. Eight vectors in a row meet
// all banks with 16 bytes each, and so do four that are eight or four vectors apart with a
// word a lane of eight.
template <int kDim>
struct Tile {
  static constexpr unsigned kStride = 2 * kDim + 16;  // bytes
  static constexpr unsigned kBytes = kPairs * kStride + kPairs / 8 * 32;
  static constexpr unsigned kChunks = kDim / 8;      // of 16 bytes a vector
  static constexpr unsigned kAtOnce = 32 / kChunks;  // vectors that a warp copies
  static constexpr __host__ __device__ unsigned At(unsigned j) { return j * kStride + j / 8 * 32; }
};

template <KvElement kK, KvElement kV, int kDim>
struct Row {
  static constexpr int kVAt = kDim * static_cast<int>(KvElementBytes(kK));
  static constexpr int kKScaleAt = kVAt + kDim * static_cast<int>(KvElementBytes(kV));
  static constexpr int kVScaleAt = kKScaleAt + static_cast<int>(KvScaleBytes(kK));
  static constexpr int kBytes = kVScaleAt + static_cast<int>(KvScaleBytes(kV));
  static_assert(kBytes % 4 == 0);
};

// What a warp does for the block's pairs: one query head of the group for all of them, or K
// or V of a half.
struct Place {
  int first, num;  // the block's pairs: of [num_tokens, num_kv_heads] from `first` on
  unsigned warp;   // query head in the group, or half
  bool is_key;     // K; otherwise V
  uint8_t* tile;
  uint8_t* staged;  // [kPairs] flat rows
  float* sums;      // [4][32]
};

// 1 / root mean square of a vector, as dms_compact.cc's: the sum of squares runs upwards.
template <int kDim>
__device__ float NormScale(const uint8_t* vector, float eps) {
  float sum = 0.0f;
#pragma unroll 2
  for (int i = 0; i < kDim / 8; ++i) {
    const uint4 x = reinterpret_cast<const uint4*>(vector)[i];
    for (const uint32_t pair : {x.x, x.y, x.z, x.w}) {
      const float lo = __uint_as_float(pair << 16), hi = __uint_as_float(pair & 0xffff0000u);
      sum = __fadd_rn(__fadd_rn(sum, __fmul_rn(lo, lo)), __fmul_rn(hi, hi));
    }
  }
  const float mean = __fdiv_rn(sum, static_cast<float>(kDim));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

__device__ bool Evicts(const DecisionRule& rule, float u) {
  return __fsub_rn(__fmul_rn(u, rule.scale), rule.offset) > 0.0f;
}

// The pair's decision by the warp of the group's first query head; `vector` is that as it
// came, `scale` its norm's if it has one.
template <int kDim>
__device__ void Decide(const DmsPrepareParams& p, int row, int g, const uint8_t* vector,
                       float scale) {
  const DecisionRule& rule = p.rule;
  const int heads = p.batch.num_kv_heads;
  uint8_t* out = p.decisions + int64_t{row} * heads;
  if (rule.source == DecisionSource::kNone || rule.source == DecisionSource::kLogits) {
    bool evict = false;
    if (rule.source == DecisionSource::kLogits) {
      evict = Evicts(rule, p.logit_inputs[row * p.logit_stride + (rule.per_layer ? 0 : g)]);
    }
    out[g] = evict ? 1 : 0;
    return;
  }
  if (rule.per_layer && g != 0) return;
  const uint32_t last = reinterpret_cast<const uint32_t*>(vector)[kDim / 2 - 1];
  float u = __uint_as_float(last & 0xffff0000u);
  if (rule.source == DecisionSource::kBorrowedAfterQNorm && p.q_norm != nullptr) {
    u = __fmul_rn(__fmul_rn(u, scale), p.q_norm[kDim - 1]);
  }
  if (rule.round_to_bf16) u = __bfloat162float(__float2bfloat16_rn(u));
  const uint8_t evict = Evicts(rule, u) ? 1 : 0;
  for (int h = g; h < (rule.per_layer ? heads : g + 1); ++h) out[h] = evict;
}

template <bool kIsQuery, KvElement kK, KvElement kV, int kDim, bool kRotated>
__device__ __forceinline__ void RunPart(const DmsPrepareParams& p, const DmsPrefillSequence& s,
                                        const Place& place, unsigned lane) {
  using R = Row<kK, kV, kDim>;
  using T = Tile<kDim>;
  constexpr unsigned kCount = kIsQuery ? kPairs : kPairs / 2, kTurns = kCount / 4;
  constexpr int kParts = kDim / 16, kHalf = kDim / 32;
  const DmsPrefillBatch& b = p.batch;
  const bool roped = kIsQuery || place.is_key;
  const int first = kIsQuery ? 0 : static_cast<int>(place.warp * kCount);  // of the tile
  // A lane's own pair, the last one's again past the end.
  const int own = min(first + static_cast<int>(lane % kCount), place.num - 1);
  const int own_token = (place.first + own) / b.num_kv_heads;
  const int own_g = place.first + own - own_token * b.num_kv_heads, own_row = s.row + own_token;
  const int head = kIsQuery ? own_g * b.group + static_cast<int>(place.warp) : own_g;
  const uint32_t at = static_cast<uint32_t>(head) * T::kChunks;
  const auto row_of = [](int row, int64_t stride) {  // of eight elements
    return static_cast<uint32_t>(row) * static_cast<uint32_t>(stride / 8);
  };
  const unsigned chunk = lane % T::kChunks, line = lane / T::kChunks;
  uint8_t* tile = place.tile + T::At(static_cast<unsigned>(first));
  uint8_t* own_chunk = tile + line * T::kStride + 16 * chunk;
  {
    const Bf16* in = (kIsQuery ? p.q : place.is_key ? p.k : p.v) + 8 * chunk;
    const uint32_t own_in = row_of(own_row, kIsQuery ? p.q_stride : p.kv_stride) + at;
#pragma unroll 8
    for (unsigned i = 0; i < kCount; i += T::kAtOnce) {
      const uint32_t from = __shfl_sync(kAll, own_in, i + line);
      __pipeline_memcpy_async(own_chunk + T::At(i), in + uint64_t{from} * 8, 16);
    }
  }
  __pipeline_commit();
  const Quarter quarter{.lane = static_cast<int>(lane % 8), .mask = kAll};
  const float* norm = kIsQuery ? p.q_norm : place.is_key ? p.k_norm : nullptr;
  float2 weight[kParts];
  if (norm != nullptr) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      weight[i] = *reinterpret_cast<const float2*>(norm + 16 * i + 2 * quarter.lane);
    }
  }
  const int own_position = roped ? p.positions[own_row] : 0;
  __pipeline_wait_prior(0);
  __syncwarp();
  float own_scale = 0.0f;
  if (lane < kCount) {
    const uint8_t* vector = tile + T::At(lane);
    if (norm != nullptr) own_scale = NormScale<kDim>(vector, p.norm_eps);
    if (kIsQuery && place.warp == 0 && static_cast<int>(lane) < place.num &&
        p.decisions != nullptr) {
      Decide<kDim>(p, own_row, own_g, vector, own_scale);
    }
  }
  __syncwarp();

  // Each eight lanes take neighbours, mostly of one token.
  const unsigned own_first = lane / 8 * kTurns;
  auto* vector = reinterpret_cast<uint32_t*>(tile + T::At(own_first)) + quarter.lane;
  uint8_t* row = place.staged + (static_cast<unsigned>(first) + own_first) * R::kBytes;
  const bool zero =
      kIsQuery && place.warp == 0 && quarter.lane == 7 && p.rule.zeroing != ChannelZeroing::kNone;
  int table_row = -1;
  float2 cos[kHalf], sin[kHalf];
#pragma unroll 1
  for (unsigned turn = 0; turn < kTurns; ++turn, vector += T::kStride / 4, row += R::kBytes) {
    HeadVector<kDim> x;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const uint32_t pair = vector[8 * i];
      x[i] = make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    if (roped) {
      if (norm != nullptr) {
        const float scale = __shfl_sync(kAll, own_scale, own_first + turn);
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          x[i].x = __fmul_rn(__fmul_rn(x[i].x, scale), weight[i].x);
          x[i].y = __fmul_rn(__fmul_rn(x[i].y, scale), weight[i].y);
        }
      }
      if (zero) x[kParts - 1].y = 0.0f;
      const int position = __shfl_sync(kAll, own_position, own_first + turn);
      if (position != table_row) {
        table_row = position;
        const int64_t table = int64_t{position} * (kDim / 2) + 2 * quarter.lane;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
          cos[i] = *reinterpret_cast<const float2*>(p.rope_cos + table + 16 * i);
          sin[i] = *reinterpret_cast<const float2*>(p.rope_sin + table + 16 * i);
        }
      }
      internal::RopeVector<kDim>(cos, sin, x);
      if (zero && p.rule.zeroing == ChannelZeroing::kBeforeAndAfterRope) {
        x[kParts - 1].y = 0.0f;
      }
    }
    if constexpr (kRotated) internal::RotateVector<kDim>(quarter.lane, x);
    if constexpr (!kIsQuery) {
      uint8_t* codes = row + (place.is_key ? 0 : R::kVAt);
      uint8_t* scale = row + (place.is_key ? R::kKScaleAt : R::kVScaleAt);
      float* sums = place.sums + lane / 8 * 32;
      if (kK == kV || place.is_key) {
        internal::StoreVector<kK>(x, quarter, sums, codes, scale);
      } else {
        internal::StoreVector<kV>(x, quarter, sums, codes, scale);
      }
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) vector[8 * i] = ptx::PackBf16(x[i].x, x[i].y);
  }
  __syncwarp();

  Bf16* out = (kIsQuery ? p.q_out : place.is_key ? b.band_k : b.band_v) + 8 * chunk;
  const uint32_t own_out = at + (kIsQuery ? row_of(own_row, p.q_out_stride)
                                          : row_of(s.band_row + s.num_prefix + own_token,
                                                   int64_t{b.num_kv_heads} * kDim));
#pragma unroll 8
  for (unsigned i = 0; i < kCount; i += T::kAtOnce) {
    const uint32_t to = __shfl_sync(kAll, own_out, i + line);
    if (first + static_cast<int>(i + line) < place.num) {
      *reinterpret_cast<uint4*>(out + uint64_t{to} * 8) =
          *reinterpret_cast<const uint4*>(own_chunk + T::At(i));
    }
  }
}

// Grid (twice the blocks of kPairs pairs of the longest chunk, batch): even blocks have the
// queries, a warp a head of the group, odd ones K and V. Shared memory: a tile for each query
// head of a group, or for K, for V, and the pairs' flat rows.
// Registers are for six blocks an SM, nine at head_dim 64, whose blocks wait for loads more.
template <KvElement kK, KvElement kV, int kDim, bool kRotated>
__global__ void __maxnreg__(kDim == 64 ? 56 : 80)
    PrepareKernel(const __grid_constant__ DmsPrepareParams p) {
  using R = Row<kK, kV, kDim>;
  using T = Tile<kDim>;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ alignas(16) float sums[kStoreWarps][kSumFloats];
  const DmsPrefillBatch& b = p.batch;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int first = static_cast<int>(blockIdx.x / 2) * kPairs;
  const int num = min(kPairs, s.num_tokens * b.num_kv_heads - first);
  if (num <= 0) return;
  uint8_t* staged = shared + 2 * T::kBytes;
  Place place{.first = first,
              .num = num,
              .warp = warp,
              .is_key = false,
              .tile = shared + warp * T::kBytes,
              .staged = staged,
              .sums = nullptr};
  if (blockIdx.x % 2 == 0) {
    if (warp < static_cast<unsigned>(b.group)) {
      RunPart<true, kK, kV, kDim, kRotated>(p, s, place, lane);
    }
    return;
  }
  if (warp >= kStoreWarps) return;
  place.warp = warp % 2;
  place.tile = shared + warp / 2 * T::kBytes;
  place.sums = sums[warp];
  place.is_key = warp < 2;
  RunPart<false, kK, kV, kDim, kRotated>(p, s, place, lane);
  if (p.rows == nullptr) return;
  constexpr unsigned kThreads = 32 * kStoreWarps;
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");  // the rows are staged
  auto* to =
      reinterpret_cast<uint32_t*>(p.rows + (int64_t{s.row} * b.num_kv_heads + first) * R::kBytes);
  const unsigned words = static_cast<unsigned>(num * R::kBytes / 4);
  for (unsigned i = threadIdx.x; i < words; i += kThreads) {
    to[i] = reinterpret_cast<const uint32_t*>(staged)[i];
  }
}

// Dynamic shared memory, where a flat row has `row_bytes`.
template <int kDim>
int DynamicBytes(int group, int row_bytes) {
  constexpr int kTile = static_cast<int>(Tile<kDim>::kBytes);
  return std::max(group * kTile, 2 * kTile + kPairs * row_bytes);
}

template <KvElement kK, KvElement kV, int kDim, bool kRotated = false>
absl::Status Enqueue(const DmsPrepareParams& p, cudaStream_t stream) {
  const DmsPrefillBatch& b = p.batch;
  const int64_t pairs = int64_t{b.max_band} * b.num_kv_heads;
  const dim3 grid(2 * static_cast<unsigned>((pairs + kPairs - 1) / kPairs),
                  static_cast<unsigned>(b.batch));
  const unsigned threads = 32 * static_cast<unsigned>(std::max(b.group, kStoreWarps));
  const int bytes = DynamicBytes<kDim>(b.group, Row<kK, kV, kDim>::kBytes);
  WINNOW_ASSIGN_OR_RETURN(const int limit, SharedBytesLimit());
  WINNOW_RETURN_IF_ERROR(CheckDmsPrepareSharedBytes(p, limit));
  const auto kernel = PrepareKernel<kK, kV, kDim, kRotated>;
  WINNOW_RETURN_IF_ERROR(
      CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)));
  kernel<<<grid, threads, static_cast<size_t>(bytes), stream>>>(p);
  return CudaStatus(cudaGetLastError());
}

template <int kDim>
absl::Status Enqueue(const DmsPrepareParams& p, cudaStream_t stream) {
  switch (p.format) {
    case KvFormatId::kBf16:
      return Enqueue<KvElement::kBf16, KvElement::kBf16, kDim>(p, stream);
    case KvFormatId::kFp8:
      return Enqueue<KvElement::kE4m3, KvElement::kE4m3, kDim>(p, stream);
    case KvFormatId::kInt8:
      return Enqueue<KvElement::kInt8, KvElement::kInt8, kDim>(p, stream);
    case KvFormatId::kInt8H:
      return Enqueue<KvElement::kInt8, KvElement::kInt8, kDim, true>(p, stream);
    case KvFormatId::kK8V8:
      return Enqueue<KvElement::kInt8, KvElement::kE4m3, kDim>(p, stream);
  }
  return absl::InternalError("dms_prepare: unknown format");
}

absl::Status CheckPointer(const char* field, const void* pointer, bool needed,
                          uintptr_t alignment) {
  if (needed && pointer == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("dms_prepare: ", field, " is null"));
  }
  if (Aligned(pointer, alignment)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("dms_prepare: ", field, " is not aligned to ", alignment, " bytes"));
}

// Offsets are counted in 32 bits, eight elements each.
absl::Status CheckStride(const char* field, int64_t stride, int least, int rows) {
  if (stride >= least && stride % 8 == 0 && stride / 8 * rows <= INT32_MAX) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("dms_prepare: ", field, "=", stride,
                                                 " is less than ", least,
                                                 ", not a multiple of 8 or too large"));
}

}  // namespace

absl::Status ValidateDmsPrepare(const DmsPrepareParams& p) {
  const DmsPrefillBatch& b = p.batch;
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillBatch(b));
  if (b.group > kMaxGroup) {
    return absl::UnimplementedError(
        absl::StrCat("dms_prepare: group=", b.group, " is more than ", kMaxGroup));
  }
  if (static_cast<size_t>(p.format) >= std::size(kKvFormats)) {
    return absl::InvalidArgumentError(
        absl::StrCat("dms_prepare: format=", static_cast<int>(p.format)));
  }
  const int row = b.num_kv_heads * b.head_dim;
  WINNOW_RETURN_IF_ERROR(CheckStride("q_stride", p.q_stride, row * b.group, b.num_rows));
  WINNOW_RETURN_IF_ERROR(CheckStride("q_out_stride", p.q_out_stride, row * b.group, b.num_rows));
  WINNOW_RETURN_IF_ERROR(CheckStride("kv_stride", p.kv_stride, row, b.num_rows));
  WINNOW_RETURN_IF_ERROR(CheckStride("band_rows", row, row, b.band_rows));
  WINNOW_RETURN_IF_ERROR(CheckPointer("q", p.q, true, 16));
  WINNOW_RETURN_IF_ERROR(CheckPointer("k", p.k, true, 16));
  WINNOW_RETURN_IF_ERROR(CheckPointer("v", p.v, true, 16));
  WINNOW_RETURN_IF_ERROR(CheckPointer("q_out", p.q_out, true, 16));
  WINNOW_RETURN_IF_ERROR(CheckPointer("q_norm", p.q_norm, false, 8));
  WINNOW_RETURN_IF_ERROR(CheckPointer("k_norm", p.k_norm, false, 8));
  WINNOW_RETURN_IF_ERROR(CheckPointer("positions", p.positions, true, 4));
  WINNOW_RETURN_IF_ERROR(CheckPointer("rope_cos", p.rope_cos, true, 8));
  WINNOW_RETURN_IF_ERROR(CheckPointer("rope_sin", p.rope_sin, true, 8));
  WINNOW_RETURN_IF_ERROR(CheckPointer("rows", p.rows, false, 4));
  const bool logits = p.rule.source == DecisionSource::kLogits && p.decisions != nullptr;
  WINNOW_RETURN_IF_ERROR(CheckPointer("logit_inputs", p.logit_inputs, logits, 4));
  if (p.q_out == p.q && p.q_out_stride != p.q_stride) {
    return absl::InvalidArgumentError("dms_prepare: q_out is q with another stride");
  }
  return absl::OkStatus();
}

absl::Status CheckDmsPrepareSharedBytes(const DmsPrepareParams& p, int64_t limit) {
  const int group = p.batch.group, dim = p.batch.head_dim;
  const int row_bytes = static_cast<int>(TokenBytes(p.format, dim));
  const int bytes =
      dim == 64 ? DynamicBytes<64>(group, row_bytes) : DynamicBytes<128>(group, row_bytes);
  constexpr int kStaticBytes = sizeof(float) * kStoreWarps * kSumFloats;
  return CheckSharedBytes("dms_prepare", "group", group, bytes + kStaticBytes, limit);
}

absl::Status LaunchDmsPrepare(const DmsPrepareParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrepare(params));
  if (params.batch.batch == 0 || params.batch.max_band == 0) return absl::OkStatus();
  return params.batch.head_dim == 64 ? Enqueue<64>(params, stream) : Enqueue<128>(params, stream);
}

}  // namespace winnow::kernels
