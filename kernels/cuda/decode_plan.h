#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/decode_span_cut.h"
#include "kernels/cuda/device_spans.h"

// How a decode step's attention is cut up: once a step, for all layers, on the device.
//
// A span is read as a list of pages: survivor pages | ring pages | the newest token as a
// page of one slot. It is cut into pieces as SpanCut says, which depends on that span's length
// alone, so a sequence's result has the same bits whatever its batch mates. The plan lists
// pieces and, where there is work enough for all blocks, whole spans, whose pieces one block goes
// through in turn; longest first. Of few and short spans of like lengths it lists
// DecodeClusterBlocks() shares each, runs of pieces, for the blocks of a cluster.
namespace winnow::kernels {

// Spans of a layer, sequences * KV heads, of one launch: their shares are counted in 32 bits.
inline constexpr int kMaxDecodeRows = 1 << 24;

// Blocks of a cluster, 1 where the spans are too many for clusters.
inline constexpr int kMaxShares = 128;  // about one an SM
inline constexpr int kMaxClusterBlocks = 8;
// Pages of a share, at most: longer ones take longer than the merge of pieces that is saved.
inline constexpr int kMaxSharePages = 24;
inline constexpr int kMaxSharedPieces = 16;  // of a span that a cluster shares
constexpr int DecodeClusterBlocks(int num_rows) {
  int blocks = kMaxClusterBlocks;
  while (blocks > 1 && num_rows * blocks > kMaxShares) blocks /= 2;
  return blocks;
}

// A piece, a whole span, or the share of a cluster's block, perhaps of no pages.
struct alignas(32) DecodePiece {
  int32_t row;         // in the batch: b * num_kv_heads + g
  int32_t span;        // among the layer's spans: slot * num_kv_heads + g
  int32_t first_page;  // of the span's list
  int32_t num_pages;
  int32_t partial;  // index of the span's first partial result; kShare: the cluster keeps them
  int32_t num_survivors;
  int32_t num_ring;
  int32_t fresh_ring_page;  // of the list: the one that the step's token goes to; -1: none
};
static_assert(sizeof(DecodePiece) == 32);
inline constexpr int32_t kShare = -1;

// Device memory of a plan; all of it the caller's, 16-byte aligned.
struct DecodePlan {
  DecodePiece* pieces = nullptr;  // [num_layers, max_pieces]; 32-byte aligned
  int32_t* num_pieces = nullptr;  // [num_layers]
  int32_t* next_piece = nullptr;  // [num_layers, 2]; zero at first, and after every attention
  int32_t* arrivals = nullptr;    // [max_rows]; as next_piece; shared by the layers
  float* partial_out = nullptr;   // [max_pieces, num_heads / num_kv_heads, head_dim]; shared
  float* partial_norm = nullptr;  // [max_pieces, num_heads / num_kv_heads, 2]; shared
  int max_pieces = 0;             // of a layer; see MaxDecodePieces
  // Set to 1, and never back, when a layer had more pieces than max_pieces: its attention
  // then writes nothing.
  int32_t* overflow = nullptr;
};

// Enough for `num_rows` spans (sequences * KV heads) whose tables hold `num_pages` together.
constexpr int64_t MaxDecodePieces(int64_t num_rows, int64_t num_pages) {
  const int64_t pieces = 2 * num_rows + num_pages / kPagesPerUnit;
  return pieces > kMaxShares ? pieces : kMaxShares;
}

struct DecodePlanParams {
  DeviceSpans spans;
  const int32_t* slots = nullptr;  // device [num_seqs]: the cache's slot of each; < 0: no sequence
  int num_seqs = 0;
  DecodePlan plan;
  // Blocks that the work is dealt to; 0: as many as the device holds, or clusters. Results do
  // not depend on it: 1 leaves most spans in one, very many cuts them all.
  int force_blocks = 0;
};

// INVALID_ARGUMENT for a null pointer, a bad shape or more than kMaxDecodeRows.
absl::Status ValidateDecodePlan(const DecodePlanParams& params);
// Reads the states as they are when the step's tokens have entered.
absl::Status LaunchDecodePlan(const DecodePlanParams& params, StreamHandle stream);

}  // namespace winnow::kernels
