#include <cuda_runtime.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"
#include "kernels/cuda/decode_prepare.h"
#include "kernels/cuda/span_token.cuh"
#include "kernels/cuda/store_row.cuh"

namespace winnow::kernels {
namespace {

using device::CopyToken;
using device::HeadLanes;
using device::Place;
using device::TokenShape;

struct Args {
  DmsCompactParams c;
  const SpanState* state;  // of the layer, as are the arrays below
  const int32_t* survivor_pages;
  const int32_t* ring_pages;
  uint8_t* newest;
  uint8_t* ring_evict;
  uint8_t* pages;
  const int32_t* slots;
  int64_t newest_stride;
  int window, shift, max_survivor_pages, ring_pages_per_span;
  int group;
  bool rotated;
};

template <int kDim>
__device__ __forceinline__ void LoadHead(const float* in, int lane, HeadLanes<kDim>& x) {
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) x[i] = in[lane + 32 * i];
}

// One RMSNorm over a head, as dms_compact.cc's: the sum of squares runs upwards.
// `scratch` [kDim] is the warp's, 16-byte aligned.
template <int kDim>
__device__ __forceinline__ void NormHead(const float* weight, float eps, int lane, float* scratch,
                                         HeadLanes<kDim>& x) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) scratch[lane + 32 * i] = __fmul_rn(x[i], x[i]);
  __syncwarp();
  float sum = 0.0f;
#pragma unroll 8
  for (int d = 0; d < kDim; d += 4) {
    const float4 y = *reinterpret_cast<const float4*>(scratch + d);
    sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, y.x), y.y), y.z), y.w);
  }
  const float mean = __fdiv_rn(sum, static_cast<float>(kDim));
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    x[i] = __fmul_rn(__fmul_rn(x[i], scale), weight[lane + 32 * i]);
  }
}

template <int kDim>
__device__ __forceinline__ void RopeHead(const float* cos, const float* sin, int lane,
                                         HeadLanes<kDim>& x) {
#pragma unroll
  for (int i = 0; i < kDim / 64; ++i) {
    const float a = x[i], b = x[i + kDim / 64];
    const float c = cos[lane + 32 * i], s = sin[lane + 32 * i];
    x[i] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
    x[i + kDim / 64] = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
  }
}

// HadamardRotate(): the product, then butterflies of width 1, 2, 4, ...
template <int kDim>
__device__ __forceinline__ void RotateHead(int lane, HeadLanes<kDim>& x) {
  const float scale = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(kDim)));
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) x[i] = __fmul_rn(x[i], scale);
#pragma unroll
  for (int half = 1; half < 32; half *= 2) {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], half);
      x[i] = (lane & half) != 0 ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
    }
  }
#pragma unroll
  for (int half = 1; half < kDim / 32; half *= 2) {
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      if ((i & half) != 0) continue;
      const float a = x[i], b = x[i + half];
      x[i] = __fadd_rn(a, b);
      x[i + half] = __fsub_rn(a, b);
    }
  }
}

__device__ __forceinline__ float RoundedToBf16(float x) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return __uint_as_float(((u >> 16) | 0x0040u) << 16);
  return __uint_as_float(((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) << 16);
}

// Grid (KV heads, sequences), block of group + 2 warps: one a query head, one for K and V,
// the last for the decision and the moves. Shared memory: the new row, and a head a warp for
// the norm's ordered sum.
template <KvElement kK, KvElement kV, int kDim>
__global__ void __launch_bounds__(1024) DecodePrepareKernel(const __grid_constant__ Args args) {
  using T = TokenShape<kK, kDim>;
  extern __shared__ __align__(16) float scratch[];
  __shared__ __align__(16) uint8_t row[2 * T::kRowBytes + 4];
  const DmsCompactParams& c = args.c;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int g = static_cast<int>(blockIdx.x), s = static_cast<int>(blockIdx.y);
  const int slot_of_cache = args.slots[s];
  if (slot_of_cache < 0) return;
  const int64_t span = static_cast<int64_t>(slot_of_cache) * c.num_kv_heads + g;
  uint8_t* newest = args.newest + span * args.newest_stride;
  float* own_scratch = scratch + warp * kDim;
  const int64_t table = static_cast<int64_t>(c.positions[s]) * (kDim / 2);
  const float* cos = c.rope_cos + table;
  const float* sin = c.rope_sin + table;
  HeadLanes<kDim> x;

  if (warp < args.group) {
    const int h = g * args.group + warp;
    LoadHead<kDim>(c.q + s * c.q_stride + static_cast<int64_t>(h) * kDim, lane, x);
    if (c.q_norm != nullptr) NormHead<kDim>(c.q_norm, c.norm_eps, lane, own_scratch, x);
    const bool zero = warp == 0 && c.rule.zeroing != ChannelZeroing::kNone && lane == 31;
    if (zero) x[kDim / 32 - 1] = 0.0f;
    RopeHead<kDim>(cos, sin, lane, x);
    if (zero && c.rule.zeroing == ChannelZeroing::kBeforeAndAfterRope) x[kDim / 32 - 1] = 0.0f;
    if (args.rotated) RotateHead<kDim>(lane, x);
    float* out = c.q_out + (static_cast<int64_t>(s) * c.num_heads + h) * kDim;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) out[lane + 32 * i] = x[i];
  } else if (warp == args.group) {
    LoadHead<kDim>(c.k + s * c.k_stride + static_cast<int64_t>(g) * kDim, lane, x);
    HeadLanes<kDim> v;
    LoadHead<kDim>(c.v + s * c.v_stride + static_cast<int64_t>(g) * kDim, lane, v);
    if (c.k_norm != nullptr) NormHead<kDim>(c.k_norm, c.norm_eps, lane, own_scratch, x);
    RopeHead<kDim>(cos, sin, lane, x);
    if (args.rotated) {
      RotateHead<kDim>(lane, x);
      RotateHead<kDim>(lane, v);
    }
    device::StoreElements<kK, kDim>(x, lane, row, row + 2 * T::kRowBytes);
    device::StoreElements<kV, kDim>(v, lane, row + T::kRowBytes, row + 2 * T::kRowBytes + 2);
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
      LoadHead<kDim>(c.q + s * c.q_stride + static_cast<int64_t>(decider) * args.group * kDim, lane,
                     x);
      if (c.rule.source == DecisionSource::kBorrowedAfterQNorm && c.q_norm != nullptr) {
        NormHead<kDim>(c.q_norm, c.norm_eps, lane, own_scratch, x);
      }
      float u = __shfl_sync(0xffffffffu, x[kDim / 32 - 1], 31);
      if (c.rule.round_to_bf16) u = RoundedToBf16(u);
      evict = __fsub_rn(__fmul_rn(u, c.rule.scale), c.rule.offset) > 0.0f;
    }
    if (c.decisions != nullptr && lane == 0) {
      c.decisions[static_cast<int64_t>(s) * c.num_kv_heads + g] = evict ? 1 : 0;
    }
    // The counters are already those after this token.
    const SpanState state = args.state[span];
    uint8_t* flags = args.ring_evict + span * (args.window + 1);
    const auto survivor = [&] {
      const int slot = state.num_survivors - 1;
      const int page =
          args.survivor_pages[span * args.max_survivor_pages + max(slot, 0) / T::kSlots];
      return Place{
          slot < 0 || page < 0 ? nullptr : args.pages + static_cast<int64_t>(page) * T::kPageBytes,
          T::kSlots, slot % T::kSlots};
    };
    const Place old_newest{newest, 1, 0};
    if (state.num_tokens > 1 && args.window == 0) {
      const Place to = survivor();
      if (to.base != nullptr) CopyToken<T>(old_newest, to, lane);
    } else if (state.num_tokens > 1) {
      const bool was_full = state.num_tokens - 2 >= args.window;
      const int slot = !was_full               ? state.num_ring - 1
                       : state.ring_start == 0 ? args.window - 1
                                               : state.ring_start - 1;
      const int page = args.ring_pages[span * args.ring_pages_per_span + slot / T::kSlots];
      const Place ring{page < 0 ? nullptr : args.pages + static_cast<int64_t>(page) * T::kPageBytes,
                       T::kSlots, slot % T::kSlots};
      const uint8_t old_flag = flags[slot], old_newest_flag = flags[args.window];
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
    if (lane == 0 && args.window > 0) flags[args.window] = args.shift == 0 && evict ? 1 : 0;
  }
  __syncthreads();  // the old newest token has moved, the new row is written
  if (warp == args.group) {
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
  const unsigned warps = static_cast<unsigned>(args.group) + 2;
  const size_t bytes = warps * static_cast<size_t>(head_dim) * sizeof(float);
  if (head_dim == 64) {
    DecodePrepareKernel<kK, kV, 64><<<grid, warps * 32, bytes, stream>>>(args);
  } else {
    DecodePrepareKernel<kK, kV, 128><<<grid, warps * 32, bytes, stream>>>(args);
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
  if (spans.format != c.format || spans.head_dim != c.head_dim ||
      spans.num_kv_heads != c.num_kv_heads || p.layer < 0 || p.layer >= spans.num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("decode_prepare: spans and compact differ, or layer=", p.layer));
  }
  if (c.q == nullptr || c.k == nullptr || c.v == nullptr || c.positions == nullptr ||
      c.rope_cos == nullptr || c.rope_sin == nullptr || c.q_out == nullptr || p.slots == nullptr ||
      spans.pages == nullptr || spans.state == nullptr || spans.survivor_pages == nullptr ||
      spans.newest == nullptr ||
      (spans.window > 0 && (spans.ring_pages == nullptr || spans.ring_evict == nullptr))) {
    return absl::InvalidArgumentError("decode_prepare: a pointer is null");
  }
  if (c.rule.source == DecisionSource::kLogits && spans.window > 0 && c.logit_inputs == nullptr) {
    return absl::InvalidArgumentError("decode_prepare: logit_inputs is null");
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
  const int64_t first = static_cast<int64_t>(p.layer) * spans.max_sequences * spans.num_kv_heads;
  const Args args = {.c = p.compact,
                     .state = spans.state + first,
                     .survivor_pages = spans.survivor_pages + first * spans.max_survivor_pages,
                     .ring_pages = spans.ring_pages + first * spans.ring_pages_per_span(),
                     .newest = spans.newest + first * spans.newest_stride(),
                     .ring_evict = spans.ring_evict + first * spans.evict_stride(),
                     .pages = spans.pages,
                     .slots = p.slots,
                     .newest_stride = spans.newest_stride(),
                     .window = spans.window,
                     .shift = spans.shift,
                     .max_survivor_pages = spans.max_survivor_pages,
                     .ring_pages_per_span = spans.ring_pages_per_span(),
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
