#include "router/worker_registry.h"

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/log.h"
#include "common/rpc/grpc_status.h"
#include "winnow/v1/worker.grpc.pb.h"

namespace winnow::router {

// One worker and the stream to it.
class WorkerRegistry::Watcher : public std::enable_shared_from_this<Watcher> {
 public:
  Watcher(std::string target, v1::WorkerRole role, ChannelPool* channels, MetricsRegistry* metrics)
      : target_(std::move(target)),
        role_(role),
        stub_(v1::Worker::NewStub(channels->Get(target_))) {
    const char* name = role == v1::WORKER_ROLE_PREFILL ? "prefill" : "decode";
    up_ = metrics->Gauge("winnow_peer_up", "1 while the worker is alive, else 0.",
                         {{"peer", target_}, {"role", name}});
    reconnects_ =
        metrics->Counter("winnow_peer_reconnects_total", "Load streams that were opened again.",
                         {{"peer", target_}, {"role", name}});
  }

  const std::string& target() const { return target_; }

  // Opens the stream if there is none, ends one that is silent. `asleep` is how long this
  // process did not run since the last tick: that silence is not the worker's.
  void Tick(absl::Time now, absl::Duration asleep) {
    MutexLock lock(&mu_);
    heard_ = std::min(heard_ + asleep, now);
    if (stream_ == nullptr) {
      if (!stopping_ && now - ended_ >= kReconnectAfter) Open(now);
    } else if (now - heard_ > kSilence) {
      stream_->context.TryCancel();
    }
    SetAlive(fresh_ && now - heard_ <= kSilence);
  }

  void Stop() {
    MutexLock lock(&mu_);
    stopping_ = true;
    if (stream_ != nullptr) stream_->context.TryCancel();
  }

  // After Stop().
  void WaitUntilEnded() {
    MutexLock lock(&mu_);
    while (stream_ != nullptr) ended_cv_.Wait(&mu_);
  }

  // Appends what is known of the worker, if it can take requests.
  void AppendIfAlive(std::vector<Candidate>* out) const {
    MutexLock lock(&mu_);
    if (!alive_ || candidate_.load.draining()) return;
    out->push_back(candidate_);
    out->back().target = target_;
  }

  void Count(int requests, int64_t prompt_tokens) {
    MutexLock lock(&mu_);
    candidate_.in_flight += requests;
    candidate_.in_flight_prompt_tokens += prompt_tokens;
  }

  void Suspect() {
    MutexLock lock(&mu_);
    fresh_ = false;
    SetAlive(false);
  }

 private:
  // Lives until gRPC's OnDone(); holds the watcher till then.
  struct Stream final : public grpc::ClientReadReactor<v1::LoadSnapshot> {
    explicit Stream(std::shared_ptr<Watcher> w) : watcher(std::move(w)) {}
    void OnReadDone(bool ok) override {
      if (!ok) return;
      watcher->OnSnapshot(snapshot);
      StartRead(&snapshot);
    }
    void OnDone(const grpc::Status& status) override {
      // `watcher` dies with *this, which OnEnd() lets go of.
      const std::shared_ptr<Watcher> keep = watcher;
      keep->OnEnd(FromGrpcStatus(status));
    }

    const std::shared_ptr<Watcher> watcher;
    grpc::ClientContext context;
    v1::WatchLoadRequest request;
    v1::LoadSnapshot snapshot;
  };

  void Open(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (opened_once_) reconnects_->Increment();
    opened_once_ = true;
    heard_ = now;
    stream_ = std::make_unique<Stream>(shared_from_this());
    // No deadline: kSilence bounds it.
    stream_->context.set_wait_for_ready(true);
    stub_->async()->WatchLoad(&stream_->context, &stream_->request, stream_.get());
    stream_->StartRead(&stream_->snapshot);
    stream_->StartCall();
  }

  void OnSnapshot(const v1::LoadSnapshot& snapshot) {
    MutexLock lock(&mu_);
    if (snapshot.role() != role_) {
      if (!wrong_role_) {
        LogLine(LogLevel::kError, "wrong_role",
                absl::StrCat(LogField("peer", target_), LogField("is", snapshot.role()),
                             LogField("wanted", role_)));
      }
      wrong_role_ = true;
      return;
    }
    wrong_role_ = false;
    heard_ = absl::Now();
    fresh_ = true;
    candidate_.load = snapshot;
    SetAlive(true);
  }

  void OnEnd(const absl::Status& status) {
    MutexLock lock(&mu_);
    const bool was_alive = fresh_;
    fresh_ = false;
    ended_ = absl::Now();
    SetAlive(false);
    if (was_alive && !stopping_) {
      LogLine(LogLevel::kWarning, "peer_lost",
              absl::StrCat(LogField("peer", target_), LogField("status", status.ToString())));
    }
    stream_.reset();
    ended_cv_.NotifyAll();
  }

  void SetAlive(bool alive) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (alive == alive_) return;
    alive_ = alive;
    up_->Set(alive ? 1 : 0);
    LogLine(LogLevel::kInfo, alive ? "peer_up" : "peer_down", LogField("peer", target_));
  }

  const std::string target_;
  const v1::WorkerRole role_;
  const std::unique_ptr<v1::Worker::Stub> stub_;
  prometheus::Gauge* up_;
  prometheus::Counter* reconnects_;

  mutable Mutex mu_;
  CondVar ended_cv_;
  std::unique_ptr<Stream> stream_ ABSL_GUARDED_BY(mu_);
  Candidate candidate_ ABSL_GUARDED_BY(mu_);                      // load: the last that came
  absl::Time heard_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();  // last snapshot, or opening
  absl::Time ended_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  bool fresh_ ABSL_GUARDED_BY(mu_) = false;  // the present stream has sent a snapshot
  bool alive_ ABSL_GUARDED_BY(mu_) = false;  // fresh_, and heard of lately
  bool opened_once_ ABSL_GUARDED_BY(mu_) = false;
  bool wrong_role_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

WorkerRegistry::WorkerRegistry(const std::vector<std::string>& prefill_targets,
                               const std::vector<std::string>& decode_targets,
                               ChannelPool* channels, MetricsRegistry* metrics) {
  for (const std::string& target : prefill_targets) {
    prefill_.push_back(
        std::make_shared<Watcher>(target, v1::WORKER_ROLE_PREFILL, channels, metrics));
  }
  for (const std::string& target : decode_targets) {
    decode_.push_back(std::make_shared<Watcher>(target, v1::WORKER_ROLE_DECODE, channels, metrics));
  }
  thread_ = std::thread([this] { Run(); });
}

WorkerRegistry::~WorkerRegistry() {
  {
    MutexLock lock(&mu_);
    stop_ = true;
    stop_cv_.NotifyAll();
  }
  thread_.join();
  for (const auto* list : {&prefill_, &decode_}) {
    for (const auto& watcher : *list) watcher->Stop();
    for (const auto& watcher : *list) watcher->WaitUntilEnded();
  }
}

void WorkerRegistry::Run() {
  MutexLock lock(&mu_);
  absl::Time last = absl::Now();
  while (!stop_) {
    const absl::Time now = absl::Now();
    const absl::Duration asleep = std::max(absl::ZeroDuration(), now - last - kReconnectAfter);
    last = now;
    for (const auto& watcher : prefill_) watcher->Tick(now, asleep);
    for (const auto& watcher : decode_) watcher->Tick(now, asleep);
    stop_cv_.WaitFor(&mu_, absl::Milliseconds(50));
  }
}

std::vector<Candidate> WorkerRegistry::Alive(
    const std::vector<std::shared_ptr<Watcher>>& watchers) const {
  std::vector<Candidate> out;
  for (const auto& watcher : watchers) watcher->AppendIfAlive(&out);
  return out;
}

std::vector<Candidate> WorkerRegistry::Prefill() const { return Alive(prefill_); }
std::vector<Candidate> WorkerRegistry::Decode() const { return Alive(decode_); }

WorkerRegistry::Watcher* WorkerRegistry::Find(const std::string& target) const {
  for (const auto* list : {&prefill_, &decode_}) {
    for (const auto& watcher : *list) {
      if (watcher->target() == target) return watcher.get();
    }
  }
  return nullptr;
}

void WorkerRegistry::Dispatched(const std::string& target, int64_t prompt_tokens) {
  if (Watcher* watcher = Find(target)) watcher->Count(1, prompt_tokens);
}

void WorkerRegistry::FirstTokenSeen(const std::string& target, int64_t prompt_tokens) {
  if (Watcher* watcher = Find(target)) watcher->Count(0, -prompt_tokens);
}

void WorkerRegistry::Released(const std::string& target) {
  if (Watcher* watcher = Find(target)) watcher->Count(-1, 0);
}

void WorkerRegistry::Suspect(const std::string& target) {
  if (Watcher* watcher = Find(target)) watcher->Suspect();
}

}  // namespace winnow::router
