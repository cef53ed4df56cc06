"""Tokens for the requests of httpx. Install `token-broker-client[httpx]`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any

import httpx

from ._aio import AsyncTokenClient
from ._http import LONGEST_REFUSAL, check_origin, may_be_refusal, peek, refusal_code
from ._sync import TokenClient
from ._token import Token

_PIECE = 1024  # how much of a body is decoded at a time, because a little can become a lot


class TokenAuth(httpx.Auth):
    """Puts the token of an account on each request of an `httpx.Client`.

    If the API answers that it refuses the token, this is reported to the broker, and the request is sent again, once,
    with the next token. A token is sent to its API only; for any other host, `WrongHost` is raised. A redirect away
    from the API is refused before anything is sent there, unless the client has a transport that does not use httpcore:
    that is refused afterwards.

        httpx.Client(auth=TokenAuth(client, "acme"))
    """

    def __init__(self, client: TokenClient, account: str, *, timeout: float | None = None) -> None:
        self._client = client
        self._account = account
        self._timeout = timeout

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        token = self._client.token(self._account, timeout=self._timeout)
        _authorize(request, token)
        _guard(request, _Guard, token)
        response = yield request
        check_origin(token, str(response.url))
        code = _refusal_code(response) if _worth_reading(response) else None
        if code is None:
            return
        newer = self._client._replacement(token, code, self._timeout)
        if newer is not None and _can_be_sent_again(request):
            _authorize(request, newer)
            yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        raise TypeError("an httpx.AsyncClient needs an AsyncTokenAuth")
        yield request


class AsyncTokenAuth(httpx.Auth):
    """Puts the token of an account on each request of an `httpx.AsyncClient`, like `TokenAuth`.

    httpx.AsyncClient(auth=AsyncTokenAuth(client, "acme"))
    """

    def __init__(self, client: AsyncTokenClient, account: str, *, timeout: float | None = None) -> None:
        self._client = client
        self._account = account
        self._timeout = timeout

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        raise TypeError("an httpx.Client needs a TokenAuth")
        yield request

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        token = await self._client.token(self._account, timeout=self._timeout)
        _authorize(request, token)
        _guard(request, _AsyncGuard, token)
        response = yield request
        check_origin(token, str(response.url))
        code = await _async_refusal_code(response) if _worth_reading(response) else None
        if code is None:
            return
        newer = await self._client._replacement(token, code, self._timeout)
        if newer is not None and _can_be_sent_again(request):
            _authorize(request, newer)
            yield request


def _authorize(request: httpx.Request, token: Token) -> None:
    check_origin(token, str(request.url))
    request.headers["Authorization"] = f"Bearer {token.access_token}"


class _Guard:
    """Is called for each event of a request and of those that follow its redirects, and refuses to send one elsewhere.
    httpx would send it without the token, or with it from http to https on the same host."""

    def __init__(self, token: Token, other: Callable[..., Any] | None) -> None:
        self._token = token
        self.other = other  # the one that the program has set

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        self.check(event, info)
        if self.other is not None:
            self.other(event, info)

    def check(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith(".send_request_headers.started") and info["request"].method != b"CONNECT":
            check_origin(self._token, _target(info["request"].url))


class _AsyncGuard(_Guard):
    async def __call__(self, event: str, info: dict[str, Any]) -> None:  # type: ignore[override]
        self.check(event, info)
        if self.other is not None:
            await self.other(event, info)


def _guard(request: httpx.Request, kind: type[_Guard], token: Token) -> None:
    other = request.extensions.get("trace")
    if isinstance(other, _Guard):  # the program sends the request again
        other = other.other
    # The requests that follow redirects have the extensions too.
    request.extensions = {**request.extensions, "trace": kind(token, other)}


def _target(url: Any) -> str:
    """Returns where a request of httpcore goes. Through a proxy, the whole URL is the target."""
    target: str = url.target.decode("ascii", "replace")
    if not target.startswith("/"):
        return target
    host = url.host.decode("ascii", "replace")
    return f"{url.scheme.decode()}://{f'[{host}]' if ':' in host else host}:{url.port or ''}"


def _can_be_sent_again(request: httpx.Request) -> bool:
    """Whether the body is in memory. A stream has been used up by the first request."""
    return isinstance(request.stream, httpx.ByteStream)


def _worth_reading(response: httpx.Response) -> bool:
    return may_be_refusal(response.status_code, response.headers.get("content-length"))


def _refusal_code(response: httpx.Response) -> str | None:
    stream = response.stream
    assert isinstance(stream, httpx.SyncByteStream)  # noqa: S101
    body, again = peek(iter(stream))
    response.stream = _Replayed(stream, again)
    return None if body is None else _code_in(response, body)


def _code_in(response: httpx.Response, body: bytes) -> str | None:
    """Searches a copy of the body, so that the program reads the answer itself, and hears if that is broken."""
    pieces = (body[start : start + _PIECE] for start in range(0, len(body), _PIECE))
    encoding = {"Content-Encoding": response.headers.get("Content-Encoding", "")}
    copy = httpx.Response(response.status_code, headers=encoding, stream=_Pieces(pieces))
    decoded, _ = peek(copy.iter_bytes())
    return None if decoded is None else refusal_code(decoded)


class _Pieces(httpx.SyncByteStream):
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces


class _Replayed(httpx.SyncByteStream):
    """A body of which some has been read."""

    def __init__(self, stream: httpx.SyncByteStream, chunks: Iterator[bytes]) -> None:
        self._stream = stream
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        self._stream.close()


async def _async_refusal_code(response: httpx.Response) -> str | None:
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)  # noqa: S101
    head: list[bytes] = []
    rest = stream.__aiter__()
    ended = False
    problem: Exception | None = None
    while not ended and problem is None and sum(map(len, head)) <= LONGEST_REFUSAL:
        try:
            head.append(await rest.__anext__())
        except StopAsyncIteration:
            ended = True
        except Exception as error:  # noqa: BLE001  # the program gets it when it reads the body
            problem = error
    response.stream = _AsyncReplayed(stream, head, rest, problem)
    return _code_in(response, b"".join(head)) if ended else None


class _AsyncReplayed(httpx.AsyncByteStream):
    """A body of which some has been read."""

    def __init__(
        self, stream: httpx.AsyncByteStream, head: list[bytes], rest: AsyncIterator[bytes], problem: Exception | None
    ) -> None:
        self._stream = stream
        self._head = head
        self._rest = rest
        self._problem = problem

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._head:
            yield chunk
        if self._problem is not None:
            raise self._problem
        async for chunk in self._rest:
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
