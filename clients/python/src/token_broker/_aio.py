"""The client for programs with asyncio."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from types import TracebackType
from typing import Any, TypeVar

import grpc
import grpc.aio

from ._config import Config, check
from ._connection import Connection, Connector, ended_stream, error_of, metadata_of
from ._core import BearerChanged, Call, Core, Effect, Flow, Log, Look, NextMessage, OpenStream, Report, Wait
from ._errors import Closed, TokenBrokerError, Unavailable, unexpected
from ._files import BearerFile, CertificateFiles
from ._log import log
from ._plan import Stream
from ._sync import deadline_of
from ._token import Token

T = TypeVar("T")
CLOSE_TIMEOUT = 0.9
_users: dict[str, int] = {}  # has the process that was the first to make calls


class _Runner:
    """Runs the flows of the core: those of callers in their tasks, and others in tasks of its own. It does not refer to
    the client, so that a client that is no longer used is collected."""

    def __init__(self, config: Config) -> None:
        endpoints = check(config)
        self._files = CertificateFiles(config)
        self._bearer = BearerFile(config.bearer_file)
        self._connector = Connector(grpc.aio, endpoints, self._files, self._dispose, self._connection_changed)
        self.core = Core(self, endpoints=len(endpoints.hosts), certificates=self._files.any)
        self.loop: asyncio.AbstractEventLoop | None = None  # the one to which the tasks and connections belong
        self._pid = os.getpid()
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiters: set[asyncio.Future[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._abandoned: list[object] = []  # belong to another loop, or to the parent of a fork

    def bind(self) -> None:
        """Keeps only the tokens if the program has another loop now, or is the child of a fork."""
        loop = asyncio.get_running_loop()
        if loop is self.loop and os.getpid() == self._pid:
            return
        if self.loop is not None:
            # They are kept, because their destructors belong to the other loop.
            self._abandoned.append(
                (self._connector.drop(), self.core.plan.current, self.core.plan.next, self._tasks, self._waiters)
            )
            self._files.reset_lock()
            self._tasks, self._waiters = set(), set()
            self.core.start_again()
        self.loop, self._pid = loop, os.getpid()

    # What the core calls

    def start(self, flow: Flow[None]) -> None:
        task = asyncio.get_running_loop().create_task(self.run(flow))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def changed(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def end_stream(self, stream: Stream) -> None:
        if stream.call is not None:
            stream.call.cancel()

    # Running

    async def run(self, flow: Flow[T]) -> T:
        """Runs a flow to its end."""
        result: Any = None
        error: TokenBrokerError | None = None
        try:
            while True:
                try:
                    effect = flow.send(result) if error is None else flow.throw(error)
                except StopIteration as end:
                    value: T = end.value
                    return value
                result = error = None
                try:
                    result = await self._do(effect)
                except TokenBrokerError as problem:
                    error = problem
                except Exception as problem:  # noqa: BLE001  # the flow has to tell those who wait for it
                    error = unexpected(problem)
        finally:
            flow.close()

    async def _do(self, effect: Effect) -> Any:
        if isinstance(effect, Wait):
            return await self._wait(effect)
        if isinstance(effect, Call):
            return await self._call(effect)
        if isinstance(effect, NextMessage):
            return await self._next_message(effect.stream)
        if isinstance(effect, OpenStream):
            return await self._open(effect)
        if isinstance(effect, BearerChanged):
            return self._bearer.changed_from(effect.used)
        if isinstance(effect, Look):
            return self._connector.look()
        assert isinstance(effect, Log)  # noqa: S101
        return log(effect.level, effect.text, *effect.arguments)

    async def _wait(self, wait: Wait) -> None:
        loop = asyncio.get_running_loop()
        while not (wait.ready() or self.core.closed):
            left = wait.until - time.monotonic()
            if left <= 0:
                break
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait({waiter}, timeout=None if left == float("inf") else left)
            finally:
                self._waiters.discard(waiter)

    def _acquire(self) -> Connection:
        if _users.setdefault("process", os.getpid()) != os.getpid():
            # Its thread does not exist here, so calls would never end.
            raise Unavailable(
                "gRPC for asyncio cannot be used in a child whose parent has used it: fork before the first call",
                retriable=False,
            )
        return self._connector.acquire()

    async def _call(self, call: Call) -> tuple[Any, float]:
        connection = self._acquire()
        error: TokenBrokerError | None = None
        try:
            call.bearer = self._bearer.current()
            sent = time.monotonic()
            method = getattr(connection.stub, call.method)
            answer = await method(
                call.request, timeout=max(0.0, call.deadline - sent), metadata=metadata_of(call.bearer)
            )
        except grpc.RpcError as problem:
            error = self._error_of(problem, call.account)
        except grpc.aio.UsageError:  # raised by a channel that has just been closed
            error = Closed("the client was closed", account=call.account)
        except asyncio.CancelledError:
            if not self.core.closed:
                raise
            error = Closed("the client was closed", account=call.account)
        finally:
            self._connector.release(connection, error)
        if error is not None:
            raise error
        return answer, sent

    async def _open(self, effect: OpenStream) -> None:
        stream = effect.stream
        connection = self._acquire()
        effect.bearer = self._bearer.current()
        try:
            stream.call = connection.stub.WatchTokens(effect.request, metadata=metadata_of(effect.bearer))
            stream.call.add_done_callback(lambda _: self._connector.release(connection))
        except grpc.aio.UsageError:
            self._connector.release(connection)
            raise Closed("the client was closed") from None
        await stream.call.initial_metadata()
        if stream.call.done():
            await self._next_message(stream)  # raises what the broker said

    async def _next_message(self, stream: Stream) -> Any:
        try:
            message = await stream.call.read()
        except grpc.RpcError as problem:
            error = self._error_of(problem, "")
        except asyncio.CancelledError:
            if not stream.call.cancelled():
                raise  # the task was cancelled, not the call
            error = Closed("the stream was replaced")
        else:
            if message is not grpc.aio.EOF:
                return message
            error = ended_stream()
        raise error

    def _error_of(self, problem: grpc.RpcError, account: str) -> TokenBrokerError:
        if self.core.closed:
            return Closed("the client was closed", account=account)
        return error_of(problem, account)

    def _connection_changed(self) -> None:
        self.core.connection_changed()

    def _dispose(self, channel: Any) -> None:
        loop = self.loop
        if loop is None or loop.is_closed():
            return
        task = loop.create_task(channel.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends everything, and waits for the tasks."""
        self.bind()
        self.core.close()
        for stream in (self.core.plan.current, self.core.plan.next):
            if stream is not None and stream.call is not None:
                stream.call.cancel()
        self._connector.close()
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT)
        for task in tasks:
            task.cancel()

    def abandon(self) -> None:
        """Closes the runner of a client that was collected, perhaps in another thread than that of the loop."""
        loop = self.loop
        if loop is None or loop.is_closed() or os.getpid() != self._pid or self.core.closed:
            return

        def end() -> None:
            self._closing = loop.create_task(self.close())

        loop.call_soon_threadsafe(end)


class AsyncTokenClient:
    """Keeps the tokens of accounts. A program makes one, and all of its tasks share it.

    Making a client opens no connection, so it does not fail when the broker is away. It raises `InvalidArgument` when
    the settings cannot be used. It belongs to the event loop that uses it; another loop gets the tokens that are kept,
    and connections of its own. The child of a fork gets the tokens too, but can make calls only if its parent had made
    none: gRPC for asyncio does not survive a fork.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._runner = _Runner(config)
        weakref.finalize(self, self._runner.abandon).atexit = False

    @classmethod
    def from_env(cls) -> AsyncTokenClient:
        """Makes a client with the settings in the environment. See `Config.from_env`."""
        return cls(Config.from_env())

    async def token(self, account: str, *, timeout: float | None = None) -> Token:
        """Returns a token of the account that may be used now.

        It returns the kept one without a call if that is not due for replacement, and otherwise asks the broker, for at
        most `timeout` seconds, by default those of the settings. Raises `TokenBrokerError`.
        """
        self._runner.bind()
        return await self._runner.run(self._runner.core.token(account, self._deadline(account, timeout)))

    async def report(
        self,
        account: str,
        generation: int,
        upstream_code: str,
        *,
        timeout: float | None = None,
    ) -> Report:
        """Tells the broker that the API refused the token of the generation with the code, such as `61003`. The
        adapters do this by themselves. Raises `TokenBrokerError`."""
        self._runner.bind()
        core = self._runner.core
        return await self._runner.run(core.report(account, generation, upstream_code, self._deadline(account, timeout)))

    async def close(self) -> None:
        """Ends the watch and the connections. Calls that are waiting, and later ones, raise `Closed`. It may be called
        again."""
        await self._runner.close()

    async def __aenter__(self) -> AsyncTokenClient:  # noqa: PYI034
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncTokenClient of {', '.join(self.config.endpoints)}>"

    def _deadline(self, account: str, timeout: float | None) -> float:
        return deadline_of(self.config, account, timeout)

    async def _replacement(self, refused: Token, upstream_code: str, timeout: float | None) -> Token | None:
        """For the adapters: reports a refused token and returns a newer one."""
        self._runner.bind()
        return await self._runner.run(
            self._runner.core.replacement(refused, upstream_code, self._deadline(refused.account, timeout))
        )
