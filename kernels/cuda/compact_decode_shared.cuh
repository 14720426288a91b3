#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_attention.h"
#include "kernels/cuda/compact_decode_warp.cuh"

// What the warps of a block of compact_decode_attention share.
namespace winnow::kernels::device {

inline constexpr int kDecodeWarps = 4;
static_assert(kPagesPerUnit % kDecodeWarps == 0 && SpanCut::kHalfStep % kDecodeWarps == 0);
inline constexpr int kMergeWarps = 2;
inline constexpr int kDecodeThreads = 32 * (kDecodeWarps + kMergeWarps + 1);

struct CompactDecodeArgs {
  const DecodePiece* pieces;
  const int32_t* num_pieces;
  int32_t* next_piece;  // [2]: pieces handed out, blocks done
  int32_t* arrivals;
  float* partial_out;
  float* partial_norm;
  const uint8_t* pages;
  const int32_t* survivor_pages;  // of the layer, as are the next two
  const int32_t* ring_pages;
  const uint8_t* newest;
  const float* q;
  float* out_f32;
  Bf16* out_bf16;
  int64_t newest_stride;
  int max_survivor_pages, ring_pages_per_span;
  int max_pieces;
  int group;
  int ring_slots;    // pages in shared memory; set by the launch, as is the next
  int gather_slots;  // results of a cluster's pieces in it; 0: no clusters
  float scale_log2;  // scale * log2(e)
  bool rotated;
};

// A piece as the producer's lanes hold it, a word each.
struct PieceWords {
  int word = 0;
  __device__ __forceinline__ int Get(int field) const {
    return __shfl_sync(0xffffffffu, word, field);
  }
};
enum PieceField {
  kRow,
  kSpan,
  kFirstPage,
  kNumPages,
  kPartial,
  kNumSurvivors,
  kNumRing,
  kFreshRingPage,
  kPieceWords
};
static_assert(sizeof(DecodePiece) == 4 * kPieceWords);

template <KvElement kK, KvElement kV, int kDim, int kHeads>
struct alignas(16) DecodeShared {
  using S = DecodeShape<kK, kV, kDim>;
  static constexpr int kStages = kHeads == 4 ? 3 : 2;  // pieces under way
  static constexpr int kMaxRing = 32;
  // Whether the next kernel's blocks, which fill their rings at once, start when all but the last
  // pages of this one's are on their way: at 128 channels a ring does not hold a share, whose other
  // pages they would delay.
  static constexpr bool kLateDependents = kDim == 128;
  // With fewer a warp would wait for pages that find no room until it has read others.
  static constexpr int kMinRing = (DecodeWarp<kK, kV, kDim, kHeads>::kPages - 1) * kDecodeWarps + 1;
  static constexpr int kHeadFloats = kDim + 4;  // 16 bytes more: fewer bank conflicts
  struct Piece {
    int words[kPieceWords];  // num_pages 0: no more pieces
    float q_scale[kHeads];
    typename QueryWords<kHeads>::Type query[kDim / 16][32];
  };
  float out[kDecodeWarps][kHeads][kHeadFloats];
  Piece piece[kStages];
  float max[kDecodeWarps][kHeads], sum[kDecodeWarps][kHeads];
  int is_last;
  // Of a piece: its words, then its query, are there; all have read it.
  uint64_t words_full[kStages], query_full[kStages], piece_empty[kStages];
  uint64_t results_full, results_empty;
  uint64_t gathered;
  uint64_t full[kMaxRing], empty[kMaxRing];
  // The ring of pages lies before this, what a cluster's blocks store here behind it.
  static constexpr size_t RingBytes(int slots) {
    return static_cast<size_t>(slots) * S::kRingBytes;
  }
};

template <int kSlots>
__device__ __forceinline__ int PagesOf(int tokens) {
  return (tokens + kSlots - 1) / kSlots;
}

// Position in the ring: n pages on, the slot and the parity of its turn.
struct RingCursor {
  int slot = 0;
  uint32_t turn = 0;
  __device__ __forceinline__ void Next(int slots) {
    ++slot;
    turn ^= slot == slots ? 1 : 0;
    slot = slot == slots ? 0 : slot;
  }
  __device__ __forceinline__ void Advance(int n, int slots) {
    slot += n;
    while (slot >= slots) {
      slot -= slots;
      turn ^= 1;
    }
  }
};

// What a warp that works on pieces reads of one.
template <KvElement kK, KvElement kV, int kDim>
struct PieceView {
  using S = DecodeShape<kK, kV, kDim>;
  int num_pages, first_page, num_survivors, num_ring, survivors;
  SpanCut span;
  __device__ __forceinline__ explicit PieceView(const int* words)
      : num_pages(words[kNumPages]),
        first_page(words[kFirstPage]),
        num_survivors(words[kNumSurvivors]),
        num_ring(words[kNumRing]),
        survivors(PagesOf<S::kSlots>(num_survivors)),
        span(survivors + PagesOf<S::kSlots>(num_ring) + 1) {}
  // Past the last page of what is dealt out.
  __device__ __forceinline__ int end_page() const { return first_page + num_pages; }
  // Live keys of the span's page i.
  __device__ __forceinline__ int Keys(int i) const {
    const int left =
        i < survivors ? num_survivors - i * S::kSlots : num_ring - (i - survivors) * S::kSlots;
    return IsNewest(i) ? 1 : min(left, S::kSlots);
  }
  __device__ __forceinline__ bool IsNewest(int i) const { return i == span.num_pages - 1; }
};

}  // namespace winnow::kernels::device
