#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "common/cuda/stream_handle.h"
#include "kernels/cuda/device_spans.h"

// How a decode step's attention is cut up: once a step, for all layers, on the device.
//
// A span is read as a list of pages: survivor pages | ring pages | the newest token as a
// page of one slot. It is cut into pieces of PieceUnits(pages) * kPagesPerUnit pages, which
// depends on that span's length alone, so a sequence's result has the same bits whatever
// its batch mates. Pieces are listed longest first.
namespace winnow::kernels {

inline constexpr int kPagesPerUnit = 4;
inline constexpr int kMaxPieces = 64;  // of a span

// The least power of two that cuts `num_pages` into at most kMaxPieces pieces.
constexpr int PieceUnits(int num_pages) {
  int units = 1;
  while (num_pages > units * kPagesPerUnit * kMaxPieces) units *= 2;
  return units;
}

struct alignas(64) DecodePiece {
  int32_t row;         // in the batch: b * num_kv_heads + g
  int32_t span;        // among the layer's spans: slot * num_kv_heads + g
  int32_t first_page;  // of the span's list
  int32_t num_pages;
  int32_t piece;  // index in the span, of
  int32_t num_pieces;
  int32_t partial;  // index of the span's first partial result
  int32_t num_survivors;
  int32_t num_ring;
  int32_t page[kPagesPerUnit];  // the first pages' ids; -1: the newest token
  int32_t unused[3];
};
static_assert(sizeof(DecodePiece) == 64);

// Device memory of a plan; all of it the caller's, 16-byte aligned.
struct DecodePlan {
  DecodePiece* pieces = nullptr;  // [num_layers, max_pieces]; 64-byte aligned
  int32_t* num_pieces = nullptr;  // [num_layers]
  int32_t* next_piece = nullptr;  // [num_layers, 2]; zero at first, and after every attention
  int32_t* arrivals = nullptr;    // [max_rows]; as next_piece; shared by the layers
  float* partial_out = nullptr;   // [max_pieces, num_heads / num_kv_heads, head_dim]; shared
  float* partial_norm = nullptr;  // [max_pieces, num_heads / num_kv_heads, 2]; shared
  int max_pieces = 0;             // of a layer; see MaxDecodePieces
};

// Enough for `num_rows` spans (sequences * KV heads) whose tables hold `num_pages` together.
constexpr int64_t MaxDecodePieces(int64_t num_rows, int64_t num_pages) {
  return 2 * num_rows + (num_pages + kPagesPerUnit - 1) / kPagesPerUnit;
}

struct DecodePlanParams {
  DeviceSpans spans;
  const int32_t* slots = nullptr;  // device [num_seqs]: the cache's slot of each; < 0: no sequence
  int num_seqs = 0;
  DecodePlan plan;
};

// INVALID_ARGUMENT for a null pointer or a bad shape.
absl::Status ValidateDecodePlan(const DecodePlanParams& params);
// Reads states and page tables as they are when the step's tokens have entered. REQUIRES:
// no layer has more than max_pieces pieces (MaxDecodePieces() of what its spans may hold);
// with fewer the attention would write past the partials.
absl::Status LaunchDecodePlan(const DecodePlanParams& params, StreamHandle stream);

}  // namespace winnow::kernels
