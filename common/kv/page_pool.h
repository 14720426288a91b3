#pragma once

#include <cstdint>
#include <vector>

namespace winnow {

// Hands out page ids [0, num_pages); the memory is elsewhere. A page is free or
// taken; some of the free ones may be reserved (promised, not yet chosen).
//
// Invariants: taken + free == total; reserved <= free. Not thread-safe: owned by
// the engine thread. No operation allocates.
class PagePool {
 public:
  explicit PagePool(int num_pages);

  int total() const { return total_; }
  int free() const { return static_cast<int>(free_.size()); }
  int used() const { return total_ - free(); }
  int reserved() const { return reserved_; }
  // Free and promised to nobody.
  int available() const { return free() - reserved_; }
  // Most pages ever taken at once.
  int peak() const { return peak_; }

  // False, and nothing changed, if fewer than n are available.
  [[nodiscard]] bool Reserve(int64_t n);
  // REQUIRES: n <= reserved().
  void Unreserve(int64_t n);
  // A page; its contents are whatever the last owner left. REQUIRES: free() > 0.
  int32_t Take();
  // REQUIRES: `page` is taken.
  void Give(int32_t page);
  // Scrambles the order in which free pages are taken (tests).
  void Shuffle(uint32_t seed);

 private:
  const int total_;
  int reserved_ = 0;
  int peak_ = 0;
  std::vector<int32_t> free_;  // a stack
  std::vector<bool> taken_;
};

}  // namespace winnow
