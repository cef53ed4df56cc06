"""When streams are opened, and with which accounts."""

from __future__ import annotations

from typing import Any

from ._errors import TokenBrokerError

MOST_WATCHED = 1000
ADDITIONS_DELAY = 0.1
ADDITIONS_INTERVAL = 5.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
PAUSE_UNAUTHENTICATED = 10.0
LONGEST_OPENING = 20.0  # how long a stream may take to answer
SHORTEST_LIFE = 1.0  # a stream that ends earlier counts as failed, whatever it delivered
LONGEST_RETRY_INFO = 30.0
UNUSED_AFTER = 3600.0


def growing_pause(first: float, limit: float, failures: int, random: float) -> float:
    """Returns a pause that starts at first, is doubled for each failure before up to the limit, and is shortened by up
    to half. The random number is at least 0 and less than 1."""
    pause: float = min(limit, first * 2 ** min(failures, 32))
    return pause - random / 2 * pause


class Stream:
    """One call of WatchTokens."""

    def __init__(self, accounts: tuple[str, ...], opened_at: float = 0.0) -> None:
        self.accounts = accounts
        self.opened_at = opened_at
        self.delivered = False  # a message has arrived
        self.call: Any = None  # this and the next one belong to the part that does I/O
        self.connection: Any = None


class Plan:
    """Decides when streams are opened. It does nothing by itself.

    There are at most two streams: the current one, and the next one, which takes its place when it has answered. So no
    replacement is missed while a stream is being replaced.
    """

    def __init__(self) -> None:
        self.members: set[str] = set()
        self.current: Stream | None = None
        self.next: Stream | None = None
        self.first_addition: float | None = None  # of those that no stream has
        self.last_addition: float | None = None  # when a stream was last opened for additions
        self.reopen_at: float | None = None  # when to open a stream for another reason
        self.failures = 0  # streams in a row that brought no message, or ended at once

    def add(self, account: str, now: float) -> bool:
        """Puts an account on the watch, if there is room. Returns whether it was not there before."""
        if account in self.members or len(self.members) >= MOST_WATCHED:
            return False
        self.members.add(account)
        if self.first_addition is None:
            self.first_addition = now
        return True

    def due(self) -> float | None:
        """Returns when to open a stream or, if there is a next one, when to give that up. None means never."""
        if self.next is not None:
            return self.next.opened_at + LONGEST_OPENING
        if not self.members:
            return None
        if self.reopen_at is not None:
            return self.reopen_at
        if self.first_addition is None:
            return None
        at = self.first_addition + ADDITIONS_DELAY
        if self.last_addition is not None:
            at = max(at, self.last_addition + ADDITIONS_INTERVAL)
        return at

    def open(self, now: float) -> Stream:
        """Returns the next stream, with all accounts on it."""
        if self.first_addition is not None:
            self.last_addition = now
        self.first_addition = self.reopen_at = None
        self.next = Stream(tuple(sorted(self.members)), now)
        return self.next

    def answered(self, stream: Stream) -> list[Stream]:
        """Makes the stream the current one. Returns those to be ended: the one that it replaces, or itself, if it was
        given up before."""
        if stream is not self.next:
            return [stream]
        replaced, self.current, self.next = self.current, stream, None
        return [] if replaced is None else [replaced]

    def message(self, stream: Stream) -> None:
        """Notes that the stream works."""
        stream.delivered = True

    def reopen(self, at: float) -> None:
        """Plans a stream for the given time, if none is planned earlier and there is something to watch."""
        if self.members and (self.reopen_at is None or at < self.reopen_at):
            self.reopen_at = at

    def ended(self, stream: Stream) -> bool:
        """Notes that a stream has ended. Returns whether that says anything: it does not if another one has taken its
        place, or is about to."""
        if stream is self.current:
            self.current = None
            return self.next is None
        if stream is self.next:
            self.next = None
            return True
        return False

    def after_end(self, stream: Stream, error: TokenBrokerError, now: float, random: float) -> None:
        """Plans the stream that follows one which ended for no reason that concerns its accounts."""
        if stream.delivered and now - stream.opened_at >= SHORTEST_LIFE:
            self.failures, pause = 0, 0.0
        else:
            pause = growing_pause(FIRST_PAUSE, LONGEST_PAUSE, self.failures, random)
            self.failures += 1
        self.reopen(now + max(pause, min(error.retry_after or 0.0, LONGEST_RETRY_INFO)))

    def start_again(self, now: float) -> None:
        """Forgets the streams, because nothing is left of them after a fork."""
        self.current = self.next = self.last_addition = None
        self.failures = 0
        self.reopen(now)
