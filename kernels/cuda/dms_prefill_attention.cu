#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "kernels/cuda/dms_prefill_sm90.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace {

using internal::PrefillScratch;

// The portable kernel: a warp a query row (position and head), 32 keys at a time, a key
// a lane for the scores and a slice of the columns a lane for the values. A row's own
// survivors end where its own window begins, so nothing is masked. Grid (pieces of the
// longest chunk's rows, batch). Shared memory: the queries as floats.

constexpr int kPortableWarps = 4;

// Elements 2 i and 2 i + 1 of a BF16 row as floats.
__device__ float2 BothHalves(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

template <int kDim>
__global__ void __launch_bounds__(32 * kPortableWarps)
    PortableKernel(const DmsPrefillCudaParams p, const PrefillScratch scratch) {
  __shared__ alignas(16) float queries[kPortableWarps][kDim];
  constexpr int kPairs = kDim / 64;  // of output columns a lane
  const DmsPrefillBatch& b = p.batch;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, heads = b.num_kv_heads * b.group;
  const DmsPrefillSequence s = b.sequences[blockIdx.y];
  const int item = static_cast<int>(blockIdx.x) * kPortableWarps + warp;
  const int position = item / heads, query_head = item % heads, head = query_head / b.group;
  if (position >= s.num_tokens) return;
  const Bf16* q = p.q + (s.row + position) * p.q_stride + query_head * kDim;
  for (int i = lane; i < kDim / 2; i += 32) {
    const float2 x = BothHalves(*reinterpret_cast<const uint32_t*>(q + 2 * i));
    queries[warp][2 * i] = x.x;
    queries[warp][2 * i + 1] = x.y;
  }
  __syncwarp();

  const int newest = s.num_prefix + position, oldest = max(0, newest - b.window);
  int num_survivors = 0;
  if (newest > b.window) {
    num_survivors = scratch.marks[int64_t{head} * b.band_rows + s.band_row + oldest] >> 1;
  } else if (b.num_survivors != nullptr) {
    num_survivors = b.num_survivors[blockIdx.y * b.num_kv_heads + head];
  }
  const int num_keys = num_survivors + newest - oldest + 1;
  const int64_t compact_at = (int64_t{head} * b.compact_rows + s.compact_row) * kDim;
  const int64_t band_stride = int64_t{b.num_kv_heads} * kDim;
  const int64_t band_at = (s.band_row + oldest) * band_stride + head * kDim;
  // Key `i` of the list in K or V.
  const auto row_of = [&](int i, const Bf16* compact, const Bf16* band) {
    return i < num_survivors ? compact + compact_at + int64_t{i} * kDim
                             : band + band_at + (i - num_survivors) * band_stride;
  };

  const float scale_log2 = p.scale * 1.44269504088896340736f;
  float highest = -INFINITY, sum = 0.0f;
  float2 out[kPairs] = {};
  for (int first = 0; first < num_keys; first += 32) {
    float score = -INFINITY;
    if (first + lane < num_keys) {
      const auto* k = reinterpret_cast<const uint4*>(row_of(first + lane, b.compact_k, b.band_k));
      float dot = 0.0f;
      for (int i = 0; i < kDim / 8; ++i) {
        const uint4 words = k[i];
        const uint32_t packed[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const float2 x = BothHalves(packed[n]);
          dot = fmaf(queries[warp][8 * i + 2 * n], x.x, dot);
          dot = fmaf(queries[warp][8 * i + 2 * n + 1], x.y, dot);
        }
      }
      score = dot * scale_log2;
    }
    float max = fmaxf(highest, score);
    for (int step = 1; step < 32; step *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
    const float shrink = ptx::Exp2(highest - max), weight = ptx::Exp2(score - max);
    highest = max;
    float weights = weight;
    for (int step = 1; step < 32; step *= 2) weights += __shfl_xor_sync(~0u, weights, step);
    sum = fmaf(sum, shrink, weights);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      out[n].x *= shrink;
      out[n].y *= shrink;
    }
    const int keys = min(32, num_keys - first);
    for (int i = 0; i < keys; ++i) {
      const float w = __shfl_sync(~0u, weight, i);
      const auto* v = reinterpret_cast<const uint32_t*>(row_of(first + i, b.compact_v, b.band_v));
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        const float2 x = BothHalves(v[32 * n + lane]);
        out[n].x = fmaf(w, x.x, out[n].x);
        out[n].y = fmaf(w, x.y, out[n].y);
      }
    }
  }
  auto* to =
      reinterpret_cast<uint32_t*>(p.out + (int64_t{s.row + position} * heads + query_head) * kDim);
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    to[32 * n + lane] = ptx::PackBf16(out[n].x / sum, out[n].y / sum);
  }
}

template <int kDim>
absl::Status EnqueuePortable(const DmsPrefillCudaParams& p, StreamHandle stream) {
  const DmsPrefillBatch& b = p.batch;
  const int64_t rows = int64_t{std::min(b.max_band, b.num_rows)} * b.num_kv_heads * b.group;
  const dim3 grid(static_cast<unsigned>((rows + kPortableWarps - 1) / kPortableWarps),
                  static_cast<unsigned>(b.batch));
  PortableKernel<kDim><<<grid, 32 * kPortableWarps, 0, stream>>>(p, internal::ScratchOf(b));
  return CudaStatus(cudaGetLastError());
}

absl::Status Invalid(const char* field, int64_t value) {
  return absl::InvalidArgumentError(absl::StrCat("dms_prefill: ", field, "=", value));
}

}  // namespace

size_t DmsPrefillScratchBytes(const DmsPrefillBatch& batch) {
  DmsPrefillBatch at_zero = batch;
  at_zero.scratch = nullptr;
  const size_t tiles =
      sizeof(internal::PrefillTile) * static_cast<size_t>(internal::MaxTiles(batch));
  return (reinterpret_cast<size_t>(internal::ScratchOf(at_zero).tiles) + tiles + 255) / 256 * 256;
}

absl::Status ValidateDmsPrefillBatch(const DmsPrefillBatch& b) {
  if (b.head_dim != 64 && b.head_dim != 128) {
    return absl::UnimplementedError(
        absl::StrCat("dms_prefill: head_dim=", b.head_dim, " is not 64 or 128"));
  }
  if (b.batch < 0 || b.batch > 65535) return Invalid("batch", b.batch);
  if (b.num_kv_heads < 1 || b.num_kv_heads > 1024) return Invalid("num_kv_heads", b.num_kv_heads);
  if (b.group < 1 || b.group > 64) return Invalid("group", b.group);
  if (b.window < 1) return Invalid("window", b.window);
  if (b.shift != 0 && b.shift != 1) return Invalid("shift", b.shift);
  constexpr int kMost = 1 << 28;  // marks are twice a rank
  if (b.num_rows < 0 || b.num_rows > kMost) return Invalid("num_rows", b.num_rows);
  if (b.band_rows < b.num_rows || b.band_rows > kMost) return Invalid("band_rows", b.band_rows);
  if (b.compact_rows < 8 || b.compact_rows > kMost) return Invalid("compact_rows", b.compact_rows);
  // Rows and tiles of all heads are counted in 32 bits.
  if (int64_t{b.band_rows} * b.num_kv_heads * b.group > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("dms_prefill: band_rows=", b.band_rows, " of num_kv_heads=", b.num_kv_heads,
                     " and group=", b.group, " are too many for one launch"));
  }
  if (b.max_band < 0 || b.max_band > b.band_rows) return Invalid("max_band", b.max_band);
  if (b.sequences == nullptr || b.scratch == nullptr || !Aligned(b.scratch, 256)) {
    return absl::InvalidArgumentError("dms_prefill: sequences or scratch is null or misaligned");
  }
  for (const Bf16* x : {b.band_k, b.band_v, b.compact_k, b.compact_v}) {
    if (x == nullptr || !Aligned(x, 16)) {
      return absl::InvalidArgumentError(
          "dms_prefill: a band or compact tensor is null or not "
          "aligned to 16 bytes");
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateDmsPrefillCompact(const DmsPrefillCompactParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillBatch(p.batch));
  const int row = p.batch.num_kv_heads * p.batch.head_dim;
  if (p.k == nullptr && p.v == nullptr && p.rows == nullptr) return absl::OkStatus();
  if (p.kv_stride < row || p.kv_stride % 8 != 0) return Invalid("kv_stride", p.kv_stride);
  if (p.k == nullptr || p.v == nullptr || !Aligned(p.k, 16) || !Aligned(p.v, 16)) {
    return absl::InvalidArgumentError("dms_prefill: k or v is null or misaligned");
  }
  if (static_cast<size_t>(p.format) >= std::size(kKvFormats)) {
    return Invalid("format", static_cast<int>(p.format));
  }
  if (!Aligned(p.rows, 4)) return absl::InvalidArgumentError("dms_prefill: rows is misaligned");
  return absl::OkStatus();
}

absl::Status ValidateDmsPrefillAttentionCuda(const DmsPrefillCudaParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillBatch(p.batch));
  const int row = p.batch.num_kv_heads * p.batch.group * p.batch.head_dim;
  if (p.q_stride < row || p.q_stride % 8 != 0) return Invalid("q_stride", p.q_stride);
  if (p.q == nullptr || p.out == nullptr || !Aligned(p.q, 16) || !Aligned(p.out, 16)) {
    return absl::InvalidArgumentError("dms_prefill: q or out is null or misaligned");
  }
  if (!(p.scale > 0.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("dms_prefill: scale=", p.scale));
  }
  return absl::OkStatus();
}

absl::Status LaunchDmsPrefillAttention(const DmsPrefillCudaParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDmsPrefillAttentionCuda(params));
  const DmsPrefillBatch& b = params.batch;
  if (b.batch == 0 || b.num_rows == 0 || b.max_band == 0) return absl::OkStatus();
  static const bool have_sm90 = internal::HaveSm90Code();
  const bool wide = b.head_dim == 128;
  if (have_sm90 && !params.portable) {
    return wide ? internal::EnqueuePrefillSm90Dim128(params, stream)
                : internal::EnqueuePrefillSm90Dim64(params, stream);
  }
  return wide ? EnqueuePortable<128>(params, stream) : EnqueuePortable<64>(params, stream);
}

}  // namespace winnow::kernels
