from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from token_broker import AsyncTokenClient, Config, Report, Token, TokenClient

from .broker import Broker


class Client(Protocol):
    """Both kinds of clients, used without asyncio."""

    inner: Any

    def token(self, account: str = "acme", timeout: float | None = None) -> Token: ...

    def tokens(self, number: int, account: str = "acme") -> list[Token]: ...

    def report(self, account: str, generation: int, code: str) -> Report: ...

    def close(self) -> None: ...

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that happens in the background."""


class WithThreads:
    def __init__(self, config: Config) -> None:
        self.inner = TokenClient(config)

    def token(self, account: str = "acme", timeout: float | None = None) -> Token:
        return self.inner.token(account, timeout=timeout)

    def tokens(self, number: int, account: str = "acme") -> list[Token]:
        results: list[Token] = []
        threads = [threading.Thread(target=lambda: results.append(self.token(account))) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def report(self, account: str, generation: int, code: str) -> Report:
        return self.inner.report(account, generation, code)

    def close(self) -> None:
        self.inner.close()

    def until(self, condition: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(3000):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError("it does not happen")


class WithTasks:
    def __init__(self, config: Config) -> None:
        self.loop = asyncio.new_event_loop()
        self.inner = AsyncTokenClient(config)

    def token(self, account: str = "acme", timeout: float | None = None) -> Token:
        return self.loop.run_until_complete(self.inner.token(account, timeout=timeout))

    def tokens(self, number: int, account: str = "acme") -> list[Token]:
        async def all_of_them() -> list[Token]:
            return await asyncio.gather(*(self.inner.token(account) for _ in range(number)))

        return self.loop.run_until_complete(all_of_them())

    def report(self, account: str, generation: int, code: str) -> Report:
        return self.loop.run_until_complete(self.inner.report(account, generation, code))

    def close(self) -> None:
        self.loop.run_until_complete(self.inner.close())

    def until(self, condition: Callable[[], bool]) -> None:
        async def poll() -> None:
            for _ in range(3000):
                if condition():
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("it does not happen")

        self.loop.run_until_complete(poll())


Open = Callable[..., Client]


@pytest.fixture(params=[WithThreads, WithTasks], ids=["threads", "asyncio"])
def open_client(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens clients of both kinds, and closes them after the test."""
    opened: list[Client] = []

    def open_one(*brokers: Broker | str, **settings: Any) -> Client:
        endpoints = [broker if isinstance(broker, str) else broker.endpoint for broker in brokers]
        client: Client = request.param(Config(endpoints=endpoints, **settings))
        opened.append(client)
        return client

    yield open_one
    for client in opened:
        client.close()
        if isinstance(client, WithTasks):
            client.loop.close()


@pytest.fixture
def broker() -> Iterator[Broker]:
    broker = Broker()
    yield broker
    broker.stop()


@pytest.fixture
def bearer_file(tmp_path: Path) -> Path:
    file = tmp_path / "bearer"
    file.write_text(" tbk_this-is-the-bearer\n")
    return file
