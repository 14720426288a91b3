#include "kernels/cpu/weight_arena.h"

#include <sys/mman.h>

#include <cstdint>

#include "common/base/check.h"

namespace winnow::kernels {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{32} << 20;  // shared by several allocations

size_t RoundUp(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

WeightArena::~WeightArena() {
  for (const Mapping& mapping : mappings_) munmap(mapping.base, mapping.bytes);
}

char* WeightArena::Map(size_t bytes) {
  // A huge page more than needed, to align within; what is not touched costs nothing.
  const size_t mapped = RoundUp(bytes, kHugePage) + kHugePage;
  void* base =
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1, 0);
  WINNOW_CHECK(base != MAP_FAILED);
  mappings_.push_back({base, mapped});
  char* aligned =
      static_cast<char*>(base) +
      (RoundUp(reinterpret_cast<uintptr_t>(base), kHugePage) - reinterpret_cast<uintptr_t>(base));
#ifdef MADV_HUGEPAGE
  // Refused on hosts without huge pages: then these are ordinary ones.
  (void)madvise(aligned, RoundUp(bytes, kHugePage), MADV_HUGEPAGE);
#endif
  return aligned;
}

void* WeightArena::Allocate(size_t bytes) {
  bytes = RoundUp(bytes, 64);
  std::lock_guard<std::mutex> lock(mu_);
  if (bytes > kChunk / 2) return Map(bytes);
  if (bytes > left_) {
    next_ = Map(kChunk);
    left_ = kChunk;
  }
  char* p = next_;
  next_ += bytes;
  left_ -= bytes;
  return p;
}

}  // namespace winnow::kernels
