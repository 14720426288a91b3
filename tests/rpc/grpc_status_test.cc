#include "common/rpc/grpc_status.h"

#include <gtest/gtest.h>

namespace winnow {
namespace {

TEST(GrpcStatus, EveryCodeThereAndBack) {
  for (int code = 0; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), code == 0 ? "" : "why");
    EXPECT_EQ(ToGrpcStatus(status).error_code(), code);
    EXPECT_EQ(FromGrpcStatus(ToGrpcStatus(status)), status);
  }
}

TEST(GrpcStatus, ReasonAndHintTravel) {
  const absl::Status status = WithReason(absl::ResourceExhaustedError("full"),
                                         v1::ERROR_REASON_QUEUE_FULL, absl::Milliseconds(1500));
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(status));
  EXPECT_EQ(back, status);
  EXPECT_EQ(ReasonOf(back), v1::ERROR_REASON_QUEUE_FULL);
  EXPECT_EQ(RetryAfter(back), absl::Milliseconds(1500));
}

TEST(GrpcStatus, DetailsAreGooglesOnTheWire) {
  const grpc::Status status =
      ToGrpcStatus(WithReason(absl::UnavailableError("no"), v1::ERROR_REASON_NO_WORKER));
  v1::RpcStatus details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), 14);
  EXPECT_EQ(details.message(), "no");
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.ErrorInfo");
  v1::ErrorInfo info;
  ASSERT_TRUE(info.ParseFromString(details.details(0).value()));
  EXPECT_EQ(info.reason(), "NO_WORKER");
  EXPECT_EQ(info.domain(), "winnow");
}

TEST(GrpcStatus, HostileDetailsDoNoHarm) {
  for (const std::string& details : {std::string("\xff\xff\xff"), std::string(1000, '\0')}) {
    const absl::Status status = FromGrpcStatus({grpc::StatusCode::INTERNAL, "x", details});
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_UNSPECIFIED);
  }
  EXPECT_EQ(FromGrpcStatus({static_cast<grpc::StatusCode>(20), "x"}).code(),
            absl::StatusCode::kUnknown);
}

TEST(GrpcStatus, AForeignReasonIsNone) {
  v1::ErrorInfo info;
  info.set_reason("QUEUE_FULL");
  info.set_domain("elsewhere");
  v1::RpcStatus details;
  details.add_details()->set_type_url("type.googleapis.com/google.rpc.ErrorInfo");
  details.mutable_details(0)->set_value(info.SerializeAsString());
  const absl::Status status =
      FromGrpcStatus({grpc::StatusCode::INTERNAL, "x", details.SerializeAsString()});
  EXPECT_EQ(ReasonOf(status), v1::ERROR_REASON_UNSPECIFIED);
}

TEST(GrpcStatus, NamesAreGrpcs) {
  EXPECT_EQ(CodeName(absl::StatusCode::kResourceExhausted), "RESOURCE_EXHAUSTED");
  EXPECT_EQ(CodeName(static_cast<absl::StatusCode>(77)), "UNKNOWN");
  EXPECT_EQ(ReasonName(v1::ERROR_REASON_KV_FULL), "KV_FULL");
}

}  // namespace
}  // namespace winnow
