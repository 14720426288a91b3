#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_shared.cuh"

// The warp that feeds a block: it deals pieces to it, prepares their queries and copies their
// pages into the ring.
namespace winnow::kernels::device {

template <KvElement kK, KvElement kV, int kDim, int kHeads>
class DecodeProducer {
 public:
  using S = DecodeShape<kK, kV, kDim>;
  using Shared = DecodeShared<kK, kV, kDim, kHeads>;
  using Warp = DecodeWarp<kK, kV, kDim, kHeads>;
  static constexpr int kPagesATrip = 3;  // filled while memory answers
  // A head's steps are its lanes' in runs: both columns of four heads' have the same channels.
  static constexpr int kLaneSteps = Warp::kSteps / (kHeads == 4 ? 2 : 1);

  __device__ __forceinline__ DecodeProducer(const CompactDecodeArgs& args, const CUtensorMap* map,
                                            uint8_t* ring, Shared& shared, int lane)
      : args_(args), map_(map), ring_(ring), shared_(shared), lane_(lane) {}

  // Fills the ring's first slots with the pages that the step writes. A warp beside Run()'s, which
  // meanwhile sees to the query.
  __device__ void BeginWritten() {
    const int at = static_cast<int>(blockIdx.x), num_pieces = *args_.num_pieces;
    if (at >= num_pieces) return;
    const PieceWords piece = LoadPiece(at, num_pieces);
    const int ids = PageIds(piece, 0);
    ptx::WaitForPredecessors();
    BeginPages(piece, ids, /*settled=*/false);
  }

  __device__ void Run() {
    const int grid = static_cast<int>(gridDim.x);
    int at = static_cast<int>(blockIdx.x);
#if WINNOW_SM90A
    if (lane_ == 0) ptx::PrefetchMap(map_);
#endif
    PieceWords piece = LoadPiece(at, args_.max_pieces);  // perhaps none: before the count is here
    const int num_pieces = *args_.num_pieces;
    if (at >= num_pieces) {
      PublishWords(PieceWords{});
      ptx::WaitForPredecessors();  // the next kernel's blocks come later so, which is faster
      return;
    }
    int ids = PageIds(piece, 0);
    // What the kernel before this one does not write is on its way before that one ends.
    PublishWords(piece);
    int filled = BeginPages(piece, ids, /*settled=*/true);
    cursor_.Advance(filled, args_.ring_slots);
    if constexpr (Shared::kLateDependents) {  // nothing is left that they could delay
      if (filled == piece.Get(kNumPages)) ptx::LetDependentsStart();
    }
    ptx::WaitForPredecessors();
    float4 query[kLaneSteps];
    LoadQuery(piece, query);
    for (bool first = true; at < num_pieces; first = false) {
      if (!first) PublishWords(piece);
      PublishQuery(query);
      // The next piece is claimed late, so that blocks end together, but with pages left to
      // fill that cover each of the three trips to memory until its own can be.
      PieceWords next;
      int claim = 0, next_at = 0, next_ids = -1;
      const int pages = piece.Get(kNumPages);
#pragma unroll 1
      for (int step = 0; step < 4; ++step) {
        FillPages(piece, &ids, &filled, pages - (step < 3 ? (3 - step) * kPagesATrip - 1 : 0));
        if (Shared::kLateDependents && step == 0) ptx::LetDependentsStart();
        if (step == 0 && !first && lane_ == 0) claim = ClaimPiece(args_.next_piece);
        if (step == 1) {
          next_at = first ? at + grid : 2 * grid + __shfl_sync(0xffffffffu, claim, 0);
          next = LoadPiece(next_at, num_pieces);
        }
        if (step == 2) {
          next_ids = PageIds(next, 0);
          LoadQuery(next, query);
        }
      }
      piece = next;
      ids = next_ids;
      at = next_at;
      filled = 0;
    }
    PublishWords(PieceWords{});
    // The last block with work to end leaves the counters as it found them.
    if (lane_ == 0 && atomicAdd(args_.next_piece + 1, 1) == min(grid, num_pieces) - 1) {
      args_.next_piece[0] = 0;
      args_.next_piece[1] = 0;
    }
  }

 private:
  // The number of claims before this one. An increment, since an addition's result is waited
  // for at once: the assembler adds up lanes and shuffles it back.
  static __device__ __forceinline__ int ClaimPiece(int32_t* claims) {
    int before;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7fffffff;"
                 : "=r"(before)
                 : "l"(claims)
                 : "memory");
    return before;
  }

  // No pages past the last piece.
  __device__ __forceinline__ PieceWords LoadPiece(int i, int num_pieces) const {
    PieceWords piece;
    if (i < num_pieces && lane_ < kPieceWords) {
      piece.word = reinterpret_cast<const int*>(args_.pieces + i)[lane_];
    }
    return piece;
  }

  // The ids of 32 of the piece's pages from `start` on, one a lane; -1: the newest, or none.
  __device__ __forceinline__ int PageIds(const PieceWords& piece, int start) const {
    const int survivors = PagesOf<S::kSlots>(piece.Get(kNumSurvivors));
    const int ring = PagesOf<S::kSlots>(piece.Get(kNumRing));
    const int64_t span = piece.Get(kSpan);
    const int i = piece.Get(kFirstPage) + start + lane_;
    if (start + lane_ >= piece.Get(kNumPages) || i >= survivors + ring) return -1;
    return i < survivors ? args_.survivor_pages[span * args_.max_survivor_pages + i]
                         : args_.ring_pages[span * args_.ring_pages_per_span + i - survivors];
  }

  // Starts the copies of the piece's pages from *filled up to `end`, as the ring has room.
  // `ids` are those of the 32 pages that *filled is among.
  __device__ __forceinline__ void FillPages(const PieceWords& piece, int* ids, int* filled,
                                            int end) {
    int i = *filled;
    for (; i < end; ++i) {
      if (i % 32 == 0 && i > 0) *ids = PageIds(piece, i);
      const int id = __shfl_sync(0xffffffffu, *ids, i % 32);
      RingWait(&shared_.empty[cursor_.slot], cursor_.turn ^ 1);
      Fill(piece, id, cursor_.slot);
      cursor_.Next(args_.ring_slots);
    }
    *filled = i;
  }

  // Starts the copy of a page, or of the newest token (id < 0), to `slot`.
  __device__ __forceinline__ void Fill(const PieceWords& piece, int id, int slot) {
    uint8_t* to = ring_ + slot * S::kRingBytes;
    if (id >= 0) {
      RingFillPage<S>(map_, id, args_.pages, to, &shared_.full[slot], lane_);
    } else {
      RingFillRow<S>(args_.newest + piece.Get(kSpan) * args_.newest_stride, to, &shared_.full[slot],
                     lane_);
    }
  }

  // Fills the empty ring with the first piece's pages: those that the step does not write, or
  // those that it does. How many both are.
  __device__ __forceinline__ int BeginPages(const PieceWords& piece, int ids, bool settled) {
    const int survivors = PagesOf<S::kSlots>(piece.Get(kNumSurvivors));
    const int pages = min(min(piece.Get(kNumPages), args_.ring_slots), 32);
    const int fresh = piece.Get(kFreshRingPage), page = piece.Get(kFirstPage) + lane_;
    const bool written = ids < 0 || page == survivors - 1 || page == fresh;
    uint32_t left = __ballot_sync(0xffffffffu, lane_ < pages && settled != written);
    for (; left != 0; left &= left - 1) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      Fill(piece, __shfl_sync(0xffffffffu, ids, i), i);
    }
    return pages;
  }

  // The first of this lane's steps.
  __device__ __forceinline__ int FirstStep() const {
    return kHeads == 4 ? lane_ / 4 % 2 * kLaneSteps : 0;
  }

  // This lane's steps of its column's head, or of the last head where the group has fewer, as
  // DecodeWarp's right factors want them.
  __device__ __forceinline__ void LoadQuery(const PieceWords& piece, float4 (&x)[kLaneSteps]) {
    const int head = min(lane_ / 4 / (kHeads == 4 ? 2 : 1), args_.group - 1);
    const int64_t row = piece.Get(kRow);
    const float* q = args_.q + (row * args_.group + head) * kDim;
#pragma unroll
    for (int s = 0; s < kLaneSteps; ++s) {
      const float* at = q + Warp::QChannel(FirstStep() + s, lane_ % 4);
      if constexpr (S::kBytes == 1) {
        x[s] = __ldcg(reinterpret_cast<const float4*>(at));
      } else {
        const float2 low = __ldcg(reinterpret_cast<const float2*>(at));
        const float2 high = __ldcg(reinterpret_cast<const float2*>(at + 8));
        x[s] = make_float4(low.x, low.y, high.x, high.y);
      }
    }
  }

  __device__ __forceinline__ void PublishWords(const PieceWords& piece) {
    RingWait(&shared_.piece_empty[stage_.at], stage_.parity ^ 1);
    if (lane_ < kPieceWords) shared_.piece[stage_.at].words[lane_] = piece.word;
    RingArrive(&shared_.words_full[stage_.at]);
  }

  // The query of the piece whose words went before.
  __device__ __forceinline__ void PublishQuery(const float4 (&x)[kLaneSteps]) {
    typename Shared::Piece& to = shared_.piece[stage_.at];
    int amax = 0;
#pragma unroll
    for (int s = 0; s < kLaneSteps; ++s) {
      const float larger =
          fmaxf(fmaxf(fabsf(x[s].x), fabsf(x[s].y)), fmaxf(fabsf(x[s].z), fabsf(x[s].w)));
      amax = max(amax, __float_as_int(larger));
    }
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
    if constexpr (kHeads == 4) amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 4));
    // Scaled by a power of two to at most 2^8, so that float16 holds it.
    const int exponent = min(max(261 - (amax >> 23), 1), 253);
    const float factor = __int_as_float(exponent << 23);
    const int column = lane_ / 4;
    if (lane_ % 4 == 0 && (kHeads == 8 || column % 2 == 0)) {
      to.q_scale[kHeads == 8 ? column : column / 2] =
          args_.scale_log2 * __int_as_float((254 - exponent) << 23);
    }
#pragma unroll
    for (int s = 0; s < kLaneSteps; ++s) {
      SplitPair a, b;
      if constexpr (S::kScaled) {
        a = SplitF16(x[s].x * factor, x[s].y * factor);
        b = SplitF16(x[s].z * factor, x[s].w * factor);
      } else {
        a = SplitBf16(x[s].x * factor, x[s].y * factor);
        b = SplitBf16(x[s].z * factor, x[s].w * factor);
      }
      if constexpr (kHeads == 4) {
        to.query[FirstStep() + s][lane_ & ~4] = make_uint2(a.hi, b.hi);
        to.query[FirstStep() + s][lane_ | 4] = make_uint2(a.lo, b.lo);
      } else {
        to.query[s][lane_] = make_uint4(a.hi, b.hi, a.lo, b.lo);
      }
    }
    RingArrive(&shared_.query_full[stage_.at]);
    stage_.Next(Shared::kStages);
  }

  const CompactDecodeArgs& args_;
  const CUtensorMap* map_;
  uint8_t* ring_;
  Shared& shared_;
  const int lane_;
  RingCursor cursor_;
  ptx::RingPlace stage_;
};

}  // namespace winnow::kernels::device
