package io.github.tokenbroker.client;

import java.util.concurrent.Future;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;

/**
 * A loop with a thread of its own, which starts with the first action and keeps no program alive.
 */
final class ThreadLoop implements Loop {
  private final long start = System.nanoTime();
  private final ScheduledThreadPoolExecutor executor;

  ThreadLoop() {
    executor = new ScheduledThreadPoolExecutor(1, Threads.daemons("token-broker"));
    executor.setRemoveOnCancelPolicy(true);
  }

  @Override
  public long now() {
    return System.nanoTime() - start;
  }

  @Override
  public void execute(Runnable action) {
    try {
      executor.execute(action);
    } catch (RejectedExecutionException closed) {
      // Who waits was told by `close`.
    }
  }

  @Override
  public Runnable schedule(long delay, Runnable action) {
    try {
      Future<?> timer = executor.schedule(action, Math.max(0, delay), TimeUnit.NANOSECONDS);
      return () -> timer.cancel(false);
    } catch (RejectedExecutionException closed) {
      return () -> {};
    }
  }

  @Override
  public double random() {
    return ThreadLocalRandom.current().nextDouble();
  }

  @Override
  public void close() {
    executor.shutdownNow();
  }
}
