package io.github.tokenbroker.client;

import java.time.Duration;
import java.util.Optional;

/**
 * The exception with which everything in this library fails. It contains no token and no bearer.
 */
public final class TokenBrokerException extends RuntimeException {
  private static final long serialVersionUID = 1;

  /** What went wrong. */
  private final ErrorKind kind;

  /** The account, or null if the error is about none. */
  private final String account;

  /** The name of the gRPC status, or null if there was none. */
  private final String code;

  /** The broker's reason, or null if it gave none. */
  private final String reason;

  /** The upstream's own code, or null if it gave none. */
  private final String upstreamCode;

  /** The pause before another call, or null if the broker gave none. */
  private final Duration retryAfter;

  /** Whether the broker asked for no other call before the deadline. */
  private final boolean pushedBack;

  private TokenBrokerException(Builder from) {
    super(from.describe(), from.cause);
    this.kind = from.kind;
    this.account = from.account;
    this.code = from.code;
    this.reason = from.reason;
    this.upstreamCode = from.upstreamCode;
    this.retryAfter = from.retryAfter;
    this.pushedBack = from.pushedBack;
  }

  /** Copies an exception, so that the copy has the stack of its own caller. */
  private TokenBrokerException(TokenBrokerException original) {
    super(original.getMessage(), original);
    this.kind = original.kind;
    this.account = original.account;
    this.code = original.code;
    this.reason = original.reason;
    this.upstreamCode = original.upstreamCode;
    this.retryAfter = original.retryAfter;
    this.pushedBack = original.pushedBack;
  }

  /**
   * Returns what went wrong.
   *
   * @return the kind of error
   */
  public ErrorKind kind() {
    return kind;
  }

  /**
   * Returns the account that was asked for.
   *
   * @return the account's name, if the error is about one
   */
  public Optional<String> account() {
    return Optional.ofNullable(account);
  }

  /**
   * Returns the name of the gRPC status, such as {@code PERMISSION_DENIED}.
   *
   * @return the name, if the broker or gRPC gave a status
   */
  public Optional<String> code() {
    return Optional.ofNullable(code);
  }

  /**
   * Returns the broker's reason, such as {@code CALLER_RATE}.
   *
   * @return the reason, if the broker gave one
   */
  public Optional<String> reason() {
    return Optional.ofNullable(reason);
  }

  /**
   * Returns the upstream's own code.
   *
   * @return the code, if the upstream refused the account's credential
   */
  public Optional<String> upstreamCode() {
    return Optional.ofNullable(upstreamCode);
  }

  /**
   * Returns how long to wait before another call.
   *
   * @return the pause, if the broker gave one
   */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(retryAfter);
  }

  /** Returns whether the broker asked for no other call before the deadline. */
  boolean isPushedBack() {
    return pushedBack;
  }

  /** Returns the same error for the thread that calls this. */
  TokenBrokerException forThisThread() {
    return new TokenBrokerException(this);
  }

  static Builder of(ErrorKind kind, String text) {
    return new Builder(kind, text);
  }

  static final class Builder {
    private final ErrorKind kind;
    private final String text;
    private String account;
    private String code;
    private String reason;
    private String upstreamCode;
    private Duration retryAfter;
    private boolean pushedBack;
    private Throwable cause;

    private Builder(ErrorKind kind, String text) {
      this.kind = kind;
      this.text = text;
    }

    Builder account(String value) {
      this.account = value;
      return this;
    }

    Builder code(String value) {
      this.code = value;
      return this;
    }

    Builder reason(String value) {
      this.reason = value;
      return this;
    }

    Builder upstreamCode(String value) {
      this.upstreamCode = value;
      return this;
    }

    Builder retryAfter(Duration value) {
      this.retryAfter = value;
      return this;
    }

    Builder pushedBack(boolean value) {
      this.pushedBack = value;
      return this;
    }

    Builder cause(Throwable value) {
      this.cause = value;
      return this;
    }

    TokenBrokerException build() {
      return new TokenBrokerException(this);
    }

    private String describe() {
      String subject = account == null ? "" : "account " + account + ": ";
      String why = reason == null || reason.equals(kind.name()) ? "" : " (" + reason + ")";
      return subject + kind + why + ": " + text;
    }
  }
}
