#include "decode_worker/kv_receiver.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/rpc/grpc_status.h"
#include "kernels/kv_format.h"

namespace winnow::decode {

int64_t MaxLayerPages(const KvCache& cache, uint64_t layer_bytes, int num_tokens) {
  const KvCacheOptions& options = cache.options();
  const int64_t any = cache.PagesUpperBound(num_tokens) / options.num_layers;
  const auto tokens =
      static_cast<int64_t>(layer_bytes / kernels::TokenBytes(options.format, options.head_dim));
  // Each table's last page may be a part.
  const int tables = options.num_kv_heads * (options.window > 0 ? 2 : 1);
  return std::min(any, tokens / cache.layout().slots_per_page + tables);
}

KvReceiver::KvReceiver(const Options& options, const Clock* clock, KvCache* cache,
                       StagingRing* ring, Receiver* receiver)
    : options_(options), clock_(clock), cache_(cache), ring_(ring), receiver_(receiver) {}

KvReceiver::~KvReceiver() {
  Close();
  for (Claim& claim : claims_) Drop(&claim);
}

absl::Status KvReceiver::Open(std::shared_ptr<IncomingTransfer> transfer) {
  MutexLock lock(&mu_);
  if (closed_) return absl::UnavailableError("the worker is shutting down");
  if (static_cast<int>(opened_.size()) >= options_.max_transfers) {
    return absl::ResourceExhaustedError(
        absl::StrCat(options_.max_transfers, " transfers wait to be looked at"));
  }
  opened_.push_back(std::move(transfer));
  return absl::OkStatus();
}

absl::Status KvReceiver::Expect(uint64_t id, const std::string& transfer_id, int prompt_tokens) {
  for (const Claim& claim : claims_) {
    if (claim.transfer_id == transfer_id) {
      return absl::InvalidArgumentError(
          absl::StrCat("transfer_id ", TransferIdText(transfer_id), " is in use"));
    }
  }
  Claim& claim = claims_.emplace_back();
  claim.id = id;
  claim.transfer_id = transfer_id;
  claim.prompt_tokens = prompt_tokens;
  return absl::OkStatus();
}

void KvReceiver::Drop(Claim* claim) {
  for (const TransferReceiver::Received& received : claim->received) ring_->Free(received.slot);
  claim->received.clear();
  claim->cache.reset();
  promised_pages_ -= std::exchange(claim->promised_pages, 0);
}

void KvReceiver::Forget(uint64_t id, absl::Status why) {
  const auto it =
      std::find_if(claims_.begin(), claims_.end(), [id](const Claim& c) { return c.id == id; });
  if (it == claims_.end()) return;
  if (it->transfer != nullptr) it->transfer->Fail(std::move(why));
  Drop(&*it);
  claims_.erase(it);
}

void KvReceiver::MatchParked() {
  {
    MutexLock lock(&mu_);
    for (auto& transfer : std::exchange(opened_, {})) parked_.push_back({std::move(transfer)});
  }
  std::erase_if(parked_, [this](Parked& parked) {
    if (!parked.transfer->Check().ok()) return true;
    const std::optional<IncomingTransfer::Opening> opening = parked.transfer->opening();
    if (!opening.has_value()) return false;
    for (Claim& claim : claims_) {
      if (claim.transfer_id != opening->transfer_id) continue;
      if (claim.transfer != nullptr) {
        parked.transfer->Fail(absl::InvalidArgumentError("the transfer is under way already"));
      } else {
        claim.transfer = parked.transfer;
      }
      return true;
    }
    const absl::Time now = clock_->Now();
    parked.deadline = std::min(parked.deadline, now + options_.park);
    if (now < parked.deadline) return false;
    parked.transfer->Fail(absl::NotFoundError(
        absl::StrCat("no Decode call waits for transfer ", TransferIdText(opening->transfer_id))));
    return true;
  });
}

void KvReceiver::Poll(const Room& room) {
  MatchParked();
  int room_left = room.sequences;
  for (auto it = claims_.begin(); it != claims_.end();) {
    Claim& claim = *it;
    if (claim.transfer == nullptr) {
      ++it;
      continue;
    }
    absl::Status status = Advance(&claim, room);
    if (!status.ok()) {
      claim.transfer->Fail(status);
      Drop(&claim);
      const uint64_t id = claim.id;
      it = claims_.erase(it);
      receiver_->OnTransferFailed(id, std::move(status));
      continue;
    }
    const std::optional<int32_t> first_token = claim.transfer->Committing();
    if (!first_token.has_value() || !claim.received.empty() || room_left < 1) {
      ++it;
      continue;
    }
    const std::shared_ptr<IncomingTransfer> transfer = claim.transfer;
    SequenceCache cache = *std::move(claim.cache);
    const uint64_t id = claim.id;
    const uint64_t bytes = claim.bytes;
    Drop(&claim);
    it = claims_.erase(it);
    --room_left;
    status = receiver_->OnArrived(id, std::move(cache), *first_token, bytes);
    // If the sender went away in this very moment it does not matter any more.
    if (status.ok()) {
      transfer->Commit();
    } else {
      transfer->Fail(std::move(status));
    }
  }
}

absl::Status KvReceiver::Advance(Claim* claim, const Room& room) {
  if (absl::Status status = claim->transfer->Check(); !status.ok()) {
    // To our caller a peer that is silent is a peer that is gone.
    if (!absl::IsDeadlineExceeded(status)) return status;
    return WithReason(absl::UnavailableError(status.message()), v1::ERROR_REASON_TRANSFER_TIMEOUT);
  }
  if (const auto opening = claim->transfer->opening();
      opening.has_value() && opening->prompt_tokens != claim->prompt_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("the transfer has prompt_tokens=", opening->prompt_tokens,
                     ", the Decode call ", claim->prompt_tokens));
  }
  std::vector<TransferReceiver::Received> arrived = claim->transfer->TakeReceived();
  claim->received.insert(claim->received.end(), std::make_move_iterator(arrived.begin()),
                         std::make_move_iterator(arrived.end()));
  WINNOW_RETURN_IF_ERROR(Unpack(claim));
  PromiseMemory(claim, room);
  return absl::OkStatus();
}

absl::Status KvReceiver::Unpack(Claim* claim) {
  while (!claim->received.empty()) {
    if (!claim->cache.has_value()) {
      // A layer without pages (a prompt of one token) comes without having asked for any.
      absl::StatusOr<SequenceCache> cache = cache_->NewSequence();
      if (!cache.ok()) return absl::OkStatus();  // comes when another ends
      claim->cache.emplace(*std::move(cache));
    }
    const TransferReceiver::Received& received = claim->received.front();
    absl::Status status = UnpackSegment(claim, received);
    // The engine was quicker to take pages: they come back, or the deadline ends it.
    if (absl::IsResourceExhausted(status)) return absl::OkStatus();
    ring_->Free(received.slot);
    claim->received.pop_front();
    WINNOW_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

absl::Status KvReceiver::UnpackSegment(Claim* claim, const TransferReceiver::Received& received) {
  const v1::Offer& offer = received.offer;
  const uint8_t* data = ring_->data(received.slot);
  const uint8_t* layer = data;
  if (offer.bytes() < offer.layer_bytes()) {
    // Again after a lack of pages, the last segment is there already.
    if (claim->layer.size() == offer.offset()) {
      claim->layer.insert(claim->layer.end(), data, data + offer.bytes());
    }
    if (claim->layer.size() < offer.layer_bytes()) {
      claim->bytes += offer.bytes();
      received_bytes_ += offer.bytes();
      return absl::OkStatus();
    }
    layer = claim->layer.data();
  }
  if (absl::Status status =
          claim->cache->Import(offer.layer(), claim->prompt_tokens, layer, offer.layer_bytes());
      !status.ok()) {
    return absl::Status(status.code(),
                        absl::StrCat("layer ", offer.layer(), ": ", std::string(status.message())));
  }
  claim->layer.clear();
  claim->bytes += offer.bytes();
  received_bytes_ += offer.bytes();
  ++claim->layers;
  const int64_t kept = MaxLayerPages(*cache_, offer.layer_bytes(), claim->prompt_tokens);
  claim->promised_pages -= kept;
  promised_pages_ -= kept;
  return absl::OkStatus();
}

void KvReceiver::PromiseMemory(Claim* claim, const Room& room) {
  const std::optional<IncomingTransfer::Wish> wish = claim->transfer->Waiting();
  if (!wish.has_value()) return;
  const int64_t available = cache_->pool().available() - room.reserved_pages - promised_pages_;
  if (!claim->cache.has_value()) {
    // Let in: what the whole sequence will take if all layers are like the first, and
    // what those already let in will still take.
    const int64_t layers = cache_->options().num_layers;
    int64_t expected = wish->pages * layers + cache_->StepReservePages(1);
    for (const Claim& other : claims_) {
      if (!other.cache.has_value() || other.layers == 0) continue;
      const int64_t a_layer = other.cache->pages_held() / other.layers;
      expected += std::max<int64_t>(0, a_layer * (layers - other.layers) - other.promised_pages);
    }
    const bool alone = room.idle && receiving() == 0;
    if (expected > available && !alone) return;
    absl::StatusOr<SequenceCache> cache = cache_->NewSequence();
    if (!cache.ok()) return;  // comes when another ends
    claim->cache.emplace(*std::move(cache));
  }
  if (wish->pages > available) return;
  claim->promised_pages += wish->pages;
  promised_pages_ += wish->pages;
  claim->transfer->Promise(wish->pages);
}

int KvReceiver::receiving() const {
  return static_cast<int>(std::count_if(claims_.begin(), claims_.end(),
                                        [](const Claim& c) { return c.cache.has_value(); }));
}

bool KvReceiver::idle() const {
  MutexLock lock(&mu_);
  return claims_.empty() && parked_.empty() && opened_.empty();
}

void KvReceiver::Close() {
  const absl::Status why = absl::UnavailableError("the worker is shutting down");
  MatchParked();
  for (const Parked& parked : parked_) parked.transfer->Fail(why);
  parked_.clear();
  while (!claims_.empty()) {
    const uint64_t id = claims_.front().id;
    Forget(id, why);
    receiver_->OnTransferFailed(id, why);
  }
  MutexLock lock(&mu_);
  closed_ = true;
}

}  // namespace winnow::decode
