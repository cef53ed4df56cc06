"""Tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .v1.token_broker_pb2 import GetTokenResponse

END_MARGIN = 1.0
"""How many seconds before its end a token counts as ended, because a request needs time to reach the API."""


class Token:
    """An upstream token of an account. It never changes, and its text forms leave out the secret."""

    __slots__ = ("_end", "_reuse_end", "_secret", "account", "allowed_ip", "api_base_url", "generation")

    account: str
    """The account's name."""
    generation: int
    """A number that grows with each new token of the account."""
    allowed_ip: str
    """The address from which the upstream may accept the token. It is empty if the token names none."""
    api_base_url: str
    """The base URL of the API for which the token is valid."""

    def __init__(
        self,
        *,
        account: str,
        access_token: str,
        generation: int,
        allowed_ip: str,
        api_base_url: str,
        reuse_end: float,
        end: float,
    ) -> None:
        self.account = account
        self.generation = generation
        self.allowed_ip = allowed_ip
        self.api_base_url = api_base_url
        self._secret = access_token
        self._reuse_end = reuse_end
        self._end = end

    @property
    def access_token(self) -> str:
        """The upstream's JWT, which goes into the header `Authorization: Bearer …`."""
        return self._secret

    @property
    def expires_in(self) -> float:
        """How many seconds the token remains valid. It is right even where the wall clock is not."""
        return self._end - time.monotonic()

    def __repr__(self) -> str:
        return f"<Token of account {self.account!r}, generation {self.generation}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Token cannot be pickled, because that would write its secret down")

    def ended(self, now: float) -> bool:
        """Whether the token should no longer be sent."""
        return now >= self._end - END_MARGIN

    def fresh(self, now: float) -> bool:
        """Whether the token may be used without asking again."""
        return now < self._reuse_end

    def to_be_renewed(self, now: float) -> Token:
        """Returns the same token, which is to be asked for again now."""
        return Token(
            account=self.account,
            access_token=self._secret,
            generation=self.generation,
            allowed_ip=self.allowed_ip,
            api_base_url=self.api_base_url,
            reuse_end=min(now, self._reuse_end),
            end=self._end,
        )

    def replaces(self, kept: Token | None, now: float) -> bool:
        """Whether this token is to be kept instead of the other. One of an older generation is used only where
        nothing else is left."""
        if kept is None or self.generation > kept.generation or kept.ended(now):
            return True
        return self.generation == kept.generation and self._secret == kept._secret and self._reuse_end > kept._reuse_end


def token_of(account: str, answer: GetTokenResponse, arrival: float) -> Token | None:
    """Makes a token of an answer. Returns None if the answer has none, or does not say how long it may be used."""
    reuse_for = answer.reuse_for.seconds + answer.reuse_for.nanos / 1e9
    expires_in = answer.expires_in.seconds + answer.expires_in.nanos / 1e9
    if not answer.access_token or reuse_for <= 0 or expires_in <= 0:
        return None
    return Token(
        account=account,
        access_token=answer.access_token,
        generation=answer.generation,
        allowed_ip=answer.allowed_ip,
        api_base_url=answer.api_base_url,
        reuse_end=arrival + reuse_for,
        end=arrival + expires_in,
    )
