"""A broker in the process, behind real connections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from token_broker.v1 import token_broker_pb2 as pb
from token_broker.v1.token_broker_pb2_grpc import TokenServiceServicer, add_TokenServiceServicer_to_server

from .simulation import answer

LIMIT = 30  # how many seconds the tests wait for what takes no time


class Broker(TokenServiceServicer):
    """Answers as the functions say that a test sets, and notes who asked."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.get: Callable[[pb.GetTokenRequest, grpc.ServicerContext], pb.GetTokenResponse] = lambda _, __: answer(1)
        self.report: Callable[[pb.ReportRejectedTokenRequest], pb.ReportRejectedTokenResponse] | None = None
        self.lock = threading.Lock()
        self.asked = 0
        self.reported = 0
        self.bearers: list[str] = []
        self.names: list[str] = []
        self.watching: list[list[str]] = []
        self.peers: dict[str, set[str]] = {}  # by account, the connections on which it was asked for
        self.changed = threading.Condition(self.lock)
        self.pushed: list[pb.WatchTokensResponse] = []
        self.stopped = False
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=32))
        add_TokenServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("localhost:0", credentials)
        self.endpoint = f"http://127.0.0.1:{self.port}" if credentials is None else f"https://localhost:{self.port}"
        self._server.start()

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            self.changed.notify_all()
        self._server.stop(None).wait(LIMIT)

    def push(self, message: pb.WatchTokensResponse) -> None:
        with self.lock:
            self.pushed.append(message)
            self.changed.notify_all()

    def asked_for(self, account: str) -> int:
        return len(self.peers.get(account, ()))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.lock:
            assert self.changed.wait_for(condition, LIMIT)

    def _note(self, context: grpc.ServicerContext) -> None:
        metadata = dict(context.invocation_metadata())
        self.bearers.append(str(metadata.get("authorization", "")))
        names = context.auth_context().get("x509_common_name", [b""])
        self.names.append(bytes(names[0]).decode())

    def GetToken(self, request: pb.GetTokenRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with self.lock:
            self.asked += 1
            self._note(context)
            self.peers.setdefault(request.account, set()).add(context.peer())
            self.changed.notify_all()
        return self.get(request, context)

    def ReportRejectedToken(self, request: pb.ReportRejectedTokenRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        with self.lock:
            self.reported += 1
        if self.report is None:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no grant to report")
        return self.report(request)

    def WatchTokens(self, request: pb.WatchTokensRequest, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        context.send_initial_metadata(())
        accounts = list(request.accounts)
        context.add_callback(self._wake)
        with self.lock:
            self.watching.append(accounts)
            self.changed.notify_all()
            sent = len(self.pushed)
        while context.is_active():
            with self.lock:
                while not (self.stopped or len(self.pushed) > sent or not context.is_active()):
                    self.changed.wait(LIMIT)
                messages, sent = self.pushed[sent:], len(self.pushed)
                if self.stopped:
                    break
            yield from messages
        with self.lock:
            self.watching.remove(accounts)
            self.changed.notify_all()

    def _wake(self) -> None:
        with self.lock:
            self.changed.notify_all()
