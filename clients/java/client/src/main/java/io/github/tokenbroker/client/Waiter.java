package io.github.tokenbroker.client;

import java.util.concurrent.CompletableFuture;
import java.util.function.Consumer;
import java.util.function.Supplier;

/**
 * Somebody who waits for a result until a deadline. The result may come from elsewhere for others
 * too, so that nothing else ends when a waiter gives up.
 */
final class Waiter<T> {
  private final Loop loop;
  private final String account;
  private final long deadline;
  private final CompletableFuture<T> future = new CompletableFuture<>();
  private Supplier<TokenBrokerException> lastError = () -> null;
  private Consumer<TokenBrokerException> atDeadline = this::fail;

  /** Starts to wait, on the loop. */
  Waiter(Loop loop, String account, long deadline) {
    this.loop = loop;
    this.account = account;
    this.deadline = deadline;
    Runnable stopTimer =
        loop.schedule(
            deadline - loop.now(),
            () -> {
              TokenBrokerException reason = lastError.get();
              atDeadline.accept(reason != null ? reason : timedOut());
            });
    future.whenComplete((result, error) -> stopTimer.run());
  }

  String account() {
    return account;
  }

  long deadline() {
    return deadline;
  }

  /** Returns whether nobody waits any more. */
  boolean isDone() {
    return future.isDone();
  }

  CompletableFuture<T> future() {
    return future;
  }

  /** Sets where the error comes from that says, at the deadline, why there is no result. */
  void setLastError(Supplier<TokenBrokerException> source) {
    lastError = source;
  }

  /** Sets what is done with the error at the deadline, instead of failing with it. */
  void setAtDeadline(Consumer<TokenBrokerException> action) {
    atDeadline = action;
  }

  void complete(T result) {
    future.complete(result);
  }

  void fail(TokenBrokerException error) {
    future.completeExceptionally(error);
  }

  /** Completes with the outcome of a future that others may share. */
  void follow(CompletableFuture<T> shared) {
    shared.whenComplete(
        (result, error) ->
            loop.execute(
                () -> {
                  if (error == null) {
                    complete(result);
                  } else {
                    fail(Errors.from(error, account));
                  }
                }));
  }

  /** Runs an action on the loop once there is a result, an error, or a cancellation. */
  void onDone(Runnable action) {
    future.whenComplete((result, error) -> loop.execute(action));
  }

  private TokenBrokerException timedOut() {
    return TokenBrokerException.of(ErrorKind.DEADLINE_EXCEEDED, "no answer within the timeout")
        .account(account)
        .build();
  }
}
