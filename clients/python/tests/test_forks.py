"""What a child has of a client after a fork. The parent is a process of its own, because the broker of the tests has
threads, which do not survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest

from token_broker.v1 import token_broker_pb2 as pb

from .broker import LIMIT, Broker
from .simulation import answer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")

Run = Callable[[str], None]

COMMON = """
    import asyncio, os, sys, threading, time, warnings
    from token_broker import AsyncTokenClient, Cancellation, Config, TokenClient, TokenBrokerError

    warnings.simplefilter("ignore", DeprecationWarning)  # forks with threads are what this is about
    config = Config([sys.argv[1]], timeout=20)

    def wait_for(condition):
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, "it does not happen"
            time.sleep(0.01)

    def fork(child):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child()
                status = 0
            except BaseException as error:
                print("child:", type(error).__name__, error, file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"
"""


@pytest.fixture
def run(broker: Broker) -> Run:
    def run_program(program: str) -> None:
        source = textwrap.dedent(COMMON) + textwrap.dedent(program)
        result = subprocess.run(  # noqa: S603
            [sys.executable, "-c", source, broker.endpoint],
            timeout=4 * LIMIT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr

    def get(request: pb.GetTokenRequest, _: object) -> pb.GetTokenResponse:
        return answer(broker.asked)

    broker.get = get
    return run_program


def test_a_child_keeps_the_tokens_and_makes_connections_and_a_watch_of_its_own(run: Run, broker: Broker) -> None:
    run(
        """
        client = TokenClient(config)
        assert client.token("acme").generation == 1
        wait_for(lambda: client._runner.core.plan.current is not None)

        def child():
            assert client.token("acme").generation == 1, "the token was not kept"
            assert client.token("other").generation > 1
            wait_for(lambda: client._runner.core.plan.current is not None)
            client.close()

        for _ in range(5):
            fork(child)
        assert client.token("acme").generation == 1
        assert client.token("parent").generation == 7
        client.close()
        """
    )
    assert broker.asked == 7
    broker.wait_for(lambda: broker.watching == [])


def test_a_fork_while_threads_use_the_client_leaves_no_lock_held(run: Run, broker: Broker) -> None:
    run(
        """
        client = TokenClient(config)
        client.token("acme")
        stop = threading.Event()

        def use():
            while not stop.is_set():
                client.token("acme")
                time.sleep(0.001)  # leaves some time to the thread that forks

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()

        def child():
            client.token("acme")
            client.token("of-the-child")

        for _ in range(5):
            fork(child)
        stop.set()
        for thread in threads:
            thread.join()
        client.close()
        """
    )


def test_a_child_has_no_threads_of_the_parent_to_wait_for_in_close(run: Run) -> None:
    run(
        """
        client = TokenClient(config)
        client.token("acme")
        wait_for(lambda: client._runner.core.plan.current is not None)
        fork(client.close)
        client.token("other")
        client.close()
        """
    )


def test_a_child_that_ends_as_programs_do_is_not_held_up(run: Run) -> None:
    run(
        """
        client = TokenClient(config)
        client.token("acme")
        wait_for(lambda: client._runner.core.plan.current is not None)
        pid = os.fork()
        if pid == 0:
            client.token("of the child")
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"
        client.token("parent")
        """
    )


def test_another_loop_and_a_child_have_the_tokens_of_an_asyncio_client(run: Run, broker: Broker) -> None:
    run(
        """
        client = AsyncTokenClient(config)

        async def use(account):
            token = await client.token(account)
            return token.generation

        assert asyncio.run(use("acme")) == 1
        assert asyncio.run(use("acme")) == 1, "the token was not kept"
        assert asyncio.run(use("other")) == 2

        def child():
            assert asyncio.run(use("acme")) == 1, "the token was not kept"
            try:
                asyncio.run(use("of the child"))
            except TokenBrokerError as error:
                assert "fork before the first call" in str(error)
            else:
                raise AssertionError("gRPC for asyncio survives forks now")

        start = time.monotonic()
        fork(child)
        assert time.monotonic() - start < 10, "the child waited"
        assert asyncio.run(use("after")) == 3
        asyncio.run(client.close())
        """
    )
    assert broker.asked == 3


def test_a_child_of_a_parent_that_has_made_no_call_can_use_asyncio(run: Run, broker: Broker) -> None:
    run(
        """
        client = AsyncTokenClient(config)

        async def use():
            await client.token("acme")
            await client.close()

        for _ in range(2):
            fork(lambda: asyncio.run(use()))
        asyncio.run(use())
        """
    )
    assert broker.asked == 3


def test_a_fork_in_the_middle_of_asks_and_of_a_watch_disturbs_neither_side(run: Run, broker: Broker) -> None:
    released = threading.Event()

    def get(request: pb.GetTokenRequest, _: object) -> pb.GetTokenResponse:
        if request.account == "release":
            released.set()
        elif request.account.startswith("slow") and broker.asked_for("slow of the child") == 0:
            assert released.wait(LIMIT)
        return answer(broker.asked)

    broker.get = get
    run(
        """
        client = TokenClient(config)
        client.token("acme")
        wait_for(lambda: client._runner.core.plan.current is not None)
        results = []
        threads = [
            threading.Thread(target=lambda n=n: results.append(client.token(f"slow {n}"))) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: sum(ask.ask is not None for ask in client._runner.core.accounts.values()) == 5)
        time.sleep(0.2)  # the calls are on their way, or are being made

        def child():
            assert client.token("acme").generation == 1, "the token was not kept"
            client.token("slow of the child")
            client.token("slow 0")  # which the parent is asking for
            wait_for(lambda: client._runner.core.plan.current is not None)

        for _ in range(3):
            fork(child)
        stream = client._runner.core.plan.current
        client.token("release")
        for thread in threads:
            thread.join(20)
        assert len(results) == 4
        assert client._runner.core.plan.current is stream, "the stream of the parent ended"
        client.close()
        """
    )
    of_parents = broker.peers["release"] | broker.peers["slow 1"]
    assert len(of_parents) == 1
    assert len(broker.peers["slow of the child"]) == 3
    assert not of_parents & broker.peers["slow of the child"]


def test_forks_amid_all_that_other_threads_do_leave_the_children_able_to_ask(run: Run, broker: Broker) -> None:
    """New accounts, connections, clients and cancellations, each of which takes locks of the client and of gRPC."""
    run(
        """
        import itertools, logging

        logging.getLogger("token_broker").setLevel(logging.DEBUG)
        logging.getLogger("token_broker").addHandler(logging.StreamHandler(open(os.devnull, "w")))
        client = TokenClient(config)
        cancellation = Cancellation()
        stop = threading.Event()
        names = itertools.count()

        def ask():
            client.token(f"parent {next(names)}", cancellation=cancellation)

        def report():
            try:
                client.report("acme", 1, "61003")
            except TokenBrokerError:
                pass

        def open_another():
            with TokenClient(config) as another:
                another.token("acme")

        def cancel():
            cancelled = Cancellation()
            cancelled.cancel()
            try:
                client.token(f"cancelled {next(names)}", cancellation=cancelled)
            except TokenBrokerError:
                pass

        problems = []

        def repeat(action):
            while not stop.is_set():
                try:
                    action()
                except BaseException as problem:
                    problems.append(problem)
                    raise

        actions = ask, ask, report, open_another, cancel
        threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        wait_for(lambda: next(names) > 20)

        def child():
            client.token("child", cancellation=cancellation)
            with TokenClient(config) as another:
                another.token("child")
            client.close()

        try:
            for _ in range(10):
                fork(child)
        finally:
            stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not problems, problems
        client.token("parent")
        client.close()
        """
    )
    of_parent = set().union(*(peers for account, peers in broker.peers.items() if account.startswith("parent")))
    assert not of_parent & broker.peers["child"]
