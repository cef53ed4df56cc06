package io.github.tokenbroker.client;

import com.google.protobuf.Duration;
import java.util.concurrent.TimeUnit;
import java.util.function.LongSupplier;
import token_broker.v1.GetTokenResponse;

/**
 * A token with the monotonic times, in nanoseconds, until which it may be used.
 *
 * @param token the token
 * @param reuseEnd when the token should be asked for again
 * @param end when the token ends
 */
record Kept(Token token, long reuseEnd, long end) {
  /** A number of seconds whose sum with any time of a loop does not overflow. */
  private static final long LONGEST = TimeUnit.DAYS.toSeconds(30 * 365);

  /**
   * Returns the token of an answer that counts as arrived at {@code arrival}.
   *
   * @throws TokenBrokerException with the kind INTERNAL if the answer cannot be used
   */
  static Kept from(String account, GetTokenResponse answer, long arrival, LongSupplier now) {
    long reuseFor = nanos(answer.getReuseFor());
    long expiresIn = nanos(answer.getExpiresIn());
    if (answer.getAccessToken().isEmpty() || reuseFor <= 0 || expiresIn <= 0) {
      throw TokenBrokerException.of(
              ErrorKind.INTERNAL, "the answer has no token, or no time for which to keep it")
          .account(account)
          .build();
    }
    long end = arrival + expiresIn;
    Token token =
        new Token(
            account,
            answer.getAccessToken(),
            answer.getGeneration(),
            answer.getAllowedIp(),
            answer.getApiBaseUrl(),
            () -> end - now.getAsLong());
    return new Kept(token, arrival + reuseFor, end);
  }

  Kept withReuseEnd(long time) {
    return new Kept(token, time, end);
  }

  /** Returns a duration in nanoseconds, of thirty years at most. */
  static long nanos(Duration duration) {
    long seconds = Math.max(-LONGEST, Math.min(duration.getSeconds(), LONGEST));
    return TimeUnit.SECONDS.toNanos(seconds) + duration.getNanos();
  }
}
