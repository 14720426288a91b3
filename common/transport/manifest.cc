#include "common/transport/manifest.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "kernels/kv_format.h"
#include "kernels/kv_pack.h"

namespace winnow {
namespace {

absl::Status CheckRange(const char* name, uint64_t value, uint64_t low, uint64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, "=", value, " is outside [", low, ", ", high, "]"));
}

}  // namespace

TransferLimits LimitsOf(const KvCacheOptions& cache, int max_prompt_tokens, uint64_t slot_bytes) {
  const auto heads = static_cast<uint64_t>(cache.num_kv_heads);
  return {.num_layers = cache.num_layers,
          .max_prompt_tokens = max_prompt_tokens,
          .layer_fixed_bytes = heads * kernels::kPackedHeadBytes,
          // One byte more for a ring token's flag.
          .layer_token_bytes = heads * (kernels::TokenBytes(cache.format, cache.head_dim) +
                                        (cache.window > 0 ? 1 : 0)),
          .slot_bytes = slot_bytes};
}

absl::Status CheckOffer(const v1::Offer& offer, const TransferLimits& limits) {
  WINNOW_RETURN_IF_ERROR(CheckTransferId(offer.transfer_id()));
  // A negative value becomes a huge one and fails the same check.
  WINNOW_RETURN_IF_ERROR(CheckRange("layer", static_cast<uint64_t>(offer.layer()), 0,
                                    static_cast<uint64_t>(limits.num_layers - 1)));
  WINNOW_RETURN_IF_ERROR(CheckRange("prompt_tokens", static_cast<uint64_t>(offer.prompt_tokens()),
                                    1, static_cast<uint64_t>(limits.max_prompt_tokens)));
  WINNOW_RETURN_IF_ERROR(CheckRange("layer_bytes", offer.layer_bytes(), 1,
                                    limits.MaxLayerBytes(offer.prompt_tokens())));
  WINNOW_RETURN_IF_ERROR(CheckRange("offset", offer.offset(), 0, offer.layer_bytes() - 1));
  WINNOW_RETURN_IF_ERROR(CheckRange("bytes", offer.bytes(), 1, limits.slot_bytes));
  return CheckRange("bytes", offer.bytes(), 1, offer.layer_bytes() - offer.offset());
}

absl::Status CheckTransferId(const std::string& id) {
  if (id.size() == kTransferIdBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("transfer_id of ", id.size(), " bytes, must be ", kTransferIdBytes));
}

std::string TransferIdText(const std::string& id) {
  return absl::BytesToHexString(id.substr(0, kTransferIdBytes));
}

}  // namespace winnow
