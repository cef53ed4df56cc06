package io.github.tokenbroker.client;

import static io.github.tokenbroker.client.FakeBroker.error;
import static io.github.tokenbroker.client.FakeBroker.outcome;
import static io.github.tokenbroker.client.FakeBroker.token;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.time.Duration;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.stream.Stream;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator.ReplaceUnderscores;
import org.junit.jupiter.api.Test;
import token_broker.v1.ReportRejectedTokenResponse.Outcome;

@DisplayNameGeneration(ReplaceUnderscores.class)
class CoreTest {
  private static final long DEFAULT_TIMEOUT = 5000;

  private final FakeLoop loop = new FakeLoop();
  private final FakeBroker broker = new FakeBroker();
  private final TestLogger logger = new TestLogger();
  private final Core core = new Core(loop, broker, new Log(logger, Runnable::run));

  private CompletableFuture<Token> ask() {
    return ask(DEFAULT_TIMEOUT);
  }

  private CompletableFuture<Token> ask(long timeoutMs) {
    CompletableFuture<Token> result =
        core.token("acme", TimeUnit.MILLISECONDS.toNanos(timeoutMs), Runnable::run);
    loop.settle();
    return result;
  }

  private CompletableFuture<Token> replace(Token refused) {
    CompletableFuture<Token> result =
        core.replace(
            "acme", refused.generation(), "61003", TimeUnit.SECONDS.toNanos(5), Runnable::run);
    loop.settle();
    return result;
  }

  /** Gives the client its first token, which is kept for 40 s and ends after 60 s. */
  private Token firstToken() {
    CompletableFuture<Token> call = ask();
    broker.ask().answer().complete(token(1));
    return result(call);
  }

  private <T> T result(CompletableFuture<T> call) {
    loop.settle();
    try {
      return call.get(20, TimeUnit.SECONDS);
    } catch (Exception failed) {
      throw new AssertionError(failed);
    }
  }

  private ErrorKind errorOf(CompletableFuture<?> call) {
    return failureOf(call).kind();
  }

  private TokenBrokerException failureOf(CompletableFuture<?> call) {
    loop.settle();
    ExecutionException failed =
        assertThrows(ExecutionException.class, () -> call.get(20, TimeUnit.SECONDS));
    return Errors.from(failed, null);
  }

  @Test
  void a_token_is_used_without_a_call_until_its_reuse_end() {
    Token first = firstToken();
    loop.advance(39_999);
    assertSame(first, result(ask()));
    assertEquals(1, broker.asks.size());
  }

  @Test
  void a_token_that_lives_for_millennia_is_used() {
    CompletableFuture<Token> call = ask();
    com.google.protobuf.Duration millennia =
        com.google.protobuf.Duration.newBuilder().setSeconds(315_576_000_000L).build();
    broker
        .ask()
        .answer()
        .complete(token(1).toBuilder().setReuseFor(millennia).setExpiresIn(millennia).build());
    assertEquals(1, result(call).generation());
  }

  @Test
  void a_call_that_fails_in_an_unexpected_way_is_an_internal_error() {
    CompletableFuture<Token> call = ask(1000);
    broker.ask().answer().complete(null);
    loop.advance(1000);
    assertEquals(ErrorKind.INTERNAL, errorOf(call));
  }

  @Test
  void a_pause_of_zero_that_the_broker_asks_for_does_not_make_a_loop_without_pauses() {
    CompletableFuture<Token> call = ask();
    broker
        .ask()
        .answer()
        .completeExceptionally(error(ErrorKind.UNAVAILABLE).retryAfter(Duration.ZERO).build());
    loop.advance(99);
    assertEquals(1, broker.asks.size());
    loop.advance(1);
    broker.ask().answer().complete(token(1));
    result(call);
  }

  @Test
  void an_answer_that_is_not_newer_than_the_refused_token_does_not_replace_it() {
    CompletableFuture<Token> call = replace(firstToken());
    broker.report().answer().complete(outcome(Outcome.OUTCOME_REISSUING, 0));
    loop.settle();
    broker.ask().answer().complete(token(1));
    loop.advance(5000);
    assertNull(result(call));
  }

  @Test
  void an_account_of_which_there_is_nothing_to_know_is_forgotten() {
    CompletableFuture<Token> call = ask();
    broker.ask().fail(ErrorKind.NO_SUCH_ACCOUNT);
    assertEquals(ErrorKind.NO_SUCH_ACCOUNT, errorOf(call));
    assertEquals(1, core.knownAccounts());
    loop.advance(2000);
    assertEquals(0, core.knownAccounts());
  }

  @Test
  void a_stream_that_ends_soon_after_it_was_opened_is_not_opened_again_at_once() {
    firstToken();
    loop.advance(100);
    broker.stream().push("acme", token(1));
    broker.stream().events.ended(null, false);
    loop.advance(99);
    assertEquals(1, broker.streams.size());
    loop.advance(1);
    assertEquals(2, broker.streams.size());
  }

  @Test
  void a_stream_has_a_thousand_accounts_and_an_end_makes_room_for_another_one() {
    for (int number = 0; number <= 1000; number++) {
      firstToken("acme-" + number);
    }
    loop.advance(100);
    assertEquals(1000, broker.stream().accounts.size());
    assertFalse(broker.stream().accounts.contains("acme-1000"));
    int asks = broker.asks.size();
    result(core.token("acme-1000", TimeUnit.SECONDS.toNanos(5), Runnable::run));
    assertEquals(asks, broker.asks.size(), "it is kept all the same");
    broker.stream().push("acme-0", token(1));
    broker.stream().end("acme-0");
    firstToken("other");
    loop.advance(5000);
    assertEquals(1000, broker.stream().accounts.size());
    assertTrue(broker.stream().accounts.contains("other"));
  }

  private void firstToken(String account) {
    CompletableFuture<Token> call = core.token(account, TimeUnit.SECONDS.toNanos(5), Runnable::run);
    loop.settle();
    broker.ask().answer().complete(token(1));
    result(call);
  }

  @Test
  void a_hundred_callers_cause_one_ask() {
    List<CompletableFuture<Token>> calls = Stream.generate(this::ask).limit(100).toList();
    assertEquals(1, broker.asks.size());
    broker.ask().answer().complete(token(1));
    assertEquals(1, calls.stream().map(this::result).distinct().count());
  }

  @Test
  void a_caller_that_gives_up_does_not_disturb_the_others() {
    CompletableFuture<Token> first = ask();
    CompletableFuture<Token> second = ask();
    first.cancel(true);
    broker.ask().answer().complete(token(1));
    assertEquals(1, result(second).generation());
  }

  @Test
  void a_caller_with_a_longer_timeout_causes_another_ask_after_the_first_has_timed_out() {
    CompletableFuture<Token> brief = ask(1000);
    CompletableFuture<Token> patient = ask(9000);
    assertEquals(1000, broker.ask().timeoutMs());
    loop.advance(1000);
    assertEquals(ErrorKind.DEADLINE_EXCEEDED, errorOf(brief));
    broker.ask().fail(ErrorKind.DEADLINE_EXCEEDED);
    loop.advance(100);
    assertEquals(2, broker.asks.size());
    assertEquals(7900, broker.ask().timeoutMs());
    broker.ask().answer().complete(token(1));
    result(patient);
  }

  @Test
  void an_ask_that_fails_for_the_time_being_is_repeated_with_growing_pauses() {
    CompletableFuture<Token> call = ask();
    for (int pause : new int[] {100, 200, 400, 800, 1000}) {
      int count = broker.asks.size();
      broker.ask().fail(ErrorKind.UNAVAILABLE);
      loop.advance(pause - 1);
      assertEquals(count, broker.asks.size());
      loop.advance(1);
      assertEquals(count + 1, broker.asks.size());
    }
    broker.ask().answer().complete(token(1));
    result(call);
  }

  @Test
  void the_last_error_is_told_at_the_timeout() {
    CompletableFuture<Token> call = ask(1000);
    broker.ask().fail(ErrorKind.OVERLOADED);
    loop.advance(1000);
    assertEquals(ErrorKind.OVERLOADED, errorOf(call));
  }

  @Test
  void an_error_is_told_at_once_if_the_pause_is_longer_than_the_time_that_is_left() {
    CompletableFuture<Token> call = ask();
    broker
        .ask()
        .answer()
        .completeExceptionally(
            error(ErrorKind.UNAVAILABLE).retryAfter(Duration.ofMillis(5001)).build());
    assertEquals(ErrorKind.UNAVAILABLE, errorOf(call));
  }

  @Test
  void an_error_is_told_at_once_if_the_broker_wants_no_other_call() {
    CompletableFuture<Token> call = ask();
    broker
        .ask()
        .answer()
        .completeExceptionally(error(ErrorKind.UNAVAILABLE).pushedBack(true).build());
    assertEquals(ErrorKind.UNAVAILABLE, errorOf(call));
  }

  @Test
  void after_its_reuse_end_a_token_is_used_while_the_broker_is_away() {
    Token first = firstToken();
    loop.advance(40_000);
    CompletableFuture<Token> call = ask();
    broker.ask().fail(ErrorKind.UNAVAILABLE);
    assertSame(first, result(call));

    // During the pause nothing is asked.
    loop.advance(999);
    assertSame(first, result(ask()));
    assertEquals(2, broker.asks.size());

    // The next pause is twice as long.
    loop.advance(1);
    CompletableFuture<Token> next = ask();
    assertEquals(3, broker.asks.size());
    broker.ask().fail(ErrorKind.UNAVAILABLE);
    assertSame(first, result(next));
    loop.advance(1999);
    assertSame(first, result(ask()));
    assertEquals(3, broker.asks.size());
  }

  @Test
  void a_caller_with_little_time_gets_the_kept_token_at_its_end() {
    Token first = firstToken();
    loop.advance(40_000);
    CompletableFuture<Token> call = ask(500);
    loop.advance(500);
    assertSame(first, result(call));
  }

  @Test
  void a_slow_broker_delays_a_caller_by_two_seconds_at_most_while_a_token_lives() {
    Token first = firstToken();
    loop.advance(40_000);
    CompletableFuture<Token> call = ask(10_000);
    loop.advance(1999);
    assertFalse(call.isDone());
    loop.advance(1);
    assertSame(first, result(call));
    // Later callers are not delayed, although the ask is still in flight.
    assertSame(first, result(ask()));
    broker.ask().answer().complete(token(2));
    loop.settle();
    assertEquals(2, result(ask()).generation());
  }

  @Test
  void a_token_counts_as_ended_one_second_before_its_end() {
    firstToken();
    loop.advance(59_000);
    CompletableFuture<Token> call = ask(500);
    broker.ask().fail(ErrorKind.UNAVAILABLE);
    loop.advance(500);
    assertEquals(ErrorKind.UNAVAILABLE, errorOf(call));
  }

  @Test
  void a_token_that_is_about_to_end_when_it_arrives_is_not_used() {
    CompletableFuture<Token> call = ask();
    broker.ask().answer().complete(token(1, 1, 900));
    loop.advance(100);
    broker.ask().answer().complete(token(2));
    assertEquals(2, result(call).generation());
  }

  @Test
  void the_life_of_a_token_counts_from_the_time_when_it_was_asked_for() {
    CompletableFuture<Token> call = ask();
    loop.advance(4000);
    broker.ask().answer().complete(token(1));
    assertEquals(Duration.ofSeconds(56), result(call).expiresIn());
  }

  @Test
  void an_answer_with_an_older_token_is_not_used() {
    firstToken();
    loop.advance(100);
    broker.stream().push("acme", token(3, 1000, 60_000));
    loop.advance(1000);
    CompletableFuture<Token> call = ask();
    broker.ask().answer().complete(token(2));
    assertEquals(3, result(call).generation());
  }

  @Test
  void a_refusal_makes_the_client_forget_the_token_and_is_remembered_for_a_second() {
    firstToken();
    loop.advance(40_000);
    CompletableFuture<Token> call = ask();
    broker.ask().fail(ErrorKind.NOT_GRANTED);
    assertEquals(ErrorKind.NOT_GRANTED, errorOf(call));
    loop.advance(999);
    assertEquals(ErrorKind.NOT_GRANTED, errorOf(ask()));
    assertEquals(2, broker.asks.size());
    loop.advance(1);
    ask();
    assertEquals(3, broker.asks.size());
  }

  @Test
  void an_answer_without_a_time_for_which_to_keep_the_token_is_an_error() {
    CompletableFuture<Token> call = ask(50);
    broker.ask().answer().complete(token(1, 0, 60_000));
    loop.advance(50);
    assertEquals(ErrorKind.INTERNAL, errorOf(call));
  }

  @Test
  void a_closed_client_fails_waiting_and_later_calls_with_errors_that_name_the_account() {
    CompletableFuture<Token> waiting = ask();
    core.close();
    core.close();
    for (CompletableFuture<?> call : List.of(waiting, ask(), replaceOfUnknown())) {
      TokenBrokerException error = failureOf(call);
      assertEquals(ErrorKind.CLOSED, error.kind());
      assertEquals(Optional.of("acme"), error.account());
    }
    assertTrue(broker.closed);
  }

  private CompletableFuture<Token> replaceOfUnknown() {
    return core.replace("acme", 1, "61003", TimeUnit.SECONDS.toNanos(5), Runnable::run);
  }

  @Test
  void a_handler_of_logs_that_fails_ends_neither_an_ask_nor_the_watch() {
    logger.failure = new AssertionError("as the test says");
    firstToken();
    loop.advance(100);
    broker.stream().events.ended(error(ErrorKind.UNAUTHENTICATED).build(), false);
    loop.advance(10_000);
    assertEquals(2, broker.streams.size());
    CompletableFuture<Token> call = ask();
    broker.ask().fail(ErrorKind.NOT_GRANTED);
    assertEquals(ErrorKind.NOT_GRANTED, errorOf(call));
    assertEquals(2, logger.warnings.size());
  }

  @Test
  void a_call_that_cannot_be_made_is_an_internal_error_and_the_next_one_is_made() {
    broker.broken = new IllegalStateException("as the test says");
    CompletableFuture<Token> call = ask(1000);
    loop.advance(1000);
    TokenBrokerException error = failureOf(call);
    assertEquals(ErrorKind.INTERNAL, error.kind());
    assertEquals(Optional.of("acme"), error.account());
    assertEquals(
        ErrorKind.INTERNAL,
        errorOf(core.report("acme", 1, "61003", TimeUnit.SECONDS.toNanos(5), Runnable::run)));
    broker.broken = null;
    firstToken();
    assertEquals(
        ErrorKind.INTERNAL,
        errorOf(core.report(null, 1, "61003", TimeUnit.SECONDS.toNanos(5), Runnable::run)));
  }

  @Test
  void a_stream_that_cannot_be_opened_is_opened_again_later() {
    firstToken();
    broker.broken = new IllegalStateException("as the test says");
    loop.advance(100);
    broker.broken = null;
    loop.advance(100);
    assertEquals(1, broker.streams.size());
  }

  @Test
  void a_stream_that_is_not_answered_is_given_up_after_20_s() {
    firstToken();
    loop.advance(100);
    FakeBroker.Stream silent = broker.stream();
    loop.advance(19_999);
    assertFalse(silent.cancelled);
    loop.advance(1);
    assertTrue(silent.cancelled);
    loop.advance(100);
    assertEquals(2, broker.streams.size());
    // One that is answered stays.
    broker.stream().events.opened();
    loop.advance(60_000);
    assertFalse(broker.stream().cancelled);
  }

  @Test
  void a_call_that_was_cancelled_before_it_began_asks_nobody() {
    long timeout = TimeUnit.SECONDS.toNanos(5);
    core.token("acme", timeout, Runnable::run).cancel(false);
    core.report("acme", 1, "61003", timeout, Runnable::run).cancel(false);
    loop.settle();
    assertTrue(broker.asks.isEmpty());
    assertTrue(broker.reports.isEmpty());
  }

  @Test
  void a_cancelled_caller_does_not_count_as_a_failure_of_the_broker() {
    firstToken();
    loop.advance(40_000);
    ask().cancel(false);
    loop.settle();
    CompletableFuture<Token> other = ask();
    assertFalse(other.isDone());
    broker.ask().answer().complete(token(2));
    assertEquals(2, result(other).generation());
  }

  @Test
  void a_cancelled_caller_causes_no_further_ask_when_the_kept_token_ends() {
    firstToken();
    loop.advance(58_500);
    ask(10_000).cancel(false);
    loop.advance(1000);
    broker.ask().fail(ErrorKind.UNAVAILABLE);
    loop.advance(5000);
    assertEquals(2, broker.asks.size());
  }

  @Test
  void a_cancelled_replacement_causes_no_further_report() {
    CompletableFuture<Token> call = replace(firstToken());
    broker.report().answer().complete(outcome(Outcome.OUTCOME_TOO_SOON, 1000));
    loop.settle();
    call.cancel(false);
    loop.advance(5000);
    assertEquals(1, broker.reports.size());
  }

  @Test
  void a_result_that_the_program_has_completed_itself_causes_no_further_ask() {
    CompletableFuture<Token> call = ask();
    call.completeExceptionally(new java.util.concurrent.TimeoutException());
    loop.settle();
    broker.ask().fail(ErrorKind.UNAVAILABLE);
    loop.advance(5000);
    assertEquals(1, broker.asks.size());
  }

  @Test
  void a_result_is_told_although_no_thread_can_be_had_for_it() {
    CompletableFuture<Token> call =
        core.token(
            "acme",
            TimeUnit.SECONDS.toNanos(5),
            action -> {
              throw new RejectedExecutionException("as the test says");
            });
    loop.settle();
    broker.ask().answer().complete(token(1));
    assertEquals(1, result(call).generation());
  }

  @Test
  void accounts_are_watched_after_their_first_token() {
    firstToken();
    loop.advance(99);
    assertTrue(broker.streams.isEmpty());
    loop.advance(1);
    assertEquals(List.of("acme"), List.copyOf(broker.stream().accounts));
    broker.stream().push("acme", token(2));
    loop.settle();
    assertEquals(2, result(ask()).generation());
    assertEquals(1, broker.asks.size());
  }

  @Test
  void the_end_of_an_account_makes_the_client_forget_its_token() {
    firstToken();
    loop.advance(100);
    broker.stream().end("acme");
    loop.settle();
    CompletableFuture<Token> call = ask();
    broker.ask().fail(ErrorKind.NO_SUCH_ACCOUNT);
    assertEquals(ErrorKind.NO_SUCH_ACCOUNT, errorOf(call));
  }

  @Test
  void a_stream_that_had_delivered_something_is_opened_again_at_once() {
    firstToken();
    loop.advance(100);
    broker.stream().push("acme", token(1));
    loop.advance(1000);
    broker.stream().events.ended(error(ErrorKind.UNAVAILABLE).build(), false);
    loop.advance(0);
    assertEquals(2, broker.streams.size());
    assertEquals(1, result(ask()).generation());
  }

  @Test
  void a_stream_that_had_delivered_nothing_is_opened_again_after_growing_pauses() {
    firstToken();
    loop.advance(100);
    for (int pause : new int[] {100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000}) {
      int count = broker.streams.size();
      broker.stream().events.ended(error(ErrorKind.UNAVAILABLE).build(), false);
      loop.advance(pause - 1);
      assertEquals(count, broker.streams.size());
      loop.advance(1);
      assertEquals(count + 1, broker.streams.size());
    }
  }

  @Test
  void a_refused_bearer_that_was_replaced_is_used_at_once() {
    firstToken();
    loop.advance(100);
    broker.stream().events.ended(error(ErrorKind.UNAUTHENTICATED).build(), true);
    loop.advance(0);
    assertEquals(2, broker.streams.size());
    assertEquals(1, result(ask()).generation());
  }

  @Test
  void a_refused_bearer_makes_the_client_forget_all_tokens_and_try_again_after_10_s() {
    firstToken();
    loop.advance(100);
    broker.stream().events.ended(error(ErrorKind.UNAUTHENTICATED).build(), false);
    loop.settle();
    CompletableFuture<Token> call = ask();
    broker.ask().fail(ErrorKind.UNAUTHENTICATED);
    assertEquals(ErrorKind.UNAUTHENTICATED, errorOf(call));
    loop.advance(9999);
    assertEquals(1, broker.streams.size());
    loop.advance(1);
    assertEquals(2, broker.streams.size());
  }

  @Test
  void a_refused_stream_makes_the_client_ask_for_each_of_its_accounts() {
    firstToken();
    loop.advance(100);
    broker.stream().events.ended(error(ErrorKind.NOT_GRANTED).build(), false);
    loop.advance(20_000);
    assertEquals(1, broker.streams.size());
    CompletableFuture<Token> call = ask();
    broker.ask().answer().complete(token(2));
    result(call);
    loop.advance(100);
    assertEquals(2, broker.streams.size());
  }

  @Test
  void a_stream_for_additions_takes_the_place_of_the_old_one_when_the_broker_has_accepted_it() {
    firstToken();
    loop.advance(100);
    FakeBroker.Stream old = broker.stream();
    old.events.opened();
    core.token("other", TimeUnit.SECONDS.toNanos(5), Runnable::run);
    loop.settle();
    broker.ask().answer().complete(token(1));
    loop.advance(4999);
    assertEquals(1, broker.streams.size());
    loop.advance(1);
    assertEquals(2, broker.stream().accounts.size());
    assertFalse(old.cancelled);
    broker.stream().events.opened();
    loop.settle();
    assertTrue(old.cancelled);
  }

  @Test
  void an_account_that_nobody_has_used_for_an_hour_is_watched_no_longer() {
    firstToken();
    loop.advance(100);
    broker.stream().events.opened();
    loop.advance(3_600_001);
    core.token("other", TimeUnit.SECONDS.toNanos(5), Runnable::run);
    loop.settle();
    broker.ask().answer().complete(token(1));
    loop.advance(100);
    assertEquals(List.of("other"), List.copyOf(broker.stream().accounts));
  }

  @Test
  void an_account_that_has_left_the_watch_is_asked_for_when_it_is_used_again() {
    CompletableFuture<Token> call = ask();
    broker.ask().answer().complete(token(1, 36_000_000, 36_000_000));
    Token first = result(call);
    loop.advance(100);
    broker.stream().events.opened();
    loop.advance(3_600_001);
    // The next stream is opened without the account.
    broker.stream().events.ended(null, false);
    loop.advance(100);
    CompletableFuture<Token> later = ask();
    assertEquals(2, broker.asks.size());
    broker.ask().fail(ErrorKind.UNAVAILABLE);
    assertSame(first, result(later), "it is kept all the same");
  }

  @Test
  void a_refused_stream_ends_the_pause_in_which_nothing_is_asked() {
    firstToken();
    loop.advance(40_000);
    CompletableFuture<Token> call = ask();
    broker.ask().fail(ErrorKind.UNAVAILABLE);
    result(call);
    broker.stream().events.ended(error(ErrorKind.NOT_GRANTED).build(), false);
    loop.settle();
    ask();
    assertEquals(3, broker.asks.size());
  }

  @Test
  void a_refused_token_is_reported_once_for_all_who_had_it_and_replaced() {
    Token first = firstToken();
    List<CompletableFuture<Token>> calls = Stream.generate(() -> replace(first)).limit(10).toList();
    assertEquals(1, broker.reports.size());
    broker.report().answer().complete(outcome(Outcome.OUTCOME_REISSUING, 0));
    loop.settle();
    assertEquals(2, broker.asks.size());
    assertEquals(1, broker.ask().generation());
    broker.ask().answer().complete(token(2));
    calls.forEach(call -> assertEquals(2, result(call).generation()));
  }

  @Test
  void a_refused_token_that_was_replaced_already_is_not_reported() {
    Token first = firstToken();
    loop.advance(100);
    broker.stream().push("acme", token(2));
    loop.settle();
    assertEquals(2, result(replace(first)).generation());
    assertTrue(broker.reports.isEmpty());
  }

  @Test
  void a_report_that_comes_too_soon_is_repeated_after_the_pause() {
    Token first = firstToken();
    CompletableFuture<Token> call = replace(first);
    broker.report().answer().complete(outcome(Outcome.OUTCOME_TOO_SOON, 3000));
    loop.advance(3000);
    assertEquals(2, broker.reports.size());
    broker.report().answer().complete(outcome(Outcome.OUTCOME_ALREADY_REPLACED, 0));
    loop.settle();
    broker.ask().answer().complete(token(2));
    assertEquals(2, result(call).generation());
  }

  @Test
  void a_refused_token_is_not_replaced_if_the_pause_is_longer_than_the_timeout() {
    Token first = firstToken();
    CompletableFuture<Token> call = replace(first);
    broker.report().answer().complete(outcome(Outcome.OUTCOME_TOO_SOON, 6000));
    assertNull(result(call));
  }

  @Test
  void a_refused_token_is_not_replaced_if_it_is_not_at_fault() {
    Token first = firstToken();
    CompletableFuture<Token> call = replace(first);
    broker.report().answer().complete(outcome(Outcome.OUTCOME_NOT_A_TOKEN_FAULT, 0));
    assertNull(result(call));
  }

  @Test
  void a_refused_token_is_not_replaced_if_the_report_fails_but_it_is_not_forgotten() {
    Token first = firstToken();
    CompletableFuture<Token> call = replace(first);
    broker.report().fail(ErrorKind.NOT_GRANTED);
    assertNull(result(call));
    assertSame(first, result(ask()));
  }
}
