#include "common/transport/staging.h"

#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace winnow {

absl::StatusOr<std::unique_ptr<StagingRing>> StagingRing::Create(int num_slots, size_t slot_bytes) {
  if (num_slots < 1 || num_slots > 4096) {
    return absl::InvalidArgumentError(
        absl::StrCat("staging slots=", num_slots, " is outside [1, 4096]"));
  }
  if (slot_bytes < 1 || slot_bytes > (size_t{1} << 30)) {
    return absl::InvalidArgumentError(
        absl::StrCat("staging slot_bytes=", slot_bytes, " is outside [1, 1 GiB]"));
  }
  const size_t bytes = static_cast<size_t>(num_slots) * slot_bytes;
  std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[bytes]);
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes of staging"));
  }
  return std::unique_ptr<StagingRing>(new StagingRing(num_slots, slot_bytes, std::move(memory)));
}

StagingRing::StagingRing(int num_slots, size_t slot_bytes, std::unique_ptr<uint8_t[]> memory)
    : slot_bytes_(slot_bytes),
      memory_(std::move(memory)),
      slots_(static_cast<size_t>(num_slots)),
      free_(num_slots) {}

int StagingRing::free_slots() const {
  MutexLock lock(&mu_);
  return free_;
}

int StagingRing::quarantined_slots() const {
  MutexLock lock(&mu_);
  return quarantined_;
}

std::optional<StagedSlot> StagingRing::Take() {
  MutexLock lock(&mu_);
  if (free_ == 0) return std::nullopt;
  while (slots_[static_cast<size_t>(next_)].state != SlotState::kFree) {
    next_ = (next_ + 1) % num_slots();
  }
  Slot& slot = slots_[static_cast<size_t>(next_)];
  slot.state = SlotState::kFilling;
  ++slot.generation;
  --free_;
  return StagedSlot{.index = next_, .generation = slot.generation};
}

uint8_t* StagingRing::data(const StagedSlot& slot) {
  MutexLock lock(&mu_);
  Owned(slot);
  return memory_.get() + static_cast<size_t>(slot.index) * slot_bytes_;
}

void StagingRing::Advance(const StagedSlot& slot, SlotState to) {
  MutexLock lock(&mu_);
  Slot& owned = Owned(slot);
  WINNOW_CHECK(to == SlotState::kOffered || to == SlotState::kInFlight);
  WINNOW_CHECK(owned.state < to);
  owned.state = to;
}

void StagingRing::Free(const StagedSlot& slot) {
  MutexLock lock(&mu_);
  Slot& owned = Owned(slot);
  WINNOW_CHECK(owned.state != SlotState::kQuarantined);
  owned.state = SlotState::kFree;
  ++free_;
}

void StagingRing::Quarantine(const StagedSlot& slot) {
  MutexLock lock(&mu_);
  Slot& owned = Owned(slot);
  WINNOW_CHECK(owned.state != SlotState::kQuarantined);
  owned.state = SlotState::kQuarantined;
  ++quarantined_;
}

void StagingRing::Quiesced(const StagedSlot& slot) {
  MutexLock lock(&mu_);
  Slot& owned = Owned(slot);
  WINNOW_CHECK(owned.state == SlotState::kQuarantined);
  owned.state = SlotState::kFree;
  --quarantined_;
  ++free_;
}

StagingRing::Slot& StagingRing::Owned(const StagedSlot& slot) {
  WINNOW_CHECK(slot.index >= 0 && slot.index < num_slots());
  Slot& owned = slots_[static_cast<size_t>(slot.index)];
  WINNOW_CHECK(owned.state != SlotState::kFree && owned.generation == slot.generation);
  return owned;
}

}  // namespace winnow
