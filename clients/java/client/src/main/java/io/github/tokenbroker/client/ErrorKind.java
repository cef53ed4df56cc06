package io.github.tokenbroker.client;

/** What went wrong, and so what a program can do about it. */
public enum ErrorKind {
  /** The account's name, another argument, or a setting cannot be used. */
  INVALID_ARGUMENT(false),
  /** The broker does not know the caller. */
  UNAUTHENTICATED(false),
  /** No grant covers the account. */
  NOT_GRANTED(false),
  /** There is no such account. */
  NO_SUCH_ACCOUNT(false),
  /** An admin disabled the account. */
  ACCOUNT_DISABLED(false),
  /** The upstream refuses the account's credential. */
  CREDENTIAL_REJECTED(false),
  /** The upstream refuses the account or the broker's address. */
  EGRESS_REJECTED(false),
  /** The broker or the upstream cannot be reached. */
  UNAVAILABLE(true),
  /** The broker has too much to do, or the caller asks too often. */
  OVERLOADED(true),
  /** There was no answer within the timeout. */
  DEADLINE_EXCEEDED(true),
  /** The caller cancelled the call, or its thread was interrupted. */
  CANCELLED(false),
  /** The client was closed. */
  CLOSED(false),
  /** A token would have been sent to another host than that of its API. */
  WRONG_HOST(false),
  /** Anything else. */
  INTERNAL(true);

  private final boolean temporary;

  ErrorKind(boolean temporary) {
    this.temporary = temporary;
  }

  /**
   * Returns whether the same call may succeed later although nobody changes anything.
   *
   * @return whether the same call may succeed later
   */
  public boolean isTemporary() {
    return temporary;
  }
}
