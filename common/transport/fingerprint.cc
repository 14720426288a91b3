#include "common/transport/fingerprint.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/transport/manifest.h"

namespace winnow {
namespace {

// What a peer sent may be any length; a message shows the start of it.
std::string Shown(const std::string& text) { return absl::CHexEscape(text.substr(0, 128)); }
std::string Shown(int64_t number) { return absl::StrCat(number); }

template <typename T>
absl::Status CheckEqual(const char* field, const T& ours, const T& theirs) {
  if (ours == theirs) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("layouts differ in ", field, ": ours is ",
                                                    Shown(ours), ", the peer's ", Shown(theirs)));
}

}  // namespace

v1::LayoutFingerprint MakeFingerprint(const KvCacheOptions& cache, const std::string& kv_mode,
                                      const std::string& decision_rule,
                                      const std::array<uint8_t, 32>& weights_digest,
                                      const std::string& architecture,
                                      const std::string& compute_path) {
  v1::LayoutFingerprint out;
  out.set_wire_version(kWireVersion);
  out.set_weights_digest(weights_digest.data(), weights_digest.size());
  out.set_architecture(architecture);
  out.set_num_layers(cache.num_layers);
  out.set_num_kv_heads(cache.num_kv_heads);
  out.set_head_dim(cache.head_dim);
  out.set_kv_mode(kv_mode);
  out.set_window(cache.window);
  out.set_decision_shift(cache.window > 0 ? cache.shift : 0);
  out.set_decision_rule(decision_rule);
  out.set_compute_path(compute_path);
  return out;
}

absl::Status CheckFingerprint(const v1::LayoutFingerprint& ours,
                              const v1::LayoutFingerprint& theirs) {
  WINNOW_RETURN_IF_ERROR(CheckEqual<int64_t>("wire_version", ours.wire_version(),  //
                                             theirs.wire_version()));
  WINNOW_RETURN_IF_ERROR(CheckEqual("architecture", ours.architecture(), theirs.architecture()));
  WINNOW_RETURN_IF_ERROR(CheckEqual<int64_t>("num_layers", ours.num_layers(), theirs.num_layers()));
  WINNOW_RETURN_IF_ERROR(
      CheckEqual<int64_t>("num_kv_heads", ours.num_kv_heads(), theirs.num_kv_heads()));
  WINNOW_RETURN_IF_ERROR(CheckEqual<int64_t>("head_dim", ours.head_dim(), theirs.head_dim()));
  WINNOW_RETURN_IF_ERROR(CheckEqual("kv_mode", ours.kv_mode(), theirs.kv_mode()));
  WINNOW_RETURN_IF_ERROR(CheckEqual<int64_t>("window", ours.window(), theirs.window()));
  WINNOW_RETURN_IF_ERROR(
      CheckEqual<int64_t>("decision_shift", ours.decision_shift(), theirs.decision_shift()));
  WINNOW_RETURN_IF_ERROR(CheckEqual("decision_rule", ours.decision_rule(), theirs.decision_rule()));
  // Last: two different models usually differ in something more telling.
  return CheckEqual("weights_digest", absl::BytesToHexString(ours.weights_digest()),
                    absl::BytesToHexString(theirs.weights_digest().substr(0, 64)));
}

}  // namespace winnow
