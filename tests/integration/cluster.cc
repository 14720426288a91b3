#include "tests/integration/cluster.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace winnow::testing {
namespace {

std::chrono::system_clock::time_point Deadline(absl::Duration timeout) {
  return absl::ToChronoTime(absl::Now() + timeout);
}

}  // namespace

Cluster::Cluster(const ClusterOptions& options) : options_(options) {
  decode_ = StartWorker("winnow-decode-worker", "127.0.0.1:0", &decode_address_);
  prefill_ = StartWorker("winnow-prefill-worker", "127.0.0.1:0", &prefill_address_);
  std::vector<std::string> args = {"--listen=127.0.0.1:0",
                                   absl::StrCat("--model=", options.model_dir),
                                   absl::StrCat("--prefill-workers=", prefill_address_),
                                   absl::StrCat("--decode-workers=", decode_address_)};
  args.insert(args.end(), options.router_flags.begin(), options.router_flags.end());
  router_ = std::make_unique<Process>("winnow-router", args);
  router_address_ = router_->WaitReady();
  if (router_address_.empty()) ADD_FAILURE() << "router not ready:\n" << router_->Errors();
  stub_ = v1::Inference::NewStub(
      grpc::CreateChannel(router_address_, grpc::InsecureChannelCredentials()));
}

Cluster::~Cluster() {
  if (!::testing::Test::HasFailure()) return;
  for (const Process* process : {router_.get(), prefill_.get(), decode_.get()}) {
    const std::string errors = process->Errors();
    ADD_FAILURE() << "a process wrote:\n"
                  << errors.substr(errors.size() - std::min<size_t>(errors.size(), 2000));
  }
}

std::unique_ptr<Process> Cluster::StartWorker(const std::string& name, const std::string& listen,
                                              std::string* address) {
  std::vector<std::string> args = {absl::StrCat("--listen=", listen),
                                   absl::StrCat("--model=", options_.model_dir),
                                   absl::StrCat("--kv-mode=", options_.kv_mode),
                                   absl::StrCat("--kv-budget=", options_.kv_budget),
                                   absl::StrCat("--prefill-chunk=", options_.prefill_chunk),
                                   absl::StrCat("--max-num-seqs=", options_.max_num_seqs),
                                   absl::StrCat("--threads=", options_.threads)};
  if (!options_.adapter_dir.empty())
    args.push_back(absl::StrCat("--adapter=", options_.adapter_dir));
  auto process = std::make_unique<Process>(name, args);
  *address = process->WaitReady();
  if (address->empty()) ADD_FAILURE() << name << " not ready:\n" << process->Errors();
  return process;
}

void Cluster::RestartPrefill() {
  prefill_.reset();
  prefill_ = StartWorker("winnow-prefill-worker", std::string(prefill_address_), &prefill_address_);
}

void Cluster::RestartDecode() {
  decode_.reset();
  decode_ = StartWorker("winnow-decode-worker", std::string(decode_address_), &decode_address_);
}

Generated Cluster::Generate(const v1::GenerateRequest& request, absl::Duration timeout,
                            const std::function<void(int, grpc::ClientContext*)>& on_message) {
  Generated result;
  grpc::ClientContext context;
  context.set_deadline(Deadline(timeout));
  const absl::Time start = absl::Now();
  absl::Time last = start;
  const auto stream = stub_->Generate(&context, request);
  v1::GenerateResponse response;
  for (int messages = 1; stream->Read(&response); ++messages) {
    result.token_ids.insert(result.token_ids.end(), response.token_ids().begin(),
                            response.token_ids().end());
    result.text += response.text();
    result.last = response;
    last = absl::Now();
    if (on_message) on_message(messages, &context);
  }
  result.status = stream->Finish();
  result.elapsed = absl::Now() - start;
  result.since_last_message = absl::Now() - last;
  return result;
}

v1::LoadSnapshot Cluster::Load(const std::string& address) {
  const auto stub =
      v1::Worker::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(Deadline(absl::Seconds(5)));
  const auto stream = stub->WatchLoad(&context, {});
  v1::LoadSnapshot snapshot;
  if (!stream->Read(&snapshot)) ADD_FAILURE() << "no load from " << address;
  context.TryCancel();
  return snapshot;
}

bool Cluster::PagesReturn(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  do {
    if (PrefillLoad().kv_used_bytes() == 0 && DecodeLoad().kv_used_bytes() == 0) return true;
    absl::SleepFor(absl::Milliseconds(20));
  } while (absl::Now() < deadline);
  return false;
}

}  // namespace winnow::testing
