"""What can go wrong."""

from __future__ import annotations

import enum
from typing import ClassVar


class Kind(str, enum.Enum):
    """The kinds of errors, which all clients of the broker share."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_GRANTED = "NOT_GRANTED"
    NO_SUCH_ACCOUNT = "NO_SUCH_ACCOUNT"
    ACCOUNT_DISABLED = "ACCOUNT_DISABLED"
    CREDENTIAL_REJECTED = "CREDENTIAL_REJECTED"
    EGRESS_REJECTED = "EGRESS_REJECTED"
    UNAVAILABLE = "UNAVAILABLE"
    OVERLOADED = "OVERLOADED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    CLOSED = "CLOSED"
    WRONG_HOST = "WRONG_HOST"
    INTERNAL = "INTERNAL"


class TokenBrokerError(Exception):
    """The base of all errors of this package. Each kind has a class of its own."""

    kind: ClassVar[Kind] = Kind.INTERNAL
    temporary: ClassVar[bool] = False
    """Whether the same call may succeed later without anybody changing anything."""

    message: str
    """Explains the error to people."""
    account: str
    """The account's name. It is empty if the error concerns none."""
    code: str | None
    """The name of the gRPC status, if there was one."""
    reason: str
    """The reason of the broker's ErrorInfo, such as `CALLER_RATE`. It may be empty."""
    upstream_code: str
    """The upstream's code, where the upstream refused the account's credential. Otherwise empty."""
    retry_after: float | None
    """How many seconds the broker asks to wait, if it said so."""

    def __init__(
        self,
        message: str,
        *,
        account: str = "",
        code: str | None = None,
        reason: str = "",
        upstream_code: str = "",
        retry_after: float | None = None,
        retriable: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.account = account
        self.code = code
        self.reason = reason
        self.upstream_code = upstream_code
        self.retry_after = retry_after
        self._retriable = retriable  # False if the broker forbids to repeat the call

    def __str__(self) -> str:
        text = f"account {self.account}: " if self.account else ""
        text += self.kind.value
        if self.reason and self.reason != self.kind.value:
            text += f" ({self.reason})"
        text += f": {self.message}"
        if self.upstream_code:
            text += f" (upstream code {self.upstream_code})"
        return text

    def again(self) -> TokenBrokerError:
        """Returns a copy to raise, because one exception must not be raised in several threads at once."""
        copy = type(self)(
            self.message,
            account=self.account,
            code=self.code,
            reason=self.reason,
            upstream_code=self.upstream_code,
            retry_after=self.retry_after,
            retriable=self._retriable,
        )
        copy.__cause__ = self.__cause__
        return copy


class InvalidArgument(TokenBrokerError, ValueError):
    """A name or a setting cannot be used."""

    kind = Kind.INVALID_ARGUMENT


class Unauthenticated(TokenBrokerError):
    """The broker does not know this caller's credential."""

    kind = Kind.UNAUTHENTICATED


class NotGranted(TokenBrokerError):
    """No grant of this caller covers the account."""

    kind = Kind.NOT_GRANTED


class NoSuchAccount(TokenBrokerError):
    """A grant covers the name, but there is no such account."""

    kind = Kind.NO_SUCH_ACCOUNT


class AccountDisabled(TokenBrokerError):
    """An administrator disabled the account."""

    kind = Kind.ACCOUNT_DISABLED


class CredentialRejected(TokenBrokerError):
    """The upstream refuses the account's credential. `upstream_code` says how."""

    kind = Kind.CREDENTIAL_REJECTED


class EgressRejected(TokenBrokerError):
    """The upstream refuses the broker's address."""

    kind = Kind.EGRESS_REJECTED


class Unavailable(TokenBrokerError):
    """The broker, or the upstream, cannot be reached."""

    kind = Kind.UNAVAILABLE
    temporary = True


class Overloaded(TokenBrokerError):
    """The broker sheds load, or the caller's rate is used up."""

    kind = Kind.OVERLOADED
    temporary = True


class DeadlineExceeded(TokenBrokerError, TimeoutError):
    """No answer came in time."""

    kind = Kind.DEADLINE_EXCEEDED
    temporary = True


class Cancelled(TokenBrokerError):
    """The caller cancelled the call. With asyncio, `asyncio.CancelledError` is raised instead."""

    kind = Kind.CANCELLED


class Closed(TokenBrokerError):
    """The client was closed."""

    kind = Kind.CLOSED


class WrongHost(TokenBrokerError):
    """An adapter was asked to send a token to another host than that of the API."""

    kind = Kind.WRONG_HOST


class Internal(TokenBrokerError):
    """Anything else."""

    kind = Kind.INTERNAL
    temporary = True


_BY_CODE: dict[str, type[TokenBrokerError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": NotGranted,
    "NOT_FOUND": NoSuchAccount,
    "UNAVAILABLE": Unavailable,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
}
_BY_REASON: dict[str, type[TokenBrokerError]] = {
    "ACCOUNT_DISABLED": AccountDisabled,
    "CREDENTIAL_REJECTED": CredentialRejected,
    "EGRESS_REJECTED": EgressRejected,
}


def unexpected(problem: Exception, account: str = "") -> Internal:
    """Makes an error of an exception that nobody foresaw. Its text is left out: it may quote a secret."""
    return Internal(f"an unexpected {type(problem).__name__} was raised", account=account)


def class_of(code: str, reason: str) -> type[TokenBrokerError]:
    """Returns the class of a status. `CANCELLED` is internal: calls of this client are ended by nobody else."""
    if code == "FAILED_PRECONDITION":
        return _BY_REASON.get(reason, Internal)
    return _BY_CODE.get(code, Internal)
