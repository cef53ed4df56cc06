"""What a child has of a client after a fork. The parent is a process of its own, because the broker of the tests has
threads, which do not survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from token_broker.v1 import token_broker_pb2 as pb

from .broker import LIMIT, Broker
from .simulation import answer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")

Run = Callable[[str], None]

COMMON = """
    import asyncio, os, sys, threading, time, warnings
    from token_broker import AsyncTokenClient, Config, TokenClient, TokenBrokerError

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

        fork(child)
        asyncio.run(client.close())
        """
    )
    assert broker.asked == 2
