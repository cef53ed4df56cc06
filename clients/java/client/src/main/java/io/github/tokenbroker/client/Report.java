package io.github.tokenbroker.client;

import java.time.Duration;

/**
 * The broker's answer to the report of a refused token.
 *
 * @param outcome what the broker does
 * @param retryAfter how long to wait before another report; zero if there is no need to wait
 */
public record Report(Outcome outcome, Duration retryAfter) {
  /** What the broker does after a report. */
  public enum Outcome {
    /** A new token is being issued. */
    REISSUING,
    /** A later token exists already. */
    ALREADY_REPLACED,
    /** The last token was issued too recently. The broker does not remember the report. */
    TOO_SOON,
    /** The code is not about the token, so a new token would not help. */
    NOT_A_TOKEN_FAULT
  }
}
