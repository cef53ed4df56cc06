"""Drives the Python clients for the scenarios in clients/conformance, over standard input and output.

With TOKEN_BROKER_DRIVER=asyncio it drives `AsyncTokenClient`, otherwise `TokenClient`. Both run below an event loop;
the calls of `TokenClient` are made in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import httpx
import requests

import token_broker
import token_broker.httpx
import token_broker.requests
from token_broker import AsyncTokenClient, Config, Report, Token, TokenBrokerError, TokenClient

T = TypeVar("T")
Object = dict[str, Any]


class Driven(Protocol):
    """A client, as the driver uses both kinds."""

    async def token(self, account: str, timeout: float | None) -> Token: ...

    async def report(self, account: str, generation: int, code: str, timeout: float | None) -> Report: ...

    async def api(self, adapter: str, request: Object, timeout: float | None) -> Object: ...

    async def close(self) -> None: ...

    def forms(self) -> list[object]: ...


class Threads:
    """A `TokenClient` whose calls are made in threads."""

    adapters = ("httpx", "requests")

    def __init__(self, config: Config) -> None:
        self.config = config
        self._client = TokenClient(config)
        self._pool = ThreadPoolExecutor(max_workers=256)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def token(self, account: str, timeout: float | None) -> Token:
        cancellation = token_broker.Cancellation()
        call = self._in_thread(lambda: self._client.token(account, timeout=timeout, cancellation=cancellation))
        try:
            return await asyncio.shield(call_task := asyncio.ensure_future(call))
        except asyncio.CancelledError:
            cancellation.cancel()
            return await call_task

    async def report(self, account: str, generation: int, code: str, timeout: float | None) -> Report:
        return await self._in_thread(lambda: self._client.report(account, generation, code, timeout=timeout))

    async def api(self, adapter: str, request: Object, timeout: float | None) -> Object:
        def with_httpx() -> Object:
            auth = token_broker.httpx.TokenAuth(self._client, request["account"], timeout=timeout)
            with httpx.Client(auth=auth, follow_redirects=True, timeout=60) as client:
                answer = client.request(request.get("method", "GET"), request["url"], content=request.get("body"))
            return {"status": answer.status_code, "body": answer.text}

        def with_requests() -> Object:
            auth = token_broker.requests.TokenAuth(self._client, request["account"], timeout=timeout)
            with requests.Session() as session:
                answer = session.request(
                    request.get("method", "GET"), request["url"], data=request.get("body"), auth=auth, timeout=60
                )
            return {"status": answer.status_code, "body": answer.text}

        return await self._in_thread(with_requests if adapter == "requests" else with_httpx)

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)

    def forms(self) -> list[object]:
        return [self._client, self._client.__dict__]


class Tasks:
    """An `AsyncTokenClient`."""

    adapters = ("httpx",)

    def __init__(self, config: Config) -> None:
        self.config = config
        self._client = AsyncTokenClient(config)

    async def token(self, account: str, timeout: float | None) -> Token:
        return await self._client.token(account, timeout=timeout)

    async def report(self, account: str, generation: int, code: str, timeout: float | None) -> Report:
        return await self._client.report(account, generation, code, timeout=timeout)

    async def api(self, adapter: str, request: Object, timeout: float | None) -> Object:  # noqa: ARG002
        auth = token_broker.httpx.AsyncTokenAuth(self._client, request["account"], timeout=timeout)
        async with httpx.AsyncClient(auth=auth, follow_redirects=True, timeout=60) as client:
            answer = await client.request(request.get("method", "GET"), request["url"], content=request.get("body"))
        return {"status": answer.status_code, "body": answer.text}

    async def close(self) -> None:
        await self._client.close()

    def forms(self) -> list[object]:
        return [self._client, self._client.__dict__]


class Opened:
    """A client with what `show` prints of it."""

    def __init__(self, driven: Driven, config: Config) -> None:
        self.driven = driven
        self.config = config
        self.last_token: Token | None = None
        self.last_error: TokenBrokerError | None = None

    async def token(self, account: str, timeout: float | None) -> Token:
        try:
            self.last_token = await self.driven.token(account, timeout)
        except TokenBrokerError as error:
            self.last_error = error
            raise
        return self.last_token


class Driver:
    def __init__(self, kind: Callable[[Config], Driven], adapters: tuple[str, ...]) -> None:
        self._kind = kind
        self._adapters = adapters
        self._clients: dict[str, Opened] = {}
        self._running: dict[int, asyncio.Task[None]] = {}

    async def serve(self, lines: asyncio.Queue[str | None]) -> None:
        """Answers the requests until the input ends."""
        while (line := await lines.get()) is not None:
            request: Object = json.loads(line)
            if request["op"] in ("open", "cancel"):
                await self._answer(request)
            else:
                self._running[request["id"]] = asyncio.create_task(self._answer(request))
        for opened in self._clients.values():
            await opened.driven.close()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _answer(self, request: Object) -> None:
        answer: Object = {"id": request["id"]}
        try:
            answer["ok"] = await self._do(request)
        except asyncio.CancelledError:
            answer["error"] = {"kind": "CANCELLED", "message": "asyncio.CancelledError"}
        except Exception as error:  # noqa: BLE001
            answer["error"] = error_object(error)
        self._running.pop(request["id"], None)
        print(json.dumps(answer), flush=True)  # noqa: T201

    async def _do(self, request: Object) -> Object:
        operation = request["op"]
        if operation == "hello":
            return {"language": "python", "adapters": self._adapters}
        if operation == "open":
            return self._open(request)
        if operation == "cancel":
            task = self._running.get(request["request"])
            if task is not None:
                task.cancel()
            return {}
        opened = self._clients.get(request["client"])
        if opened is None:
            raise token_broker.InvalidArgument("no such client is open")
        timeout = request["timeout_ms"] / 1000 if "timeout_ms" in request else None
        if operation == "token":
            return token_object(await opened.token(request["account"], timeout))
        if operation == "tokens":
            return await self._tokens(opened, request, timeout)
        if operation == "report":
            generation = int(request["generation"])
            report = await opened.driven.report(request["account"], generation, request["upstream_code"], timeout)
            return {"outcome": report.outcome.value, "retry_after_ms": round(report.retry_after * 1000)}
        if operation == "api":
            return await opened.driven.api(request.get("adapter", "httpx"), request, timeout)
        if operation == "load":
            return await self._load(opened, request)
        if operation == "show":
            return {"text": show(opened)}
        if operation == "close":
            await opened.driven.close()
            return {}
        raise ValueError(f"unknown operation {operation}")

    def _open(self, request: Object) -> Object:
        config = Config(
            endpoints=request["endpoints"],
            bearer_file=request.get("bearer_file"),
            ca_file=request.get("ca_file"),
            client_cert=request.get("client_cert"),
            client_key=request.get("client_key"),
            timeout=request.get("timeout_ms", 5000) / 1000,
        )
        self._clients[request["client"]] = Opened(self._kind(config), config)
        return {}

    async def _tokens(self, opened: Opened, request: Object, timeout: float | None) -> Object:
        async def one() -> Object:
            try:
                return token_object(await opened.token(request["account"], timeout))
            except TokenBrokerError as error:
                return {"error": error_object(error)}

        return {"results": await asyncio.gather(*(one() for _ in range(request["threads"])))}

    async def _load(self, opened: Opened, request: Object) -> Object:
        stop = time.monotonic() + request["stop_after_ms"] / 1000
        calls = 0
        errors: dict[str, int] = {}
        generations: set[str] = set()

        async def thread() -> None:
            nonlocal calls
            while time.monotonic() < stop:
                calls += 1
                try:
                    token = await opened.token(request["account"], None)
                    generations.add(str(token.generation))
                except TokenBrokerError as error:
                    errors[error.kind.value] = errors.get(error.kind.value, 0) + 1
                await asyncio.sleep(0.001)

        await asyncio.gather(*(thread() for _ in range(request["threads"])))
        return {"calls": calls, "errors": errors, "generations": sorted(generations)}


def show(opened: Opened) -> str:
    """Prints everything in all the ways in which Python prints."""
    texts = []
    for value in [*opened.driven.forms(), opened.config, opened.last_token, opened.last_error]:
        texts += [str(value), repr(value), f"{value}", f"{value!r}"]
        with contextlib.suppress(TypeError):
            texts.append(json.dumps(value))
        with contextlib.suppress(TypeError):
            texts.append(str(vars(value)))
    return "\n".join(texts)


def token_object(token: Token) -> Object:
    return {
        "token": token.access_token,
        "generation": str(token.generation),
        "allowed_ip": token.allowed_ip,
        "api_base_url": token.api_base_url,
        "expires_in_ms": round(token.expires_in * 1000),
    }


def error_object(error: Exception) -> Object:
    if not isinstance(error, TokenBrokerError):
        return {"kind": "INTERNAL", "message": f"{type(error).__name__}: {error}"}
    answer: Object = {"kind": error.kind.value, "message": error.message}
    if error.code:
        answer["code"] = error.code
    if error.reason:
        answer["reason"] = error.reason
    if error.upstream_code:
        answer["upstream_code"] = error.upstream_code
    if error.retry_after is not None:
        answer["retry_after_ms"] = round(error.retry_after * 1000)
    return answer


def read_lines(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str | None]) -> None:
    """Reads standard input in a thread of its own, because not every kind of it can be read by a loop."""
    for line in sys.stdin:
        if line.strip():
            loop.call_soon_threadsafe(lines.put_nowait, line)
    loop.call_soon_threadsafe(lines.put_nowait, None)


async def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.DEBUG)
    lines: asyncio.Queue[str | None] = asyncio.Queue()
    threading.Thread(target=read_lines, args=(asyncio.get_running_loop(), lines), daemon=True).start()
    if os.environ.get("TOKEN_BROKER_DRIVER") == "asyncio":
        driver = Driver(Tasks, Tasks.adapters)
    else:
        driver = Driver(Threads, Threads.adapters)
    await driver.serve(lines)


if __name__ == "__main__":
    asyncio.run(main())
