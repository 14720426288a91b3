#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/cuda/cuda_status.h"
#include "kernels/cuda/layer_spans.cuh"
#include "kernels/cuda/prefix_cache.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/span_token.cuh"

namespace winnow::kernels {
namespace {

using device::TokenShape;
using internal::LayerSpans;

constexpr int kThreads = 256;
constexpr int kBlocks = 2048;  // about as many of all spans together
constexpr int kElements = 8;   // of a vector, a thread and turn: 16 bytes of BF16

// Eight stored elements as BF16. `in` is aligned to their bytes.
template <KvElement kElement>
__device__ void LoadElements(const uint8_t* in, float scale, uint32_t (&out)[kElements / 2]) {
  if constexpr (kElement == KvElement::kBf16) {
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(in);
  } else {
    const uint2 codes = *reinterpret_cast<const uint2*>(in);
    const uint32_t words[] = {codes.x, codes.y};
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      const uint32_t pair = words[i / 2] >> (16 * (i % 2));
      float2 x;
      if constexpr (kElement == KvElement::kE4m3) {
        x = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(
            static_cast<__nv_fp8x2_storage_t>(pair & 0xffff), __NV_E4M3)));
      } else {
        x = make_float2(static_cast<float>(static_cast<int8_t>(pair & 0xff)),
                        static_cast<float>(static_cast<int8_t>(pair >> 8 & 0xff)));
      }
      out[i] = ptx::PackBf16(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale));
    }
  }
}

// Grid (blocks a span, KV heads, batch). A block takes runs of a page's tokens in turn: the
// survivors' pages, then the prefix in order of age.
template <KvElement kK, KvElement kV, int kDim>
__global__ void __launch_bounds__(kThreads)
    PrefixLoadKernel(const __grid_constant__ PrefixLoadParams p, const LayerSpans spans) {
  using T = TokenShape<kK, kDim>;
  constexpr int kParts = kDim / kElements, kRun = T::kSlots * kParts;  // threads for K of a run
  const DmsPrefillBatch& b = p.batch;
  const int g = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const DmsPrefillSequence s = b.sequences[sequence];
  const int slot_of_cache = p.slots[sequence];
  const int64_t span = int64_t{max(slot_of_cache, 0)} * b.num_kv_heads + g;
  const SpanState state = slot_of_cache < 0 ? SpanState{} : spans.state[span];
  const bool first_block = blockIdx.x == 0 && threadIdx.x == 0;
  if (first_block) p.num_survivors[sequence * b.num_kv_heads + g] = state.num_survivors;
  if (state.num_tokens == 0) return;
  const int survivor_runs = (state.num_survivors + T::kSlots - 1) / T::kSlots;
  const int runs = survivor_runs + (state.num_ring + T::kSlots) / T::kSlots;
  const uint8_t* newest = spans.newest + span * spans.newest_stride;
  for (int run = static_cast<int>(blockIdx.x); run < runs; run += static_cast<int>(gridDim.x)) {
    const bool survivors = run < survivor_runs;
    const int first = (survivors ? run : run - survivor_runs) * T::kSlots;
    const uint8_t* page = nullptr;
    if (survivors) {
      page = spans.pages +
             int64_t{spans.survivor_pages[span * spans.max_survivor_pages + run]} * T::kPageBytes;
    }
    for (int i = static_cast<int>(threadIdx.x); i < kRun; i += kThreads) {
      const int part = i % kParts, token = first + i / kParts;
      if (token >= (survivors ? state.num_survivors : state.num_ring + 1)) continue;
      int slots = T::kSlots, slot = i / kParts;
      bool evict = false;
      if (!survivors && token < state.num_ring) {
        int at = state.ring_start + token;
        if (at >= spans.window) at -= spans.window;
        slot = at % T::kSlots;
        page = spans.pages +
               int64_t{spans.ring_pages[span * spans.ring_pages_per_span + at / T::kSlots]} *
                   T::kPageBytes;
        evict = spans.ring_evict[span * spans.evict_stride() + at] != 0;
      } else if (!survivors) {
        page = newest;
        slots = 1;
        slot = 0;
        evict =
            spans.window > 0 && spans.ring_evict[span * spans.evict_stride() + spans.window] != 0;
      }
      const int64_t to = survivors ? (int64_t{g} * b.compact_rows + s.compact_row + token) * kDim
                                   : (int64_t{s.band_row + token} * b.num_kv_heads + g) * kDim;
      const int code_bytes = kElements * static_cast<int>(KvElementBytes(kK));
      const uint8_t* k = page + slot * T::kRowBytes + part * code_bytes;
      float k_scale = 1.0f, v_scale = 1.0f;
      if constexpr (T::kScaled) {
        const uint8_t* scales = page + slots * 2 * T::kRowBytes + slot * 2;
        k_scale = __half2float(*reinterpret_cast<const __half*>(scales));
        v_scale = __half2float(*reinterpret_cast<const __half*>(scales + slots * 2));
      }
      uint32_t k_out[kElements / 2], v_out[kElements / 2];
      LoadElements<kK>(k, k_scale, k_out);
      LoadElements<kV>(k + slots * T::kRowBytes, v_scale, v_out);
      const auto store = [&](Bf16* base, const uint32_t(&x)[kElements / 2]) {
        *reinterpret_cast<uint4*>(base + to + part * kElements) =
            make_uint4(x[0], x[1], x[2], x[3]);
      };
      store(survivors ? b.compact_k : b.band_k, k_out);
      store(survivors ? b.compact_v : b.band_v, v_out);
      if (!survivors && part == 0) {
        p.prefix_evict[int64_t{s.band_row + token} * b.num_kv_heads + g] = evict ? 1 : 0;
      }
    }
  }
}

template <KvElement kK, KvElement kV>
absl::Status Enqueue(const PrefixLoadParams& p, cudaStream_t stream) {
  const DmsPrefillBatch& b = p.batch;
  const LayerSpans spans = internal::LayerOf(p.spans, p.layer);
  const int most = spans.max_survivor_pages + spans.ring_pages_per_span + 1;
  const dim3 grid(static_cast<unsigned>(std::clamp(kBlocks / (b.batch * b.num_kv_heads), 1, most)),
                  static_cast<unsigned>(b.num_kv_heads), static_cast<unsigned>(b.batch));
  if (b.head_dim == 64) {
    PrefixLoadKernel<kK, kV, 64><<<grid, kThreads, 0, stream>>>(p, spans);
  } else {
    PrefixLoadKernel<kK, kV, 128><<<grid, kThreads, 0, stream>>>(p, spans);
  }
  return CudaStatus(cudaGetLastError());
}

}  // namespace

absl::Status ValidatePrefixLoad(const PrefixLoadParams& p) {
  WINNOW_RETURN_IF_ERROR(
      internal::ValidateLayer("prefix_load", p.batch, p.spans, p.slots, p.layer));
  if (p.num_survivors == nullptr || p.prefix_evict == nullptr) {
    return absl::InvalidArgumentError("prefix_load: num_survivors or prefix_evict is null");
  }
  return absl::OkStatus();
}

absl::Status LaunchPrefixLoad(const PrefixLoadParams& params, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidatePrefixLoad(params));
  if (params.batch.batch == 0) return absl::OkStatus();
  switch (params.spans.format) {
    case KvFormatId::kBf16:
      return Enqueue<KvElement::kBf16, KvElement::kBf16>(params, stream);
    case KvFormatId::kFp8:
      return Enqueue<KvElement::kE4m3, KvElement::kE4m3>(params, stream);
    case KvFormatId::kInt8:
    case KvFormatId::kInt8H:
      return Enqueue<KvElement::kInt8, KvElement::kInt8>(params, stream);
    case KvFormatId::kK8V8:
      return Enqueue<KvElement::kInt8, KvElement::kE4m3>(params, stream);
  }
  return absl::InvalidArgumentError("prefix_load: unknown format");
}

}  // namespace winnow::kernels
