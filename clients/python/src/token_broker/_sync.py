"""The client for programs with threads."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import grpc

from ._config import Config, check
from ._connection import Connection, Connector, ended_stream, error_of, metadata_of
from ._core import BearerChanged, Call, Core, Effect, Flow, Log, Look, NextMessage, OpenStream, Report, Wait
from ._errors import Cancelled, Closed, InvalidArgument, TokenBrokerError, unexpected
from ._files import BearerFile, CertificateFiles
from ._log import log
from ._plan import Stream
from ._token import Token

T = TypeVar("T")
LONGEST_WAIT = 3600.0  # the longest wait at a time, because a lock cannot wait forever
CLOSE_TIMEOUT = 0.9


class Cancellation:
    """Cancels calls of a `TokenClient`. Give one to a call, and call `cancel` in another thread."""

    def __init__(self) -> None:
        # There is no lock, which a thread could hold when another one forks: each use of the set is one operation.
        self._cancelled = False
        self._wake: set[Callable[[], None]] = set()

    def cancel(self) -> None:
        """Makes the calls raise `Cancelled`. It may be called again."""
        self._cancelled = True
        for function in tuple(self._wake):
            function()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def _subscribe(self, wake: Callable[[], None]) -> None:
        self._wake.add(wake)

    def _unsubscribe(self, wake: Callable[[], None]) -> None:
        self._wake.discard(wake)


class _Runner:
    """Runs the flows of the core: those of callers in their threads, and others in threads of its own. It does not
    refer to the client, so that a client that is no longer used is collected."""

    def __init__(self, config: Config) -> None:
        endpoints = check(config)
        self._files = CertificateFiles(config)
        self._condition = threading.Condition(threading.Lock())
        # Is held while a call is started or ended, and a channel made or closed; taken after the condition.
        self._starting = threading.Lock()
        self._bearer = BearerFile(config.bearer_file)
        self._connector = Connector(grpc, endpoints, self._files, self._close_channel, self._connection_changed)
        self.core = Core(self, endpoints=len(endpoints.hosts), certificates=self._files.any)
        self._threads: set[threading.Thread] = set()
        self._abandoned: list[object] = []  # belong to the parent of a fork
        with _fork_lock:
            _runners.add(self)

    # What the core calls, with the lock held

    def start(self, flow: Flow[None]) -> None:
        thread = threading.Thread(target=self._run_alone, args=(flow,), name="token-broker", daemon=True)
        thread.start()
        self._threads.add(thread)

    def changed(self) -> None:
        self._condition.notify_all()

    def end_stream(self, stream: Stream) -> None:
        with self._starting:
            if stream.call is not None:
                stream.call.cancel()

    # Running

    def run(self, flow: Flow[T], cancellation: Cancellation | None = None) -> T:
        """Runs a flow to its end."""
        result: Any = None
        error: TokenBrokerError | None = None
        while True:
            condition = self._condition
            with condition:
                try:
                    effect = flow.send(result) if error is None else flow.throw(error)
                except StopIteration as end:
                    value: T = end.value
                    return value
            result = error = None
            try:
                result = self._do(effect, cancellation)
            except Cancelled:
                self._end(flow)
                raise
            except TokenBrokerError as problem:
                error = problem
            except Exception as problem:  # noqa: BLE001  # the flow has to tell those who wait for it
                error = unexpected(problem)
            except BaseException:  # such as KeyboardInterrupt
                self._end(flow)
                raise

    def _end(self, flow: Flow[Any]) -> None:
        with self._condition:
            flow.close()

    def _run_alone(self, flow: Flow[None]) -> None:
        try:
            self.run(flow)
        finally:
            with self._condition:
                self._threads.discard(threading.current_thread())

    def _do(self, effect: Effect, cancellation: Cancellation | None) -> Any:
        if isinstance(effect, Wait):
            return self._wait(effect, cancellation)
        if isinstance(effect, Call):
            return self._call(effect)
        if isinstance(effect, NextMessage):
            return self._next_message(effect.stream)
        if isinstance(effect, OpenStream):
            return self._open(effect)
        if isinstance(effect, BearerChanged):
            return self._bearer.changed_from(effect.used)
        if isinstance(effect, Look):
            return self._connector.look()
        assert isinstance(effect, Log)  # noqa: S101
        return log(effect.level, effect.text, *effect.arguments)

    def _wait(self, wait: Wait, cancellation: Cancellation | None) -> None:
        if cancellation is not None:
            cancellation._subscribe(self._wake)
        try:
            with self._condition:
                while not (wait.ready() or self.core.closed):
                    if cancellation is not None and cancellation.cancelled:
                        raise Cancelled("the caller cancelled the call")
                    left = wait.until - time.monotonic()
                    if left <= 0:
                        break
                    self._condition.wait(min(left, LONGEST_WAIT))
        finally:
            if cancellation is not None:
                cancellation._unsubscribe(self._wake)

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _acquire(self) -> Connection:
        connection = self._connector.acquire()
        _register_for_forks_again()
        return connection

    def _call(self, call: Call) -> tuple[Any, float]:
        connection = self._acquire()
        error: TokenBrokerError | None = None
        try:
            call.bearer = self._bearer.current()
            sent = time.monotonic()
            method = getattr(connection.stub, call.method)
            timeout = max(0.0, call.deadline - sent)
            with self._starting:
                future = method.future(call.request, timeout=timeout, metadata=metadata_of(call.bearer))
            answer = future.result()
        except grpc.RpcError as problem:
            error = self._error_of(problem, call.account)
        except (ValueError, grpc.FutureCancelledError):  # raised by a channel that has just been closed
            error = Closed("the client was closed", account=call.account)
        finally:
            self._connector.release(connection, error)
        if error is not None:
            raise error
        return answer, sent

    def _open(self, effect: OpenStream) -> None:
        stream = effect.stream
        stream.connection = connection = self._acquire()
        effect.bearer = self._bearer.current()
        try:
            with self._starting:
                stream.call = connection.stub.WatchTokens(effect.request, metadata=metadata_of(effect.bearer))
        except ValueError:  # raised by a channel that has just been closed
            self._connector.release(connection)
            raise Closed("the client was closed") from None
        stream.call.initial_metadata()
        if not stream.call.is_active():
            error = self._error_of(stream.call, "")
            self._connector.release(connection, error)
            raise error

    def _next_message(self, stream: Stream) -> Any:
        try:
            return next(stream.call)
        except StopIteration:
            error = ended_stream()
        except grpc.RpcError as problem:
            error = self._error_of(problem, "")
        self._connector.release(stream.connection, error)
        raise error

    def _error_of(self, problem: Any, account: str) -> TokenBrokerError:
        if self.core.closed:
            return Closed("the client was closed", account=account)
        return error_of(problem, account)

    def _connection_changed(self) -> None:
        with self._condition:
            self.core.connection_changed()

    def close(self, wait: bool = True) -> None:
        """Ends everything, and waits for the threads, unless one of them hangs."""
        with self._condition:
            self.core.close()
            streams = [stream for stream in (self.core.plan.current, self.core.plan.next) if stream is not None]
            threads = list(self._threads)
        for stream in streams:
            if stream.call is not None:
                self.end_stream(stream)
        self._connector.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for thread in threads:
            if wait and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _close_channel(self, channel: Any) -> None:
        with self._starting:
            channel.close()

    # Forks

    def before_fork(self) -> None:
        """Takes the locks, so that the child finds nothing half done: neither here, nor in gRPC, whose own locks are
        held for a moment when a call is started or ended, or a channel is closed."""
        self._condition.acquire()
        self._starting.acquire()
        self._connector.before_fork()

    def after_fork_in_parent(self) -> None:
        self._connector.after_fork_in_parent()
        self._starting.release()
        self._condition.release()

    def after_fork_in_child(self) -> None:
        """Keeps the tokens. The threads and connections of the parent do not exist in the child."""
        self._condition = threading.Condition(threading.Lock())
        self._starting = threading.Lock()
        self._threads = set()
        self._files.reset_lock()
        # They are kept, because their destructors would wait for threads that do not exist.
        self._abandoned.append((self._connector.drop(), self.core.plan.current, self.core.plan.next))
        self.core.start_again()


_runners: weakref.WeakSet[_Runner] = weakref.WeakSet()
_forking: list[_Runner] = []  # those whose locks are held during a fork
_fork_lock = threading.RLock()  # is held during a fork, because several threads may fork at once


def _before_fork() -> None:
    _fork_lock.acquire()
    if not _forking:  # otherwise this is the second registration of this function
        _forking.extend(_runners)
        for runner in _forking:
            runner.before_fork()


def _after_fork_in_parent() -> None:
    for runner in _forking:
        runner.after_fork_in_parent()
    _forking.clear()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    for runner in _forking:
        runner.after_fork_in_child()
    _forking.clear()
    _fork_lock.release()


def _register_for_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )


_register_for_forks()


@functools.cache
def _register_for_forks_again() -> None:
    """Makes the locks be taken before gRPC stops its threads. gRPC registers itself when the first channel is made,
    and who registers last comes first before a fork. Otherwise a call that another thread starts in between has a
    thread of gRPC that is not stopped, and may hold a lock on which the child waits for ever."""
    _register_for_forks()


def _abandon(runner: _Runner) -> None:
    """Closes the runner of a client that was collected. The collector may run while the lock is held, so this is done
    in another thread."""
    try:
        threading.Thread(target=runner.close, args=(False,), name="token-broker", daemon=True).start()
    except RuntimeError:  # at the end of the program
        runner.close(wait=False)


class TokenClient:
    """Keeps the tokens of accounts. A program makes one, and all of its threads share it.

    Making a client opens no connection, so it does not fail when the broker is away. It raises `InvalidArgument` when
    the settings cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._runner = _Runner(config)
        weakref.finalize(self, _abandon, self._runner)

    @classmethod
    def from_env(cls) -> TokenClient:
        """Makes a client with the settings in the environment. See `Config.from_env`."""
        return cls(Config.from_env())

    def token(self, account: str, *, timeout: float | None = None, cancellation: Cancellation | None = None) -> Token:
        """Returns a token of the account that may be used now.

        It returns the kept one without a call if that is not due for replacement, and otherwise asks the broker, for at
        most `timeout` seconds, by default those of the settings. Raises `TokenBrokerError`.
        """
        try:
            return self._runner.run(self._runner.core.token(account, self._deadline(account, timeout)), cancellation)
        except Cancelled as error:
            error.account = account
            raise

    def report(self, account: str, generation: int, upstream_code: str, *, timeout: float | None = None) -> Report:
        """Tells the broker that the API refused the token of the generation with the code, such as `61003`. The
        adapters do this by themselves. Raises `TokenBrokerError`."""
        core = self._runner.core
        return self._runner.run(core.report(account, generation, upstream_code, self._deadline(account, timeout)))

    def close(self) -> None:
        """Ends the watch and the connections. Calls that are waiting, and later ones, raise `Closed`. It may be called
        again."""
        self._runner.close()

    def __enter__(self) -> TokenClient:  # noqa: PYI034
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TokenClient of {', '.join(self.config.endpoints)}>"

    def _deadline(self, account: str, timeout: float | None) -> float:
        return deadline_of(self.config, account, timeout)

    def _replacement(self, refused: Token, upstream_code: str, timeout: float | None) -> Token | None:
        """For the adapters: reports a refused token and returns a newer one."""
        return self._runner.run(
            self._runner.core.replacement(refused, upstream_code, self._deadline(refused.account, timeout))
        )


def deadline_of(config: Config, account: str, timeout: float | None) -> float:
    """Returns the end of a call on the monotonic clock."""
    if timeout is None:
        timeout = config.timeout
    elif not timeout > 0:
        raise InvalidArgument("the timeout is not positive", account=account)
    return time.monotonic() + timeout
