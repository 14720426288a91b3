#pragma once

#include <optional>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "winnow/v1/kv_transfer.pb.h"

namespace winnow {

// Moves the bytes of granted segments, below the state machine: transfer.h says
// when a segment may move, the plane says how. One object an end of a transfer;
// one segment at a time. Not thread-safe.
class DataPlane {
 public:
  virtual ~DataPlane() = default;

  // Sender: the segment may move now. Its bytes stay until the receiver has
  // acknowledged them or the transfer is quiet.
  virtual void StartSend(const v1::Grant& grant, absl::Span<const uint8_t> segment) = 0;
  // Sender: the next message that carries bytes in the control stream; nullopt when
  // there is none (left).
  virtual std::optional<v1::Chunk> NextChunk() = 0;
  // Sender: all bytes have been handed over.
  virtual bool sent() const = 0;

  // Receiver: what arrives for this grant goes to `segment`. Called before the grant
  // is sent.
  virtual void StartReceive(const v1::Grant& grant, absl::Span<uint8_t> segment) = 0;
  // Receiver: a chunk came in the control stream. On error nothing was written.
  //   INVALID_ARGUMENT     empty, larger than 1 MiB, out of order, past the segment.
  //   FAILED_PRECONDITION  of another slot or generation: stale.
  //   DATA_LOSS            the chunk's checksum differs.
  virtual absl::Status OnChunk(const v1::Chunk& chunk) = 0;
  // Receiver: all bytes of the segment are there.
  virtual bool received() const = 0;
};

}  // namespace winnow
