package io.github.tokenbroker.client;

import java.io.IOException;
import java.nio.file.Path;
import java.util.concurrent.TimeUnit;

/** The bearer in a file, which is read again from time to time. */
final class BearerFile {
  /** For how long the file is not read again. */
  private static final long FRESH = TimeUnit.SECONDS.toNanos(1);

  private final Path file;
  private final Loop loop;
  private final Log log;
  private String bearer;
  private long readAt;
  private String lastFailure = "";

  /** Reads the file. */
  BearerFile(Path file, Loop loop, Log log) {
    this.file = file;
    this.loop = loop;
    this.log = log;
    try {
      this.bearer = parse();
    } catch (IOException unreadable) {
      throw Errors.invalid("the file of the bearer cannot be used: " + unreadable.getMessage());
    }
    this.readAt = loop.now();
  }

  /** Returns the bearer, after reading the file again if it was last read over a second ago. */
  synchronized String current() {
    return loop.now() - readAt > FRESH ? read() : bearer;
  }

  /** Reads the file again. Returns the last bearer if the file cannot be used. */
  synchronized String read() {
    readAt = loop.now();
    try {
      bearer = parse();
      lastFailure = "";
    } catch (IOException unusable) {
      if (!unusable.getMessage().equals(lastFailure)) {
        lastFailure = unusable.getMessage();
        log.warning(
            "the file of the bearer cannot be used, the last one is kept: {0}", lastFailure);
      }
    }
    return bearer;
  }

  /** Returns the bearer in the file. The texts of exceptions do not quote the file. */
  private String parse() throws IOException {
    String text = TextFiles.read(file).strip();
    if (text.isEmpty() || !text.chars().allMatch(character -> character > ' ' && character < 127)) {
      throw new IOException(TextFiles.shown(file) + " must contain one bearer, and nothing else");
    }
    return text;
  }
}
