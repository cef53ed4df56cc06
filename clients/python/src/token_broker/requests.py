"""Tokens for the requests of requests. Install `token-broker-client[requests]`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import requests
import requests.auth
import requests.utils

from ._errors import WrongHost
from ._http import check_origin, may_be_refusal, peek, refusal_code
from ._sync import TokenClient
from ._token import Token


class TokenAuth(requests.auth.AuthBase):
    """Puts the token of an account on each request of a `requests.Session`.

    If the API answers that it refuses the token, this is reported to the broker, and the request is sent again, once,
    with the next token. A token is sent to its API only; for any other host, `WrongHost` is raised.

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
        _keep_from_redirect(response, token)
        code = _refusal_code(response)
        if code is None:
            return response
        newer = self._client._replacement(token, code, self._timeout)
        if newer is None or not _rewind(request):
            return response
        again = request.copy()
        again.hooks = {}
        _authorize(again, newer)
        response.close()
        connection: requests.adapters.BaseAdapter = response.connection
        answer = connection.send(again, **options)
        answer.history.append(response)
        return answer


def _authorize(request: requests.PreparedRequest, token: Token) -> None:
    check_origin(token, request.url or "")
    request.headers["Authorization"] = f"Bearer {token.access_token}"


def _keep_from_redirect(response: requests.Response, token: Token) -> None:
    """Takes the token off the request that follows a redirect away from the API, because requests itself leaves it on
    if only the scheme changes. The session copies that request from this one after its hooks."""
    if not response.is_redirect:
        return
    try:
        check_origin(token, urljoin(response.request.url or "", response.headers["location"]))
    except (WrongHost, ValueError):
        response.request.headers.pop("Authorization", None)


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
    body, again = peek(response.raw.stream(8192, decode_content=True))
    response.raw = _Replayed(response.raw, again)
    return None if body is None else refusal_code(body)


class _Replayed:
    """A body of which some has been read, in place of the response of urllib3."""

    def __init__(self, raw: Any, chunks: Iterator[bytes]) -> None:
        self._raw = raw
        self._chunks = chunks
        self._left = b""

    def stream(self, amt: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:  # noqa: ARG002
        return self._chunks

    def read(self, amt: int | None = None, decode_content: bool | None = None) -> bytes:  # noqa: ARG002
        for chunk in self._chunks:
            self._left += chunk
            if amt is not None and len(self._left) >= amt:
                break
        end = len(self._left) if amt is None else amt
        read, self._left = self._left[:end], self._left[end:]
        return read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)
