"""What both clients do over real connections."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import threading
import time
import weakref
from pathlib import Path

import grpc
import pytest
import trustme
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from token_broker import (
    Cancellation,
    Cancelled,
    Closed,
    Config,
    CredentialRejected,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotGranted,
    Outcome,
    TokenBrokerError,
    TokenClient,
    Unauthenticated,
    Unavailable,
)
from token_broker._connection import details_of
from token_broker.v1 import token_broker_pb2 as pb

from .broker import LIMIT, Broker
from .conftest import Open, WithTasks
from .simulation import SECRET, answer, duration

BEARER = "tbk_this-is-the-bearer"


def test_a_hundred_callers_cause_one_ask_and_the_token_is_kept(open_client: Open, broker: Broker) -> None:
    client = open_client(broker)
    assert {token.access_token for token in client.tokens(100)} == {SECRET}
    client.token()
    assert broker.asked == 1


def test_a_pushed_token_is_used(open_client: Open, broker: Broker) -> None:
    client = open_client(broker)
    client.token()
    client.until(lambda: broker.watching == [["acme"]])
    broker.push(pb.WatchTokensResponse(account="acme", token=answer(2)))
    account = client.inner._runner.core.accounts["acme"]
    client.until(lambda: account.version == 2)
    assert client.token().generation == 2
    assert broker.asked == 1


def test_the_bearer_is_sent_and_read_again_when_the_broker_does_not_know_it(
    open_client: Open, broker: Broker, bearer_file: Path
) -> None:
    def get(_: pb.GetTokenRequest, context: grpc.ServicerContext) -> pb.GetTokenResponse:
        if broker.bearers[-1] != "Bearer tbk_new":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the bearer is not known")
        return answer(1)

    broker.get = get
    client = open_client(broker, bearer_file=bearer_file)
    with pytest.raises(Unauthenticated):
        client.token("one")
    assert broker.bearers == [f"Bearer {BEARER}"]
    bearer_file.write_text("tbk_new")
    client.token("two")
    assert broker.bearers[1:] == [f"Bearer {BEARER}", "Bearer tbk_new"]


def test_the_details_of_a_refusal_are_in_the_error(open_client: Open, broker: Broker) -> None:
    def get(_: pb.GetTokenRequest, context: grpc.ServicerContext) -> pb.GetTokenResponse:
        details = [any_pb2.Any(), any_pb2.Any()]
        info = error_details_pb2.ErrorInfo(
            domain="token-broker", reason="CREDENTIAL_REJECTED", metadata={"upstream_code": "61001"}
        )
        details[0].Pack(info)
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=duration(2.5)))
        status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="rejected", details=details)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "rejected")
        raise AssertionError

    broker.get = get
    with pytest.raises(CredentialRejected) as raised:
        open_client(broker).token()
    error = raised.value
    assert (error.account, error.code, error.reason) == ("acme", "FAILED_PRECONDITION", "CREDENTIAL_REJECTED")
    assert (error.upstream_code, error.retry_after, error.temporary) == ("61001", 2.5, False)
    assert str(error) == "account acme: CREDENTIAL_REJECTED: rejected (upstream code 61001)"


def test_a_reason_of_another_domain_is_left_out() -> None:
    def status_of(domain: str) -> bytes:
        detail = any_pb2.Any()
        detail.Pack(error_details_pb2.ErrorInfo(domain=domain, reason="ACCOUNT_DISABLED"))
        content: bytes = status_pb2.Status(details=[detail]).SerializeToString()
        return content

    info, _ = details_of(status_of("token-broker"))
    assert info is not None
    assert info.reason == "ACCOUNT_DISABLED"
    assert details_of(status_of("proxy.example")) == (None, None)


def test_details_that_cannot_be_read_are_left_out(open_client: Open, broker: Broker) -> None:
    def get(_: pb.GetTokenRequest, context: grpc.ServicerContext) -> pb.GetTokenResponse:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "no grant")
        raise AssertionError

    broker.get = get
    with pytest.raises(NotGranted, match="no grant"):
        open_client(broker, timeout=LIMIT).token()


def test_an_exception_that_nobody_foresaw_reaches_all_who_wait(
    open_client: Open, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def current() -> str:
        raise RuntimeError(BEARER)

    client = open_client(broker, timeout=0.5)
    monkeypatch.setattr(client.inner._runner._bearer, "current", current)
    with pytest.raises(Internal, match="RuntimeError") as raised:
        client.token()
    assert BEARER not in str(raised.value)


def test_arguments_that_no_request_can_have_are_refused(open_client: Open, broker: Broker) -> None:
    client = open_client(broker)
    with pytest.raises(InvalidArgument):
        client.token(123)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        client.token("\ud800")
    with pytest.raises(InvalidArgument):
        client.report("acme", -1, "61003")
    assert client.token().generation == 1


def test_making_a_client_needs_no_broker_and_asking_says_that_there_is_none(open_client: Open) -> None:
    client = open_client("http://127.0.0.1:1", timeout=0.5)
    with pytest.raises(Unavailable):
        client.token()


def test_a_timeout_is_a_timeout_error(open_client: Open, broker: Broker) -> None:
    released = threading.Event()
    broker.get = lambda _, __: answer(1) if released.wait(LIMIT) else answer(2)
    client = open_client(broker)
    with pytest.raises(TimeoutError) as raised:
        client.token(timeout=0.2)
    released.set()
    assert isinstance(raised.value, DeadlineExceeded)


def test_calls_are_spread_over_all_endpoints_and_go_on_without_one_that_is_away(open_client: Open) -> None:
    first, second = Broker(), Broker()
    try:
        client = open_client("http://127.0.0.1:1", first, second)
        for number in range(20):
            client.token(f"account{number}")
        assert first.asked > 5
        assert second.asked > 5
    finally:
        first.stop()
        second.stop()


def test_a_report_returns_its_outcome(open_client: Open, broker: Broker) -> None:
    broker.report = lambda _: pb.ReportRejectedTokenResponse(
        outcome=pb.ReportRejectedTokenResponse.OUTCOME_TOO_SOON, retry_after=duration(1.5)
    )
    report = open_client(broker).report("acme", 1, "61003")
    assert (report.outcome, report.retry_after) == (Outcome.TOO_SOON, 1.5)


def test_a_report_that_is_refused_does_not_forget_the_token(open_client: Open, broker: Broker) -> None:
    client = open_client(broker)
    client.token()
    with pytest.raises(NotGranted):
        client.report("acme", 1, "61003")
    client.token()
    assert broker.asked == 1


def test_a_closed_client_fails_and_may_be_closed_again(open_client: Open, broker: Broker) -> None:
    client = open_client(broker)
    client.token()
    client.until(lambda: broker.watching == [["acme"]])
    start = time.monotonic()
    client.close()
    client.close()
    assert time.monotonic() - start < 5
    with pytest.raises(Closed) as raised:
        client.token()
    assert raised.value.account == "acme"
    broker.wait_for(lambda: broker.watching == [])


def test_an_ask_that_finds_the_connections_closed_fails_with_an_error_that_names_the_account(
    open_client: Open, broker: Broker
) -> None:
    client = open_client(broker)
    client.inner._runner._connector.close()
    with pytest.raises(Closed) as raised:
        client.token()
    assert raised.value.account == "acme"


def test_a_certificate_identifies_the_caller_and_a_rotated_one_is_used_afterwards(
    open_client: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = trustme.CA()
    server = authority.issue_cert("localhost")
    credentials = grpc.ssl_server_credentials(
        [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())],
        root_certificates=authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    ca, cert, key = tmp_path / "ca", tmp_path / "cert", tmp_path / "key"
    ca.write_bytes(authority.cert_pem.bytes())
    first, second = (authority.issue_cert(f"{name}@x", common_name=name) for name in ("first", "second"))
    cert.write_bytes(first.cert_chain_pems[0].bytes())
    key.write_bytes(first.private_key_pem.bytes())
    broker = Broker(credentials)
    try:
        client = open_client(broker, ca_file=ca, client_cert=cert, client_key=key)
        files = client.inner._runner._files

        def asked_by(account: str) -> str:
            files._read_at = float("-inf")  # instead of waiting for a second
            client.token(account)
            return broker.names[-1]

        assert asked_by("one") == "first"
        client.until(lambda: broker.watching == [["one"]])
        cert.write_bytes(second.cert_chain_pems[0].bytes())
        assert asked_by("torn") == "first"
        assert asked_by("torn again") == "first"
        key.write_bytes(second.private_key_pem.bytes())
        assert asked_by("two") == "second"
        assert sum("certificates cannot be used" in record.message for record in caplog.records) == 1
        client.until(lambda: len(broker.watching) == 1 and "two" in broker.watching[0])
        client.close()
    finally:
        broker.stop()


def test_without_a_ca_those_of_the_system_are_trusted(
    open_client: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    roots = tmp_path / "roots"
    roots.write_bytes(authority.cert_pem.bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(roots))
    server = authority.issue_cert("localhost")
    broker = Broker(grpc.ssl_server_credentials([(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())]))
    try:
        client = open_client(broker)
        client.token()
        client.close()
    finally:
        broker.stop()


def test_the_file_of_a_ca_may_have_a_comment_in_any_language(open_client: Open, tmp_path: Path) -> None:
    authority = trustme.CA()
    server = authority.issue_cert("localhost")
    broker = Broker(grpc.ssl_server_credentials([(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())]))
    ca = tmp_path / "ca"
    ca.write_bytes("# Autorité de Genève\n".encode() + authority.cert_pem.bytes())
    try:
        client = open_client(broker, ca_file=ca)
        client.token()
        client.close()
    finally:
        broker.stop()


def test_a_broker_of_another_authority_is_not_trusted(open_client: Open, tmp_path: Path) -> None:
    server = trustme.CA().issue_cert("localhost")
    broker = Broker(grpc.ssl_server_credentials([(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())]))
    ca = tmp_path / "ca"
    ca.write_bytes(trustme.CA().cert_pem.bytes())
    try:
        with pytest.raises(Unavailable):
            open_client(broker, ca_file=ca, timeout=0.5).token()
        assert broker.asked == 0
    finally:
        broker.stop()


def test_neither_tokens_nor_bearers_are_in_any_text_or_log(
    open_client: Open, broker: Broker, bearer_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = open_client(broker, bearer_file=bearer_file, timeout=0.5)
    token = client.token()
    assert token.access_token == SECRET

    def refuse(_: pb.GetTokenRequest, context: grpc.ServicerContext) -> pb.GetTokenResponse:
        context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        return answer(1)

    broker.get = refuse
    with pytest.raises(TokenBrokerError) as raised:
        client.token("away")
    client.close()
    assert broker.bearers[0] == f"Bearer {BEARER}"
    texts = [caplog.text]
    for value in (
        token,
        client.inner,
        client.inner.config,
        raised.value,
        raised.value.__cause__,
        [token],
        {"t": token},
    ):
        texts += [str(value), repr(value), f"{value}", "%s %r" % (value, value)]  # noqa: UP031
    texts.append(repr(vars(raised.value)))
    with pytest.raises(TypeError):
        pickle.dumps(token)
    with pytest.raises(TypeError):
        json.dumps(token)
    with pytest.raises(TypeError):
        vars(token)
    text = "\n".join(texts)
    assert "<Token of account 'acme', generation 1>" in text
    assert "the broker answered with generation 1 of acme" in text
    assert SECRET not in text
    assert BEARER not in text


def test_a_handler_of_logs_may_use_the_client(open_client: Open, broker: Broker) -> None:
    client = open_client(broker)
    if isinstance(client, WithTasks):
        pytest.skip("a handler cannot await")

    class Handler(logging.Handler):
        handled = 0

        def emit(self, record: logging.LogRecord) -> None:
            Handler.handled += 1
            client.token()

    handler, logger = Handler(), logging.getLogger("token_broker")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        client.token()
        client.until(lambda: Handler.handled > 0)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_a_handler_of_logs_may_fail(open_client: Open, broker: Broker, bearer_file: Path) -> None:
    class Handler(logging.Handler):
        handled = 0

        def handle(self, record: logging.LogRecord) -> bool:
            Handler.handled += 1
            raise RuntimeError("as the test says")

    client = open_client(broker, bearer_file=bearer_file)
    handler, logger = Handler(), logging.getLogger("token_broker")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        client.token()
        client.until(lambda: broker.watching == [["acme"]])
        core = client.inner._runner.core
        client.until(lambda: core.plan.current is not None)
        stream = core.plan.current
        for generation in (2, 3):
            broker.push(pb.WatchTokensResponse(account="acme", token=answer(generation)))
            client.until(lambda: core.accounts["acme"].kept.generation == generation)  # noqa: B023
        assert core.plan.current is stream
        handled = Handler.handled
        bearer_file.unlink()
        client.inner._runner._bearer._read_at = float("-inf")  # instead of waiting for a second
        client.token("other")
        assert Handler.handled > handled
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_a_cancelled_call_ends_and_the_others_go_on(broker: Broker) -> None:
    released = threading.Event()

    def get(_: pb.GetTokenRequest, __: grpc.ServicerContext) -> pb.GetTokenResponse:
        released.wait(LIMIT)
        return answer(1)

    broker.get = get
    with TokenClient(Config([broker.endpoint], timeout=LIMIT)) as client:
        cancellation = Cancellation()
        outcomes: list[object] = []

        def cancelled() -> None:
            try:
                client.token("acme", cancellation=cancellation)
            except Cancelled as error:
                outcomes.append(error.kind.value)

        threads = [
            threading.Thread(target=cancelled),
            threading.Thread(target=lambda: outcomes.append(client.token("acme").generation)),
        ]
        for thread in threads:
            thread.start()
        broker.wait_for(lambda: broker.asked == 1)
        cancellation.cancel()
        threads[0].join()
        released.set()
        threads[1].join()
        assert outcomes == ["CANCELLED", 1]


def test_a_client_that_is_no_longer_used_leaves_no_thread(broker: Broker) -> None:
    before = threading.active_count()
    client = TokenClient(Config([broker.endpoint]))
    client.token("acme")
    broker.wait_for(lambda: broker.watching == [["acme"]])
    runner = weakref.ref(client._runner)
    del client
    gc.collect()
    broker.wait_for(lambda: broker.watching == [])
    pause = threading.Event()
    for _ in range(LIMIT * 100):
        gc.collect()
        if runner() is None and threading.active_count() <= before + 32:
            return
        pause.wait(0.01)
    raise AssertionError(f"{threading.enumerate()}")


ONE = "https://broker:50051"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("no endpoint", {"endpoints": []}),
        ("one text", {"endpoints": ONE}),
        ("no scheme", {"endpoints": ["broker:50051"]}),
        ("another scheme", {"endpoints": ["dns:///broker:50051"]}),
        ("no port", {"endpoints": ["https://broker"]}),
        ("port 0", {"endpoints": ["https://broker:0"]}),
        ("a port that is too large", {"endpoints": ["https://broker:65536"]}),
        ("a port that is none", {"endpoints": ["https://broker:port"]}),
        ("a path", {"endpoints": [ONE + "/v1"]}),
        ("a password", {"endpoints": ["https://user:password@broker:50051"]}),
        ("two schemes", {"endpoints": ["http://127.0.0.1:1", ONE]}),
        ("a bearer without TLS", {"endpoints": ["http://broker:1"], "bearer_file": "bearer"}),
        ("a bearer without TLS", {"endpoints": ["http://[::ffff:128.0.0.1]:1"], "bearer_file": "bearer"}),
        ("a missing bearer", {"endpoints": [ONE], "bearer_file": "missing"}),
        ("an empty bearer", {"endpoints": [ONE], "bearer_file": "empty"}),
        ("a bearer of two lines", {"endpoints": [ONE], "bearer_file": "lines"}),
        ("a certificate without key", {"endpoints": [ONE], "client_cert": "bearer"}),
        ("a CA that is none", {"endpoints": [ONE], "ca_file": "bearer"}),
        ("a CA for plaintext", {"endpoints": ["http://127.0.0.1:1"], "ca_file": "bearer"}),
        ("a certificate that is none", {"endpoints": [ONE], "client_cert": "bearer", "client_key": "bearer"}),
        ("no timeout", {"endpoints": [ONE], "timeout": 0}),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in {"bearer": "tbk_secret", "empty": " \n", "lines": "tbk_secret\ntbk_secret"}.items():
        Path(file).write_text(content)
    with pytest.raises(InvalidArgument) as raised:
        TokenClient(Config(**settings))  # type: ignore[arg-type]
    assert "secret" not in str(raised.value), name
    assert "password" not in str(raised.value), name


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:1",
        "http://localhost:1",
        "http://[::1]:1",
        "http://[::ffff:127.0.0.1]:1",
        "HTTPS://Broker:1",
        "https://a_broker:1",
        ONE + "/",
    ],
)
def test_a_bearer_may_go_over_loopback_or_tls(bearer_file: Path, endpoint: str) -> None:
    TokenClient(Config([endpoint], bearer_file=bearer_file)).close()


def test_a_bearer_may_go_over_plaintext_on_request(bearer_file: Path) -> None:
    TokenClient(Config(["http://broker:1"], bearer_file=bearer_file, allow_plaintext_bearer=True)).close()


def test_the_environment_has_the_settings() -> None:
    names = {"ENDPOINT": "https://a:1, https://b:2", "BEARER_FILE": "b", "CA_FILE": "c", "CLIENT_CERT": "d"}
    environment = {f"TOKEN_BROKER_{name}": value for name, value in names.items()}
    config = Config.from_env({**environment, "TOKEN_BROKER_CLIENT_KEY": "e"})
    assert config == Config(("https://a:1", "https://b:2"), "b", "c", "d", "e")
    assert Config.from_env({}).endpoints == ()


def test_grpc_is_asked_to_survive_forks() -> None:
    assert os.environ["GRPC_ENABLE_FORK_SUPPORT"] == "true"
