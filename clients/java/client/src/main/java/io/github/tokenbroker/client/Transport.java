package io.github.tokenbroker.client;

import java.util.Collection;
import java.util.concurrent.CompletableFuture;
import token_broker.v1.GetTokenResponse;
import token_broker.v1.ReportRejectedTokenResponse;
import token_broker.v1.WatchTokensResponse;

/**
 * The calls to the broker. Its methods are called on the loop, and return at once. Futures fail
 * with a {@link TokenBrokerException}, and complete on any thread.
 */
interface Transport {
  /**
   * Asks for a token of a later generation than {@code newerThan}, for {@code timeout} nanoseconds.
   */
  CompletableFuture<GetTokenResponse> getToken(String account, long newerThan, long timeout);

  /** Reports a refused token. */
  CompletableFuture<ReportRejectedTokenResponse> report(
      String account, long generation, String upstreamCode, long timeout);

  /**
   * Opens a stream, and returns what cancels it. It ends with one call of {@link
   * StreamEvents#ended}.
   */
  Runnable watch(Collection<String> accounts, StreamEvents events);

  /**
   * Looks whether the files of the settings have changed. Returns whether calls use a new
   * connection now.
   */
  boolean refresh();

  /** Ends all calls and connections. */
  void close();

  /** What happens to a stream. The methods are called on any thread, one at a time. */
  interface StreamEvents {
    /** The broker has accepted the stream. */
    void opened();

    /** The broker has sent a message. */
    void message(WatchTokensResponse message);

    /**
     * The stream ended.
     *
     * @param error why, or null if the broker ended it properly
     * @param bearerChanged whether the bearer's file has another bearer than the stream was opened
     *     with
     */
    void ended(TokenBrokerException error, boolean bearerChanged);
  }
}
