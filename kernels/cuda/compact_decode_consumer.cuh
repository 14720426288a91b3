#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_shared.cuh"

// One of the warps that multiply: of each piece it takes every kDecodeWarps-th page.
namespace winnow::kernels::device {

template <KvElement kK, KvElement kV, int kDim, int kHeads>
class DecodeConsumer {
 public:
  using S = DecodeShape<kK, kV, kDim>;
  using Shared = DecodeShared<kK, kV, kDim, kHeads>;
  using Warp = DecodeWarp<kK, kV, kDim, kHeads>;
  using View = PieceView<kK, kV, kDim>;

  __device__ __forceinline__ DecodeConsumer(const CompactDecodeArgs& args, uint8_t* ring,
                                            Shared& shared, int warp, int lane)
      : args_(args), ring_(ring), shared_(shared), warp_(warp), lane_(lane), state_(lane) {}

  __device__ void Run() {
    ptx::RingPlace stage;
    while (true) {
      RingWait(&shared_.words_full[stage.at], stage.parity);
      const typename Shared::Piece& piece = shared_.piece[stage.at];
      const View view(piece.words);
      if (view.num_pages == 0) return;
      RingWait(&shared_.query_full[stage.at], stage.parity);
      for (int page = view.first_page; page < view.end_page();) {
        const int end = view.span.PieceEnd(page);
        state_.Reset(piece.query, piece.q_scale);
        AddPiece(view, page, end);
        PublishResult();
        page = end;
      }
      __syncwarp();
      if (ptx::ArrivesForWarp(lane_)) RingArrive(&shared_.piece_empty[stage.at]);
      stage.Next(Shared::kStages);
    }
  }

 private:
  // Adds this warp's of the span's pages [page, end), a piece.
  __device__ __forceinline__ void AddPiece(const View& view, int page, int end) {
    RingCursor cursor = begin_;
    cursor.Advance(warp_, args_.ring_slots);
    begin_.Advance(end - page, args_.ring_slots);
    int at = page + warp_;
    int slots[Warp::kPages];
    const auto next = [&](int n) {
      slots[n] = cursor.slot;
      const typename Warp::Page result = WaitForPage(view, at, cursor);
      cursor.Advance(kDecodeWarps, args_.ring_slots);
      at += kDecodeWarps;
      return result;
    };
    const auto done = [&](int n) {
      __syncwarp();
      if (ptx::ArrivesForWarp(lane_)) RingArrive(&shared_.empty[slots[n]]);
    };
    while (at < end) {
      if constexpr (Warp::kPages == 2) {
        if (at + kDecodeWarps < end) {
          const typename Warp::Page first = next(0);
          state_.AddPages({first, next(1)}, done);
          continue;
        }
      }
      state_.AddPages({next(0)}, done);
    }
  }

  // The span's page `at`, when it is there.
  __device__ __forceinline__ typename Warp::Page WaitForPage(const View& view, int at,
                                                             const RingCursor& cursor) const {
    // Until the page a turn before has been read, this one's parity says nothing.
    RingWait(&shared_.empty[cursor.slot], cursor.turn ^ 1);
    RingWait(&shared_.full[cursor.slot], cursor.turn);
    const uint8_t* page = ring_ + cursor.slot * S::kRingBytes;
    return {.codes = ptx::SharedAddress(page),
            .scales = page + S::kCodeBytes,
            .v_scales = view.IsNewest(at) ? 2 : 2 * S::kSlots,
            .count = view.Keys(at)};
  }

  // Leaves the piece's result to the merging warps; of no key where this warp had no page.
  __device__ __forceinline__ void PublishResult() {
    RingWait(&shared_.results_empty, results_turn_);
    results_turn_ ^= 1;
    state_.Finish(
        [&](int head, float max, float sum) {
          shared_.max[warp_][head] = max;
          shared_.sum[warp_][head] = sum;
        },
        [&](int head, int channel, float4 x) {
          *reinterpret_cast<float4*>(&shared_.out[warp_][head][channel]) = x;
        });
    __syncwarp();
    if (ptx::ArrivesForWarp(lane_)) RingArrive(&shared_.results_full);
  }

  const CompactDecodeArgs& args_;
  uint8_t* ring_;
  Shared& shared_;
  const int warp_, lane_;
  Warp state_;
  RingCursor begin_;  // of the next piece
  uint32_t results_turn_ = 1;
};

}  // namespace winnow::kernels::device
