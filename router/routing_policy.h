#pragma once

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "winnow/v1/worker.pb.h"

namespace winnow::router {

// A worker that could serve a request: what it reported last, and what this router sent
// it, which a report up to a second old may not show yet.
struct Candidate {
  std::string target;  // HOST:PORT
  v1::LoadSnapshot load;
  int in_flight = 0;                    // requests of this router that are open there
  int64_t in_flight_prompt_tokens = 0;  // their prompts, until the first token came
};

// Index of the worker with the fewest prompt tokens to compute; of equals the one with
// the fewest open requests, then the first counted from `rotation`. -1 if there is none.
// Pure.
int PickPrefill(absl::Span<const Candidate> candidates, uint64_t rotation);

// Index of the worker with the smallest share of its KV memory in use, in sixteenths; of
// equals the one with the fewest requests, then the first from `rotation`. -1 if there is
// none. Pure.
int PickDecode(absl::Span<const Candidate> candidates, uint64_t rotation);

}  // namespace winnow::router
