#pragma once

#include "decode_worker/decode_engine.h"
#include "winnow/v1/decode.grpc.pb.h"

namespace winnow::decode {

// Serves winnow.v1.Decode. Only translates: protobuf to engine calls, engine events to
// the stream. No scheduling and no KV-cache logic live here, so tests run it against a
// fake DecodeEngine.
//
// Thread-safe: gRPC calls it, and the engine its reactors, from many threads.
class DecodeService final : public v1::Decode::CallbackService {
 public:
  // `engine` is not owned and must outlive *this and every open stream.
  explicit DecodeService(DecodeEngine* engine) : engine_(engine) {}

  DecodeService(const DecodeService&) = delete;
  DecodeService& operator=(const DecodeService&) = delete;

  // Status codes: see decode.proto.
  grpc::ServerWriteReactor<v1::DecodeEvent>* Decode(grpc::CallbackServerContext* context,
                                                    const v1::DecodeRequest* request) override;

 private:
  DecodeEngine* const engine_;
};

// INVALID_ARGUMENT unless every field is within the limits that decode.proto states;
// what depends on the model is left to the engine.
absl::Status ValidateDecode(const v1::DecodeRequest& request);

}  // namespace winnow::decode
