#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_cluster.cuh"
#include "kernels/cuda/compact_decode_shared.cuh"

// The warps that add up a block's results and, where a span is in several blocks, the blocks'.
namespace winnow::kernels::device {

// Rotates a head's channels, 4 a lane of kDim / 4 neighbours, as HadamardRotate() does.
template <int kDim>
__device__ __forceinline__ float4 HadamardLanes(float4 x, int lane) {
  const float scale = kDim == 128 ? 0.08838834764831845f : 0.125f;
  x = make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
  x = make_float4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
  x = make_float4(x.x + x.z, x.y + x.w, x.x - x.z, x.y - x.w);
#pragma unroll
  for (int half = 1; half < kDim / 4; half *= 2) {
    const auto step = [&](float own) {
      const float other = __shfl_xor_sync(0xffffffffu, own, half);
      return (lane & half) != 0 ? other - own : own + other;
    };
    x = make_float4(step(x.x), step(x.y), step(x.z), step(x.w));
  }
  return x;
}

template <int kDim>
__device__ __forceinline__ void StoreOutput(const CompactDecodeArgs& args, int row, int head,
                                            int channel, float4 x) {
  const int64_t at = (static_cast<int64_t>(row) * args.group + head) * kDim + channel;
  if (args.out_f32 != nullptr) {
    *reinterpret_cast<float4*>(args.out_f32 + at) = x;
  } else {
    const __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x.x, x.y),
                                    __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(args.out_bf16 + at) = *reinterpret_cast<const uint2*>(pair);
  }
}

// Barrier of the merging warps.
__device__ __forceinline__ void MergerSync() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kMergeWarps) : "memory");
}

// Adds one with what the block has written so far published, and what other blocks published
// visible afterwards. Returns the value before.
__device__ __forceinline__ int ArriveGlobal(int32_t* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// Four channels of a head over the pieces seen so far, in order: the same operations whether
// a block goes through a whole span or the last one through the pieces' partial results.
struct Fold {
  float max = -INFINITY, sum = 0.0f;
  float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
  // Nothing changes unless `valid`: a condition around it would part the loads that it needs.
  __device__ __forceinline__ void Add(float piece_max, float piece_sum, const float4& y,
                                      bool valid = true) {
    const float new_max = fmaxf(max, piece_max);
    const float a = Exp2(max - new_max), b = Exp2(piece_max - new_max);
    const auto add = [&](float own, float other) {
      return valid ? __fmaf_rn(b, other, __fmul_rn(own, a)) : own;
    };
    sum = add(sum, piece_sum);
    x = make_float4(add(x.x, y.x), add(x.y, y.y), add(x.z, y.z), add(x.w, y.w));
    max = valid ? new_max : max;
  }
};

// The result of four channels of a head, if there is that head. Whole warps.
template <int kDim>
__device__ __forceinline__ void StoreFold(const CompactDecodeArgs& args, int row, int head,
                                          int channel, const Fold& fold) {
  const float norm = 1.0f / fold.sum;
  float4 x = make_float4(fold.x.x * norm, fold.x.y * norm, fold.x.z * norm, fold.x.w * norm);
  if (args.rotated) x = HadamardLanes<kDim>(x, static_cast<int>(threadIdx.x) % 32);
  if (head < args.group) StoreOutput<kDim>(args, row, head, channel, x);
}

// The part of a merging lane: tasks of four channels of a head, kTasks in all.
template <int kDim, int kHeads>
struct MergeTasks {
  static constexpr int kLanesPerHead = kDim / 4;
  static constexpr int kTasks = kHeads * kLanesPerHead / (32 * kMergeWarps);
  static_assert(kTasks * 32 * kMergeWarps == kHeads * kLanesPerHead);
  static __device__ __forceinline__ int Head(int k, int tid) {
    return (k * 32 * kMergeWarps + tid) / kLanesPerHead;
  }
  static __device__ __forceinline__ int Channel(int tid) { return tid % kLanesPerHead * 4; }

  static __device__ __forceinline__ void Store(const CompactDecodeArgs& args, int row,
                                               const Fold (&fold)[kTasks], int tid) {
#pragma unroll
    for (int k = 0; k < kTasks; ++k)
      StoreFold<kDim>(args, row, Head(k, tid), Channel(tid), fold[k]);
  }

  // The sum of a span's partial results.
  static __device__ void MergePieces(const CompactDecodeArgs& args, int row, int partial,
                                     int num_pieces, int tid) {
    constexpr int kAhead = 16 / kTasks;
    const int group = args.group;
    Fold fold[kTasks];
    for (int first = 0; first < num_pieces; first += kAhead) {
      float4 y[kAhead][kTasks];
      float2 norm[kAhead][kTasks];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t piece = static_cast<int64_t>(partial) + min(first + i, num_pieces - 1);
#pragma unroll
        for (int k = 0; k < kTasks; ++k) {
          const int64_t at = piece * group + min(Head(k, tid), group - 1);
          norm[i][k] = __ldcg(reinterpret_cast<const float2*>(args.partial_norm + at * 2));
          y[i][k] =
              __ldcg(reinterpret_cast<const float4*>(args.partial_out + at * kDim + Channel(tid)));
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int k = 0; k < kTasks; ++k) {
          fold[k].Add(norm[i][k].x, norm[i][k].y, y[i][k], first + i < num_pieces);
        }
      }
    }
    Store(args, row, fold, tid);
  }
};

// Adds the consumers' results of each piece in the order of their pages, and the pieces.
template <KvElement kK, KvElement kV, int kDim, int kHeads>
__device__ void FinishPieces(const CompactDecodeArgs& args,
                             DecodeShared<kK, kV, kDim, kHeads>& shared, int warp, int lane) {
  using Shared = DecodeShared<kK, kV, kDim, kHeads>;
  using Tasks = MergeTasks<kDim, kHeads>;
  const int tid = warp * 32 + lane, group = args.group, channel = Tasks::Channel(tid);
  ptx::RingPlace stage;
  uint32_t results_turn = 0;
  while (true) {
    RingWait(&shared.words_full[stage.at], stage.parity);
    const int* words = shared.piece[stage.at].words;
    const PieceView<kK, kV, kDim> view(words);
    const int row = words[kRow], partial = words[kPartial];
    if (view.num_pages == 0) return;
    ptx::WaitForPredecessors();
    __syncwarp();
    if (ptx::ArrivesForWarp(lane)) RingArrive(&shared.piece_empty[stage.at]);
    stage.Next(Shared::kStages);
    const int num_pieces = view.span.num_pieces();
#if WINNOW_SM90A
    const SpanGather<kDim, kHeads> gather(reinterpret_cast<uint8_t*>(&shared + 1),
                                          args.gather_slots, &shared.gathered, group, num_pieces);
    const bool is_share = partial == kShare && view.num_pages < view.span.num_pages;
    typename SpanGather<kDim, kHeads>::Target target[Tasks::kTasks];
    int piece = view.span.PieceIndex(view.first_page);
    if (is_share) {
      if (tid == 0) gather.Expect();
      ptx::ClusterWaitAll();  // the others' barriers are initialized
#pragma unroll
      for (int k = 0; k < Tasks::kTasks; ++k) target[k] = gather.Aim(Tasks::Head(k, tid), channel);
    }
#endif
    Fold fold[Tasks::kTasks];
    for (int page = view.first_page; page < view.end_page();) {
      page = view.span.PieceEnd(page);
      RingWait(&shared.results_full, results_turn);
      results_turn ^= 1;
#pragma unroll
      for (int k = 0; k < Tasks::kTasks; ++k) {
        const int head = Tasks::Head(k, tid);
        float max = shared.max[0][head];
#pragma unroll
        for (int w = 1; w < kDecodeWarps; ++w) max = fmaxf(max, shared.max[w][head]);
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) {  // weight 0 of one that saw no key
          const float4 y = *reinterpret_cast<const float4*>(&shared.out[w][head][channel]);
          const float weight = Exp2(shared.max[w][head] - max);
          x = make_float4(__fmaf_rn(weight, y.x, x.x), __fmaf_rn(weight, y.y, x.y),
                          __fmaf_rn(weight, y.z, x.z), __fmaf_rn(weight, y.w, x.w));
          sum = __fmaf_rn(weight, shared.sum[w][head], sum);
        }
#if WINNOW_SM90A
        if (is_share) {
          if (head < group) gather.Put(target[k], piece, channel == 0, x, max, sum);
          continue;
        }
#endif
        fold[k].Add(max, sum, x);
      }
      __syncwarp();
      if (ptx::ArrivesForWarp(lane)) RingArrive(&shared.results_empty);
#if WINNOW_SM90A
      ++piece;
#endif
    }
#if WINNOW_SM90A
    if (is_share) {
      gather.template Merge<Fold, 32 * kMergeWarps>(
          tid, [&](int head, int at_channel, const Fold& sum, bool valid) {
            StoreFold<kDim>(args, row, valid ? head : group, at_channel, sum);
          });
      continue;
    }
#endif
    if (view.num_pages == view.span.num_pages) {
      Tasks::Store(args, row, fold, tid);
      continue;
    }
    const int64_t index = static_cast<int64_t>(partial) + view.span.PieceIndex(view.first_page);
#pragma unroll
    for (int k = 0; k < Tasks::kTasks; ++k) {
      const int head = Tasks::Head(k, tid);
      if (head >= group) continue;
      const int64_t out = index * group + head;
      __stcg(reinterpret_cast<float4*>(args.partial_out + out * kDim + channel), fold[k].x);
      if (channel == 0) {
        __stcg(reinterpret_cast<float2*>(args.partial_norm + out * 2),
               make_float2(fold[k].max, fold[k].sum));
      }
    }
    MergerSync();  // the block's partial result is out
    if (tid == 0) {
      shared.is_last = ArriveGlobal(&args.arrivals[row]) == num_pieces - 1 ? 1 : 0;
      if (shared.is_last != 0) args.arrivals[row] = 0;
    }
    MergerSync();
    if (shared.is_last != 0) Tasks::MergePieces(args, row, partial, num_pieces, tid);
  }
}

}  // namespace winnow::kernels::device
