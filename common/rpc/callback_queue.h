#pragma once

namespace winnow {

// gRPC 1.51 runs all callback calls of a process on one shared completion queue, which it
// frees when the last channel or server that used it goes: twice, if two of its threads
// race (AddressSanitizer: double free in grpc_cq_internal_unref). This keeps the queue for
// the life of the process. Called by whatever opens channels or servers; thread-safe,
// cheap after the first call.
void KeepCallbackQueue();

}  // namespace winnow
