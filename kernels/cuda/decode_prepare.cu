#include <cuda_runtime.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/decode_prepare.h"
#include "kernels/cuda/head_vector.cuh"
#include "kernels/cuda/layer_spans.cuh"
#include "kernels/cuda/span_token.cuh"
#include "kernels/cuda/store_vector.cuh"

namespace winnow::kernels {
namespace {

using device::CopyToken;
using device::Place;
using device::TokenShape;
using internal::HeadVector;
using internal::LayerSpans;
using internal::Quarter;

struct Args {
  DmsCompactParams c;
  LayerSpans spans;
  const int32_t* slots;
  int shift;
  int group;
  bool rotated;
};

// Eight lanes a vector, as head_vector.cuh has it; `lane` is the one in the eight. Not all of
// them get 8-byte aligned vectors.
template <int kDim>
__device__ __forceinline__ void LoadHead(const float* in, int lane, HeadVector<kDim>& x) {
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    x[i] = make_float2(in[16 * i + 2 * lane], in[16 * i + 2 * lane + 1]);
  }
}

// One RMSNorm over a head, as dms_compact.cc's: the sum of squares runs upwards.
// `squares` [kDim] is the eight lanes', 16-byte aligned.
template <int kDim>
__device__ __forceinline__ void NormHead(const HeadVector<kDim>& weight, float eps,
                                         const Quarter& quarter, float* squares,
                                         HeadVector<kDim>& x) {
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    *reinterpret_cast<float2*>(squares + 16 * i + 2 * quarter.lane) =
        make_float2(__fmul_rn(x[i].x, x[i].x), __fmul_rn(x[i].y, x[i].y));
  }
  __syncwarp(quarter.mask);
  float sum = 0.0f;
#pragma unroll 8
  for (int d = 0; d < kDim; d += 4) {
    const float4 y = *reinterpret_cast<const float4*>(squares + d);
    sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, y.x), y.y), y.z), y.w);
  }
  const float mean = __fdiv_rn(sum, static_cast<float>(kDim));
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    x[i].x = __fmul_rn(__fmul_rn(x[i].x, scale), weight[i].x);
    x[i].y = __fmul_rn(__fmul_rn(x[i].y, scale), weight[i].y);
  }
}

__device__ __forceinline__ float RoundedToBf16(float x) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return __uint_as_float(((u >> 16) | 0x0040u) << 16);
  return __uint_as_float(((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) << 16);
}

// Shared memory of eight lanes: a head for the norm's ordered sum, and the partial sums of a
// quantization's error. The four of a warp meet different banks.
template <int kDim>
inline constexpr int kScratchFloats = kDim + 32 + 4;

// The vectors of a (sequence, KV head): its queries, K and V, eight lanes each.
__host__ __device__ constexpr int VectorWarps(int group) { return (group + 2 + 3) / 4; }

// Grid (KV heads, sequences), block of VectorWarps() warps and one for the decision and the
// moves.
template <KvElement kK, KvElement kV, int kDim>
__global__ void __launch_bounds__(288) DecodePrepareKernel(const __grid_constant__ Args args) {
  using T = TokenShape<kK, kDim>;
  constexpr int kParts = kDim / 16;
  extern __shared__ __align__(16) float scratch[];
  __shared__ __align__(16) uint8_t row[2 * T::kRowBytes + 4];
  const DmsCompactParams& c = args.c;
  const LayerSpans& spans = args.spans;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = static_cast<int>(blockIdx.x), s = static_cast<int>(blockIdx.y);
  const int slot_of_cache = args.slots[s];
  if (slot_of_cache < 0) return;
  const int64_t span = static_cast<int64_t>(slot_of_cache) * c.num_kv_heads + g;
  uint8_t* newest = spans.newest + span * spans.newest_stride;
  const Quarter quarter{.lane = lane % 8, .mask = 0xffu << (lane & ~7)};
  float* squares = scratch + threadIdx.x / 8 * kScratchFloats<kDim>;
  HeadVector<kDim> x;

  if (warp < VectorWarps(args.group)) {
    const int vector = static_cast<int>(threadIdx.x) / 8;
    const bool is_query = vector < args.group, is_key = vector == args.group;
    const int h = g * args.group + vector;
    LoadHead<kDim>(is_query ? c.q + s * c.q_stride + static_cast<int64_t>(h) * kDim
                   : is_key ? c.k + s * c.k_stride + static_cast<int64_t>(g) * kDim
                            : c.v + s * c.v_stride + static_cast<int64_t>(g) * kDim,
                   quarter.lane, x);
    const float* norm = is_query ? c.q_norm : is_key ? c.k_norm : nullptr;
    const bool roped = is_query || is_key;
    HeadVector<kDim> weight;  // like the tables, on its way before the sum of squares
    HeadVector<kDim / 2> cos, sin;
    if (norm != nullptr) LoadHead<kDim>(norm, quarter.lane, weight);
    if (roped) {
      const int64_t table = static_cast<int64_t>(c.positions[s]) * (kDim / 2);
      LoadHead<kDim / 2>(c.rope_cos + table, quarter.lane, cos);
      LoadHead<kDim / 2>(c.rope_sin + table, quarter.lane, sin);
    }
    if (norm != nullptr) NormHead<kDim>(weight, c.norm_eps, quarter, squares, x);
    const bool zero = vector == 0 && c.rule.zeroing != ChannelZeroing::kNone && quarter.lane == 7;
    if (zero) x[kParts - 1].y = 0.0f;
    if (roped) internal::RopeVector<kDim>(cos, sin, x);
    if (zero && c.rule.zeroing == ChannelZeroing::kBeforeAndAfterRope) x[kParts - 1].y = 0.0f;
    if (args.rotated) internal::RotateVector<kDim>(quarter.lane, x);
    if (is_query) {
      float* out = c.q_out + (static_cast<int64_t>(s) * c.num_heads + h) * kDim;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        out[16 * i + 2 * quarter.lane] = x[i].x;
        out[16 * i + 2 * quarter.lane + 1] = x[i].y;
      }
    } else if (vector < args.group + 2) {
      uint8_t* codes = row + (is_key ? 0 : T::kRowBytes);
      uint8_t* scale = row + 2 * T::kRowBytes + (is_key ? 0 : 2);
      if (kK == kV || is_key) {
        internal::StoreVector<kK>(x, quarter, squares + kDim, codes, scale);
      } else {
        internal::StoreVector<kV>(x, quarter, squares + kDim, codes, scale);
      }
    }
  } else {
    // The decision of the group's first query head, or of the layer's.
    const int decider = c.rule.per_layer ? 0 : g;
    bool evict = false;
    if (c.rule.source == DecisionSource::kLogits) {
      if (c.logit_inputs != nullptr) {
        const float u = c.logit_inputs[s * c.logit_stride + decider];
        evict = __fsub_rn(__fmul_rn(u, c.rule.scale), c.rule.offset) > 0.0f;
      }
    } else if (c.rule.source != DecisionSource::kNone) {
      LoadHead<kDim>(c.q + s * c.q_stride + static_cast<int64_t>(decider) * args.group * kDim,
                     quarter.lane, x);
      if (c.rule.source == DecisionSource::kBorrowedAfterQNorm && c.q_norm != nullptr) {
        HeadVector<kDim> weight;
        LoadHead<kDim>(c.q_norm, quarter.lane, weight);
        NormHead<kDim>(weight, c.norm_eps, quarter, squares, x);
      }
      float u = __shfl_sync(0xffffffffu, x[kParts - 1].y, 7);
      if (c.rule.round_to_bf16) u = RoundedToBf16(u);
      evict = __fsub_rn(__fmul_rn(u, c.rule.scale), c.rule.offset) > 0.0f;
    }
    if (c.decisions != nullptr && lane == 0) {
      c.decisions[static_cast<int64_t>(s) * c.num_kv_heads + g] = evict ? 1 : 0;
    }
    // The counters are already those after this token.
    const SpanState state = spans.state[span];
    uint8_t* flags = spans.ring_evict + span * spans.evict_stride();
    const auto survivor = [&] {
      const int slot = state.num_survivors - 1;
      const int page =
          spans.survivor_pages[span * spans.max_survivor_pages + max(slot, 0) / T::kSlots];
      return Place{
          slot < 0 || page < 0 ? nullptr : spans.pages + static_cast<int64_t>(page) * T::kPageBytes,
          T::kSlots, slot % T::kSlots};
    };
    const Place old_newest{newest, 1, 0};
    if (state.num_tokens > 1 && spans.window == 0) {
      const Place to = survivor();
      if (to.base != nullptr) CopyToken<T>(old_newest, to, lane);
    } else if (state.num_tokens > 1) {
      const bool was_full = state.num_tokens - 2 >= spans.window;
      const int slot = !was_full               ? state.num_ring - 1
                       : state.ring_start == 0 ? spans.window - 1
                                               : state.ring_start - 1;
      const int page = spans.ring_pages[span * spans.ring_pages_per_span + slot / T::kSlots];
      const Place ring{
          page < 0 ? nullptr : spans.pages + static_cast<int64_t>(page) * T::kPageBytes, T::kSlots,
          slot % T::kSlots};
      const uint8_t old_flag = flags[slot], old_newest_flag = flags[spans.window];
      __syncwarp();
      if (ring.base != nullptr) {
        if (was_full && old_flag == 0) {
          const Place to = survivor();
          if (to.base != nullptr) CopyToken<T>(ring, to, lane);
        }
        CopyToken<T>(old_newest, ring, lane);
      }
      if (lane == 0) flags[slot] = (args.shift == 1 ? evict : old_newest_flag != 0) ? 1 : 0;
    }
    if (lane == 0 && spans.window > 0) flags[spans.window] = args.shift == 0 && evict ? 1 : 0;
  }
  __syncthreads();  // the old newest token has moved, the new row is written
  if (warp == 0) {
    for (int i = lane * 4; i < static_cast<int>(sizeof(row)); i += 128) {
      if (T::kScaled || i < 2 * T::kRowBytes) {
        *reinterpret_cast<uint32_t*>(newest + i) = *reinterpret_cast<const uint32_t*>(row + i);
      }
    }
  }
}

template <KvElement kK, KvElement kV>
void Enqueue(const Args& args, int head_dim, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.c.num_kv_heads),
                  static_cast<unsigned>(args.c.num_tokens));
  const unsigned warps = static_cast<unsigned>(VectorWarps(args.group)) + 1;
  if (head_dim == 64) {
    constexpr size_t kBytes = 4 * kScratchFloats<64> * sizeof(float);
    DecodePrepareKernel<kK, kV, 64><<<grid, warps * 32, warps * kBytes, stream>>>(args);
  } else {
    constexpr size_t kBytes = 4 * kScratchFloats<128> * sizeof(float);
    DecodePrepareKernel<kK, kV, 128><<<grid, warps * 32, warps * kBytes, stream>>>(args);
  }
}

}  // namespace

absl::Status ValidateDecodePrepare(const DecodePrepareCudaParams& p) {
  const DmsCompactParams& c = p.compact;
  const DeviceSpans& spans = p.spans;
  if (c.head_dim != 64 && c.head_dim != 128) {
    return absl::UnimplementedError(
        absl::StrCat("decode_prepare: head_dim=", c.head_dim, " is not 64 or 128"));
  }
  if (c.num_tokens < 0 || c.num_tokens > 65535 || c.num_heads < 1 || c.num_kv_heads < 1 ||
      c.num_heads % c.num_kv_heads != 0 || c.num_heads / c.num_kv_heads > 30) {
    return absl::InvalidArgumentError(absl::StrCat("decode_prepare: num_tokens=", c.num_tokens,
                                                   " num_heads=", c.num_heads,
                                                   " num_kv_heads=", c.num_kv_heads));
  }
  WINNOW_RETURN_IF_ERROR(ValidateDeviceSpans("decode_prepare", spans));
  if (spans.format != c.format || spans.head_dim != c.head_dim ||
      spans.num_kv_heads != c.num_kv_heads || p.layer < 0 || p.layer >= spans.num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_prepare: spans and compact differ, or layer=", p.layer));
  }
  if (c.q == nullptr || c.k == nullptr || c.v == nullptr || c.positions == nullptr ||
      c.rope_cos == nullptr || c.rope_sin == nullptr || c.q_out == nullptr || p.slots == nullptr) {
    return absl::InvalidArgumentError("decode_prepare: a pointer is null");
  }
  if (c.rule.source == DecisionSource::kLogits && spans.window > 0 && c.logit_inputs == nullptr) {
    return absl::InvalidArgumentError("decode_prepare: logit_inputs is null");
  }
  const int64_t row = int64_t{c.num_kv_heads} * c.head_dim;
  if (c.q_stride < int64_t{c.num_heads} * c.head_dim || c.k_stride < row || c.v_stride < row) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_prepare: rows overlap, q_stride=", c.q_stride,
                     " k_stride=", c.k_stride, " v_stride=", c.v_stride));
  }
  if (c.q_out == c.q) {
    return absl::InvalidArgumentError("decode_prepare: q_out is q");
  }
  return absl::OkStatus();
}

absl::Status LaunchDecodePrepare(const DecodePrepareCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateDecodePrepare(p));
  if (p.compact.num_tokens == 0) return absl::OkStatus();
  const DeviceSpans& spans = p.spans;
  const Args args = {.c = p.compact,
                     .spans = internal::LayerOf(spans, p.layer),
                     .slots = p.slots,
                     .shift = spans.shift,
                     .group = p.compact.num_heads / p.compact.num_kv_heads,
                     .rotated = KvFormatOf(spans.format).rotated};
  switch (spans.format) {
    case KvFormatId::kBf16:
      Enqueue<KvElement::kBf16, KvElement::kBf16>(args, spans.head_dim, stream);
      break;
    case KvFormatId::kFp8:
      Enqueue<KvElement::kE4m3, KvElement::kE4m3>(args, spans.head_dim, stream);
      break;
    case KvFormatId::kInt8:
    case KvFormatId::kInt8H:
      Enqueue<KvElement::kInt8, KvElement::kInt8>(args, spans.head_dim, stream);
      break;
    case KvFormatId::kK8V8:
      Enqueue<KvElement::kInt8, KvElement::kE4m3>(args, spans.head_dim, stream);
      break;
  }
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
