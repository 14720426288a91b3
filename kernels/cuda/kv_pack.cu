#include <algorithm>

#include "common/cuda/cuda_status.h"
#include "kernels/cuda/kv_pack.h"
#include "kernels/cuda/kv_pack_runs.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace internal {
namespace {

constexpr int kThreads = kPackThreads, kWarps = kPackWarps;

// Finds each item's place. One block of kThreads.
__global__ void __launch_bounds__(kThreads)
    PlaceItemsKernel(const PackArgs a, int64_t staging_bytes, ByteRange* ranges) {
  ptx::LetDependentsStart();
  __shared__ int64_t sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int each = (a.num_items + kThreads - 1) / kThreads;
  const int begin = min(thread * each, a.num_items), end = min(begin + each, a.num_items);
  const auto bytes_of = [&](int item) {
    const int64_t span = FirstSpan(a, item);
    if (span < 0) return int64_t{0};
    int64_t bytes = a.num_kv_heads * static_cast<int64_t>(kPackedHeadBytes);
    for (int g = 0; g < a.num_kv_heads; ++g) {
      bytes += BodyBytes(a, a.spans.state[span + g]);
    }
    return bytes;
  };
  const auto padded = [](int64_t bytes) {
    return (bytes + kPackAlign - 1) / kPackAlign * kPackAlign;
  };
  int64_t own = 0;
  for (int item = begin; item < end; ++item) {
    ranges[item].bytes = bytes_of(item);
    own += padded(ranges[item].bytes);
  }
  sums[thread] = own;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const int64_t other = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += other;
  }
  int64_t offset = sums[thread] - own;
  for (int item = begin; item < end; ++item) {
    const int64_t bytes = ranges[item].bytes;
    ranges[item].offset = offset + bytes <= staging_bytes ? offset : -1;
    offset += padded(bytes);
  }
}

constexpr int kBatch = 4;  // pieces of a lane under way

// Lays the rows of a run out from rows[0] on; zeros for a token without a page.
__device__ __forceinline__ void LoadRun(const PackArgs& a, int64_t span, const SpanState& state,
                                        int first, int num, uint32_t* rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  TokenPlace place;
  if (lane < num) place = PlaceOf(a, span, state, first + lane);
  uint32_t scales = 0;
  if (a.scaled && place.k != nullptr) {
    scales = *reinterpret_cast<const uint16_t*>(place.k + place.k_scale) |
             uint32_t{*reinterpret_cast<const uint16_t*>(place.k + place.v_scale)} << 16;
  }
  RunPieces pieces(a, place, num);
#pragma unroll
  for (int batch = 0; batch < kRunPieces / 32 / kBatch; ++batch) {
    uint4 x[kBatch];
    int word[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const RunPieces::Piece piece = pieces.Next();
      word[j] = piece.word;
      x[j] = make_uint4(0, 0, 0, 0);
      if (piece.word >= 0 && piece.at != nullptr) x[j] = *piece.at;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (word[j] < 0) continue;
      rows[word[j]] = x[j].x;
      rows[word[j] + 1] = x[j].y;
      rows[word[j] + 2] = x[j].z;
      rows[word[j] + 3] = x[j].w;
    }
  }
  if (a.scaled && lane < num) rows[(lane + 1) * (a.row_bytes() / 4) - 1] = scales;
}

// Writes `bytes` of shared memory, from the word `out` % 16 / 4 on, to `out`.
__device__ __forceinline__ void WriteRun(const uint32_t* shared, int bytes, uint8_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(out) & 15), odd = past & 3;
  uint4* aligned = reinterpret_cast<uint4*>(out - past);
  const int begin = past == 0 ? 0 : 1, end = (past + bytes) / 16;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += 32) {
    uint4 x = reinterpret_cast<const uint4*>(shared)[i];
    if (odd != 0) {
      const uint32_t before = shared[4 * i - 1];
      x = make_uint4(__funnelshift_l(before, x.x, 8 * odd), __funnelshift_l(x.x, x.y, 8 * odd),
                     __funnelshift_l(x.y, x.z, 8 * odd), __funnelshift_l(x.z, x.w, 8 * odd));
    }
    aligned[i] = x;
  }
  // Fewer than 16 bytes at either end.
  const uint8_t* from = reinterpret_cast<const uint8_t*>(shared) + past - odd;
  const int at = lane < 16 ? lane : 16 * end - past + lane - 16;
  if (at < (lane < 16 ? 16 * begin - past : bytes)) out[at] = from[at];
}

// Grid (blocks of a head, heads, items). What it reads but `ranges` was there before the kernel
// ahead of it, which did not start early itself.
__global__ void __launch_bounds__(kThreads, 4)
    PackKernel(const PackArgs a, const ByteRange* ranges, uint8_t* staging) {
  __shared__ alignas(16) uint32_t shared_of_warp[kWarps][kRunWords];
  const int item = static_cast<int>(blockIdx.z), g = static_cast<int>(blockIdx.y);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first_span = FirstSpan(a, item), span = first_span + g;
  const int step = static_cast<int>(gridDim.x) * kWarps * a.run_tokens;
  int first = (static_cast<int>(blockIdx.x) * kWarps + warp) * a.run_tokens;
  uint32_t* shared = shared_of_warp[warp];
  SpanState state;
  int live = 0;
  int64_t offset = 0;  // of the head's rows in the item
  const auto load = [&] {
    const int past = static_cast<int>((offset + int64_t{first} * a.row_bytes()) & 15);
    LoadRun(a, span, state, first, min(a.run_tokens, live - first), shared + past / 4);
  };
  if (first_span >= 0) {
    state = a.spans.state[span];
    live = state.num_survivors + state.num_ring + 1;
    offset = BodyOffset(a, g, [&](int h) { return a.spans.state[first_span + h]; });
    if (first < live) load();
  }
  ptx::WaitForPredecessors();
  const int64_t item_offset = ranges[item].offset;
  if (first_span < 0 || item_offset < 0) return;
  uint8_t* out = staging + item_offset;
  uint8_t* body = out + offset;
  while (first < live) {
    __syncwarp();
    WriteRun(shared, min(a.run_tokens, live - first) * a.row_bytes(),
             body + int64_t{first} * a.row_bytes());
    first += step;
    if (first >= live) break;
    __syncwarp();
    load();
  }
  if (blockIdx.x != 0) return;
  const uint8_t* evict = a.spans.ring_evict + span * a.spans.evict_stride();
  uint8_t* flags = body + int64_t{live} * a.row_bytes();
  for (int i = static_cast<int>(threadIdx.x); i < state.num_ring; i += kThreads) {
    const int slot = state.ring_start + i;
    flags[i] = evict[slot >= a.spans.window ? slot - a.spans.window : slot];
  }
  if (threadIdx.x == 0) {
    uint32_t* head = reinterpret_cast<uint32_t*>(out) + 3 * g;
    head[0] = static_cast<uint32_t>(state.num_survivors);
    head[1] = static_cast<uint32_t>(state.num_ring);
    head[2] = a.spans.window > 0 && a.shift == 0 ? evict[a.spans.window] : 0;
  }
}

}  // namespace

absl::Status ValidatePackSpans(const char* op, const DeviceSpans& spans, int num_seqs,
                               int first_layer, int num_layers) {
  WINNOW_RETURN_IF_ERROR(ValidateDeviceSpans(op, spans));
  if (spans.num_kv_heads > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": num_kv_heads=", spans.num_kv_heads));
  }
  if (num_seqs < 0 || first_layer < 0 || num_layers < 0 || first_layer > spans.num_layers ||
      num_layers > spans.num_layers - first_layer || int64_t{num_seqs} * num_layers > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(op, ": bad shape num_seqs=", num_seqs,
                                                   " first_layer=", first_layer,
                                                   " num_layers=", num_layers));
  }
  return absl::OkStatus();
}

}  // namespace internal

using internal::kPackAlign;

absl::Status ValidateKvPackCuda(const KvPackCudaParams& p) {
  WINNOW_RETURN_IF_ERROR(
      internal::ValidatePackSpans("kv_pack", p.spans, p.num_seqs, p.first_layer, p.num_layers));
  if (p.slots == nullptr || p.staging == nullptr || p.ranges == nullptr) {
    return absl::InvalidArgumentError("kv_pack: slots, staging or ranges is null");
  }
  if (!Aligned(p.staging, kPackAlign) || p.staging_bytes < 0 || p.staging_bytes % kPackAlign != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "kv_pack: staging or staging_bytes=", p.staging_bytes, " is not a multiple of 16"));
  }
  return absl::OkStatus();
}

absl::Status LaunchKvPack(const KvPackCudaParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateKvPackCuda(p));
  const internal::PackArgs args =
      internal::MakePackArgs(p.spans, p.slots, p.num_seqs, p.first_layer, p.num_layers);
  if (args.num_items == 0) return absl::OkStatus();
  internal::PlaceItemsKernel<<<1, internal::kPackThreads, 0, stream>>>(args, p.staging_bytes,
                                                                       p.ranges);
  WINNOW_RETURN_IF_ERROR(CudaStatus(cudaGetLastError()));
  WINNOW_RETURN_IF_ERROR(LaunchEarly(internal::PackKernel, internal::PackGrid(p.spans, args),
                                     internal::kPackThreads, 0, stream, args, p.ranges, p.staging));
  if (p.crc == nullptr) return absl::OkStatus();
  return LaunchCrc32c({.data = p.staging,
                       .ranges = p.ranges,
                       .crc = p.crc,
                       .num_ranges = args.num_items,
                       .max_bytes = p.staging_bytes / args.num_items},
                      stream);
}

}  // namespace winnow::kernels
