#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "router/admission.h"
#include "router/leg.h"
#include "router/request.h"
#include "router/router_metrics.h"
#include "router/text_stream.h"
#include "router/worker_registry.h"
#include "winnow/v1/decode.grpc.pb.h"
#include "winnow/v1/prefill.grpc.pb.h"

namespace winnow::router {

// Where a session's output goes: the client's stream. Must not block or call back into
// the session.
class ResponseSink {
 public:
  virtual ~ResponseSink() = default;
  // More tokens and text; what is not on the wire yet may be merged.
  virtual void Send(const v1::GenerateResponse& delta) = 0;
  // Exactly once, after all Send() calls.
  virtual void Finish(const absl::Status& status) = 0;
};

// What all sessions share. Not owned; must outlive them.
struct SessionDeps {
  const ServedModel* model = nullptr;
  WorkerRegistry* registry = nullptr;
  ChannelPool* channels = nullptr;
  Admission* admission = nullptr;
  RouterMetrics* metrics = nullptr;
};

// One request across both phases. Waits for admission, picks workers, calls prefill and
// decode at once under one deadline, puts their tokens in order, makes text of them, and
// ends both calls when either fails, the client leaves or a stop string was found.
//
// The one place that decides about retries: once, on another worker, if the first
// attempt failed before any token was sent.
//
// Thread-safe; kept alive by its caller and by the open calls.
class Session : public std::enable_shared_from_this<Session> {
 public:
  // `accepted` is when the client's call came.
  Session(SessionDeps deps, uint64_t id, ResolvedRequest request, absl::Time accepted,
          absl::Time deadline, std::shared_ptr<ResponseSink> sink);

  // Call once. The sink's Finish() may come within the call.
  void Start();

  // The client left. Ends the session with CANCELLED, or DEADLINE_EXCEEDED if it is past.
  void Cancel();

 private:
  using PrefillLeg = Leg<v1::PrefillEvent>;
  using DecodeLeg = Leg<v1::DecodeEvent>;

  // What belongs to one try on one pair of workers.
  struct Attempt {
    int number = 0;
    bool local_prefill = false;
    std::string prefill_target;  // empty with local_prefill
    std::string decode_target;
    std::shared_ptr<PrefillLeg> prefill;
    std::shared_ptr<DecodeLeg> decode;
    bool first_token_seen = false;  // from whichever leg sends it
    bool transfer_done = false;
    uint64_t transferred_bytes = 0;
    std::vector<int32_t> early;  // decode's tokens that came before prefill's
    int decode_tokens = 0;       // decode's tokens in all
    v1::FinishReason decode_finish = v1::FINISH_REASON_UNSPECIFIED;
    std::optional<v1::KvUsage> kv;  // once a worker has reported it
  };

  void Run();  // from admission
  void Dispatch(const std::string& without) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartDecode(const Candidate& decode, const std::string& transfer_id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartPrefill(const Candidate& decode, const std::string& transfer_id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  bool IsCurrent(int attempt) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !ended_ && attempt == attempt_.number;
  }
  void OnPrefillEvent(const v1::PrefillEvent& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnPrefillDone(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnDecodeEvent(const v1::DecodeEvent& event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnDecodeDone(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  void FirstTokenSeen() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Passes tokens on in order. May end the session (stop string).
  void Emit(const std::vector<int32_t>& tokens) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ends the session well once everything it waits for is there.
  void FinishIfComplete() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishOk(v1::FinishReason reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A worker failed: tries another one, or ends the session.
  void LegFailed(const std::string& target, const absl::Status& status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool CanRetry(const std::string& target, const absl::Status& status) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status ClientStatus(const std::string& target, const absl::Status& status) const;
  void EndAttempt() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void End(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Gives the place in admission back, without the lock: others may start.
  void LeaveIfEnded();

  RouterMetrics::Path path() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return attempt_.local_prefill ? RouterMetrics::kLocal : RouterMetrics::kDisagg;
  }

  const SessionDeps deps_;
  const uint64_t id_;
  const ResolvedRequest request_;
  const absl::Time accepted_;
  const absl::Time deadline_;
  const std::shared_ptr<ResponseSink> sink_;

  Mutex mu_;
  Attempt attempt_ ABSL_GUARDED_BY(mu_);
  TextStream text_ ABSL_GUARDED_BY(mu_);
  int tokens_sent_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time last_token_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Duration time_to_first_token_ ABSL_GUARDED_BY(mu_);
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  bool left_ ABSL_GUARDED_BY(mu_) = false;  // gave back its place
};

}  // namespace winnow::router
