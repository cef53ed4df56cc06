"""Channels of gRPC, for both clients."""

from __future__ import annotations

import pkgutil
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from ._config import Endpoints
from ._errors import Closed, Internal, TokenBrokerError, class_of
from ._files import CertificateFiles, Certificates
from .v1.token_broker_pb2_grpc import TokenServiceStub

VERSION = "0.1.0"
ERROR_DOMAIN = "token-broker"  # that of the broker's reasons
# Where Debian, Red Hat, and Alpine and macOS keep the certificates that they trust.
_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
AVOID_FOR = 1.0  # how long an endpoint that could not be reached is used only where there is no other


def _options() -> Sequence[tuple[str, Any]]:
    service_config = pkgutil.get_data(__package__, "service_config.json")
    assert service_config is not None  # noqa: S101
    return (
        ("grpc.service_config", service_config.decode()),
        ("grpc.service_config_disable_resolution", 1),
        # The client repeats calls itself: gRPC knows no RetryInfo, and hides the last error at the deadline.
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC's own limit of two minutes would keep a client waiting long after the broker is back.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A channel with new certificates makes connections of its own.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.primary_user_agent", f"token-broker-client-python/{VERSION}"),
    )


def make_channel(module: Any, host: str, tls: bool, certificates: Certificates) -> Any:
    """Makes a channel to an endpoint, with `grpc` or `grpc.aio` as the module."""
    if not tls:
        return module.insecure_channel(f"dns:///{host}", options=_options())
    roots = certificates.ca if certificates.ca is not None else system_roots()
    credentials = grpc.ssl_channel_credentials(roots, certificates.key, certificates.cert)
    return module.secure_channel(f"dns:///{host}", credentials, options=_options())


def system_roots() -> bytes | None:
    """Returns the certificates that the system trusts, or None if it keeps them in no usual place: then gRPC uses its
    own ones."""
    default = ssl.get_default_verify_paths().cafile
    for path in (default, *_ROOTS):
        if path is not None:
            try:
                with open(path, "rb") as file:
                    return file.read()
            except OSError:
                continue
    return None


class Connection:
    """A channel to one endpoint."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.stub: Any = TokenServiceStub(channel)  # type: ignore[no-untyped-call]
        self.users = 0
        self.avoid_until = 0.0


class Connector:
    """Makes the connections, and new ones when the files of the certificates have changed."""

    def __init__(
        self,
        module: Any,
        endpoints: Endpoints,
        files: CertificateFiles,
        dispose: Callable[[Any], None],
        changed: Callable[[], None],
    ) -> None:
        self._module = module
        self._endpoints = endpoints
        self._files = files
        self._dispose = dispose  # closes a channel
        self._changed = changed  # is called after other connections have taken the place of some
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._retired: list[Connection] = []
        self._next = 0
        self._closed = False

    def acquire(self) -> Connection:
        """Returns the connection for a call. The endpoints take turns. The caller releases it after the call."""
        self.look()
        with self._lock:
            if self._closed:
                raise Closed("the client was closed")
            if not self._connections:
                self._connections = [
                    Connection(make_channel(self._module, host, self._endpoints.tls, self._files.current))
                    for host in self._endpoints.hosts
                ]
            now = time.monotonic()
            usable = [c for c in self._connections if c.avoid_until <= now] or self._connections
            self._next += 1
            connection = usable[self._next % len(usable)]
            connection.users += 1
            return connection

    def release(self, connection: Connection, error: TokenBrokerError | None = None) -> None:
        """Ends the use of a connection by a call that failed with the error, if it did."""
        with self._lock:
            connection.users -= 1
            if error is not None and not error.reason and error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                connection.avoid_until = time.monotonic() + AVOID_FOR
            dispose = connection in self._retired and connection.users == 0
            if dispose:
                self._retired.remove(connection)
        if dispose:
            self._dispose(connection.channel)

    def look(self) -> None:
        """Looks at the files of the certificates, if that is due."""
        if not self._files.changed():
            return
        with self._lock:
            retired, self._connections = self._connections, []
            unused = [connection for connection in retired if connection.users == 0]
            # Others are closed when the last call on them has ended.
            self._retired += [connection for connection in retired if connection.users > 0]
        for connection in unused:
            self._dispose(connection.channel)
        if retired:
            self._changed()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, []
        for connection in connections:
            self._dispose(connection.channel)

    def before_fork(self) -> None:
        """Lets no connection be made until the fork is over."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self._lock.release()

    def drop(self) -> list[Connection]:
        """Forgets the connections without closing them, and returns them."""
        self._lock = threading.Lock()
        connections = self._connections + self._retired
        self._connections, self._retired = [], []
        return connections


def metadata_of(bearer: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {bearer}"),) if bearer else ()


def error_of(error: grpc.RpcError, account: str) -> TokenBrokerError:
    """Makes an error of a failed call."""
    call: Any = error  # both `grpc` and `grpc.aio` raise errors with these methods
    info = retry = None
    retriable = True
    for key, value in call.trailing_metadata() or ():
        if key == "grpc-retry-pushback-ms":
            retriable = not str(value).startswith("-")
        elif key == "grpc-status-details-bin":
            info, retry = details_of(value)
    reason = "" if info is None else info.reason
    upstream_code = "" if info is None else info.metadata.get("upstream_code", "")
    retry_after = None if retry is None else max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
    code: str = call.code().name
    # The RpcError is not kept as the cause: its text has the metadata of the call.
    return class_of(code, reason)(
        call.details() or code,
        account=account,
        code=code,
        reason=reason,
        upstream_code=upstream_code,
        retry_after=retry_after,
        retriable=retriable,
    )


def details_of(status: bytes) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.RetryInfo | None]:
    """Returns the details of an error. What cannot be read, such as from a proxy, is left out."""
    found: tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.RetryInfo | None] = (None, None)
    try:
        for detail in status_pb2.Status.FromString(status).details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                if info.domain == ERROR_DOMAIN:  # others are from something in between
                    found = (info, found[1])
            elif detail.Unpack(retry):
                found = (found[0], retry)
    except DecodeError:
        pass
    return found


def ended_stream() -> TokenBrokerError:
    """The error of a stream that the broker ended without one."""
    return Internal("the broker ended the stream", code="OK")
