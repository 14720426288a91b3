#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <utility>

#include "absl/time/clock.h"
#include "cli/generator.h"
#include "common/rpc/channel_pool.h"
#include "common/rpc/grpc_status.h"
#include "winnow/v1/inference.grpc.pb.h"

namespace winnow::cli {
namespace {

constexpr absl::Duration kShortCall = absl::Seconds(30);

class ServerGenerator final : public Generator {
 public:
  explicit ServerGenerator(const std::string& address)
      : stub_(v1::Inference::NewStub(grpc::CreateCustomChannel(
            address, grpc::InsecureChannelCredentials(), WorkerChannelArguments()))) {}

  absl::StatusOr<v1::GetModelInfoResponse> GetModelInfo() override {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kShortCall));
    v1::GetModelInfoResponse response;
    const grpc::Status status = stub_->GetModelInfo(&context, {}, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  absl::StatusOr<int> CountPromptTokens(const v1::GenerateRequest& request) override {
    if (request.has_token_ids()) return request.token_ids().ids_size();
    v1::TokenizeRequest tokenize;
    if (request.has_chat()) *tokenize.mutable_chat() = request.chat();
    if (request.has_text()) tokenize.set_text(request.text());
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kShortCall));
    v1::TokenizeResponse response;
    const grpc::Status status = stub_->Tokenize(&context, tokenize, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response.token_ids_size();
  }

  absl::Status Generate(const v1::GenerateRequest& request, absl::Duration timeout,
                        const OnResponse& on_response) override {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    const std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>> reader =
        stub_->Generate(&context, request);
    v1::GenerateResponse response;
    while (reader->Read(&response)) on_response(response);
    return FromGrpcStatus(reader->Finish());
  }

 private:
  const std::unique_ptr<v1::Inference::Stub> stub_;
};

}  // namespace

std::unique_ptr<Generator> NewServerGenerator(const std::string& address) {
  return std::make_unique<ServerGenerator>(address);
}

}  // namespace winnow::cli
