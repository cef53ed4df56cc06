package io.github.tokenbroker.client;

import java.lang.System.Logger;
import java.lang.System.Logger.Level;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.Executor;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;

/**
 * Writes the messages of a client. What handles them belongs to the program: it may fail, block, or
 * use the client itself, and none of that may hold up the client. So messages are written on a
 * thread of their own, in their order.
 */
final class Log {
  /** How many messages wait at most. Later ones are dropped while nothing is written. */
  private static final int MOST_WAITING = 1000;

  /** Is shared by all clients, and keeps its thread for a second after the last message. */
  private static final Executor WRITER =
      new ThreadPoolExecutor(
          0,
          1,
          1,
          TimeUnit.SECONDS,
          new ArrayBlockingQueue<>(MOST_WAITING),
          Threads.daemons("token-broker-log"),
          new ThreadPoolExecutor.DiscardPolicy());

  private final Logger logger;
  private final Executor writer;

  Log(Logger logger) {
    this(logger, WRITER);
  }

  Log(Logger logger, Executor writer) {
    this.logger = logger;
    this.writer = writer;
  }

  void warning(String pattern, Object... parameters) {
    log(Level.WARNING, pattern, parameters);
  }

  void debug(String pattern, Object... parameters) {
    log(Level.DEBUG, pattern, parameters);
  }

  private void log(Level level, String pattern, Object... parameters) {
    quietly(
        () -> {
          if (logger.isLoggable(level)) {
            writer.execute(() -> quietly(() -> logger.log(level, pattern, parameters)));
          }
        });
  }

  /** A message that cannot be written is lost, whatever the reason. */
  private static void quietly(Runnable action) {
    try {
      action.run();
    } catch (RuntimeException | Error failure) {
      // It cannot be logged either.
    }
  }
}
