#include "tests/kernels/device_span_case.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace winnow {

using kernels::Span;

void DeviceSpanCase::AddPage(kernels::PageTable* table, int32_t page) {
  if (table->num_pages % kernels::kSegmentPages == 0) {
    segments_.push_back(std::make_unique<kernels::PageSegment>());
    (table->head == nullptr ? table->head : table->tail->next) = segments_.back().get();
    table->tail = segments_.back().get();
  }
  table->tail->page[table->num_pages++ % kernels::kSegmentPages] = page;
}

kernels::KvLayout DeviceSpanCase::layout() {
  return {.format = shape_.format,
          .head_dim = shape_.head_dim,
          .window = shape_.window,
          .shift = shape_.shift,
          .pages = host_pages_.data(),
          .page_bytes = kernels::PageBytes(shape_.head_dim),
          .slots_per_page = kernels::SlotsPerPage(shape_.format, shape_.head_dim)};
}

kernels::DeviceSpans DeviceSpanCase::device() const {
  return {.format = shape_.format,
          .head_dim = shape_.head_dim,
          .window = shape_.window,
          .shift = shape_.shift,
          .num_layers = shape_.num_layers,
          .max_sequences = num_sequences_,
          .num_kv_heads = shape_.num_kv_heads,
          .max_survivor_pages = max_survivor_pages_,
          .pages = pages->get(),
          .state = state->get(),
          .survivor_pages = survivor_pages->get(),
          .ring_pages = ring_pages->get(),
          .newest = newest->get(),
          .ring_evict = ring_evict->get()};
}

DeviceSpanCase::DeviceSpanCase(const DeviceSpanShape& shape, int num_sequences,
                               const std::vector<SpanLength>& lengths)
    : shape_(shape), num_sequences_(num_sequences), spans_(lengths.size()) {
  const int slots = kernels::SlotsPerPage(shape.format, shape.head_dim);
  const auto pages_of = [slots](int n) { return (n + slots - 1) / slots; };
  const int ring_per_span = pages_of(shape.window);
  max_survivor_pages_ = (pages_of(shape.max_survivors) + 3) / 4 * 4;
  for (const SpanLength& length : lengths) {
    total_pages_ += pages_of(length.survivors) + pages_of(length.ring);
    max_survivor_pages_ = std::max(max_survivor_pages_, (pages_of(length.survivors) + 8) / 4 * 4);
  }
  const size_t page_bytes = kernels::PageBytes(shape.head_dim);
  std::vector<int32_t> free(static_cast<size_t>(total_pages_ + shape.spare_pages));
  host_pages_.assign(free.size() * page_bytes, 0xff);
  std::iota(free.begin(), free.end(), 0);
  std::mt19937 rng(shape.seed);
  std::shuffle(free.begin(), free.end(), rng);

  const size_t token_bytes = kernels::TokenBytes(shape.format, shape.head_dim);
  const size_t newest_stride = (token_bytes + 15) / 16 * 16;
  const size_t evict_stride = static_cast<size_t>(shape.window) + 1;
  host_newest_.assign(lengths.size() * newest_stride, 0xff);
  host_evict_.assign(lengths.size() * evict_stride, 0xff);
  std::normal_distribution<float> normal;
  std::vector<float> k(static_cast<size_t>(shape.head_dim)), v = k;
  std::vector<uint8_t> row(token_bytes);
  int token = 0;  // of the span
  const auto next_row = [&] {
    for (float& x : k) x = 1.5f * normal(rng);
    for (float& x : v) x = normal(rng);
    if (shape.token != nullptr) shape.token(token, k.data(), v.data());
    ++token;
    kernels::StoreRow(shape.format, shape.head_dim, k.data(), v.data(), row.data());
  };
  const kernels::KvLayout at = layout();
  const auto fill = [&](kernels::PageTable* table, int tokens) {
    for (int i = 0; i < tokens; ++i) {
      if (i % slots == 0) {
        AddPage(table, free.back());
        free.pop_back();
      }
      next_row();
      kernels::CopyRowToPage(shape.format, shape.head_dim, row.data(),
                             at.Page(table->At(i / slots)), i % slots);
    }
  };
  std::vector<kernels::SpanState> states(lengths.size());
  std::vector<int32_t> survivors(lengths.size() * static_cast<size_t>(max_survivor_pages_), -77);
  std::vector<int32_t> ring(lengths.size() * static_cast<size_t>(ring_per_span), -77);
  for (size_t i = 0; i < lengths.size(); ++i) {
    Span& span = spans_[i];
    token = 0;
    fill(&span.survivors, lengths[i].survivors);
    fill(&span.ring, lengths[i].ring);
    next_row();
    span.newest = &host_newest_[i * newest_stride];
    std::copy(row.begin(), row.end(), span.newest);
    span.ring_evict = &host_evict_[i * evict_stride];
    for (int j = 0; j < lengths[i].ring; ++j) span.ring_evict[j] = rng() % 2;
    span.num_survivors = lengths[i].survivors;
    span.num_ring = lengths[i].ring;
    span.ring_start = lengths[i].ring == shape.window && shape.window > 0
                          ? static_cast<int>(rng() % static_cast<uint32_t>(shape.window))
                          : 0;
    span.num_tokens = span.num_survivors + span.num_ring + 1;
    span.newest_evict = shape.shift == 0 && shape.window > 0 ? rng() % 2 : 0;
    host_evict_[i * evict_stride + static_cast<size_t>(shape.window)] = span.newest_evict;
    states[i] = {span.num_survivors, span.num_ring, span.ring_start, span.num_tokens};
    for (int j = 0; j < span.survivors.num_pages; ++j) {
      survivors[i * static_cast<size_t>(max_survivor_pages_) + static_cast<size_t>(j)] =
          span.survivors.At(j);
    }
    for (int j = 0; j < span.ring.num_pages; ++j) {
      ring[i * static_cast<size_t>(ring_per_span) + static_cast<size_t>(j)] = span.ring.At(j);
    }
  }
  spare_pages_ = free;
  pages = std::make_unique<DeviceArray<uint8_t>>(host_pages_);
  newest = std::make_unique<DeviceArray<uint8_t>>(host_newest_);
  ring_evict = std::make_unique<DeviceArray<uint8_t>>(host_evict_);
  state = std::make_unique<DeviceArray<kernels::SpanState>>(states);
  survivor_pages = std::make_unique<DeviceArray<int32_t>>(survivors);
  ring_pages = std::make_unique<DeviceArray<int32_t>>(ring);
}

}  // namespace winnow
