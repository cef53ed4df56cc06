package io.github.tokenbroker.client;

import com.google.protobuf.Any;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerInterceptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.util.ArrayDeque;
import java.util.Queue;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import token_broker.v1.GetTokenRequest;
import token_broker.v1.GetTokenResponse;
import token_broker.v1.ReportRejectedTokenRequest;
import token_broker.v1.ReportRejectedTokenResponse;
import token_broker.v1.TokenServiceGrpc;
import token_broker.v1.WatchTokensRequest;
import token_broker.v1.WatchTokensResponse;

/**
 * A broker on loopback with one bearer and one token of each account. A report replaces the token.
 */
public final class WireBroker extends TokenServiceGrpc.TokenServiceImplBase
    implements AutoCloseable {
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);
  private static final Context.Key<String> SHOWN = Context.key("shown");

  final AtomicLong generation = new AtomicLong(1);
  final AtomicInteger asks = new AtomicInteger();
  final AtomicInteger reports = new AtomicInteger();
  final AtomicInteger streams = new AtomicInteger();
  final Queue<StatusRuntimeException> failures = new ArrayDeque<>();
  volatile String bearer = "tbk_first";
  public volatile String apiBaseUrl = "http://127.0.0.1:9";
  private final Server server;

  /** Starts a broker on a free port. */
  public WireBroker() throws IOException {
    server =
        NettyServerBuilder.forAddress(new InetSocketAddress("127.0.0.1", 0))
            .addService(this)
            .intercept(new ShownBearer())
            .build()
            .start();
  }

  /** Keeps the header of each call for the methods. */
  private static final class ShownBearer implements ServerInterceptor {
    @Override
    public <Q, S> ServerCall.Listener<Q> interceptCall(
        ServerCall<Q, S> call, Metadata headers, ServerCallHandler<Q, S> next) {
      Context context = Context.current().withValue(SHOWN, headers.get(AUTHORIZATION));
      return Contexts.interceptCall(context, call, headers, next);
    }
  }

  /** Returns the URL of the broker. */
  public String endpoint() {
    return "http://127.0.0.1:" + server.getPort();
  }

  @Override
  public void getToken(GetTokenRequest request, StreamObserver<GetTokenResponse> answer) {
    asks.incrementAndGet();
    if (!("Bearer " + bearer).equals(SHOWN.get())) {
      answer.onError(refusal(16, "CREDENTIAL_REFUSED"));
    } else if (!failures.isEmpty()) {
      answer.onError(failures.remove());
    } else {
      answer.onNext(
          FakeBroker.token(generation.get()).toBuilder().setApiBaseUrl(apiBaseUrl).build());
      answer.onCompleted();
    }
  }

  @Override
  public void reportRejectedToken(
      ReportRejectedTokenRequest request, StreamObserver<ReportRejectedTokenResponse> answer) {
    reports.incrementAndGet();
    if (!failures.isEmpty()) {
      answer.onError(failures.remove());
      return;
    }
    generation.incrementAndGet();
    answer.onNext(FakeBroker.outcome(ReportRejectedTokenResponse.Outcome.OUTCOME_REISSUING, 0));
    answer.onCompleted();
  }

  /** Refuses a stream for the time being. */
  @Override
  public void watchTokens(WatchTokensRequest request, StreamObserver<WatchTokensResponse> answer) {
    streams.incrementAndGet();
    answer.onError(Status.UNAVAILABLE.asRuntimeException());
  }

  @Override
  public void close() {
    server.shutdownNow();
    try {
      server.awaitTermination();
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    }
  }

  /** Returns a status as the broker sends it. */
  static StatusRuntimeException refusal(int code, String reason) {
    return refusal(code, reason, "token-broker");
  }

  static StatusRuntimeException refusal(int code, String reason, String domain) {
    return StatusProto.toStatusRuntimeException(
        com.google.rpc.Status.newBuilder()
            .setCode(code)
            .setMessage("as the test says")
            .addDetails(
                Any.pack(
                    ErrorInfo.newBuilder()
                        .setReason(reason)
                        .setDomain(domain)
                        .putMetadata("upstream_code", "61006")
                        .build()))
            .addDetails(
                Any.pack(
                    RetryInfo.newBuilder()
                        .setRetryDelay(com.google.protobuf.Duration.newBuilder().setSeconds(7))
                        .build()))
            .build());
  }
}
