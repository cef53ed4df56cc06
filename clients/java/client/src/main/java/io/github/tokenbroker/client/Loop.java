package io.github.tokenbroker.client;

/**
 * The thread on which a client changes its state, so that it needs no locks, with its clock and its
 * timers. Tests have one of their own.
 */
interface Loop {
  /** Returns the monotonic time in nanoseconds. It never overflows. */
  long now();

  /** Runs an action on the loop's thread. Actions after {@link #close} are dropped. */
  void execute(Runnable action);

  /** Runs an action after a delay in nanoseconds, unless the returned action is run before. */
  Runnable schedule(long delay, Runnable action);

  /** Returns a number from 0 to below 1. */
  double random();

  /** Drops all actions, and ends the thread. */
  void close();
}
