package io.github.tokenbroker.client;

import com.google.protobuf.Duration;
import java.util.ArrayList;
import java.util.Collection;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import token_broker.v1.AccountEnded;
import token_broker.v1.GetTokenResponse;
import token_broker.v1.ReportRejectedTokenResponse;
import token_broker.v1.ReportRejectedTokenResponse.Outcome;
import token_broker.v1.WatchTokensResponse;

/** A broker that answers when the test says so. */
final class FakeBroker implements Transport {
  final List<Call<GetTokenResponse>> asks = new ArrayList<>();
  final List<Call<ReportRejectedTokenResponse>> reports = new ArrayList<>();
  final List<Stream> streams = new ArrayList<>();
  boolean closed;

  /** What a call fails with instead of being made, or null. */
  RuntimeException broken;

  /** A call that waits for its answer. */
  record Call<T>(String account, long generation, long timeoutMs, CompletableFuture<T> answer) {
    void fail(ErrorKind kind) {
      answer.completeExceptionally(error(kind).build());
    }
  }

  /** A stream that the client has opened. */
  static final class Stream {
    final Collection<String> accounts;
    final StreamEvents events;
    boolean cancelled;

    Stream(Collection<String> accounts, StreamEvents events) {
      this.accounts = accounts;
      this.events = events;
    }

    void push(String account, GetTokenResponse token) {
      events.message(WatchTokensResponse.newBuilder().setAccount(account).setToken(token).build());
    }

    void end(String account) {
      events.message(
          WatchTokensResponse.newBuilder()
              .setAccount(account)
              .setEnded(AccountEnded.newBuilder().setReason(AccountEnded.Reason.REASON_REMOVED))
              .build());
    }
  }

  @Override
  public CompletableFuture<GetTokenResponse> getToken(
      String account, long newerThan, long timeout) {
    return record(asks, account, newerThan, timeout);
  }

  @Override
  public CompletableFuture<ReportRejectedTokenResponse> report(
      String account, long generation, String upstreamCode, long timeout) {
    return record(reports, account, generation, timeout);
  }

  @Override
  public Runnable watch(Collection<String> accounts, StreamEvents events) {
    failIfBroken();
    Stream stream = new Stream(accounts, events);
    streams.add(stream);
    return () -> stream.cancelled = true;
  }

  @Override
  public boolean refresh() {
    return false;
  }

  @Override
  public void close() {
    closed = true;
  }

  Call<GetTokenResponse> ask() {
    return asks.get(asks.size() - 1);
  }

  Call<ReportRejectedTokenResponse> report() {
    return reports.get(reports.size() - 1);
  }

  Stream stream() {
    return streams.get(streams.size() - 1);
  }

  /** Returns an answer with a token for 60 s, which is to be kept for 40 s. */
  static GetTokenResponse token(long generation) {
    return token(generation, 40_000, 60_000);
  }

  static GetTokenResponse token(long generation, long reuseForMs, long expiresInMs) {
    return GetTokenResponse.newBuilder()
        .setAccessToken("secret-" + generation)
        .setGeneration(generation)
        .setReuseFor(duration(reuseForMs))
        .setExpiresIn(duration(expiresInMs))
        .setApiBaseUrl("http://127.0.0.1:9/api")
        .build();
  }

  static ReportRejectedTokenResponse outcome(Outcome outcome, long retryAfterMs) {
    return ReportRejectedTokenResponse.newBuilder()
        .setOutcome(outcome)
        .setRetryAfter(duration(retryAfterMs))
        .build();
  }

  static TokenBrokerException.Builder error(ErrorKind kind) {
    return TokenBrokerException.of(kind, "as the test says");
  }

  private static Duration duration(long milliseconds) {
    return Duration.newBuilder()
        .setSeconds(milliseconds / 1000)
        .setNanos((int) (milliseconds % 1000) * 1_000_000)
        .build();
  }

  private void failIfBroken() {
    if (broken != null) {
      throw broken;
    }
  }

  private <T> CompletableFuture<T> record(
      List<Call<T>> calls, String account, long generation, long timeout) {
    failIfBroken();
    Call<T> call = new Call<>(account, generation, timeout / 1_000_000, new CompletableFuture<>());
    calls.add(call);
    return call.answer();
  }
}
