package io.github.tokenbroker.client;

import java.time.Duration;
import java.util.function.LongSupplier;

/** An upstream token of an account. Its text form does not contain the token itself. */
public final class Token {
  private final String account;
  private final String value;
  private final long generation;
  private final String allowedIp;
  private final String apiBaseUrl;
  private final LongSupplier nanosLeft;

  Token(
      String account,
      String value,
      long generation,
      String allowedIp,
      String apiBaseUrl,
      LongSupplier nanosLeft) {
    this.account = account;
    this.value = value;
    this.generation = generation;
    this.allowedIp = allowedIp;
    this.apiBaseUrl = apiBaseUrl;
    this.nanosLeft = nanosLeft;
  }

  /**
   * Returns the account's name.
   *
   * @return the account's name
   */
  public String account() {
    return account;
  }

  /**
   * Returns the token itself, for the header {@code Authorization: Bearer …}. Do not print it.
   *
   * @return the token itself
   */
  public String value() {
    return value;
  }

  /**
   * Returns a number that grows with each new token of the account. It is an unsigned number:
   * compare it with {@link Long#compareUnsigned}.
   *
   * @return the generation
   */
  public long generation() {
    return generation;
  }

  /**
   * Returns the address from which the API may accept the token.
   *
   * @return the address; empty if the token names none
   */
  public String allowedIp() {
    return allowedIp;
  }

  /**
   * Returns the base URL of the API for which the token is valid.
   *
   * @return the base URL
   */
  public String apiBaseUrl() {
    return apiBaseUrl;
  }

  /**
   * Returns for how long the token remains valid.
   *
   * @return the time that is left; zero if the token has ended
   */
  public Duration expiresIn() {
    return Duration.ofNanos(Math.max(0, nanosLeft.getAsLong()));
  }

  boolean isNewerThan(long other) {
    return Long.compareUnsigned(generation, other) > 0;
  }

  @Override
  public String toString() {
    return "Token[account=" + account + ", generation=" + Long.toUnsignedString(generation) + "]";
  }
}
