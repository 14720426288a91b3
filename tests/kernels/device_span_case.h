#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "kernels/cuda/device_spans.h"
#include "kernels/kv_span.h"
#include "tests/kernels/device_memory.h"

namespace winnow {

struct SpanLength {
  int survivors = 0;
  int ring = 0;  // window once the ring has filled
};

struct DeviceSpanShape {
  kernels::KvFormatId format = kernels::KvFormatId::kFp8;
  int head_dim = 128;
  int window = 256;
  int shift = 1;
  int num_layers = 1, num_kv_heads = 1;
  int spare_pages = 0;    // pages of the pool that no span holds
  int max_survivors = 0;  // room in the tables beyond what lengths need
  uint32_t seed = 1;
  // Sets K and V [head_dim] of a token, 0 for the span's oldest; not set: random values.
  std::function<void(int token, float* k, float* v)> token;
};

// The same spans twice, in host memory for the CPU ops and in device memory: random stored
// tokens, pages at random places of the pool, whatever no token owns filled with 0xff.
class DeviceSpanCase {
 public:
  // lengths [num_layers, sequences, num_kv_heads]
  DeviceSpanCase(const DeviceSpanShape& shape, int num_sequences,
                 const std::vector<SpanLength>& lengths);

  const DeviceSpanShape& shape() const { return shape_; }
  int num_sequences() const { return num_sequences_; }
  kernels::KvLayout layout();
  kernels::DeviceSpans device() const;
  kernels::Span& span(int layer, int sequence, int g) { return spans_[Index(layer, sequence, g)]; }
  size_t Index(int layer, int sequence, int g) const {
    return (static_cast<size_t>(layer) * static_cast<size_t>(num_sequences_) +
            static_cast<size_t>(sequence)) *
               static_cast<size_t>(shape_.num_kv_heads) +
           static_cast<size_t>(g);
  }
  int max_survivor_pages() const { return max_survivor_pages_; }
  const std::vector<int32_t>& spare_pages() const { return spare_pages_; }
  int64_t total_pages() const { return total_pages_; }
  void AddPage(kernels::PageTable* table, int32_t page);

  // Device memory, open to tests.
  std::unique_ptr<DeviceArray<uint8_t>> pages, newest, ring_evict;
  std::unique_ptr<DeviceArray<kernels::SpanState>> state;
  std::unique_ptr<DeviceArray<int32_t>> survivor_pages, ring_pages;

 private:
  const DeviceSpanShape shape_;
  const int num_sequences_;
  int max_survivor_pages_ = 0;
  int64_t total_pages_ = 0;
  std::vector<kernels::Span> spans_;
  std::vector<std::unique_ptr<kernels::PageSegment>> segments_;
  std::vector<uint8_t> host_pages_, host_newest_, host_evict_;
  std::vector<int32_t> spare_pages_;
};

}  // namespace winnow
