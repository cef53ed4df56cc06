package io.github.tokenbroker.client;

import static java.util.concurrent.TimeUnit.HOURS;
import static java.util.concurrent.TimeUnit.MILLISECONDS;
import static java.util.concurrent.TimeUnit.SECONDS;

import java.util.LinkedHashSet;
import java.util.List;
import java.util.Set;
import java.util.stream.Collectors;
import token_broker.v1.GetTokenResponse;
import token_broker.v1.WatchTokensResponse;

/** Keeps a stream open that has all watched accounts. All methods are called on the loop. */
final class Watch {
  /** The most accounts of one stream. The broker takes no more. */
  private static final int MOST_ACCOUNTS = 1000;

  /** How long further additions are waited for before a stream is opened for the first. */
  private static final long ADDITION_DELAY = MILLISECONDS.toNanos(100);

  /** The shortest time between two streams that are opened for additions. */
  private static final long ADDITION_INTERVAL = SECONDS.toNanos(5);

  /** How long an account is watched for which nobody asks. */
  private static final long UNUSED = HOURS.toNanos(1);

  /** When a stream is opened again whose bearer was refused. */
  private static final long UNAUTHENTICATED_PAUSE = SECONDS.toNanos(10);

  /**
   * A stream that ended sooner counts as failed, so that one that always breaks is not opened in a
   * loop.
   */
  private static final long BRIEF = SECONDS.toNanos(1);

  /** How long a stream may take to be accepted. */
  private static final long LONGEST_OPENING = SECONDS.toNanos(20);

  /** The longest pause that a broker can ask for before a stream is opened again. */
  private static final long LONGEST_PAUSE = SECONDS.toNanos(30);

  private final Loop loop;
  private final Transport transport;
  private final Events events;
  private final Log log;
  private final Set<String> accounts = new LinkedHashSet<>();

  /** The stream that the broker has accepted last, or null. */
  private Stream current;

  /** The stream that takes its place once the broker has accepted it, or null. */
  private Stream opening;

  private int failures;
  private long nextAddition;
  private Plan plan;
  private boolean closed;

  Watch(Loop loop, Transport transport, Events events, Log log) {
    this.loop = loop;
    this.transport = transport;
    this.events = events;
    this.log = log;
  }

  /** What a watch tells its client, on the loop. */
  interface Events {
    /** The broker has another token of the account. */
    void token(String account, GetTokenResponse answer);

    /** The caller can no longer use the account. */
    void ended(String account);

    /** The accounts are watched no longer, although the caller may still be able to use them. */
    void left(Set<String> accounts);

    /** The broker refuses the caller. */
    void unauthenticated();

    /** Returns when the program last asked for the account. */
    long lastUsed(String account);
  }

  /** When a stream is opened next, and what cancels that. */
  private record Plan(long time, Runnable cancel) {}

  /** Adds an account, if there is room. */
  void add(String account) {
    if (closed || accounts.contains(account) || accounts.size() >= MOST_ACCOUNTS) {
      return;
    }
    accounts.add(account);
    // A stream that is opened anyway, soon or after a pause, has the account too.
    if (plan == null) {
      planAddition();
    }
  }

  boolean has(String account) {
    return accounts.contains(account);
  }

  /**
   * Opens a stream anew, for example on another connection. The present one ends when that works.
   */
  void reopen() {
    if (!accounts.isEmpty()) {
      planOpening(loop.now(), () -> {});
    }
  }

  void close() {
    closed = true;
    if (plan != null) {
      plan.cancel().run();
    }
    cancel(current);
    cancel(opening);
  }

  private void planAddition() {
    planOpening(
        Math.max(loop.now() + ADDITION_DELAY, nextAddition),
        () -> nextAddition = loop.now() + ADDITION_INTERVAL);
  }

  /** Opens a stream at {@code time}, unless one is opened before. */
  private void planOpening(long time, Runnable before) {
    if (closed || (plan != null && plan.time() <= time)) {
      return;
    }
    if (plan != null) {
      plan.cancel().run();
    }
    Runnable cancel =
        loop.schedule(
            time - loop.now(),
            () -> {
              plan = null;
              before.run();
              open();
            });
    plan = new Plan(time, cancel);
  }

  private void open() {
    cancel(opening);
    opening = null;
    long unusedSince = loop.now() - UNUSED;
    leave(
        accounts.stream()
            .filter(account -> events.lastUsed(account) < unusedSince)
            .collect(Collectors.toSet()));
    if (closed || accounts.isEmpty()) {
      cancel(current);
      current = null;
      return;
    }
    log.debug("a stream of {0} accounts is opened", accounts.size());
    Stream started = new Stream(Set.copyOf(accounts));
    opening = started;
    loop.schedule(LONGEST_OPENING, () -> giveUp(started));
    try {
      opening.cancel = transport.watch(List.copyOf(accounts), opening);
    } catch (RuntimeException failure) {
      opening.onEnd(Errors.from(failure, null), false);
    }
  }

  private void giveUp(Stream stream) {
    if (opening == stream) {
      cancel(stream);
      stream.onEnd(
          TokenBrokerException.of(
                  ErrorKind.DEADLINE_EXCEEDED, "the broker did not answer the watch in time")
              .build(),
          false);
    }
  }

  /** Takes accounts off the watch, which are to be asked for when they are needed next. */
  private void leave(Set<String> leaving) {
    accounts.removeAll(leaving);
    events.left(leaving);
  }

  private static void cancel(Stream stream) {
    if (stream != null) {
      stream.cancel.run();
    }
  }

  private void refused(Stream stream, TokenBrokerException error) {
    log.warning(
        "the broker refuses a stream of {0} accounts: {1}",
        stream.accounts.size(), error.getMessage());
    // It does not say because of which.
    leave(stream.accounts);
    cancel(current);
    current = null;
    if (!accounts.isEmpty()) {
      planAddition();
    }
  }

  private long pauseAfter(Stream stream, TokenBrokerException error) {
    long wanted =
        error == null ? 0 : error.retryAfter().map(java.time.Duration::toNanos).orElse(0L);
    wanted = Math.min(wanted, LONGEST_PAUSE);
    if (stream.hasDelivered && loop.now() - stream.openedAt >= BRIEF) {
      failures = 0;
      return wanted;
    }
    failures++;
    return Math.max(Decisions.reopeningPause(failures, loop.random()), wanted);
  }

  /** One stream. gRPC calls it on threads of its own. */
  private final class Stream implements Transport.StreamEvents {
    private final Set<String> accounts;
    private final long openedAt = loop.now();
    private boolean hasDelivered;
    private Runnable cancel = () -> {};

    Stream(Set<String> accounts) {
      this.accounts = accounts;
    }

    @Override
    public void opened() {
      loop.execute(this::accepted);
    }

    @Override
    public void message(WatchTokensResponse message) {
      loop.execute(() -> received(message));
    }

    @Override
    public void ended(TokenBrokerException error, boolean bearerChanged) {
      loop.execute(() -> onEnd(error, bearerChanged));
    }

    private void accepted() {
      if (opening == this) {
        Watch.cancel(current);
        current = this;
        opening = null;
      }
    }

    private void received(WatchTokensResponse message) {
      accepted();
      if (current != this) {
        return;
      }
      hasDelivered = true;
      String account = message.getAccount();
      switch (message.getEventCase()) {
        case TOKEN -> events.token(account, message.getToken());
        case ENDED -> {
          log.warning(
              "account {0}: no longer available ({1})", account, message.getEnded().getReason());
          Watch.this.accounts.remove(account);
          events.ended(account);
        }
        case EVENT_NOT_SET -> {}
      }
    }

    private void onEnd(TokenBrokerException error, boolean bearerChanged) {
      if (current == this) {
        current = null;
      } else if (opening == this) {
        opening = null;
      } else {
        return;
      }
      log.debug("a stream ended: {0}", error == null ? "OK" : error.getMessage());
      long now = loop.now();
      switch (error == null ? ErrorKind.INTERNAL : error.kind()) {
        case UNAUTHENTICATED -> {
          if (bearerChanged) {
            planOpening(now, () -> {});
          } else {
            log.warning("the broker refuses the caller: {0}", error.getMessage());
            events.unauthenticated();
            planOpening(now + UNAUTHENTICATED_PAUSE, () -> {});
          }
        }
        case NOT_GRANTED,
            NO_SUCH_ACCOUNT,
            INVALID_ARGUMENT,
            ACCOUNT_DISABLED,
            CREDENTIAL_REJECTED,
            EGRESS_REJECTED ->
            refused(this, error);
        default -> planOpening(now + pauseAfter(this, error), () -> {});
      }
    }
  }
}
