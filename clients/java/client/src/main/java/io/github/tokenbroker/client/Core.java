package io.github.tokenbroker.client;

import io.github.tokenbroker.client.Decisions.Knowledge;
import io.github.tokenbroker.client.Report.Outcome;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executor;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.function.Supplier;
import token_broker.v1.GetTokenResponse;
import token_broker.v1.ReportRejectedTokenResponse;

/**
 * What a client knows and does. Its public face is {@link TokenClient}, which nothing in here
 * refers to, so that a client that the program has dropped can be collected.
 *
 * <p>Everything but the knowledge of an account is used on the loop only.
 */
final class Core {
  /** How often the files for TLS are looked at. */
  private static final long LOOK = TimeUnit.SECONDS.toNanos(1);

  /** How long is waited at least before a report that came too soon is repeated. */
  private static final long SHORTEST_REPORT_PAUSE = TimeUnit.MILLISECONDS.toNanos(100);

  private final Loop loop;
  private final Transport transport;
  private final Log log;
  private final Watch watch;
  private final Map<String, Account> accounts = new ConcurrentHashMap<>();
  private final Set<Waiter<?>> waiters = new HashSet<>();
  private boolean started;
  private volatile boolean closed;

  Core(Loop loop, Transport transport, Log log) {
    this.loop = loop;
    this.transport = transport;
    this.log = log;
    this.watch = new Watch(loop, transport, new Pushes(), log);
  }

  /** What the client knows of an account, and what it does for it at present. */
  private static final class Account {
    final String name;
    volatile Knowledge known = Knowledge.NOTHING;
    volatile long lastUsed;
    int failedRenewals;

    /** The asks in flight, by the generation that their answer must exceed. */
    final Map<Long, Ask> asks = new HashMap<>();

    /**
     * The reports of refused tokens, by generation, as long as somebody waits for what they bring.
     */
    final Map<Long, SharedReport> reports = new HashMap<>();

    Account(String name) {
      this.name = name;
    }
  }

  /** The report of one refused token, for all who had it. */
  private static final class SharedReport {
    CompletableFuture<Report> answer;
    int users;
  }

  /**
   * Returns a token within {@code timeout} nanoseconds.
   *
   * @param completer runs what the program does with the result, which must not hold up the loop
   */
  CompletableFuture<Token> token(String name, long timeout, Executor completer) {
    if (closed) {
      return CompletableFuture.failedFuture(Errors.closed(name));
    }
    Account account = account(name);
    long now = loop.now();
    account.lastUsed = now;
    Knowledge known = account.known;
    return switch (Decisions.decide(known, now)) {
      case USE -> CompletableFuture.completedFuture(known.kept().token());
      case REFUSE -> CompletableFuture.failedFuture(known.refusal());
      default -> waiting(name, timeout, completer, (Waiter<Token> waiter) -> provide(name, waiter));
    };
  }

  /** Reports a refused token. */
  CompletableFuture<Report> report(
      String name, long generation, String code, long timeout, Executor completer) {
    return waiting(
        name,
        timeout,
        completer,
        waiter -> waiter.follow(shareReport(account(name), generation, code, waiter).answer));
  }

  /** Reports a refused token, and returns a newer one, or null if the API's answer is final. */
  CompletableFuture<Token> replace(
      String name, long generation, String code, long timeout, Executor completer) {
    return waiting(
        name,
        timeout,
        completer,
        waiter -> {
          // The API's answer is final then.
          waiter.setAtDeadline(error -> notReplaced(waiter, error));
          Account account = account(name);
          Token newer = newerThan(account, generation);
          if (newer != null) {
            waiter.complete(newer);
          } else {
            SharedReport report = shareReport(account, generation, code, waiter);
            succeed(account, generation, code, report, waiter);
          }
        });
  }

  /** Ends everything. Can be called on any thread, and more than once. */
  void close() {
    if (closed) {
      return;
    }
    closed = true;
    loop.execute(
        () -> {
          watch.close();
          transport.close();
          List.copyOf(waiters).forEach(waiter -> waiter.fail(Errors.closed(waiter.account())));
          loop.close();
        });
  }

  private interface Start<T> {
    void run(Waiter<T> waiter);
  }

  /** Starts something on the loop that somebody waits for. */
  private <T> CompletableFuture<T> waiting(
      String account, long timeout, Executor completer, Start<T> start) {
    CompletableFuture<T> result = new CompletableFuture<>();
    long deadline = loop.now() + timeout;
    loop.execute(
        () -> {
          if (closed) {
            result.completeExceptionally(Errors.closed(account));
            return;
          }
          startLooking();
          Waiter<T> waiter = new Waiter<>(loop, account, deadline);
          waiters.add(waiter);
          waiter.onDone(() -> waiters.remove(waiter));
          waiter.future().whenComplete((value, error) -> pass(value, error, result, completer));
          // The program may have cancelled the result, or completed it in another way.
          result.whenComplete((value, error) -> waiter.future().cancel(false));
          if (waiter.isDone()) {
            return;
          }
          try {
            start.run(waiter);
          } catch (RuntimeException failure) {
            waiter.fail(Errors.from(failure, account));
          }
        });
    if (closed) {
      // The loop may have ended before it took the action.
      result.completeExceptionally(Errors.closed(account));
    }
    return result;
  }

  /** Gives a result to the program, on a thread that the program may hold up. */
  private static <T> void pass(
      T value, Throwable error, CompletableFuture<T> result, Executor completer) {
    Runnable action =
        () -> {
          if (error == null) {
            result.complete(value);
          } else {
            result.completeExceptionally(error);
          }
        };
    try {
      completer.execute(action);
    } catch (RejectedExecutionException | OutOfMemoryError noThread) {
      // Better here than never.
      action.run();
    }
  }

  private Account account(String name) {
    return accounts.computeIfAbsent(name, Account::new);
  }

  private void startLooking() {
    if (!started) {
      started = true;
      loop.schedule(LOOK, this::look);
    }
  }

  private void look() {
    loop.schedule(LOOK, this::look);
    // Names that users type must not fill the memory.
    accounts.values().removeIf(this::isIdle);
    if (transport.refresh()) {
      watch.reopen();
    }
  }

  /** Returns whether there is nothing to know of an account. */
  private boolean isIdle(Account account) {
    Knowledge known = account.known;
    long now = loop.now();
    return !Decisions.isUsable(known.kept(), now)
        && (known.refusal() == null || known.refusedUntil() <= now)
        && account.asks.isEmpty()
        && account.reports.isEmpty()
        && !watch.has(account.name);
  }

  int knownAccounts() {
    return accounts.size();
  }

  private void provide(String name, Waiter<Token> waiter) {
    if (waiter.isDone()) {
      return;
    }
    // The loop may have forgotten the account since the call was made.
    Account account = account(name);
    account.lastUsed = loop.now();
    Knowledge known = account.known;
    switch (Decisions.decide(known, loop.now())) {
      case USE -> waiter.complete(known.kept().token());
      case REFUSE -> waiter.fail(known.refusal());
      case ASK -> ask(account, 0, waiter.deadline()).add(waiter);
      case RENEW -> renew(account, waiter);
    }
  }

  /**
   * Asks although the kept token still lives, which the caller gets if that fails or takes long.
   */
  private void renew(Account account, Waiter<Token> waiter) {
    Ask ask = ask(account, 0, waiter.deadline());
    long deadline = Math.min(waiter.deadline(), loop.now() + Decisions.RENEWAL_WAIT);
    Waiter<Token> renewal = new Waiter<>(loop, account.name, deadline);
    renewal
        .future()
        .whenComplete(
            (token, thrown) -> {
              if (thrown == null) {
                waiter.complete(token);
                return;
              }
              if (waiter.isDone()) {
                return;
              }
              TokenBrokerException error = Errors.from(thrown, account.name);
              if (!error.kind().isTemporary()) {
                waiter.fail(error);
                return;
              }
              countFailedRenewal(account, ask);
              long now = loop.now();
              if (Decisions.isUsable(account.known.kept(), now)) {
                waiter.complete(account.known.kept().token());
              } else if (now >= waiter.deadline()) {
                waiter.fail(error);
              } else {
                loop.execute(() -> provide(account.name, waiter));
              }
            });
    waiter.onDone(() -> renewal.future().cancel(false));
    // A caller with little time has its own deadline before the renewal has.
    waiter.setAtDeadline(
        error -> {
          if (Decisions.isUsable(account.known.kept(), loop.now())) {
            waiter.complete(account.known.kept().token());
          } else {
            waiter.fail(error);
          }
        });
    ask.add(renewal);
  }

  private void countFailedRenewal(Account account, Ask ask) {
    if (ask.countAsFailed()) {
      account.failedRenewals++;
      long pause = Decisions.renewalPause(account.failedRenewals, loop.random());
      account.known = account.known.pausedUntil(loop.now() + pause);
    }
  }

  /** Returns the ask in flight for a token of a later generation, or starts one. */
  private Ask ask(Account account, long newerThan, long deadline) {
    Ask present = account.asks.get(newerThan);
    if (present != null) {
      return present;
    }
    Ask ask =
        new Ask(
            loop,
            account.name,
            timeout -> attempt(account, newerThan, timeout),
            error -> {
              boolean canUseKept =
                  newerThan == 0 && Decisions.isUsable(account.known.kept(), loop.now());
              return !error.kind().isTemporary() || canUseKept;
            },
            () -> account.asks.remove(newerThan));
    account.asks.put(newerThan, ask);
    ask.run(deadline);
    return ask;
  }

  private CompletableFuture<Token> attempt(Account account, long newerThan, long timeout) {
    long sent = loop.now();
    CompletableFuture<Token> result = new CompletableFuture<>();
    call(account, () -> transport.getToken(account.name, newerThan, timeout))
        .whenComplete(
            (answer, thrown) ->
                loop.execute(
                    () -> {
                      try {
                        if (thrown != null) {
                          throw Errors.from(thrown, account.name);
                        }
                        result.complete(answered(account, newerThan, answer, sent));
                      } catch (RuntimeException failure) {
                        TokenBrokerException error = Errors.from(failure, account.name);
                        try {
                          refused(account, error);
                        } finally {
                          // Whatever fails in here, those who wait are told.
                          result.completeExceptionally(error);
                        }
                      }
                    }));
    return result;
  }

  /** Makes a call whose future fails also if it cannot be made. */
  private static <T> CompletableFuture<T> call(
      Account account, Supplier<CompletableFuture<T>> call) {
    try {
      return call.get();
    } catch (RuntimeException failure) {
      return CompletableFuture.failedFuture(Errors.from(failure, account.name));
    }
  }

  private Token answered(Account account, long newerThan, GetTokenResponse answer, long sent) {
    Kept kept = keep(account, Kept.from(account.name, answer, sent, loop::now));
    watch.add(account.name);
    if (newerThan != 0 && !kept.token().isNewerThan(newerThan)) {
      throw TokenBrokerException.of(ErrorKind.INTERNAL, "the answer has no newer token")
          .account(account.name)
          .build();
    }
    if (!Decisions.isUsable(kept, loop.now())) {
      throw TokenBrokerException.of(
              ErrorKind.UNAVAILABLE, "the broker's token has ended, or is about to")
          .account(account.name)
          .build();
    }
    return kept.token();
  }

  private void refused(Account account, TokenBrokerException error) {
    if (!error.kind().isTemporary()) {
      account.known = Knowledge.refused(error, loop.now() + Decisions.REFUSAL);
      log.warning("{0}", error.getMessage());
    }
  }

  /** Keeps a token if it is newer than the kept one. Returns the one that is kept then. */
  private Kept keep(Account account, Kept next) {
    Kept kept = account.known.kept();
    if (!Decisions.replaces(next, kept, loop.now())) {
      return kept;
    }
    account.known = Knowledge.of(next);
    account.failedRenewals = 0;
    if (kept == null || next.token().generation() != kept.token().generation()) {
      log.debug("kept: {0}", next.token());
    }
    Map.copyOf(account.asks)
        .forEach(
            (newerThan, ask) -> {
              Token token = newerThan(account, newerThan);
              if (token != null) {
                ask.settle(token);
              }
            });
    return next;
  }

  /** Returns the kept token if it may be used and has a later generation, or null. */
  private Token newerThan(Account account, long generation) {
    Kept kept = account.known.kept();
    return Decisions.isUsable(kept, loop.now()) && kept.token().isNewerThan(generation)
        ? kept.token()
        : null;
  }

  /**
   * Reports a token once for all who call this for its generation before the last of them is done.
   */
  private SharedReport shareReport(
      Account account, long generation, String code, Waiter<?> waiter) {
    SharedReport report = account.reports.get(generation);
    if (report == null) {
      report = new SharedReport();
      report.answer = sendReport(account, generation, code, waiter);
      account.reports.put(generation, report);
    }
    SharedReport shared = report;
    shared.users++;
    waiter.onDone(
        () -> {
          shared.users--;
          if (shared.users == 0) {
            account.reports.remove(generation);
          }
        });
    return shared;
  }

  private CompletableFuture<Report> sendReport(
      Account account, long generation, String code, Waiter<?> waiter) {
    return call(
            account,
            () -> transport.report(account.name, generation, code, waiter.deadline() - loop.now()))
        .thenApply(answer -> reportOf(account.name, answer));
  }

  /** Completes a waiter with what a report brings. */
  private void succeed(
      Account account, long generation, String code, SharedReport report, Waiter<Token> waiter) {
    CompletableFuture<Report> answer = report.answer;
    answer.whenComplete(
        (value, thrown) ->
            loop.execute(
                () -> {
                  if (waiter.isDone()) {
                    return;
                  }
                  Token newer = newerThan(account, generation);
                  if (thrown != null) {
                    notReplaced(waiter, Errors.from(thrown, account.name));
                  } else if (value.outcome() == Outcome.NOT_A_TOKEN_FAULT) {
                    waiter.complete(null);
                  } else if (newer != null) {
                    waiter.complete(newer);
                  } else if (value.outcome() != Outcome.TOO_SOON) {
                    askForSuccessor(account, generation, waiter);
                  } else {
                    long pause = Math.max(value.retryAfter().toNanos(), SHORTEST_REPORT_PAUSE);
                    if (loop.now() + pause >= waiter.deadline()) {
                      waiter.complete(null);
                      return;
                    }
                    loop.schedule(
                        pause,
                        () -> {
                          // The broker forgets a report that came too soon. The first who has
                          // waited reports again for all.
                          if (report.answer == answer && !waiter.isDone()) {
                            report.answer = sendReport(account, generation, code, waiter);
                          }
                          succeed(account, generation, code, report, waiter);
                        });
                  }
                }));
  }

  private void askForSuccessor(Account account, long generation, Waiter<Token> waiter) {
    Waiter<Token> asking = new Waiter<>(loop, account.name, waiter.deadline());
    asking
        .future()
        .whenComplete(
            (token, thrown) -> {
              if (thrown == null) {
                waiter.complete(token);
              } else {
                notReplaced(waiter, Errors.from(thrown, account.name));
              }
            });
    waiter.onDone(() -> asking.future().cancel(false));
    ask(account, generation, waiter.deadline()).add(asking);
  }

  private void notReplaced(Waiter<Token> waiter, TokenBrokerException error) {
    if (!waiter.isDone()) {
      waiter.complete(null);
      log.warning("a refused token was not replaced: {0}", error.getMessage());
    }
  }

  private static Report reportOf(String account, ReportRejectedTokenResponse answer) {
    Outcome outcome =
        switch (answer.getOutcome()) {
          case OUTCOME_REISSUING -> Outcome.REISSUING;
          case OUTCOME_ALREADY_REPLACED -> Outcome.ALREADY_REPLACED;
          case OUTCOME_TOO_SOON -> Outcome.TOO_SOON;
          case OUTCOME_NOT_A_TOKEN_FAULT -> Outcome.NOT_A_TOKEN_FAULT;
          case OUTCOME_UNSPECIFIED, UNRECOGNIZED ->
              throw TokenBrokerException.of(
                      ErrorKind.INTERNAL, "the answer to the report has an unknown outcome")
                  .account(account)
                  .build();
        };
    return new Report(outcome, java.time.Duration.ofNanos(Kept.nanos(answer.getRetryAfter())));
  }

  /** What the stream brings. */
  private final class Pushes implements Watch.Events {
    @Override
    public void token(String name, GetTokenResponse answer) {
      try {
        keep(account(name), Kept.from(name, answer, loop.now(), loop::now));
      } catch (TokenBrokerException unusable) {
        log.warning("{0}", unusable.getMessage());
      }
    }

    @Override
    public void ended(String name) {
      account(name).known = Knowledge.NOTHING;
    }

    @Override
    public void left(Set<String> names) {
      long now = loop.now();
      for (String name : names) {
        Account account = account(name);
        Kept kept = account.known.kept();
        if (kept != null) {
          account.known = Knowledge.of(kept.withReuseEnd(Math.min(now, kept.reuseEnd())));
        }
      }
    }

    @Override
    public void unauthenticated() {
      accounts.values().forEach(account -> account.known = Knowledge.NOTHING);
    }

    @Override
    public long lastUsed(String name) {
      return account(name).lastUsed;
    }
  }
}
