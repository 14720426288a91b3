#include "router/session.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/log.h"

namespace winnow::router {
namespace {

std::string NewTransferId() {
  std::random_device random;
  std::string id;
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = random();
    id.append(reinterpret_cast<const char*>(&word), sizeof word);
  }
  return id;
}

std::vector<Candidate> Without(std::vector<Candidate> candidates, const std::string& target) {
  std::erase_if(candidates, [&](const Candidate& c) { return c.target == target; });
  return candidates;
}

std::string TokensField(int sent, size_t prompt) {
  return absl::StrCat(LogField("prompt_tokens", prompt), LogField("completion_tokens", sent));
}

}  // namespace

Session::Session(SessionDeps deps, uint64_t id, ResolvedRequest request, absl::Time accepted,
                 absl::Time deadline, std::shared_ptr<ResponseSink> sink)
    : deps_(deps),
      id_(id),
      request_(std::move(request)),
      accepted_(accepted),
      deadline_(deadline),
      sink_(std::move(sink)),
      text_(
          &deps.model->tokenizer(), request_.skip_special_tokens, request_.stop,
          {request_.sampling.stop_token_ids().begin(), request_.sampling.stop_token_ids().end()}) {}

void Session::Start() {
  const absl::Status status =
      deps_.admission->Enter(id_, [self = shared_from_this()] { self->Run(); });
  if (!status.ok()) {
    MutexLock lock(&mu_);
    left_ = true;
    End(status);
    return;
  }
  LeaveIfEnded();
}

void Session::Cancel() {
  {
    MutexLock lock(&mu_);
    if (!ended_) {
      End(absl::Now() >= deadline_
              ? WithReason(absl::DeadlineExceededError("the request's deadline passed"),
                           v1::ERROR_REASON_DEADLINE)
              : WithReason(absl::CancelledError("the client left"), v1::ERROR_REASON_CANCELLED));
    }
  }
  LeaveIfEnded();
}

void Session::Run() {
  {
    MutexLock lock(&mu_);
    if (!ended_) {
      deps_.metrics->queue_time->Observe(absl::ToDoubleSeconds(absl::Now() - accepted_));
      if (absl::Now() >= deadline_) {
        End(WithReason(absl::DeadlineExceededError("the deadline passed in the queue"),
                       v1::ERROR_REASON_DEADLINE));
      } else {
        Dispatch(/*without=*/"");
      }
    }
  }
  LeaveIfEnded();
}

void Session::Dispatch(const std::string& without) {
  const std::vector<Candidate> decodes = Without(deps_.registry->Decode(), without);
  const std::vector<Candidate> prefills = Without(deps_.registry->Prefill(), without);
  const int decode = PickDecode(decodes, id_);
  if (decode < 0) {
    End(WithReason(absl::UnavailableError("no decode worker is alive"),
                   v1::ERROR_REASON_NO_WORKER));
    return;
  }
  const int prefill = PickPrefill(prefills, id_);
  Attempt next;
  next.number = attempt_.number + 1;
  next.decode_target = decodes[decode].target;
  next.local_prefill = prefill < 0;
  if (prefill >= 0) next.prefill_target = prefills[prefill].target;
  attempt_ = std::move(next);
  deps_.metrics->decisions[path()]->Increment();
  const std::string transfer_id = NewTransferId();
  LogLine(LogLevel::kInfo, "dispatched",
          absl::StrCat(LogField("request_id", request_.request_id),
                       LogField("transfer_id", absl::BytesToHexString(transfer_id)),
                       LogField("prefill", attempt_.prefill_target),
                       LogField("decode", attempt_.decode_target),
                       LogField("attempt", attempt_.number)));
  // Decode first: the transfer should find its receiver waiting.
  StartDecode(decodes[decode], transfer_id);
  if (!attempt_.local_prefill) StartPrefill(decodes[decode], transfer_id);
}

void Session::StartDecode(const Candidate& decode, const std::string& transfer_id) {
  v1::DecodeRequest request;
  request.set_transfer_id(transfer_id);
  request.set_request_id(request_.request_id);
  request.mutable_prompt_ids()->Assign(request_.prompt_ids.begin(), request_.prompt_ids.end());
  *request.mutable_sampling() = request_.sampling;
  request.set_local_prefill(attempt_.local_prefill);
  attempt_.decode = std::make_shared<DecodeLeg>(
      [self = shared_from_this(), n = attempt_.number](const v1::DecodeEvent& event) {
        {
          MutexLock lock(&self->mu_);
          if (self->IsCurrent(n)) self->OnDecodeEvent(event);
        }
        self->LeaveIfEnded();
      },
      [self = shared_from_this(), n = attempt_.number](const absl::Status& status) {
        {
          MutexLock lock(&self->mu_);
          if (self->IsCurrent(n)) self->OnDecodeDone(status);
        }
        self->LeaveIfEnded();
      });
  attempt_.decode->context()->set_deadline(absl::ToChronoTime(deadline_));
  deps_.registry->Dispatched(decode.target, static_cast<int64_t>(request_.prompt_ids.size()));
  const std::unique_ptr<v1::Decode::Stub> stub =
      v1::Decode::NewStub(deps_.channels->Get(decode.target));
  attempt_.decode->Start([&](grpc::ClientContext* context, DecodeLeg* leg) {
    stub->async()->Decode(context, &request, leg);
  });
}

void Session::StartPrefill(const Candidate& decode, const std::string& transfer_id) {
  v1::PrefillRequest request;
  request.set_transfer_id(transfer_id);
  request.set_request_id(request_.request_id);
  request.mutable_prompt_ids()->Assign(request_.prompt_ids.begin(), request_.prompt_ids.end());
  *request.mutable_sampling() = request_.sampling;
  request.set_decode_target(decode.target);
  request.set_decode_incarnation(decode.load.incarnation());
  attempt_.prefill = std::make_shared<PrefillLeg>(
      [self = shared_from_this(), n = attempt_.number](const v1::PrefillEvent& event) {
        {
          MutexLock lock(&self->mu_);
          if (self->IsCurrent(n)) self->OnPrefillEvent(event);
        }
        self->LeaveIfEnded();
      },
      [self = shared_from_this(), n = attempt_.number](const absl::Status& status) {
        {
          MutexLock lock(&self->mu_);
          if (self->IsCurrent(n)) self->OnPrefillDone(status);
        }
        self->LeaveIfEnded();
      });
  attempt_.prefill->context()->set_deadline(absl::ToChronoTime(deadline_));
  deps_.registry->Dispatched(attempt_.prefill_target,
                             static_cast<int64_t>(request_.prompt_ids.size()));
  const std::unique_ptr<v1::Prefill::Stub> stub =
      v1::Prefill::NewStub(deps_.channels->Get(attempt_.prefill_target));
  attempt_.prefill->Start([&](grpc::ClientContext* context, PrefillLeg* leg) {
    stub->async()->Prefill(context, &request, leg);
  });
}

void Session::OnPrefillEvent(const v1::PrefillEvent& event) {
  if (event.has_first_token() && !attempt_.first_token_seen) {
    const v1::FirstToken& first = event.first_token();
    FirstTokenSeen();
    // Decode events may have come before, and know more.
    if (first.has_kv() && !attempt_.kv.has_value()) attempt_.kv = first.kv();
    std::vector<int32_t> tokens = {first.token_id()};
    if (first.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
      Emit(tokens);
      if (!ended_) FinishOk(first.finish_reason());
      return;
    }
    tokens.insert(tokens.end(), attempt_.early.begin(), attempt_.early.end());
    attempt_.early.clear();
    Emit(tokens);
  } else if (event.has_transfer_done()) {
    attempt_.transfer_done = true;
    attempt_.transferred_bytes = event.transfer_done().bytes();
  }
  FinishIfComplete();
}

void Session::OnPrefillDone(const absl::Status& status) {
  if (status.ok() && attempt_.first_token_seen) {
    attempt_.transfer_done = true;
    FinishIfComplete();
  } else if (status.ok()) {
    LegFailed(attempt_.prefill_target,
              absl::InternalError("the prefill worker ended without a token"));
  } else if (!attempt_.first_token_seen ||
             (!attempt_.transfer_done && attempt_.decode_tokens == 0)) {
    LegFailed(attempt_.prefill_target, status);
  } else {
    // The decode worker has the sequence: the prefill worker is not needed any more.
    attempt_.transfer_done = true;
    FinishIfComplete();
  }
}

void Session::OnDecodeEvent(const v1::DecodeEvent& event) {
  if (event.has_kv()) attempt_.kv = event.kv();
  if (event.token_ids_size() > 0) {
    const int expected = attempt_.decode_tokens + (attempt_.local_prefill ? 0 : 1);
    if (event.first_index() != expected ||
        attempt_.decode_finish != v1::FINISH_REASON_UNSPECIFIED ||
        expected + event.token_ids_size() > request_.sampling.max_tokens()) {
      LegFailed(attempt_.decode_target,
                absl::InternalError(absl::StrCat("the decode worker sent ", event.token_ids_size(),
                                                 " tokens from index ", event.first_index(),
                                                 ", expected from ", expected, ", at most ",
                                                 request_.sampling.max_tokens(), " in all")));
      return;
    }
    attempt_.decode_tokens += event.token_ids_size();
    const std::vector<int32_t> tokens(event.token_ids().begin(), event.token_ids().end());
    if (attempt_.local_prefill && !attempt_.first_token_seen) FirstTokenSeen();
    if (attempt_.first_token_seen) {
      Emit(tokens);
      if (ended_) return;
    } else {
      attempt_.early.insert(attempt_.early.end(), tokens.begin(), tokens.end());
    }
  }
  if (event.finish_reason() != v1::FINISH_REASON_UNSPECIFIED) {
    attempt_.decode_finish = event.finish_reason();
  }
  FinishIfComplete();
}

void Session::OnDecodeDone(const absl::Status& status) {
  if (status.ok() && attempt_.decode_finish == v1::FINISH_REASON_UNSPECIFIED) {
    LegFailed(attempt_.decode_target,
              absl::InternalError("the decode worker ended without a finish reason"));
  } else if (!status.ok() && attempt_.decode_finish == v1::FINISH_REASON_UNSPECIFIED) {
    LegFailed(attempt_.decode_target, status);
  }
}

void Session::FirstTokenSeen() {
  attempt_.first_token_seen = true;
  const auto prompt_tokens = static_cast<int64_t>(request_.prompt_ids.size());
  deps_.registry->FirstTokenSeen(attempt_.decode_target, prompt_tokens);
  if (!attempt_.local_prefill) {
    deps_.registry->FirstTokenSeen(attempt_.prefill_target, prompt_tokens);
  }
}

void Session::Emit(const std::vector<int32_t>& tokens) {
  const absl::Time now = absl::Now();
  v1::GenerateResponse delta;
  if (tokens_sent_ == 0) {
    time_to_first_token_ = now - accepted_;
    deps_.metrics->time_to_first_token[path()]->Observe(
        absl::ToDoubleSeconds(time_to_first_token_));
    if (request_.return_prompt_token_ids) {
      delta.mutable_prompt_token_ids()->Assign(request_.prompt_ids.begin(),
                                               request_.prompt_ids.end());
    }
  } else {
    deps_.metrics->inter_token->Observe(absl::ToDoubleSeconds(now - last_token_));
  }
  last_token_ = now;
  for (int32_t token : tokens) {
    delta.add_token_ids(token);
    ++tokens_sent_;
    text_.Append(token, delta.mutable_text());
    if (text_.stop_text().has_value()) break;
  }
  deps_.metrics->generation_tokens->Increment(delta.token_ids_size());
  sink_->Send(delta);
  if (text_.stop_text().has_value()) FinishOk(v1::FINISH_REASON_STOP);
}

void Session::FinishIfComplete() {
  if (ended_ || attempt_.decode_finish == v1::FINISH_REASON_UNSPECIFIED) return;
  const bool transfer_known = attempt_.local_prefill || attempt_.transfer_done ||
                              (attempt_.kv.has_value() && attempt_.kv->transferred_bytes() > 0);
  if (attempt_.first_token_seen && transfer_known) FinishOk(attempt_.decode_finish);
}

void Session::FinishOk(v1::FinishReason reason) {
  v1::GenerateResponse last;
  text_.Finish(last.mutable_text());
  last.set_finish_reason(text_.stopped() ? v1::FINISH_REASON_STOP : reason);
  if (text_.stop_text().has_value()) {
    last.set_stop_text(*text_.stop_text());
  } else if (text_.stop_token_id().has_value()) {
    last.set_stop_token_id(*text_.stop_token_id());
  }
  const auto prompt_tokens = static_cast<int>(request_.prompt_ids.size());
  last.mutable_usage()->set_prompt_tokens(prompt_tokens);
  last.mutable_usage()->set_completion_tokens(tokens_sent_);
  last.mutable_usage()->set_total_tokens(prompt_tokens + tokens_sent_);
  if (attempt_.kv.has_value()) {
    *last.mutable_kv() = *attempt_.kv;
    if (attempt_.transferred_bytes > 0) {
      last.mutable_kv()->set_transferred_bytes(attempt_.transferred_bytes);
    }
  }
  sink_->Send(last);
  RouterMetrics& metrics = *deps_.metrics;
  const absl::Duration e2e = absl::Now() - accepted_;
  metrics.e2e_latency[path()]->Observe(absl::ToDoubleSeconds(e2e));
  if (tokens_sent_ > 1) {
    metrics.time_per_output_token->Observe(absl::ToDoubleSeconds(
        (last_token_ - accepted_ - time_to_first_token_) / (tokens_sent_ - 1)));
  }
  metrics.prompt_tokens->Increment(prompt_tokens);
  metrics.kv_transfer_bytes->Increment(static_cast<double>(last.kv().transferred_bytes()));
  End(absl::OkStatus());
}

void Session::LegFailed(const std::string& target, const absl::Status& status) {
  LogLine(
      LogLevel::kWarning, "leg_failed",
      absl::StrCat(LogField("request_id", request_.request_id), LogField("peer", target),
                   LogField("attempt", attempt_.number), LogField("status", status.ToString())));
  // A worker that answers gives a reason; without one, the transport gave up.
  if (absl::IsUnavailable(status) && ReasonOf(status) == v1::ERROR_REASON_UNSPECIFIED) {
    deps_.registry->Suspect(target);
  }
  if (CanRetry(target, status)) {
    deps_.metrics->retries->Increment();
    EndAttempt();
    Dispatch(/*without=*/ReasonOf(status) == v1::ERROR_REASON_WRONG_INCARNATION ? "" : target);
    return;
  }
  End(ClientStatus(target, status));
}

bool Session::CanRetry(const std::string& target, const absl::Status& status) const {
  if (tokens_sent_ > 0 || attempt_.number > 1) return false;
  if (ReasonOf(status) == v1::ERROR_REASON_WRONG_INCARNATION) return true;
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kDataLoss:
      break;
    default:
      return false;
  }
  const bool decode_failed = target == attempt_.decode_target;
  return !Without(decode_failed ? deps_.registry->Decode() : deps_.registry->Prefill(), target)
              .empty();
}

// What the client sees of a worker's failure: the codes that inference.proto lists.
absl::Status Session::ClientStatus(const std::string& target, const absl::Status& status) const {
  const absl::StatusCode code = status.code();
  const bool ours = code == absl::StatusCode::kInvalidArgument ||
                    code == absl::StatusCode::kResourceExhausted ||
                    (code == absl::StatusCode::kDeadlineExceeded && absl::Now() >= deadline_);
  const absl::Status shown(
      ours ? code : absl::StatusCode::kUnavailable,
      absl::StrCat("worker ", target, ": ", std::string(CodeName(code)), ": ", status.message()));
  v1::ErrorReason reason = ReasonOf(status);
  if (reason == v1::ERROR_REASON_UNSPECIFIED) {
    reason = code == absl::StatusCode::kDeadlineExceeded && ours ? v1::ERROR_REASON_DEADLINE
                                                                 : v1::ERROR_REASON_WORKER_LOST;
  }
  return WithReason(shown, reason, RetryAfter(status));
}

void Session::EndAttempt() {
  if (attempt_.number == 0) return;
  if (!attempt_.first_token_seen) FirstTokenSeen();
  deps_.registry->Released(attempt_.decode_target);
  if (!attempt_.local_prefill) deps_.registry->Released(attempt_.prefill_target);
  // Cancelling a call that has ended does nothing.
  if (attempt_.prefill != nullptr) attempt_.prefill->Cancel();
  if (attempt_.decode != nullptr) attempt_.decode->Cancel();
  attempt_.prefill.reset();
  attempt_.decode.reset();
}

void Session::End(const absl::Status& status) {
  ended_ = true;
  EndAttempt();
  deps_.metrics->CountRequest(status.code());
  LogLine(status.ok() ? LogLevel::kInfo : LogLevel::kWarning, "finished",
          absl::StrCat(LogField("request_id", request_.request_id),
                       LogField("code", std::string(CodeName(status.code()))),
                       TokensField(tokens_sent_, request_.prompt_ids.size()),
                       LogField("ttft_ms", absl::ToInt64Milliseconds(time_to_first_token_)),
                       LogField("e2e_ms", absl::ToInt64Milliseconds(absl::Now() - accepted_)),
                       status.ok() ? "" : LogField("message", status.message())));
  sink_->Finish(status);
}

void Session::LeaveIfEnded() {
  {
    MutexLock lock(&mu_);
    if (!ended_ || left_) return;
    left_ = true;
  }
  deps_.admission->Leave(id_);
}

}  // namespace winnow::router
