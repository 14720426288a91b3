#pragma once

#include <string>

#include "absl/status/status.h"

namespace winnow {

// `status` with the reason that its code most likely has between workers and router,
// unless it carries one. So a status without a reason, to the router, is one of the
// transport's own: the worker did not answer.
absl::Status WithDefaultReason(absl::Status status);

// "UNAVAILABLE (DRAINING): the worker is draining", for logs.
std::string StatusText(const absl::Status& status);

}  // namespace winnow
