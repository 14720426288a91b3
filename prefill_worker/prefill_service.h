#pragma once

#include "prefill_worker/prefill_engine.h"
#include "winnow/v1/prefill.grpc.pb.h"

namespace winnow::prefill {

// Serves winnow.v1.Prefill. Only translates, as decode::DecodeService does; tests run it
// against a fake PrefillEngine.
//
// Thread-safe: gRPC calls it, and the engine its reactors, from many threads.
class PrefillService final : public v1::Prefill::CallbackService {
 public:
  // `engine` is not owned and must outlive *this and every open stream.
  explicit PrefillService(PrefillEngine* engine) : engine_(engine) {}

  PrefillService(const PrefillService&) = delete;
  PrefillService& operator=(const PrefillService&) = delete;

  // Status codes: see prefill.proto.
  grpc::ServerWriteReactor<v1::PrefillEvent>* Prefill(grpc::CallbackServerContext* context,
                                                      const v1::PrefillRequest* request) override;

 private:
  PrefillEngine* const engine_;
};

// INVALID_ARGUMENT unless every field is within the limits that prefill.proto states;
// what depends on the model is left to the engine.
absl::Status ValidatePrefill(const v1::PrefillRequest& request);

}  // namespace winnow::prefill
