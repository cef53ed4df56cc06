"""Tokens for the requests of requests. Install `token-broker-client[requests]`."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import requests
import requests.auth
import requests.utils
import urllib3

from ._errors import WrongHost
from ._http import check_origin, may_be_refusal, peek, refusal_code
from ._sync import TokenClient
from ._token import Token

_PIECE = 8192  # how much of a body is read at a time


class TokenAuth(requests.auth.AuthBase):
    """Puts the token of an account on each request of a `requests.Session`.

    If the API answers that it refuses the token, this is reported to the broker, and the request is sent again, once,
    with the next token. A token is sent to its API only; for any other host, `WrongHost` is raised, and for an answer
    that is a redirect to another host, too.

        session.auth = TokenAuth(client, "acme")
    """

    def __init__(self, client: TokenClient, account: str, *, timeout: float | None = None) -> None:
        self._client = client
        self._account = account
        self._timeout = timeout

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        token = self._client.token(self._account, timeout=self._timeout)
        _authorize(request, token)
        request.register_hook(  # type: ignore[no-untyped-call]
            "response", functools.partial(self._answered, token=token)
        )
        return request

    def _answered(self, response: requests.Response, *, token: Token, **options: Any) -> requests.Response:
        request = response.request
        check_origin(token, request.url or "")
        _check_redirect(response, token)
        code = _refusal_code(response)
        if code is None:
            return response
        newer = self._client._replacement(token, code, self._timeout)
        if newer is None or not _rewind(request):
            return response
        _authorize(request, newer)  # the session copies it to follow redirects
        again = request.copy()
        again.hooks = {}
        response.close()
        connection: requests.adapters.BaseAdapter = response.connection
        answer = connection.send(again, **options)
        answer.history.append(response)
        _check_redirect(answer, newer)
        return answer


def _authorize(request: requests.PreparedRequest, token: Token) -> None:
    check_origin(token, request.url or "")
    request.headers["Authorization"] = f"Bearer {token.access_token}"


def _check_redirect(response: requests.Response, token: Token) -> None:
    """Raises `WrongHost` if the answer leads away from the API. requests would send the token there if only the scheme
    changes."""
    if not response.is_redirect:
        return
    try:
        target = urljoin(response.request.url or "", response.headers["location"])
    except ValueError:
        target = ""
    try:
        check_origin(token, target)
    except WrongHost:
        response.close()
        raise


def _rewind(request: requests.PreparedRequest) -> bool:
    """Makes the body ready to be sent again. Returns False if it cannot be."""
    if request.body is None or isinstance(request.body, (bytes, str)):
        return True
    try:
        requests.utils.rewind_body(request)
    except requests.exceptions.UnrewindableBodyError:
        return False
    return True


def _refusal_code(response: requests.Response) -> str | None:
    if not may_be_refusal(response.status_code, response.headers.get("content-length")):
        return None
    raw = response.raw
    body, again = peek(raw.stream(_PIECE, decode_content=False))
    response.raw = _response_like(raw, _Body(again, raw), response.request.method)
    if body is None:
        return None
    # A copy is decoded, so that the program reads the answer itself, and hears if that is broken.
    copy = _response_like(raw, io.BytesIO(body), response.request.method)
    decoded, _ = peek(copy.stream(_PIECE, decode_content=True))
    return None if decoded is None else refusal_code(decoded)


def _response_like(raw: Any, body: Any, method: str | None) -> urllib3.HTTPResponse:
    """Returns the same answer with another source of its body."""
    return urllib3.HTTPResponse(
        body,
        headers=raw.headers,
        status=raw.status,
        version=raw.version,
        reason=raw.reason,
        preload_content=False,
        decode_content=raw.decode_content,
        original_response=raw._original_response,
        request_method=method,
    )


class _Body(io.RawIOBase):
    """A body of which some has been read. To close it closes the answer that it belongs to."""

    def __init__(self, chunks: Iterator[bytes], raw: Any) -> None:
        self._chunks = chunks
        self._raw = raw
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            try:
                self._left = next(self._chunks)
            except StopIteration:
                return 0
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
            self._raw.release_conn()
        super().close()
