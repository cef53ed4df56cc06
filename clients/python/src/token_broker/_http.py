"""What the adapters decide, for any HTTP library."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

from ._errors import WrongHost
from ._token import Token

LONGEST_REFUSAL = 64 * 1024  # the size up to which the body of an answer is searched for the upstream's error code
_PORTS = {"http": 80, "https": 443}


def check_origin(token: Token, url: str) -> None:
    """Raises `WrongHost` if the URL is not one of the API for which the token is valid."""
    target = _origin(url)
    if target is None or target != _origin(token.api_base_url):
        raise WrongHost(
            f"the token is valid for {token.api_base_url}, so it is not sent to {_text_of(target)}",
            account=token.account,
        )


def _origin(url: str) -> tuple[str, str, int] | None:
    """Returns the scheme, host and port of a URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
        host = parts.hostname
    except ValueError:
        return None
    return (parts.scheme, host, port) if host and port else None


def _text_of(origin: tuple[str, str, int] | None) -> str:
    return "another host" if origin is None else f"{origin[0]}://{origin[1]}:{origin[2]}"


def may_be_refusal(status: int, length: str | None) -> bool:
    """Whether the body of an answer is worth reading, by its status and Content-Length."""
    return status >= 400 and (length is None or not length.isdigit() or int(length) <= LONGEST_REFUSAL)


def refusal_code(body: bytes) -> str | None:
    """Returns the upstream's error code if the body says that the token was refused."""
    if len(body) > LONGEST_REFUSAL:
        return None
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    code = error["code"] if isinstance(error, dict) and "code" in error else answer.get("code")
    if isinstance(code, (str, int)) and str(code) in ("61003", "61004"):
        return str(code)
    return None


def peek(chunks: Iterator[bytes]) -> tuple[bytes | None, Iterator[bytes]]:
    """Reads a body, but not more of it than a refusal has. Returns it, or None if it is longer or cannot be read, and
    all of it again for the program."""
    head: list[bytes] = []
    while sum(map(len, head)) <= LONGEST_REFUSAL:
        try:
            head.append(next(chunks))
        except StopIteration:
            return b"".join(head), iter(head)
        except Exception as error:  # noqa: BLE001  # the program gets it when it reads the body
            return None, itertools.chain(head, _raising(error))
    return None, itertools.chain(head, chunks)


def _raising(error: Exception) -> Iterator[bytes]:
    raise error
    yield b""
