#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/mutex.h"

namespace winnow {

// Where a slot of a staging ring stands:
//   free -> filling -> offered -> in flight -> (acknowledged) free
// and from any of the middle three, when its transfer fails,
//   -> quarantined -> free, once nothing can touch the slot's bytes any more.
// A receiver's slot goes from filling to in flight: it is never offered.
enum class SlotState { kFree, kFilling, kOffered, kInFlight, kQuarantined };

// A slot as its present owner knows it. Every Take() gives a slot another
// generation, so what was meant for an earlier owner is told apart.
struct StagedSlot {
  int index = -1;
  uint64_t generation = 0;
};

// Equal pieces of host memory through which segments pass, allocated once.
// Thread-safe; a slot's bytes are its owner's alone. No operation allocates.
class StagingRing {
 public:
  // INVALID_ARGUMENT unless 1 <= num_slots <= 4096 and 1 <= slot_bytes <= 1 GiB;
  // RESOURCE_EXHAUSTED if the memory cannot be had.
  static absl::StatusOr<std::unique_ptr<StagingRing>> Create(int num_slots, size_t slot_bytes);

  int num_slots() const { return static_cast<int>(slots_.size()); }
  size_t slot_bytes() const { return slot_bytes_; }
  int free_slots() const;
  int quarantined_slots() const;

  // A free slot, now filling; nullopt if there is none.
  std::optional<StagedSlot> Take();
  // [slot_bytes]. REQUIRES: the caller owns the slot.
  uint8_t* data(const StagedSlot& slot);
  // The functions below REQUIRE that `slot` is not free and its generation the
  // current one.
  void Advance(const StagedSlot& slot, SlotState to);  // to kOffered or kInFlight, forward only
  void Free(const StagedSlot& slot);                   // REQUIRES: not quarantined
  void Quarantine(const StagedSlot& slot);
  void Quiesced(const StagedSlot& slot);  // REQUIRES: quarantined

 private:
  struct Slot {
    SlotState state = SlotState::kFree;
    uint64_t generation = 0;
  };

  StagingRing(int num_slots, size_t slot_bytes, std::unique_ptr<uint8_t[]> memory);
  Slot& Owned(const StagedSlot& slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const size_t slot_bytes_;
  const std::unique_ptr<uint8_t[]> memory_;  // [num_slots, slot_bytes]
  mutable Mutex mu_;
  std::vector<Slot> slots_;  // its size never changes; the elements are under mu_
  int free_ ABSL_GUARDED_BY(mu_);
  int quarantined_ ABSL_GUARDED_BY(mu_) = 0;
  int next_ ABSL_GUARDED_BY(mu_) = 0;  // where the search for a free slot starts
};

}  // namespace winnow
