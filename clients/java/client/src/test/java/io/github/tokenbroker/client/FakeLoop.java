package io.github.tokenbroker.client;

import java.util.ArrayDeque;
import java.util.Comparator;
import java.util.PriorityQueue;
import java.util.Queue;
import java.util.concurrent.TimeUnit;

/** A loop whose time the test sets. Everything runs on the test's thread. */
final class FakeLoop implements Loop {
  private final Queue<Runnable> actions = new ArrayDeque<>();
  private final PriorityQueue<Timer> timers =
      new PriorityQueue<>(Comparator.comparingLong(Timer::at).thenComparingLong(Timer::number));
  private long time;
  private boolean closed;

  private long timersMade;

  /** A timer. Of those for one time, the one that was made first ends first. */
  private record Timer(long at, long number, Runnable action) {}

  @Override
  public long now() {
    return time;
  }

  @Override
  public void execute(Runnable action) {
    if (!closed) {
      actions.add(action);
    }
  }

  @Override
  public Runnable schedule(long delay, Runnable action) {
    Timer timer = new Timer(time + Math.max(0, delay), timersMade++, action);
    timers.add(timer);
    return () -> timers.remove(timer);
  }

  @Override
  public double random() {
    return 0;
  }

  @Override
  public void close() {
    closed = true;
    actions.clear();
    timers.clear();
  }

  /** Runs everything that needs no time. */
  void settle() {
    for (Runnable action = actions.poll(); action != null; action = actions.poll()) {
      action.run();
    }
  }

  /** Lets time pass, with all timers that end meanwhile. */
  void advance(long milliseconds) {
    settle();
    long end = time + TimeUnit.MILLISECONDS.toNanos(milliseconds);
    while (!timers.isEmpty() && timers.peek().at() <= end) {
      Timer timer = timers.remove();
      time = Math.max(time, timer.at());
      timer.action().run();
      settle();
    }
    time = end;
  }
}
