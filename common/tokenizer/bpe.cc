#include "common/tokenizer/bpe.h"

#include <algorithm>

#include "common/tokenizer/byte_level.h"

namespace winnow {
namespace {

uint64_t PairKey(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// std::push_heap keeps the greatest in front: the lowest rank, then the leftmost.
bool Later(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

}  // namespace

Bpe::Bpe(const TokenizerSpec* spec) : spec_(spec) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto it = spec->vocab.find(ByteSpelling(static_cast<uint8_t>(byte)));
    byte_ids_[static_cast<size_t>(byte)] = it == spec->vocab.end() ? -1 : it->second;
  }
  merge_rank_.reserve(spec->merges.size());
  for (size_t rank = 0; rank < spec->merges.size(); ++rank) {
    // Of a pair listed twice the later rank holds, as in `tokenizers`.
    const Merge& merge = spec->merges[rank];
    merge_rank_[PairKey(merge.left, merge.right)] = static_cast<int32_t>(rank);
  }
}

void Bpe::PushCandidate(int32_t position, Scratch* scratch) const {
  const Scratch::Symbol& left = scratch->symbols[static_cast<size_t>(position)];
  if (left.next < 0) return;
  const int32_t right_id = scratch->symbols[static_cast<size_t>(left.next)].id;
  const auto it = merge_rank_.find(PairKey(left.id, right_id));
  if (it == merge_rank_.end()) return;
  scratch->heap.push_back({it->second, position});
  std::push_heap(scratch->heap.begin(), scratch->heap.end(), Later);
}

void Bpe::Encode(std::string_view word, Scratch* scratch, std::vector<int32_t>* ids) const {
  if (spec_->ignore_merges) {
    scratch->spelling.clear();
    for (const char c : word) scratch->spelling += ByteSpelling(static_cast<uint8_t>(c));
    const auto it = spec_->vocab.find(scratch->spelling);
    if (it != spec_->vocab.end()) {
      ids->push_back(it->second);
      return;
    }
  }

  auto& symbols = scratch->symbols;
  symbols.clear();
  const auto add = [&](int32_t id) {
    const auto position = static_cast<int32_t>(symbols.size());
    if (position > 0) symbols.back().next = position;
    symbols.push_back({id, position - 1, -1});
  };
  bool after_unk = false;
  for (const char c : word) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(c)];
    if (id >= 0) {
      add(id);
    } else if (spec_->unk_id && !(after_unk && spec_->fuse_unk)) {
      add(*spec_->unk_id);
    }
    after_unk = id < 0;
  }

  scratch->heap.clear();
  for (size_t i = 0; i < symbols.size(); ++i) PushCandidate(static_cast<int32_t>(i), scratch);
  while (!scratch->heap.empty()) {
    std::pop_heap(scratch->heap.begin(), scratch->heap.end(), Later);
    const Scratch::Candidate candidate = scratch->heap.back();
    scratch->heap.pop_back();
    Scratch::Symbol& left = symbols[static_cast<size_t>(candidate.position)];
    const Merge& merge = spec_->merges[static_cast<size_t>(candidate.rank)];
    // Stale if either symbol has gone into another merge since. A dead symbol's id is
    // -1, which no merge has.
    if (left.id != merge.left || left.next < 0) continue;
    Scratch::Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (right.id != merge.right) continue;
    left.id = merge.merged;
    right.id = -1;
    left.next = right.next;
    if (right.next >= 0) symbols[static_cast<size_t>(right.next)].prev = candidate.position;
    if (left.prev >= 0) PushCandidate(left.prev, scratch);
    PushCandidate(candidate.position, scratch);
  }
  for (int32_t i = symbols.empty() ? -1 : 0; i >= 0; i = symbols[static_cast<size_t>(i)].next) {
    ids->push_back(symbols[static_cast<size_t>(i)].id);
  }
}

}  // namespace winnow
