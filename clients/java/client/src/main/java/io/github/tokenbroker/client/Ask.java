package io.github.tokenbroker.client;

import java.util.LinkedHashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.function.LongFunction;
import java.util.function.Predicate;

/**
 * One ask for the token of an account, which all callers that need it share. It is repeated after
 * temporary errors as long as somebody waits for it. It belongs to none of its callers: when one
 * gives up, the others get the answer.
 *
 * <p>All methods are called on the loop.
 */
final class Ask {
  private final Loop loop;
  private final String account;
  private final LongFunction<CompletableFuture<Token>> call;
  private final Predicate<TokenBrokerException> isFinal;
  private final Runnable onEnd;
  private final Set<Waiter<Token>> waiters = new LinkedHashSet<>();
  private TokenBrokerException lastError;
  private long nextAttempt;
  private int failures;
  private boolean countsAsFailed;

  /**
   * Makes an ask.
   *
   * @param call calls the broker once, with a timeout, and keeps the token of its answer
   * @param isFinal says whether an attempt that failed with an error is not to be repeated
   * @param onEnd is run when the ask takes no more callers
   */
  Ask(
      Loop loop,
      String account,
      LongFunction<CompletableFuture<Token>> call,
      Predicate<TokenBrokerException> isFinal,
      Runnable onEnd) {
    this.loop = loop;
    this.account = account;
    this.call = call;
    this.isFinal = isFinal;
    this.onEnd = onEnd;
  }

  /** Adds a caller. */
  void add(Waiter<Token> waiter) {
    if (lastError != null && nextAttempt > waiter.deadline()) {
      waiter.fail(lastError);
      return;
    }
    waiter.setLastError(() -> lastError);
    waiters.add(waiter);
    waiter.onDone(() -> waiters.remove(waiter));
  }

  /** Gives the token to all who wait, before the answer or instead of it. */
  void settle(Token token) {
    for (Waiter<Token> waiter : List.copyOf(waiters)) {
      waiter.complete(token);
    }
    waiters.clear();
  }

  /** Calls the broker, and again until there is a token, a final error, or nobody who waits. */
  void run(long deadline) {
    call.apply(Math.max(0, deadline - loop.now()))
        .whenComplete((token, error) -> loop.execute(() -> answered(token, error)));
  }

  /** Returns true at the first call only. */
  boolean countAsFailed() {
    boolean first = !countsAsFailed;
    countsAsFailed = true;
    return first;
  }

  private void answered(Token token, Throwable thrown) {
    if (thrown == null) {
      onEnd.run();
      settle(token);
      return;
    }
    TokenBrokerException error = Errors.from(thrown, account);
    failures++;
    long now = loop.now();
    long pause = pauseAfter(error);
    boolean repeats = pause >= 0;
    if (error.kind() != ErrorKind.DEADLINE_EXCEEDED || lastError == null) {
      // Otherwise the error before says why there was no answer.
      lastError = error;
    }
    nextAttempt = now + pause;
    List<Waiter<Token>> leaving =
        waiters.stream().filter(waiter -> !repeats || waiter.deadline() < nextAttempt).toList();
    waiters.removeAll(leaving);
    if (waiters.isEmpty()) {
      onEnd.run();
    }
    leaving.forEach(waiter -> waiter.fail(lastError));
    if (!waiters.isEmpty()) {
      loop.schedule(pause, this::repeat);
    }
  }

  private void repeat() {
    if (waiters.isEmpty()) {
      onEnd.run();
    } else {
      run(waiters.stream().mapToLong(Waiter::deadline).max().getAsLong());
    }
  }

  /** Returns the pause before the next attempt; negative if there is none. */
  private long pauseAfter(TokenBrokerException error) {
    if (error.isPushedBack() || isFinal.test(error)) {
      return -1;
    }
    return error
        .retryAfter()
        .map(java.time.Duration::toNanos)
        // A pause of zero, which a broker may send, would make this a loop without pauses.
        .filter(pause -> pause > 0)
        .orElseGet(() -> Decisions.retryPause(failures, loop.random()));
  }
}
