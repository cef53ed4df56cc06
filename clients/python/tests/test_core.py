"""The behaviour that both clients share."""

from __future__ import annotations

import pytest

from token_broker import (
    Closed,
    DeadlineExceeded,
    Internal,
    Kind,
    NoSuchAccount,
    NotGranted,
    Outcome,
    TokenBrokerError,
    Unauthenticated,
    Unavailable,
)
from token_broker._core import Account, BearerChanged, Call, Decision, OpenStream, pause_after
from token_broker._errors import class_of
from token_broker._plan import MOST_WATCHED, Plan, Stream, growing_pause
from token_broker._token import Token, token_of
from token_broker.v1 import token_broker_pb2 as pb

from .simulation import NEVER, Answer, Simulation, answer, duration, failing, hanging, refusal


def kept(generation: int, arrival: float = 0.0) -> Token:
    token = token_of("acme", answer(generation), arrival)
    assert token is not None
    return token


@pytest.mark.parametrize(
    ("name", "account", "now", "newer_than", "decision"),
    [
        ("nothing is kept", Account("a"), 0, 0, Decision.ASK),
        ("just arrived", Account("a", kept(7)), 0, 0, Decision.USE),
        ("just before the reuse end", Account("a", kept(7)), 59.999, 0, Decision.USE),
        ("at the reuse end", Account("a", kept(7)), 60, 0, Decision.ASK_OR_USE),
        ("in a pause", Account("a", kept(7), pause_end=80), 79.999, 0, Decision.USE),
        ("after a pause", Account("a", kept(7), pause_end=80), 80, 0, Decision.ASK_OR_USE),
        ("just before the last second", Account("a", kept(7)), 118.999, 0, Decision.ASK_OR_USE),
        ("in the last second", Account("a", kept(7)), 119, 0, Decision.ASK),
        ("in the last second of a pause", Account("a", kept(7), pause_end=NEVER), 119, 0, Decision.ASK),
        ("the kept one was refused", Account("a", kept(7)), 0, 7, Decision.ASK),
        ("an older one was refused", Account("a", kept(7)), 0, 6, Decision.USE),
        ("a refusal is remembered", Account("a", refusal=NotGranted(""), refusal_end=1), 0.999, 0, Decision.REFUSE),
        ("a refusal is over", Account("a", refusal=NotGranted(""), refusal_end=1), 1, 0, Decision.ASK),
    ],
)
def test_a_kept_token_is_used_until_its_reuse_end_and_asked_for_afterwards(
    name: str, account: Account, now: float, newer_than: int, decision: Decision
) -> None:
    assert account.decide(now, newer_than) is decision, name


def test_the_newest_token_wins() -> None:
    assert kept(1).replaces(None, 0)
    assert kept(8).replaces(kept(7), 0)
    assert not kept(6, arrival=1).replaces(kept(7), 0)
    assert kept(7, arrival=1).replaces(kept(7), 0)
    assert not kept(7, arrival=-1).replaces(kept(7), 0)
    assert kept(6, arrival=1000).replaces(kept(7), 1000), "nothing else is left"
    other = token_of(
        "acme", pb.GetTokenResponse(access_token="x", generation=7, reuse_for=duration(99), expires_in=duration(99)), 0
    )
    assert other is not None
    assert not other.replaces(kept(7), 0)


@pytest.mark.parametrize("field", ["access_token", "reuse_for", "expires_in"])
def test_an_answer_that_lacks_something_is_no_token(field: str) -> None:
    incomplete = answer(1)
    incomplete.ClearField(field)
    assert token_of("acme", incomplete, 0) is None


def test_an_answer_that_may_not_be_used_is_no_token() -> None:
    assert token_of("acme", answer(1, reuse_for=0), 0) is None
    assert token_of("acme", answer(1, expires_in=-1), 0) is None


def test_pauses_grow_to_their_limit_and_are_shortened_by_up_to_half() -> None:
    assert [growing_pause(0.1, 1, n, 0) for n in range(5)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1])
    assert growing_pause(0.1, 1, 10**6, 0) == 1
    assert growing_pause(1, 30, 0, 0.5) == 0.75
    assert 0.5 < growing_pause(1, 30, 0, 0.999) < 0.51


def test_the_pause_that_the_broker_asks_for_counts() -> None:
    assert pause_after(Unavailable("", retry_after=3), 0, 0.7) == 3


def test_a_failure_in_a_pause_changes_nothing() -> None:
    account = Account("a")
    assert account.failed(10, 0)
    assert account.pause_end == 11
    assert not account.failed(10.9, 0)
    assert account.failed(11, 0)
    assert account.pause_end == 13


@pytest.mark.parametrize(
    ("code", "reason", "kind", "temporary"),
    [
        ("INVALID_ARGUMENT", "", Kind.INVALID_ARGUMENT, False),
        ("UNAUTHENTICATED", "CREDENTIAL_REFUSED", Kind.UNAUTHENTICATED, False),
        ("PERMISSION_DENIED", "NOT_GRANTED", Kind.NOT_GRANTED, False),
        ("NOT_FOUND", "NO_SUCH_ACCOUNT", Kind.NO_SUCH_ACCOUNT, False),
        ("FAILED_PRECONDITION", "ACCOUNT_DISABLED", Kind.ACCOUNT_DISABLED, False),
        ("FAILED_PRECONDITION", "CREDENTIAL_REJECTED", Kind.CREDENTIAL_REJECTED, False),
        ("FAILED_PRECONDITION", "EGRESS_REJECTED", Kind.EGRESS_REJECTED, False),
        ("FAILED_PRECONDITION", "SOMETHING_NEW", Kind.INTERNAL, True),
        ("UNAVAILABLE", "UPSTREAM_UNAVAILABLE", Kind.UNAVAILABLE, True),
        ("RESOURCE_EXHAUSTED", "CALLER_RATE", Kind.OVERLOADED, True),
        ("DEADLINE_EXCEEDED", "", Kind.DEADLINE_EXCEEDED, True),
        ("CANCELLED", "", Kind.INTERNAL, True),
        ("UNKNOWN", "", Kind.INTERNAL, True),
    ],
)
def test_each_status_has_its_kind(code: str, reason: str, kind: Kind, temporary: bool) -> None:
    error = class_of(code, reason)
    assert (error.kind, error.temporary) == (kind, temporary)


def test_each_kind_has_one_class() -> None:
    assert sorted(error.kind.value for error in TokenBrokerError.__subclasses__()) == sorted(
        kind.value for kind in Kind
    )


def test_a_token_is_kept_until_its_reuse_end_without_a_call() -> None:
    s = Simulation()
    s.token()
    s.advance(59.9)
    s.token()
    assert s.asks() == 1
    s.advance(0.1)
    s.token()
    assert s.asks() == 2


def test_the_times_of_an_answer_count_from_when_it_was_asked_for() -> None:
    s = Simulation(lambda call: (3.0, answer(1)))
    start = s.now
    assert s.token()._end == start + 120
    assert s.now == start + 3


def test_a_hundred_callers_cause_one_ask() -> None:
    s = Simulation(lambda call: (1.0, answer(1)))
    callers = [s.begin(s.core.token("acme", s.now + 5)) for _ in range(100)]
    s.advance(1)
    assert all(caller.result is not None for caller in callers)
    assert s.asks() == 1


def test_a_hundred_callers_together_repeat_a_failed_ask_as_one_does() -> None:
    s = Simulation()
    s.handler = lambda call: (0.0, answer(1) if s.asks() == 4 else refusal("UNAVAILABLE", "UPSTREAM_UNAVAILABLE"))
    callers = [s.begin(s.core.token("acme", s.now + 5)) for _ in range(100)]
    s.advance(5)
    assert all(caller.result is not None for caller in callers)
    assert s.asks() == 4


def test_a_caller_with_a_longer_timeout_causes_another_ask() -> None:
    s = Simulation()
    s.handler = lambda call: hanging(call) if s.asks() == 1 else (0.0, answer(1))
    start = s.now
    impatient = s.begin(s.core.token("acme", s.now + 1))
    s.token()
    assert s.now == start + 1
    assert isinstance(impatient.error, DeadlineExceeded)
    assert s.asks() == 2


def test_the_kept_token_is_used_while_the_broker_is_away_and_the_pauses_grow() -> None:
    s = Simulation()
    s.token()
    s.advance(60)
    s.handler = failing(refusal("UNAVAILABLE"))
    start, asked = s.now, s.asks()
    asks: list[int] = []
    while s.now < start + 58.9:
        assert s.token().generation == 1
        if s.asks() > asked:
            asks, asked = [*asks, round(s.now - start)], s.asks()
        s.advance(0.1)
    assert asks == [0, 1, 3, 7, 15, 31]
    s.advance(0.2)
    with pytest.raises(Unavailable):
        s.token()


def test_a_slow_broker_delays_the_use_of_a_kept_token_by_two_seconds_once() -> None:
    s = Simulation()
    s.token()
    s.advance(60)
    s.handler = hanging
    start = s.now
    s.token()
    assert s.now == start + 2
    s.token()
    assert s.now == start + 2


def test_a_caller_with_little_time_gets_the_kept_token_at_its_end() -> None:
    s = Simulation()
    s.token()
    s.advance(60)
    s.handler = hanging
    assert s.token(timeout=0.05).generation == 1


def test_at_the_timeout_the_last_error_says_why() -> None:
    s = Simulation()
    s.handler = lambda call: hanging(call) if s.asks() > 2 else (0.0, refusal("UNAVAILABLE", "UPSTREAM_UNAVAILABLE"))
    start = s.now
    with pytest.raises(Unavailable):
        s.token()
    assert s.now == start + 5
    assert s.asks() == 3


@pytest.mark.parametrize(
    "error", [refusal("UNAVAILABLE", "GRANTS_STALE", retry_after=60), refusal("UNAVAILABLE", retriable=False)]
)
def test_an_error_is_raised_at_once_where_waiting_is_in_vain(error: TokenBrokerError) -> None:
    s = Simulation(failing(error))
    start = s.now
    with pytest.raises(Unavailable):
        s.token()
    assert s.now == start
    assert s.asks() == 1


def test_the_pause_of_retry_info_is_waited_for() -> None:
    s = Simulation()
    error = refusal("RESOURCE_EXHAUSTED", "OVERLOADED", retry_after=3)
    s.handler = lambda call: (0.0, error if s.asks() == 1 else answer(1))
    start = s.now
    s.token()
    assert s.now == start + 3


def test_a_refusal_forgets_the_token_and_is_remembered_for_a_second() -> None:
    s = Simulation()
    s.token()
    s.advance(60)
    s.handler = failing(refusal("PERMISSION_DENIED", "NOT_GRANTED"))
    for _ in range(10):
        with pytest.raises(NotGranted):
            s.token()
    assert s.asks() == 2
    s.handler = lambda call: (0.0, answer(2))
    s.advance(1)
    assert s.token().generation == 2


def test_an_answer_with_an_older_generation_is_not_used() -> None:
    s = Simulation(lambda call: (0.0, answer(5)))
    s.token()
    s.advance(60)
    s.handler = lambda call: (0.0, answer(4))
    assert s.token().generation == 5


@pytest.mark.parametrize("unusable", [pb.GetTokenResponse(), answer(1, expires_in=1)])
def test_an_unusable_answer_is_an_internal_error(unusable: pb.GetTokenResponse) -> None:
    with pytest.raises(Internal):
        Simulation(lambda call: (0.0, unusable)).token()


def test_an_ask_is_repeated_once_if_the_file_has_another_bearer() -> None:
    s = Simulation(failing(refusal("UNAUTHENTICATED", "CREDENTIAL_REFUSED")))
    with pytest.raises(Unauthenticated):
        s.token("one")
    assert s.asks() == 1
    s.bearer_changed = True
    with pytest.raises(Unauthenticated):
        s.token("two")
    assert s.asks() == 3


def test_an_endpoint_that_cannot_be_reached_is_replaced_by_another_at_once() -> None:
    s = Simulation(endpoints=2)
    s.handler = lambda call: (0.0, refusal("UNAVAILABLE") if s.asks() == 1 else answer(1))
    start = s.now
    s.token()
    assert (s.now, s.asks()) == (start, 2)


def test_a_closed_client_fails_waiting_and_later_calls() -> None:
    s = Simulation(hanging)
    waiting = s.begin(s.core.token("acme", s.now + 5))
    s.core.close()
    s.advance(0)
    assert isinstance(waiting.error, Closed)
    with pytest.raises(Closed):
        s.token()
    with pytest.raises(Closed):
        s.run(s.core.report("acme", 1, "61003", s.now + 5))


# Watching


def token_message(generation: int, account: str = "acme") -> pb.WatchTokensResponse:
    return pb.WatchTokensResponse(account=account, token=answer(generation))


def watched() -> Simulation:
    s = Simulation()
    s.token()
    s.advance(0.1)
    s.stream(1, "acme")
    return s


def test_a_pushed_token_is_used_at_once() -> None:
    s = watched()
    s.push(s.streams[0], token_message(2))
    assert s.token().generation == 2
    s.push(s.streams[0], token_message(1))
    assert s.token().generation == 2
    assert s.asks() == 1


def test_a_pushed_token_answers_callers_who_are_waiting() -> None:
    s = watched()
    s.advance(120)
    s.handler = hanging
    waiting = s.begin(s.core.token("acme", s.now + 5))
    s.push(s.streams[0], token_message(2))
    assert waiting.result.generation == 2


def test_an_ended_account_is_forgotten_and_the_next_caller_hears_why() -> None:
    s = watched()
    ended = pb.AccountEnded(reason=pb.AccountEnded.REASON_REMOVED)
    s.push(s.streams[0], pb.WatchTokensResponse(account="acme", ended=ended))
    s.handler = failing(refusal("NOT_FOUND", "NO_SUCH_ACCOUNT"))
    with pytest.raises(NoSuchAccount):
        s.token()
    s.handler = lambda call: (0.0, answer(2))
    s.advance(5)
    s.token()
    s.advance(0.1)
    s.stream(2, "acme")


def test_an_end_for_an_unknown_reason_is_an_end() -> None:
    s = watched()
    s.push(s.streams[0], pb.WatchTokensResponse(account="acme", ended=pb.AccountEnded(reason=99)))  # type: ignore[arg-type]
    assert s.warnings == ["the account acme has ended for this caller: 99"]
    s.token()
    assert s.asks() == 2


def test_a_message_that_nobody_foresaw_ends_the_stream_and_another_is_opened() -> None:
    s = watched()
    s.push(s.streams[0], "no message")
    assert s.streams[0].ended
    s.advance(0.1)
    s.stream(2, "acme")


def test_what_is_to_be_done_never_shows_the_bearer() -> None:
    texts = [
        repr(Call("GetToken", None, 0, "acme", "secret")),
        repr(BearerChanged("secret")),
        repr(OpenStream(Stream(()), pb.WatchTokensRequest(), "secret")),
    ]
    assert "secret" not in "".join(texts)


def test_an_added_account_brings_a_new_stream_and_the_old_one_ends_when_that_has_answered() -> None:
    s = watched()
    s.token("zebra")
    s.advance(4.9)
    assert not s.stream(1, "acme").ended
    s.advance(0.1)
    s.stream(2, "acme", "zebra")
    assert s.streams[0].ended


def test_a_stream_that_ends_is_opened_again_and_the_tokens_stay() -> None:
    s = watched()
    s.push(s.streams[0], token_message(2))
    s.advance(1)
    s.push(s.streams[0], refusal("UNAVAILABLE"))
    s.stream(2, "acme")
    assert s.token().generation == 2
    opened = []
    for number in range(3, 12):
        s.push(s.streams[-1], refusal("UNAVAILABLE"))
        start = s.now
        while len(s.streams) < number:
            s.advance(0.1)
        opened.append(s.streams[-1].opened_at - start)
    assert opened == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10])
    assert s.asks() == 1


def test_a_stream_that_ends_at_once_counts_as_failed_whatever_it_delivered() -> None:
    s = watched()
    for number, pause in ((2, 0.1), (3, 0.2), (4, 0.4)):
        s.push(s.streams[-1], token_message(number))
        s.push(s.streams[-1], refusal("UNAVAILABLE"))
        s.advance(pause - 0.01)
        s.stream(number - 1, "acme")
        s.advance(0.01)
        s.stream(number, "acme")


@pytest.mark.parametrize(("asked", "pause"), [(3, 3), (3600, 30)])
def test_the_pause_that_the_broker_asks_for_is_kept_before_a_stream_up_to_half_a_minute(
    asked: float, pause: float
) -> None:
    s = watched()
    s.push(s.streams[0], token_message(2))
    s.advance(1)
    s.push(s.streams[0], refusal("RESOURCE_EXHAUSTED", retry_after=asked))
    s.advance(pause - 0.1)
    s.stream(1, "acme")
    s.advance(0.1)
    s.stream(2, "acme")


def test_a_stream_that_is_not_answered_is_given_up_after_twenty_seconds() -> None:
    s = Simulation()
    s.opening_takes = 60.0
    s.token()
    s.advance(0.1)
    hung = s.stream(1, "acme")
    s.opening_takes = 0.0
    s.advance(19.9)
    assert not hung.ended
    s.advance(0.2)
    assert hung.ended
    s.stream(2, "acme")
    s.advance(60)
    assert not s.stream(2, "acme").ended


def test_accounts_about_which_nothing_need_be_known_are_forgotten() -> None:
    s = Simulation()
    s.token("kept")
    usual, s.handler = s.handler, failing(refusal("NOT_FOUND", "NO_SUCH_ACCOUNT"))
    for number in range(1000):
        with pytest.raises(NoSuchAccount):
            s.token(f"guess-{number}")
        s.advance(0.1)
    s.handler = usual
    assert len(s.core.accounts) <= 101
    s.token("kept")
    assert s.asks() == 1002


def test_a_stream_of_an_unknown_bearer_forgets_all_tokens_and_is_opened_again_after_ten_seconds() -> None:
    s = watched()
    s.push(s.streams[0], refusal("UNAUTHENTICATED"))
    s.handler = failing(refusal("UNAUTHENTICATED"))
    with pytest.raises(Unauthenticated):
        s.token()
    s.advance(9.9)
    s.stream(1, "acme")
    s.advance(0.1)
    s.stream(2, "acme")


def test_a_stream_of_a_replaced_bearer_is_opened_again_at_once() -> None:
    s = watched()
    s.bearer_changed = True
    s.push(s.streams[0], refusal("UNAUTHENTICATED"))
    s.stream(2, "acme")
    s.token()
    assert s.asks() == 1


def test_a_refused_stream_makes_all_its_accounts_ask_and_those_that_may_join_again() -> None:
    s = Simulation()
    s.refuse = lambda accounts: refusal("NOT_FOUND", "NO_SUCH_ACCOUNT") if len(accounts) > 1 else None
    s.token("acme")
    s.token("gone")
    s.advance(0.1)
    s.stream(1, "acme", "gone")
    s.token("acme")
    assert s.asks() == 3
    s.advance(5)
    s.stream(2, "acme")


def test_an_account_that_is_not_used_for_an_hour_leaves_the_watch_and_comes_back_with_its_next_use() -> None:
    s = watched()
    s.advance(3600)
    s.push(s.streams[0], pb.WatchTokensResponse(account="acme", token=answer(2, reuse_for=9999, expires_in=9999)))
    s.advance(1)
    s.token("zebra")
    s.advance(0.1)
    s.stream(2, "zebra")
    s.token("acme")
    assert s.asks() == 3
    s.advance(5)
    s.stream(3, "acme", "zebra")


def test_a_thousand_accounts_are_watched_and_no_more() -> None:
    plan = Plan()
    assert all(plan.add(str(n), 0) for n in range(MOST_WATCHED))
    assert not plan.add("more", 0)
    plan.members.discard("1")
    assert plan.add("more", 0)


def test_the_end_of_a_stream_whose_successor_is_being_opened_says_nothing() -> None:
    plan = Plan()
    plan.add("a", 0)
    first = plan.open(0)
    plan.answered(first)
    plan.reopen(0)
    second = plan.open(0)
    assert not plan.ended(first)
    assert plan.answered(second) == []


def test_after_a_fork_the_tokens_are_kept_and_a_watch_is_started_at_the_next_use() -> None:
    s = watched()
    s.running.clear()
    s.core.start_again()
    s.advance(10)
    s.stream(1, "acme")
    s.token()
    s.stream(2, "acme")
    assert s.asks() == 1


# Reporting


def reporting(outcome: str, retry_after: float = 0.0) -> pb.ReportRejectedTokenResponse:
    return pb.ReportRejectedTokenResponse(outcome=f"OUTCOME_{outcome}", retry_after=duration(retry_after))


def issuing(outcome: Answer) -> Simulation:
    """A broker that answers reports so, and issues the next token in a second."""

    def handle(call: Call) -> tuple[float, Answer]:
        if call.method == "ReportRejectedToken":
            return 0.0, outcome
        newer_than = call.request.newer_than_generation
        return (1.0 if newer_than else 0.0), answer(newer_than + 1)

    return Simulation(handle)


@pytest.mark.parametrize("outcome", ["REISSUING", "ALREADY_REPLACED"])
def test_a_refused_token_is_reported_and_replaced(outcome: str) -> None:
    s = issuing(reporting(outcome))
    newer = s.run(s.core.replacement(s.token(), "61003", s.now + 5))
    assert newer is not None
    assert newer.generation == 2


def test_a_hundred_callers_with_a_refused_token_cause_one_report_and_one_ask() -> None:
    s = issuing(reporting("REISSUING"))
    token = s.token()
    callers = [s.begin(s.core.replacement(token, "61003", s.now + 5)) for _ in range(100)]
    s.advance(1)
    assert all(caller.result.generation == 2 for caller in callers)
    assert (s.reports(), s.asks()) == (1, 2)


def test_a_token_that_was_replaced_already_is_not_reported() -> None:
    s = watched()
    token = s.token()
    s.push(s.streams[0], token_message(2))
    assert s.run(s.core.replacement(token, "61003", s.now + 5)) is not None
    assert s.reports() == 0


def test_a_report_that_came_too_soon_is_repeated_once_for_all() -> None:
    s = issuing(None)
    usual = s.handler
    s.handler = lambda call: (
        usual(call)
        if call.method == "GetToken"
        else (0.0, reporting("TOO_SOON", 2) if s.reports() == 1 else reporting("REISSUING"))
    )
    token, start = s.token(), s.now
    callers = []
    for _ in range(10):
        callers.append(s.begin(s.core.replacement(token, "61003", s.now + 5)))
        s.advance(0.1)
    while not all(caller.done for caller in callers):
        s.advance(0.1)
    assert s.now - start == pytest.approx(3)
    assert all(caller.result.generation == 2 for caller in callers)
    assert s.reports() == 2


def test_an_unknown_outcome_is_an_internal_error() -> None:
    s = issuing(pb.ReportRejectedTokenResponse(outcome=99))  # type: ignore[arg-type]
    with pytest.raises(Internal):
        s.run(s.core.report("acme", 1, "61003", s.now + 5))


@pytest.mark.parametrize(
    "outcome", [reporting("NOT_A_TOKEN_FAULT"), reporting("TOO_SOON", 60), refusal("PERMISSION_DENIED", "NOT_GRANTED")]
)
def test_no_newer_token_is_had_where_the_broker_gives_none(outcome: Answer) -> None:
    s = issuing(outcome)
    token = s.token()
    assert s.run(s.core.replacement(token, "61003", s.now + 5)) is None
    assert s.token() is token


def test_a_report_is_repeated_a_few_times_while_the_broker_is_away() -> None:
    s = issuing(refusal("UNAVAILABLE"))
    with pytest.raises(Unavailable):
        s.run(s.core.report("acme", 1, "61003", s.now + 5))
    assert s.reports() == 4


def test_the_outcome_of_a_report_is_returned() -> None:
    s = issuing(reporting("TOO_SOON", 7.5))
    report = s.run(s.core.report("acme", 1, "61003", s.now + 5))
    assert (report.outcome, report.retry_after) == (Outcome.TOO_SOON, 7.5)
