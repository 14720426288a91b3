#include "common/worker/reason.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/rpc/grpc_status.h"

namespace winnow {
namespace {

v1::ErrorReason DefaultReason(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return v1::ERROR_REASON_INVALID_FIELD;
    case absl::StatusCode::kResourceExhausted:
      return v1::ERROR_REASON_KV_FULL;
    case absl::StatusCode::kUnavailable:
      return v1::ERROR_REASON_WORKER_LOST;
    case absl::StatusCode::kFailedPrecondition:
      return v1::ERROR_REASON_WRONG_INCARNATION;
    case absl::StatusCode::kDataLoss:
      return v1::ERROR_REASON_TRANSFER_CORRUPT;
    case absl::StatusCode::kNotFound:
      return v1::ERROR_REASON_TRANSFER_UNKNOWN;
    case absl::StatusCode::kDeadlineExceeded:
      return v1::ERROR_REASON_TRANSFER_TIMEOUT;
    case absl::StatusCode::kCancelled:
      return v1::ERROR_REASON_CANCELLED;
    default:
      return v1::ERROR_REASON_INTERNAL;
  }
}

}  // namespace

absl::Status WithDefaultReason(absl::Status status) {
  if (status.ok() || ReasonOf(status) != v1::ERROR_REASON_UNSPECIFIED) return status;
  const v1::ErrorReason reason = DefaultReason(status.code());
  const absl::Duration retry_after =
      reason == v1::ERROR_REASON_KV_FULL ? absl::Seconds(1) : absl::ZeroDuration();
  return WithReason(std::move(status), reason, retry_after);
}

std::string StatusText(const absl::Status& status) {
  const v1::ErrorReason reason = ReasonOf(status);
  const std::string why = reason == v1::ERROR_REASON_UNSPECIFIED
                              ? std::string()
                              : absl::StrCat(" (", ReasonName(reason), ")");
  return absl::StrCat(std::string(CodeName(status.code())), why, ": ",
                      std::string(status.message()));
}

}  // namespace winnow
