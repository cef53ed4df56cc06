"""What a client decides and remembers, without I/O.

The flows are generators: they yield what is to be done (an `Effect`) and get the result. `TokenClient` runs them with
threads and `AsyncTokenClient` with tasks, so both behave alike. Between two effects, a flow runs without interruption.
"""

from __future__ import annotations

import enum
import logging
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ._errors import (
    Closed,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    TokenBrokerError,
    Unauthenticated,
    Unavailable,
    unexpected,
)
from ._plan import PAUSE_UNAUTHENTICATED, UNUSED_AFTER, Plan, Stream, growing_pause
from ._token import Token, token_of
from .v1 import token_broker_pb2 as pb

LONGEST_WAIT_FOR_REPLACEMENT = 2.0  # how long a caller waits while a kept token is still usable
FIRST_PAUSE_WITH_TOKEN, LONGEST_PAUSE_WITH_TOKEN = 1.0, 30.0
FIRST_PAUSE_WITHOUT_TOKEN, LONGEST_PAUSE_WITHOUT_TOKEN = 0.1, 1.0
REFUSAL_LIFE = 1.0  # how long asks get a refusal again without a call
REPORT_LIFE = 5.0  # how long an outcome stands for those who hold the same generation
SHORTEST_TOO_SOON = 0.1  # the shortest wait before a report is repeated that came too soon
MOST_REPORTS = 4  # attempts to deliver a report, as many as the service config has
LOOK_INTERVAL = 1.0  # how often files are looked at
MOST_UNUSED = 100  # so many accounts are known before those are looked for about which nothing need be known


class Outcome(str, enum.Enum):
    """What the broker does after a report."""

    REISSUING = "REISSUING"
    """A new token is being issued."""
    ALREADY_REPLACED = "ALREADY_REPLACED"
    """A later generation already exists."""
    TOO_SOON = "TOO_SOON"
    """The last token was issued too recently. Wait for `retry_after`, and report again."""
    NOT_A_TOKEN_FAULT = "NOT_A_TOKEN_FAULT"  # noqa: S105
    """The code is not about the token, so a new one would not help."""


@dataclass(frozen=True)
class Report:
    """The broker's answer to the report of a refused token."""

    outcome: Outcome
    retry_after: float
    """How many seconds to wait before another report. It is 0 if there is no need to."""


# What a flow wants to be done. The results are given to the flow; errors are raised in it.


@dataclass
class Wait:
    """Wait until it is ready, the client is closed, or the time has come."""

    ready: Callable[[], bool]
    until: float


@dataclass
class Call:
    """Make a call. The result is the answer and when the call was sent."""

    method: str
    request: Any
    deadline: float
    account: str
    bearer: str = field(default="", repr=False)  # the one that was sent


@dataclass
class BearerChanged:
    """Read the bearer's file. The result is whether it has another one than was used."""

    used: str = field(repr=False)


@dataclass
class OpenStream:
    """Open a stream, and wait for its headers."""

    stream: Stream
    request: pb.WatchTokensRequest
    bearer: str = field(default="", repr=False)  # the one that was sent


@dataclass
class NextMessage:
    """Wait for the next message of a stream."""

    stream: Stream


@dataclass
class Look:
    """Look at the files of the certificates."""


@dataclass
class Log:
    """Log a line. It is an effect because what handles logs may use the client."""

    level: int
    text: str
    arguments: tuple[object, ...]


Effect = Wait | Call | BearerChanged | OpenStream | NextMessage | Look | Log
T = TypeVar("T")
Flow = Generator[Effect, Any, T]


class Runner(Protocol):
    """What the flows need of what runs them."""

    def start(self, flow: Flow[None]) -> None:
        """Runs a flow that nobody waits for."""

    def changed(self) -> None:
        """Makes those who wait look whether they are ready."""

    def end_stream(self, stream: Stream) -> None:
        """Ends a stream that was replaced."""


class Decision(enum.Enum):
    """What a caller who wants a token does."""

    ASK = enum.auto()  # ask, and wait for the answer
    USE = enum.auto()  # use the kept token, without a call
    ASK_OR_USE = enum.auto()  # ask, and use the kept token if that fails or takes long
    REFUSE = enum.auto()  # raise the remembered refusal


@dataclass
class Ask:
    """One GetToken call, which any number of callers wait for."""

    newer_than: int
    attempt: int  # how many asks of the caller who caused it failed before
    deadline: float  # of the caller who caused it
    done: bool = False
    token: Token | None = None
    error: TokenBrokerError | None = None
    retry_at: float = 0.0  # when the callers may try again


@dataclass
class SharedReport:
    """One report that all share who hold the same generation."""

    generation: int
    done: bool = False
    report: Report | None = None
    error: TokenBrokerError | None = None
    end: float = 0.0  # until then, it stands for further ones


@dataclass
class Account:
    """What a client knows about one account."""

    name: str
    kept: Token | None = None
    version: int = 0  # grows whenever another token is kept
    used_at: float = 0.0  # when the program last wanted the token
    failures: int = 0  # failed asks in a row while a usable token was kept
    pause_end: float = 0.0  # until then, a kept token is used without asking
    refusal: TokenBrokerError | None = None  # the last error that was not temporary
    refusal_end: float = 0.0
    ask: Ask | None = None  # the newest one for any token, perhaps done
    newer_ask: Ask | None = None  # the newest one with newer_than_generation, perhaps done
    shared_report: SharedReport | None = None

    def usable(self, now: float, newer_than: int) -> Token | None:
        """Returns the kept token if it may be used and is newer than the generation."""
        kept = self.kept
        return kept if kept is not None and kept.generation > newer_than and not kept.ended(now) else None

    def unused(self, now: float) -> bool:
        """Whether nothing need be known about the account: no token, no recent refusal, and nothing under way."""
        return (
            self.usable(now, 0) is None
            and now >= max(self.used_at + REFUSAL_LIFE, self.refusal_end)
            and all(ask is None or ask.done for ask in (self.ask, self.newer_ask))
            and (self.shared_report is None or (self.shared_report.done and now >= self.shared_report.end))
        )

    def decide(self, now: float, newer_than: int) -> Decision:
        """Returns what a caller does who wants a token of a later generation than the given one."""
        usable = self.usable(now, newer_than)
        if usable is not None:
            return Decision.USE if usable.fresh(now) or now < self.pause_end else Decision.ASK_OR_USE
        return Decision.REFUSE if self.refusal is not None and now < self.refusal_end else Decision.ASK

    def offer(self, token: Token, now: float) -> Token:
        """Keeps the token if it is newer than the kept one. Returns the one that is kept now."""
        if token.replaces(self.kept, now):
            self.kept = token
            self.version += 1
        self.failures, self.pause_end = 0, 0.0
        self.refusal, self.refusal_end = None, 0.0
        assert self.kept is not None  # noqa: S101
        return self.kept

    def refused(self, error: TokenBrokerError, now: float) -> None:
        """Forgets the kept token and remembers the error."""
        self.kept = None
        self.refusal, self.refusal_end = error, now + REFUSAL_LIFE

    def failed(self, now: float, random_number: float) -> bool:
        """Begins a pause in which a kept token is used without asking. The callers who waited for the same ask all
        report its failure, so nothing happens in a pause; then it returns False."""
        if now < self.pause_end:
            return False
        pause = growing_pause(FIRST_PAUSE_WITH_TOKEN, LONGEST_PAUSE_WITH_TOKEN, self.failures, random_number)
        self.pause_end = now + pause
        self.failures += 1
        return True

    def ask_soon(self, now: float) -> None:
        """Makes the next caller ask, without dropping the kept token."""
        if self.kept is not None:
            self.kept = self.kept.to_be_renewed(now)
        self.pause_end = 0.0


def pause_after(error: TokenBrokerError, attempt: int, random_number: float) -> float:
    """Returns the pause after a failed call while no usable token is kept."""
    if error.retry_after:
        return error.retry_after
    return growing_pause(FIRST_PAUSE_WITHOUT_TOKEN, LONGEST_PAUSE_WITHOUT_TOKEN, attempt, random_number)


def last_error(before: TokenBrokerError | None, now: TokenBrokerError) -> TokenBrokerError:
    """Returns the error to raise after another one. What happened first says more than that time ran out after it."""
    return before if before is not None and isinstance(now, DeadlineExceeded) else now


def life_of(report: Report) -> float:
    """Returns how long an outcome stands. One that came too soon stands until the broker accepts another report."""
    return max(SHORTEST_TOO_SOON, report.retry_after) if report.outcome is Outcome.TOO_SOON else REPORT_LIFE


@dataclass
class Core:
    """The state of a client, and its flows."""

    runner: Runner
    endpoints: int = 1
    certificates: bool = False
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.random
    accounts: dict[str, Account] = field(default_factory=dict)
    prune_at: int = MOST_UNUSED  # how many accounts are known when unused ones are looked for
    plan: Plan = field(default_factory=Plan)
    plan_version: int = 0  # grows whenever the watch should look at the plan
    watching: bool = False
    closed: bool = False

    def account(self, name: str) -> Account:
        account = self.accounts.get(name)
        if account is None:
            if len(self.accounts) >= self.prune_at:
                self._prune()
            account = self.accounts[name] = Account(name)
        return account

    def _prune(self) -> None:
        """Forgets accounts about which nothing need be known, because names may come from the program's users. Twice
        as many as are left may be known before it is done again, so that it costs little per account."""
        now = self.clock()
        for name, account in list(self.accounts.items()):
            if name not in self.plan.members and account.unused(now):
                del self.accounts[name]
        self.prune_at = max(MOST_UNUSED, 2 * len(self.accounts))

    def start_again(self) -> None:
        """Keeps the tokens, and nothing that belongs to threads, tasks or connections that no longer exist."""
        for account in self.accounts.values():
            account.ask = account.newer_ask = account.shared_report = None
        self.watching = False
        self.plan.start_again(self.clock())

    def close(self) -> None:
        self.closed = True
        self.runner.changed()

    # Getting a token

    def token(self, name: str, deadline: float, newer_than: int = 0) -> Flow[Token]:
        """Gets a token of a later generation than the given one."""
        failed: Ask | None = None  # the newest ask whose failure this caller has seen
        last: TokenBrokerError | None = None  # why no token could be had yet
        attempts = 0
        while True:
            if self.closed:
                raise Closed("the client was closed", account=name)
            now = self.clock()
            account = self.account(name)
            account.used_at = now
            if self.plan.members:
                self._start_watch()  # in a child after a fork
            decision = account.decide(now, newer_than)
            if decision is Decision.USE:
                assert account.kept is not None  # noqa: S101
                return account.kept
            if decision is Decision.REFUSE:
                assert account.refusal is not None  # noqa: S101
                raise account.refusal.again()
            if now >= deadline:
                usable = account.usable(now, newer_than)
                if usable is not None:
                    return usable
                error = DeadlineExceeded("the broker did not answer in time", account=name)
                raise last_error(last, error).again()
            ask = self._join(account, newer_than, failed, attempts, deadline)
            version = account.version
            patience = now + LONGEST_WAIT_FOR_REPLACEMENT if decision is Decision.ASK_OR_USE else deadline
            yield Wait(_done_or_changed(ask, account, version), min(deadline, patience))
            now = self.clock()
            if not ask.done:
                if account.version == version and patience <= now < deadline and account.failed(now, self.random()):
                    yield Log(logging.WARNING, "the broker is slow, so the kept token of %s is used", (name,))
                continue
            if ask.token is not None:
                return ask.token
            assert ask.error is not None  # noqa: S101
            if not ask.error.temporary:
                raise ask.error.again()
            if decision is Decision.ASK_OR_USE:
                continue  # a pause has begun, in which the kept token is used
            last = last_error(last, ask.error)
            failed, attempts = ask, ask.attempt + 1
            if ask.deadline < deadline and now >= ask.deadline:
                continue  # the caller who caused the ask had less time
            if not ask.error._retriable or ask.retry_at > deadline:
                raise last.again()
            version = account.version
            yield Wait(_done_or_changed(None, account, version), ask.retry_at)

    def _join(self, account: Account, newer_than: int, failed: Ask | None, attempts: int, deadline: float) -> Ask:
        """Returns the ask to wait for, and starts one if there is none. A caller who has seen the failure of an ask
        takes the failure of any later one, so that callers who waited together do not ask one after another."""
        newest = account.newer_ask if newer_than else account.ask
        joinable = newest is not None and newest is not failed and newest.newer_than >= newer_than
        if newest is not None and joinable and (not newest.done or (failed is not None and newest.error is not None)):
            return newest
        request = _request(pb.GetTokenRequest, account=account.name, newer_than_generation=newer_than)
        ask = Ask(newer_than, attempts, deadline)
        self.runner.start(self._run_ask(account, ask, request))
        if newer_than:
            account.newer_ask = ask
        else:
            account.ask = ask
        return ask

    def _run_ask(self, account: Account, ask: Ask, request: pb.GetTokenRequest) -> Flow[None]:
        try:
            answer, sent = yield from self._call("GetToken", request, ask.deadline, account.name)
            now = self.clock()
            token = token_of(account.name, answer, sent)
            if token is None:
                raise Internal("the broker's answer has no usable token", account=account.name)
            if token.ended(now):
                raise Internal("the broker's token is about to end", account=account.name)
            if token.generation <= ask.newer_than:
                raise Internal("the broker's answer has an older token", account=account.name)
            ask.token = account.offer(token, now)
            self._watch(account.name, now)
            log = Log(logging.DEBUG, "the broker answered with generation %d of %s", (token.generation, account.name))
        except TokenBrokerError as error:
            log = self._ask_failed(account, ask, error)
        except Exception as problem:  # noqa: BLE001  # whatever it is, nobody may wait for this ask forever
            log = self._ask_failed(account, ask, unexpected(problem, account.name))
        finally:
            if ask.token is None and ask.error is None:
                ask.error = Closed("the client was closed", account=account.name)
            ask.done = True
            self.runner.changed()
        yield log

    def _ask_failed(self, account: Account, ask: Ask, error: TokenBrokerError) -> Log:
        now = self.clock()
        ask.error = error
        level = logging.DEBUG  # the callers get the error
        if error.temporary:
            ask.retry_at = now + pause_after(error, ask.attempt, self.random())
            if account.usable(now, 0) is not None:
                account.failed(now, self.random())
                level = logging.WARNING  # the callers get the kept token
        elif not isinstance(error, Closed):
            account.refused(error, now)
        return Log(level, "asking for a token failed: %s", (error,))

    def _call(self, method: str, request: Any, deadline: float, account: str) -> Flow[tuple[Any, float]]:
        """Makes a call. It is repeated at another endpoint if one cannot be reached, and once with another bearer if
        the broker does not know the bearer."""
        tried, repeated = 1, False
        while True:
            call = Call(method, request, deadline, account)
            try:
                result: tuple[Any, float] = yield call
            except Unavailable as error:
                # With a reason, it is the broker who says so.
                if error.reason or not error._retriable or tried >= self.endpoints or self.clock() >= deadline:
                    error.account = account
                    raise
                tried += 1
            except Unauthenticated:
                changed = False if repeated else (yield BearerChanged(call.bearer))
                if not changed:
                    raise
                repeated = True
            except TokenBrokerError as error:
                error.account = account  # not all that fails knows it, such as a client that is closed
                raise
            else:
                return result

    # Watching

    def _watch(self, name: str, now: float) -> None:
        """Puts the account on the watch, and starts the watch if it does not run."""
        if self.plan.add(name, now):
            self._start_watch()
            self._look_at_plan()

    def _start_watch(self) -> None:
        if not self.watching and not self.closed:
            self.watching = True
            self.runner.start(self._run_watch())

    def _look_at_plan(self) -> None:
        self.plan_version += 1
        self.runner.changed()

    def connection_changed(self) -> None:
        """Moves the watch to a new connection."""
        self.plan.reopen(self.clock())
        self._look_at_plan()

    def _run_watch(self) -> Flow[None]:
        """Opens streams when the plan says so, and looks at the files of the certificates."""
        while not self.closed:
            now = self.clock()
            due = self.plan.due()
            if due is not None and due <= now and self.plan.next is not None:
                yield from self._give_up(self.plan.next)
                continue
            if due is not None and due <= now:
                stream = self._next_stream(now)
                if stream is not None:
                    self.runner.start(self._run_stream(stream))
                continue
            if self.certificates:
                yield Look()
            version = self.plan_version
            until = now + LOOK_INTERVAL if self.certificates else float("inf")
            yield Wait(self._plan_changed(version), min(until, due if due is not None else until))

    def _give_up(self, stream: Stream) -> Flow[None]:
        """Ends a stream that is not answered, and plans another one."""
        self.runner.end_stream(stream)
        log = self._stream_ended(stream, DeadlineExceeded("the broker did not answer the watch in time"), False)
        if log is not None:
            yield log

    def _plan_changed(self, version: int) -> Callable[[], bool]:
        return lambda: self.plan_version != version

    def _next_stream(self, now: float) -> Stream | None:
        """Drops the accounts that the program no longer uses. Returns a stream of the others, if there are any."""
        for name in sorted(self.plan.members):
            account = self.accounts[name]
            if now - account.used_at > UNUSED_AFTER:
                self.plan.members.discard(name)
                account.ask_soon(now)  # the answer brings it back on the watch
        return self.plan.open(now) if self.plan.members else None

    def _run_stream(self, stream: Stream) -> Flow[None]:
        """Reads a stream to its end."""
        opening = OpenStream(stream, pb.WatchTokensRequest(accounts=stream.accounts))
        try:
            try:
                yield opening
                for ended in self.plan.answered(stream):
                    self.runner.end_stream(ended)
                self._look_at_plan()
                while True:
                    message = yield NextMessage(stream)
                    log = self._keep(stream, message)
                    if log is not None:
                        yield log
            except Unauthenticated as error:
                changed = yield BearerChanged(opening.bearer)
                log = self._stream_ended(stream, error, changed)
            except TokenBrokerError as error:
                log = self._stream_ended(stream, error, False)
            except Exception as problem:  # noqa: BLE001  # whatever it is, the watch goes on
                self.runner.end_stream(stream)
                log = self._stream_ended(stream, unexpected(problem), False)
        finally:
            self._look_at_plan()
        if log is not None:
            yield log

    def _keep(self, stream: Stream, message: pb.WatchTokensResponse) -> Log | None:
        """Does what a message of a stream says."""
        now = self.clock()
        self.plan.message(stream)
        account = self.accounts.get(message.account)
        if account is None:
            return None
        if message.HasField("token"):
            token = token_of(account.name, message.token, now)
            if token is None:
                return Log(logging.WARNING, "the watch brought an unusable token of %s", (account.name,))
            account.offer(token, now)
            self.runner.changed()
            return Log(logging.DEBUG, "the watch brought generation %d of %s", (token.generation, account.name))
        if message.HasField("ended"):
            account.kept = None
            self.plan.members.discard(account.name)
            reason = _name_of(pb.AccountEnded.Reason, message.ended.reason)
            return Log(logging.WARNING, "the account %s has ended for this caller: %s", (account.name, reason))
        return None

    def _stream_ended(self, stream: Stream, error: TokenBrokerError, bearer_changed: bool) -> Log | None:
        """Draws the conclusions of the end of a stream."""
        if self.closed or not self.plan.ended(stream):
            return None
        now = self.clock()
        if error.code == "UNAUTHENTICATED":
            if bearer_changed:
                self.plan.reopen(now)
                return None
            for account in self.accounts.values():
                account.kept = None
            self.plan.reopen(now + PAUSE_UNAUTHENTICATED)
            return Log(logging.WARNING, "the broker no longer knows this caller, so all tokens are forgotten", ())
        if error.code in ("PERMISSION_DENIED", "NOT_FOUND", "INVALID_ARGUMENT", "FAILED_PRECONDITION"):
            # The refusal does not say which account it is about. The asks will.
            for name in stream.accounts:
                self.plan.members.discard(name)
                if name in self.accounts:
                    self.accounts[name].ask_soon(now)
            self.plan.reopen(now)  # for accounts that joined since
            return Log(logging.WARNING, "the watch was refused: %s", (error,))
        self.plan.after_end(stream, error, now, self.random())
        return Log(logging.DEBUG, "the watch ended: %s", (error,))

    # Reporting

    def report(self, account: str, generation: int, upstream_code: str, deadline: float) -> Flow[Report]:
        """Reports a refused token, and repeats that a few times if the broker is away."""
        request = _request(
            pb.ReportRejectedTokenRequest, account=account, generation=generation, upstream_code=upstream_code
        )
        last: TokenBrokerError | None = None
        attempt = 0
        while True:
            if self.closed:
                raise Closed("the client was closed", account=account)
            try:
                answer, _ = yield from self._call("ReportRejectedToken", request, deadline, account)
            except TokenBrokerError as error:
                last = last_error(last, error)
                again_at = self.clock() + pause_after(error, attempt, self.random())
                attempt += 1
                final = not error.temporary or not error._retriable or attempt == MOST_REPORTS or again_at > deadline
                if final:
                    raise last from last.__cause__
                yield Wait(_never, again_at)
            else:
                name = _name_of(pb.ReportRejectedTokenResponse.Outcome, answer.outcome)
                retry_after = answer.retry_after.seconds + answer.retry_after.nanos / 1e9
                try:
                    outcome = Outcome(name[len("OUTCOME_") :])
                except ValueError:
                    raise Internal("the broker's answer has no outcome", account=account) from None
                return Report(outcome, max(0.0, retry_after))

    def _run_report(self, shared: SharedReport, account: str, upstream_code: str, deadline: float) -> Flow[None]:
        try:
            shared.report = yield from self.report(account, shared.generation, upstream_code, deadline)
            shared.end = self.clock() + life_of(shared.report)
        except TokenBrokerError as error:
            shared.error = error
        except Exception as problem:  # noqa: BLE001  # whatever it is, nobody may wait for this report forever
            shared.error = unexpected(problem, account)
        finally:
            shared.done = True
            self.runner.changed()

    def replacement(self, refused: Token, upstream_code: str, deadline: float) -> Flow[Token | None]:
        """Reports a token that the API refused. Returns a newer one, or None if there is none within the time."""
        try:
            return (yield from self._replacement(refused, upstream_code, deadline))
        except TokenBrokerError as error:
            text = "no newer token than generation %d of %s could be had: %s"
            yield Log(logging.WARNING, text, (refused.generation, refused.account, error))
            return None

    def _replacement(self, refused: Token, upstream_code: str, deadline: float) -> Flow[Token | None]:
        account = self.account(refused.account)
        while True:
            now = self.clock()
            usable = account.usable(now, refused.generation)
            if usable is not None:
                return usable
            if now >= deadline or self.closed:
                return None
            shared = account.shared_report
            if shared is None or shared.generation != refused.generation or (shared.done and now >= shared.end):
                shared = SharedReport(refused.generation)
                self.runner.start(self._run_report(shared, refused.account, upstream_code, deadline))
                account.shared_report = shared
            yield Wait(_done(shared), deadline)
            if not shared.done or shared.report is None:
                if shared.error is not None:
                    raise shared.error.again()
                return None
            outcome = shared.report.outcome
            text = "a refused token was reported: generation %d of %s, code %s, outcome %s"
            yield Log(logging.DEBUG, text, (refused.generation, refused.account, upstream_code, outcome.value))
            if outcome in (Outcome.REISSUING, Outcome.ALREADY_REPLACED):
                return (yield from self.token(refused.account, deadline, refused.generation))
            if outcome is not Outcome.TOO_SOON or shared.end > deadline:
                return None
            # The broker does not keep such a report, so it is repeated.
            yield Wait(_done_or_changed(None, account, account.version), shared.end)


def _request(kind: Callable[..., T], **fields: object) -> T:
    """Makes a request of what the program gave."""
    try:
        return kind(**fields)
    except (TypeError, ValueError):
        names = ", ".join(fields)
        raise InvalidArgument(f"one of these is of the wrong type or out of range: {names}") from None


def _name_of(values: Any, number: int) -> str:
    """Returns the name of an enum's value. A newer broker may send one that this client does not know."""
    name: str = values.Name(number) if number in values.values() else str(number)
    return name


def _done_or_changed(ask: Ask | None, account: Account, version: int) -> Callable[[], bool]:
    return lambda: (ask is not None and ask.done) or account.version != version


def _done(shared: SharedReport) -> Callable[[], bool]:
    return lambda: shared.done


def _never() -> bool:
    return False
