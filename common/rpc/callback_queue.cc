#include "common/rpc/callback_queue.h"

#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>

#include <memory>

#include "absl/synchronization/notification.h"

namespace winnow {

void KeepCallbackQueue() {
  // Without credentials gRPC makes a channel that refuses every call without connecting.
  // Its one call is what ties it to the queue.
  // Volatile: a leak checker must find it.
  static const std::shared_ptr<grpc::Channel>* const volatile kept = [] {
    auto* channel = new std::shared_ptr<grpc::Channel>(grpc::CreateChannel("none", nullptr));
    grpc::GenericStub stub(*channel);
    grpc::ClientContext context;
    const grpc::Slice empty;
    const grpc::ByteBuffer request(&empty, 1);
    grpc::ByteBuffer response;
    absl::Notification done;
    stub.UnaryCall(&context, "/none/None", grpc::StubOptions(), &request, &response,
                   [&](const grpc::Status&) { done.Notify(); });
    done.WaitForNotification();
    return channel;
  }();
  (void)kept;
}

}  // namespace winnow
