#pragma once

#include <cstdint>

#include "kernels/cuda/decode_plan.h"
#include "tests/kernels/device_memory.h"

namespace winnow::kernels {

// A plan's device memory, zero where LaunchDecodePlan() wants it so.
struct PlanMemory {
  PlanMemory(int rows, int64_t num_pages, int group, int head_dim, int layers = 1)
      : max_pieces(static_cast<int>(MaxDecodePieces(rows, num_pages))),
        pieces(static_cast<size_t>(max_pieces * layers)),
        num_pieces(static_cast<size_t>(layers)),
        next_piece(static_cast<size_t>(2 * layers)),
        arrivals(static_cast<size_t>(rows)),
        out(static_cast<size_t>(max_pieces) * static_cast<size_t>(group * head_dim)),
        norm(static_cast<size_t>(max_pieces) * static_cast<size_t>(group * 2)),
        overflow(1) {
    overflow.Fill(0);
    next_piece.Fill(0);
    arrivals.Fill(0);
  }
  DecodePlan plan() const {
    return {.pieces = pieces.get(),
            .num_pieces = num_pieces.get(),
            .next_piece = next_piece.get(),
            .arrivals = arrivals.get(),
            .partial_out = out.get(),
            .partial_norm = norm.get(),
            .max_pieces = max_pieces,
            .overflow = overflow.get()};
  }
  const int max_pieces;
  DeviceArray<DecodePiece> pieces;
  DeviceArray<int32_t> num_pieces, next_piece, arrivals;
  DeviceArray<float> out, norm;
  DeviceArray<int32_t> overflow;
};

}  // namespace winnow::kernels
