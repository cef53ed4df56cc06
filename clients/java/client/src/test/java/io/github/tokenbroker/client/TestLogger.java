package io.github.tokenbroker.client;

import java.text.MessageFormat;
import java.util.List;
import java.util.ResourceBundle;
import java.util.concurrent.CopyOnWriteArrayList;

/** A logger that keeps its messages, and then fails if the test says so. */
final class TestLogger implements System.Logger {
  final List<String> warnings = new CopyOnWriteArrayList<>();
  volatile Error failure;

  @Override
  public String getName() {
    return "test";
  }

  @Override
  public boolean isLoggable(Level level) {
    return true;
  }

  @Override
  public void log(Level level, ResourceBundle bundle, String message, Throwable thrown) {
    throw new AssertionError("is not used");
  }

  @Override
  public void log(Level level, ResourceBundle bundle, String format, Object... parameters) {
    if (level == Level.WARNING) {
      warnings.add(MessageFormat.format(format, parameters));
    }
    if (failure != null) {
      throw failure;
    }
  }
}
