#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "common/cuda/cuda_status.h"
#include "kernels/cuda/kv_pack.h"
#include "kernels/cuda/kv_pack_runs.cuh"
#include "kernels/cuda/launch.cuh"

namespace winnow::kernels {
namespace internal {
namespace {

constexpr int kThreads = kPackThreads, kWarps = kPackWarps;

// Copies `bytes` at `in` to shared memory, from byte `in` % 16 on.
__device__ __forceinline__ void ReadRun(const uint8_t* in, int bytes, uint32_t* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(in) & 15);
  const uint4* aligned = reinterpret_cast<const uint4*>(in - past);
  const int begin = past == 0 ? 0 : 1, end = (past + bytes) / 16;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += 32) {
    __pipeline_memcpy_async(reinterpret_cast<uint4*>(shared) + i, aligned + i, 16);
  }
  __pipeline_commit();
  // Fewer than 16 bytes at either end.
  uint8_t* to = reinterpret_cast<uint8_t*>(shared) + past;
  const int at = lane < 16 ? lane : 16 * end - past + lane - 16;
  if (at < (lane < 16 ? 16 * begin - past : bytes)) to[at] = in[at];
  __pipeline_wait_prior(0);
}

// Stores the run's rows, which lie from byte `past` of shared memory on.
__device__ __forceinline__ void StoreRun(const PackArgs& a, const TokenPlace& place, int num,
                                         const uint32_t* shared, int past) {
  const int lane = static_cast<int>(threadIdx.x) % 32, odd = 8 * (past & 3);
  const uint32_t* rows = shared + past / 4;
  RunPieces pieces(a, place, num);
#pragma unroll 4
  for (int j = 0; j < kRunPieces / 32; ++j) {
    const RunPieces::Piece piece = pieces.Next();
    if (piece.word < 0 || piece.at == nullptr) continue;
    const uint32_t* from = rows + piece.word;
    uint4 x = make_uint4(from[0], from[1], from[2], from[3]);
    if (odd != 0) {
      x = make_uint4(__funnelshift_r(x.x, x.y, odd), __funnelshift_r(x.y, x.z, odd),
                     __funnelshift_r(x.z, x.w, odd), __funnelshift_r(x.w, from[4], odd));
    }
    *piece.at = x;
  }
  if (!a.scaled || place.k == nullptr) return;
  const uint32_t* last = rows + (lane + 1) * (a.row_bytes() / 4) - 1;
  const uint32_t scales = __funnelshift_r(last[0], last[1], odd);
  *reinterpret_cast<uint16_t*>(place.k + place.k_scale) = static_cast<uint16_t>(scales);
  *reinterpret_cast<uint16_t*>(place.k + place.v_scale) = static_cast<uint16_t>(scales >> 16);
}

// Grid (blocks of a head, heads, items).
__global__ void __launch_bounds__(kThreads, 5)
    UnpackKernel(const PackArgs a, const ByteRange* ranges, const uint8_t* staging,
                 const int32_t* num_tokens, SpanState* states) {
  __shared__ alignas(16) uint32_t shared_of_warp[kWarps][kRunWords];
  const int item = static_cast<int>(blockIdx.z), g = static_cast<int>(blockIdx.y);
  const ByteRange range = ranges[item];
  const int64_t first_span = FirstSpan(a, item);
  if (first_span < 0 || range.offset < 0) return;
  const uint8_t* in = staging + range.offset;
  const uint32_t* heads = reinterpret_cast<const uint32_t*>(in);
  const int most = a.spans.max_survivor_pages * a.slots_per_page;
  const auto state_of = [&](int h) {
    return SpanState{.num_survivors = min(max(static_cast<int>(heads[3 * h]), 0), most),
                     .num_ring = min(max(static_cast<int>(heads[3 * h + 1]), 0), a.spans.window),
                     .ring_start = 0,
                     .num_tokens = num_tokens[item / a.num_layers]};
  };
  const uint8_t* body = in + BodyOffset(a, g, state_of);
  const SpanState state = state_of(g);
  if (body + BodyBytes(a, state) > in + range.bytes) return;
  const int64_t span = first_span + g;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int live = state.num_survivors + state.num_ring + 1;
  const int step = static_cast<int>(gridDim.x) * kWarps * a.run_tokens;
  uint32_t* shared = shared_of_warp[warp];
  for (int first = (static_cast<int>(blockIdx.x) * kWarps + warp) * a.run_tokens; first < live;
       first += step) {
    const uint8_t* rows = body + int64_t{first} * a.row_bytes();
    const int num = min(a.run_tokens, live - first);
    TokenPlace place;
    if (lane < num) place = PlaceOf(a, span, state, first + lane);
    ReadRun(rows, num * a.row_bytes(), shared);
    __syncwarp();
    StoreRun(a, place, num, shared, static_cast<int>(reinterpret_cast<uintptr_t>(rows) & 15));
    __syncwarp();
  }
  if (blockIdx.x != 0) return;
  uint8_t* evict = a.spans.ring_evict + span * a.spans.evict_stride();
  const uint8_t* flags = body + int64_t{live} * a.row_bytes();
  for (int i = static_cast<int>(threadIdx.x); i < state.num_ring; i += kThreads) {
    evict[i] = flags[i];
  }
  if (threadIdx.x == 0) {
    if (a.spans.window > 0) evict[a.spans.window] = static_cast<uint8_t>(heads[3 * g + 2]);
    states[span] = state;
  }
}

}  // namespace
}  // namespace internal

absl::Status ValidateKvUnpackCuda(const KvUnpackCudaParams& p) {
  WINNOW_RETURN_IF_ERROR(
      internal::ValidatePackSpans("kv_unpack", p.spans, p.num_seqs, p.first_layer, p.num_layers));
  if (p.slots == nullptr || p.num_tokens == nullptr || p.staging == nullptr ||
      p.ranges == nullptr) {
    return absl::InvalidArgumentError("kv_unpack: slots, num_tokens, staging or ranges is null");
  }
  if (!Aligned(p.staging, internal::kPackAlign)) {
    return absl::InvalidArgumentError("kv_unpack: staging is not a multiple of 16");
  }
  return absl::OkStatus();
}

absl::Status LaunchKvUnpack(const KvUnpackCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateKvUnpackCuda(p));
  const internal::PackArgs args =
      internal::MakePackArgs(p.spans, p.slots, p.num_seqs, p.first_layer, p.num_layers);
  if (args.num_items == 0) return absl::OkStatus();
  internal::UnpackKernel<<<internal::PackGrid(p.spans, args), internal::kPackThreads, 0, stream>>>(
      args, p.ranges, p.staging, p.num_tokens, p.spans.state);
  return CudaStatus(cudaGetLastError());
}

}  // namespace winnow::kernels
