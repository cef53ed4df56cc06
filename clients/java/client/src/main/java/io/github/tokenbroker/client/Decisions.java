package io.github.tokenbroker.client;

import static java.util.concurrent.TimeUnit.MILLISECONDS;
import static java.util.concurrent.TimeUnit.SECONDS;

/**
 * The rules for tokens and pauses, as functions without effects. Times are monotonic, in
 * nanoseconds.
 */
final class Decisions {
  /** For how long the error of an account is given to callers without another call. */
  static final long REFUSAL = SECONDS.toNanos(1);

  /** For how long a caller waits for a newer token while the kept one still lives. */
  static final long RENEWAL_WAIT = SECONDS.toNanos(2);

  /**
   * A token counts as ended so long before its end, because a request needs time to reach the API.
   */
  private static final long END_MARGIN = SECONDS.toNanos(1);

  private Decisions() {}

  /** What to do when somebody needs the token of an account. */
  enum Decision {
    /** Return the kept token. */
    USE,
    /** Ask, and use the kept token if that fails. */
    RENEW,
    /** Ask, and wait for the answer. */
    ASK,
    /** Fail with the remembered error. */
    REFUSE
  }

  /**
   * What is known of an account when somebody needs its token.
   *
   * @param kept the kept token, or null
   * @param refusal the last error that was not temporary, or null
   * @param refusedUntil until when that error counts
   * @param pausedUntil until when the kept token is used after its reuse end because asking has
   *     failed
   */
  record Knowledge(Kept kept, TokenBrokerException refusal, long refusedUntil, long pausedUntil) {
    static final Knowledge NOTHING = new Knowledge(null, null, 0, 0);

    static Knowledge of(Kept kept) {
      return new Knowledge(kept, null, 0, 0);
    }

    static Knowledge refused(TokenBrokerException refusal, long until) {
      return new Knowledge(null, refusal, until, 0);
    }

    Knowledge pausedUntil(long time) {
      return new Knowledge(kept, refusal, refusedUntil, time);
    }
  }

  static Decision decide(Knowledge known, long now) {
    if (isUsable(known.kept(), now)) {
      return now < known.kept().reuseEnd() || now < known.pausedUntil()
          ? Decision.USE
          : Decision.RENEW;
    }
    return known.refusal() != null && now < known.refusedUntil() ? Decision.REFUSE : Decision.ASK;
  }

  static boolean isUsable(Kept kept, long now) {
    return kept != null && now < kept.end() - END_MARGIN;
  }

  /**
   * Returns whether {@code next} takes the place of the kept token, which may be null. Anything
   * takes the place of one that has ended, because generations start again at a lower number when
   * the broker's database was restored.
   */
  static boolean replaces(Kept next, Kept kept, long now) {
    if (!isUsable(kept, now)) {
      return true;
    }
    int order = Long.compareUnsigned(next.token().generation(), kept.token().generation());
    return order > 0 || (order == 0 && next.reuseEnd() > kept.reuseEnd());
  }

  /**
   * Returns the pause before an ask is repeated for which callers wait.
   *
   * @param failures how many attempts in a row have failed
   * @param random a number from 0 to below 1
   */
  static long retryPause(int failures, double random) {
    return growing(failures, MILLISECONDS.toNanos(100), SECONDS.toNanos(1), random);
  }

  /** Returns for how long a living token is used without asking. */
  static long renewalPause(int failures, double random) {
    return growing(failures, SECONDS.toNanos(1), SECONDS.toNanos(30), random);
  }

  /** Returns the pause before a stream is opened again that has failed. */
  static long reopeningPause(int failures, double random) {
    return growing(failures, MILLISECONDS.toNanos(100), SECONDS.toNanos(10), random);
  }

  /** Doubles {@code first} with each further failure, and shortens the result by up to half. */
  private static long growing(int failures, long first, long longest, double random) {
    long pause = Math.min(first << Math.min(failures - 1, 20), longest);
    return (long) (pause * (1 - random / 2));
  }
}
