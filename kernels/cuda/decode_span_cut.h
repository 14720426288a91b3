#pragma once

// How decode attention cuts a span's list of pages; see decode_plan.h.
namespace winnow::kernels {

inline constexpr int kPagesPerUnit = 8;
inline constexpr int kMaxPieces = 32;  // of a span

// One up to 64 pages; beyond, the least from three on that makes at most kMaxPieces pieces.
constexpr int PieceUnits(int num_pages) {
  constexpr int kMost = kPagesPerUnit * kMaxPieces;
  if (num_pages <= 64) return 1;
  return num_pages <= 3 * kMost ? 3 : (num_pages + kMost - 1) / kMost;
}

// Where a span of `num_pages` pages is cut: into two halves, so that two blocks have equal work,
// and these into pieces of `unit` pages, of which a half's last may have fewer.
struct SpanCut {
  static constexpr int kHalfStep = 4;  // as many as a block's warps read at once
  int unit, num_pages;
  int half;  // pages of the first half: all up to a unit, else a multiple of kHalfStep or `unit`

  constexpr explicit SpanCut(int pages)
      : unit(PieceUnits(pages) * kPagesPerUnit), num_pages(pages), half(pages) {
    const int step = pages <= 64 ? kHalfStep : unit;
    if (pages > unit) half = (pages + 2 * step - 1) / (2 * step) * step;
  }
  // Quotient by `unit`.
  constexpr int Units(int pages) const {
    return unit == kPagesPerUnit ? pages / kPagesPerUnit : pages / unit;  // mostly a shift
  }
  constexpr int Pieces(int pages) const { return Units(pages + unit - 1); }
  constexpr int first_pieces() const { return Pieces(half); }
  constexpr int num_pieces() const { return Pieces(half) + Pieces(num_pages - half); }
  // Of the piece that starts at `page`.
  constexpr int PieceEnd(int page) const {
    const int end = page < half ? half : num_pages;
    return page + unit < end ? page + unit : end;
  }
  constexpr int PieceIndex(int page) const {
    return page < half ? Units(page) : first_pieces() + Units(page - half);
  }
  constexpr int PieceStart(int index) const {
    return index < first_pieces() ? index * unit : half + (index - first_pieces()) * unit;
  }
};

}  // namespace winnow::kernels
