"""Runs the flows of the core on a simulated clock, with a simulated broker, so that no test waits."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from token_broker._core import (
    BearerChanged,
    Call,
    Core,
    Effect,
    Flow,
    Log,
    Look,
    NextMessage,
    OpenStream,
    Wait,
)
from token_broker._errors import DeadlineExceeded, TokenBrokerError, class_of
from token_broker._plan import Stream
from token_broker._token import Token
from token_broker.v1 import token_broker_pb2 as pb

SECRET = "eyJ-this-is-the-secret"  # noqa: S105
T = TypeVar("T")
Answer = Any | TokenBrokerError
Handler = Callable[[Call], "tuple[float, Answer]"]
NEVER = float("inf")


def duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def answer(generation: int, reuse_for: float = 60, expires_in: float = 120) -> pb.GetTokenResponse:
    """A token that is to be used again for a minute, and ends after two."""
    return pb.GetTokenResponse(
        access_token=SECRET,
        generation=generation,
        reuse_for=duration(reuse_for),
        expires_in=duration(expires_in),
        api_base_url="https://api.example",
    )


def refusal(code: str, reason: str = "", retry_after: float | None = None, **more: Any) -> TokenBrokerError:
    return class_of(code, reason)("the text of the broker", code=code, reason=reason, retry_after=retry_after, **more)


class Running:
    """A flow that waits for the result of an effect."""

    def __init__(self, flow: Flow[Any]) -> None:
        self.flow = flow
        self.effect: Effect | None = None
        self.wake_at = 0.0
        self.outcome: Answer = None
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class SimulatedStream:
    def __init__(self, stream: Stream, opened_at: float) -> None:
        self.stream = stream
        self.opened_at = opened_at
        self.messages: deque[Answer] = deque()
        self.ended = False  # by the client


class Simulation:
    def __init__(self, handler: Handler | None = None, endpoints: int = 1) -> None:
        self.now = 1000.0
        self.handler: Handler = handler or (lambda call: (0.0, answer(1)))
        self.refuse: Callable[[tuple[str, ...]], TokenBrokerError | None] = lambda accounts: None
        self.bearer_changed = False
        self.opening_takes = 0.0
        self.calls: list[Call] = []
        self.streams: list[SimulatedStream] = []
        self.logs: list[str] = []
        self.warnings: list[str] = []
        self.running: list[Running] = []
        self.core = Core(self, endpoints=endpoints, clock=lambda: self.now, random=lambda: 0.0)

    # What the core needs

    def start(self, flow: Flow[None]) -> None:
        self.running.append(Running(flow))

    def changed(self) -> None:
        """The flows that wait are looked at in each step."""

    def end_stream(self, stream: Stream) -> None:
        for simulated in self.streams:
            if simulated.stream is stream:
                simulated.ended = True

    # What the tests do

    def begin(self, flow: Flow[Any]) -> Running:
        running = Running(flow)
        self.running.append(running)
        self._settle()
        return running

    def run(self, flow: Flow[T]) -> T:
        """Runs a flow, and all others, until it ends."""
        running = self.begin(flow)
        while not running.done:
            at = min((r.wake_at for r in self.running), default=NEVER)
            assert at != NEVER, "nothing will ever happen"
            self.now = max(self.now, at)
            self._settle()
        if running.error is not None:
            raise running.error
        result: T = running.result
        return result

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        self._settle()
        while (at := min((r.wake_at for r in self.running), default=NEVER)) <= end:
            self.now = max(self.now, at)
            self._settle()
        self.now = end

    def token(self, account: str = "acme", timeout: float = 5.0) -> Token:
        return self.run(self.core.token(account, self.now + timeout))

    def asks(self) -> int:
        return sum(call.method == "GetToken" for call in self.calls)

    def reports(self) -> int:
        return sum(call.method == "ReportRejectedToken" for call in self.calls)

    def stream(self, number: int, *accounts: str) -> SimulatedStream:
        """Returns the newest stream, which must be the one with this number and these accounts."""
        assert [len(self.streams), *self.streams[-1].stream.accounts] == [number, *accounts]
        return self.streams[-1]

    def push(self, stream: SimulatedStream, message: Answer) -> None:
        stream.messages.append(message)
        self._settle()

    # How it works

    def _settle(self) -> None:
        """Runs all flows as far as they get without the time passing."""
        moved = True
        while moved:
            moved = False
            for running in list(self.running):
                if running in self.running and self._ready(running):
                    self._resume(running)
                    moved = True

    def _ready(self, running: Running) -> bool:
        effect = running.effect
        if isinstance(effect, Wait):
            return effect.ready() or self.core.closed or self.now >= effect.until
        if isinstance(effect, NextMessage):
            stream = self._simulated(effect.stream)
            return bool(stream.messages)
        return self.now >= running.wake_at

    def _resume(self, running: Running) -> None:
        effect, outcome = running.effect, running.outcome
        if isinstance(effect, NextMessage):
            outcome = self._simulated(effect.stream).messages.popleft()
        try:
            if isinstance(outcome, TokenBrokerError):
                running.effect = running.flow.throw(outcome)
            else:
                running.effect = running.flow.send(outcome)
        except StopIteration as end:
            running.done, running.result = True, end.value
        except TokenBrokerError as error:
            running.done, running.error = True, error
        if running.done:
            self.running.remove(running)
        else:
            self._begin_effect(running)

    def _begin_effect(self, running: Running) -> None:
        effect = running.effect
        running.outcome, running.wake_at = None, self.now
        if isinstance(effect, Wait):
            running.wake_at = effect.until
        elif isinstance(effect, NextMessage):
            running.wake_at = NEVER
        elif isinstance(effect, Call):
            self.calls.append(effect)
            delay, outcome = self.handler(effect)
            late = self.now + delay >= effect.deadline
            error = DeadlineExceeded("too late", code="DEADLINE_EXCEEDED")
            running.wake_at = effect.deadline if late else self.now + delay
            running.outcome = (
                error if late else outcome if isinstance(outcome, TokenBrokerError) else (outcome, self.now)
            )
        elif isinstance(effect, OpenStream):
            self.streams.append(SimulatedStream(effect.stream, self.now))
            running.wake_at = self.now + self.opening_takes
            running.outcome = self.refuse(tuple(effect.request.accounts)) or "bearer"
        elif isinstance(effect, BearerChanged):
            running.outcome = self.bearer_changed
        elif isinstance(effect, Log):
            text = effect.text % effect.arguments if effect.arguments else effect.text
            (self.warnings if effect.level >= logging.WARNING else self.logs).append(text)
        else:
            assert isinstance(effect, Look)

    def _simulated(self, stream: Stream) -> SimulatedStream:
        return next(simulated for simulated in self.streams if simulated.stream is stream)


def hanging(call: Call) -> tuple[float, Answer]:
    return NEVER, None


def failing(error: TokenBrokerError) -> Handler:
    return lambda call: (0.0, error.again())
