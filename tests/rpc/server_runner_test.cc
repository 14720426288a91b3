#include "common/rpc/server_runner.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/channel_pool.h"
#include "winnow/v1/worker.grpc.pb.h"

namespace winnow {
namespace {

using ::testing::HasSubstr;

// Drain() answers when told to.
class SlowWorker final : public v1::Worker::CallbackService {
 public:
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const v1::DrainRequest*,
                                  v1::DrainResponse*) override {
    reactor = context->DefaultReactor();
    return reactor;
  }
  std::atomic<grpc::ServerUnaryReactor*> reactor{nullptr};
};

// A unary call of any method with raw bytes.
grpc::Status Call(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                  const std::string& request, std::string* response) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
  grpc::CompletionQueue queue;
  const grpc::Slice slice(request);
  const grpc::ByteBuffer in(&slice, 1);
  auto call = stub.PrepareUnaryCall(&context, method, in, &queue);
  call->StartCall();
  grpc::ByteBuffer out;
  grpc::Status status;
  call->Finish(&out, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  std::vector<grpc::Slice> slices;
  if (status.ok() && out.Dump(&slices).ok()) {
    for (const grpc::Slice& s : slices)
      response->append(reinterpret_cast<const char*>(s.begin()), s.size());
  }
  return status;
}

// grpc.health.v1.HealthCheckResponse.ServingStatus: 1 SERVING, 2 NOT_SERVING.
int Health(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  std::string request;
  if (!service.empty())
    request = absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  std::string response;
  const grpc::Status status = Call(channel, "/grpc.health.v1.Health/Check", request, &response);
  return status.ok() && response.size() == 2 ? response[1] : -static_cast<int>(status.error_code());
}

TEST(ServerRunner, HealthByNameFollowsSetServing) {
  SlowWorker worker;
  auto server =
      ServerRunner::Start({.listen = "127.0.0.1:0"}, {{v1::Worker::service_full_name(), &worker}})
          .value();
  ChannelPool channels;
  const auto channel = channels.Get(server->address());
  EXPECT_EQ(Health(channel, ""), 2);
  server->SetServing(true);
  EXPECT_EQ(Health(channel, ""), 1);
  EXPECT_EQ(Health(channel, "winnow.v1.Worker"), 1);
  EXPECT_EQ(Health(channel, "no.such.Service"), -static_cast<int>(grpc::StatusCode::NOT_FOUND));
  server->SetServing(false);
  EXPECT_EQ(Health(channel, "winnow.v1.Worker"), 2);
}

TEST(ServerRunner, ReflectionIsByFlag) {
  for (const bool on : {true, false}) {
    SlowWorker worker;
    auto server = ServerRunner::Start({.listen = "127.0.0.1:0", .reflection = on},
                                      {{v1::Worker::service_full_name(), &worker}})
                      .value();
    ChannelPool channels;
    std::string response;
    // ServerReflectionRequest{list_services: "*"}, half-closed after one message.
    const grpc::Status status = Call(
        channels.Get(server->address()),
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "\x3a\x01*", &response);
    if (on) {
      EXPECT_TRUE(status.ok()) << status.error_message();
      EXPECT_THAT(response, HasSubstr("winnow.v1.Worker"));
    } else {
      EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
    }
  }
}

TEST(ServerRunner, PortInUseIsNamed) {
  SlowWorker worker;
  auto first =
      ServerRunner::Start({.listen = "127.0.0.1:0"}, {{v1::Worker::service_full_name(), &worker}})
          .value();
  SlowWorker other;
  const auto second = ServerRunner::Start({.listen = first->address()},
                                          {{v1::Worker::service_full_name(), &other}});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(std::string(second.status().message()),
            absl::StrCat("cannot listen on ", first->address(), ": Address already in use"));
}

TEST(CheckListen, SaysWhatStartWouldSay) {
  SlowWorker worker;
  const auto server =
      ServerRunner::Start({.listen = "127.0.0.1:0"}, {{v1::Worker::service_full_name(), &worker}})
          .value();
  const absl::Status in_use = absl::UnavailableError(
      absl::StrCat("cannot listen on ", server->address(), ": Address already in use"));
  EXPECT_EQ(CheckListen({.listen = server->address()}), in_use);
  EXPECT_EQ(CheckListen({.listen = "127.0.0.1:0", .metrics = server->address()}), in_use);
  EXPECT_TRUE(CheckListen({.listen = "127.0.0.1:0", .metrics = "127.0.0.1:0"}).ok());
  EXPECT_TRUE(CheckListen({.listen = "127.0.0.1:0", .metrics = ""}).ok());
  const absl::Status malformed = CheckListen({.listen = "127.0.0.1:0", .metrics = "nowhere"});
  EXPECT_EQ(malformed.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(malformed.message()), HasSubstr("--metrics-port=\"nowhere\""));
}

TEST(ServerRunner, UnknownHostIsNamed) {
  const auto server = ServerRunner::Start({.listen = "no-such-host.invalid:1"}, {});
  EXPECT_EQ(server.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(server.status().message()), HasSubstr("no-such-host.invalid:1"));
}

TEST(ServerRunner, SignalDrainsThenStops) {
  BlockShutdownSignals();
  SlowWorker worker;
  auto server =
      ServerRunner::Start({.listen = "127.0.0.1:0"}, {{v1::Worker::service_full_name(), &worker}})
          .value();
  server->SetServing(true);
  ChannelPool channels;
  const auto channel = channels.Get(server->address());
  grpc::Status answer(grpc::StatusCode::UNKNOWN, "none yet");
  std::thread client([&] {
    auto stub = v1::Worker::NewStub(channel);
    grpc::ClientContext context;
    v1::DrainResponse response;
    answer = stub->Drain(&context, {}, &response);
  });
  while (worker.reactor == nullptr) absl::SleepFor(absl::Milliseconds(1));
  std::atomic<int> health{0};
  // To this thread alone: the signal is blocked in all, and RunUntilSignal() waits here.
  ::pthread_kill(::pthread_self(), SIGTERM);
  server->RunUntilSignal(nullptr, [&](absl::Time deadline) {
    EXPECT_GT(deadline, absl::Now() + absl::Seconds(20));
    health = Health(channel, "");
    worker.reactor.load()->Finish(grpc::Status::OK);
  });
  client.join();
  EXPECT_EQ(health, 2);
  EXPECT_TRUE(answer.ok()) << answer.error_message();
}

}  // namespace
}  // namespace winnow
