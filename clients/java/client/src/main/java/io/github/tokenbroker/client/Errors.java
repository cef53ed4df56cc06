package io.github.tokenbroker.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CompletionException;
import java.util.concurrent.ExecutionException;

/** Makes exceptions of what gRPC and futures report. */
final class Errors {
  private static final Metadata.Key<String> PUSHBACK =
      Metadata.Key.of("grpc-retry-pushback-ms", Metadata.ASCII_STRING_MARSHALLER);

  /** That of the broker's reasons. Others are from something in between. */
  private static final String DOMAIN = "token-broker";

  private Errors() {}

  static TokenBrokerException invalid(String text) {
    return TokenBrokerException.of(ErrorKind.INVALID_ARGUMENT, text).build();
  }

  static TokenBrokerException closed(String account) {
    return TokenBrokerException.of(ErrorKind.CLOSED, "the client is closed")
        .account(account)
        .build();
  }

  /** Returns the exception behind what a future failed with. The account may be null. */
  static TokenBrokerException from(Throwable thrown, String account) {
    Throwable cause = thrown;
    while ((cause instanceof CompletionException || cause instanceof ExecutionException)
        && cause.getCause() != null) {
      cause = cause.getCause();
    }
    return cause instanceof TokenBrokerException known
        ? known
        : TokenBrokerException.of(ErrorKind.INTERNAL, "the call failed unexpectedly")
            .account(account)
            .cause(cause)
            .build();
  }

  /** Returns the exception that the status of a call stands for. The account may be null. */
  static TokenBrokerException from(Status status, Metadata trailers, String account) {
    String reason = null;
    String upstreamCode = null;
    Duration retryAfter = null;
    for (Any detail : details(status, trailers)) {
      try {
        if (detail.is(ErrorInfo.class)) {
          ErrorInfo info = detail.unpack(ErrorInfo.class);
          if (info.getDomain().equals(DOMAIN)) {
            reason = info.getReason();
            upstreamCode = info.getMetadataMap().get("upstream_code");
          }
        } else if (detail.is(RetryInfo.class)) {
          retryAfter = Duration.ofNanos(Kept.nanos(detail.unpack(RetryInfo.class).getRetryDelay()));
        }
      } catch (InvalidProtocolBufferException unreadable) {
        // Details that cannot be read explain nothing; the code and the text remain.
      }
    }
    return TokenBrokerException.of(kindOf(status.getCode(), reason), text(status))
        .account(account)
        .code(status.getCode().name())
        .reason(reason)
        .upstreamCode(upstreamCode)
        .retryAfter(retryAfter)
        .pushedBack(isPushedBack(trailers))
        .build();
  }

  /** Returns the details of a status; none if they are malformed, or of another status. */
  private static List<Any> details(Status status, Metadata trailers) {
    try {
      return StatusProto.fromStatusAndTrailers(status, trailers).getDetailsList();
    } catch (IllegalArgumentException unreadable) {
      return List.of();
    }
  }

  static ErrorKind kindOf(Status.Code code, String reason) {
    return switch (code) {
      case INVALID_ARGUMENT -> ErrorKind.INVALID_ARGUMENT;
      case UNAUTHENTICATED -> ErrorKind.UNAUTHENTICATED;
      case PERMISSION_DENIED -> ErrorKind.NOT_GRANTED;
      case NOT_FOUND -> ErrorKind.NO_SUCH_ACCOUNT;
      case UNAVAILABLE -> ErrorKind.UNAVAILABLE;
      case RESOURCE_EXHAUSTED -> ErrorKind.OVERLOADED;
      case DEADLINE_EXCEEDED -> ErrorKind.DEADLINE_EXCEEDED;
      case FAILED_PRECONDITION ->
          switch (reason == null ? "" : reason) {
            case "ACCOUNT_DISABLED" -> ErrorKind.ACCOUNT_DISABLED;
            case "CREDENTIAL_REJECTED" -> ErrorKind.CREDENTIAL_REJECTED;
            case "EGRESS_REJECTED" -> ErrorKind.EGRESS_REJECTED;
            default -> ErrorKind.INTERNAL;
          };
      default -> ErrorKind.INTERNAL;
    };
  }

  /** Returns the broker's text, or gRPC's with the cause of a connection that failed. */
  private static String text(Status status) {
    String description = status.getDescription() == null ? "no details" : status.getDescription();
    Throwable cause = status.getCause();
    return cause == null ? description : description + ": " + cause.getMessage();
  }

  private static boolean isPushedBack(Metadata trailers) {
    String pushback = trailers == null ? null : trailers.get(PUSHBACK);
    return pushback != null && pushback.startsWith("-");
  }
}
