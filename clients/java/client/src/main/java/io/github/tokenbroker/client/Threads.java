package io.github.tokenbroker.client;

import java.util.concurrent.ThreadFactory;

/** Makes threads that keep no program alive. */
final class Threads {
  private Threads() {}

  static ThreadFactory daemons(String name) {
    return action -> {
      Thread thread = new Thread(action, name);
      thread.setDaemon(true);
      return thread;
    };
  }
}
