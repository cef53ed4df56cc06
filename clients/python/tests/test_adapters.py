"""The adapters against an API over real connections."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
import requests
import trustme

from token_broker import AsyncTokenClient, Config, TokenClient, WrongHost
from token_broker._http import check_origin, refusal_code
from token_broker._token import token_of
from token_broker.httpx import AsyncTokenAuth
from token_broker.httpx import TokenAuth as HttpxAuth
from token_broker.requests import TokenAuth as RequestsAuth
from token_broker.v1 import token_broker_pb2 as pb

from .broker import Broker
from .simulation import SECRET, answer

REFUSED = b'{"error":{"code":"61003","message":"expired"}}'


class Api:
    """An API that refuses all tokens but one."""

    def __init__(self, certificate: trustme.LeafCert | None = None) -> None:
        self.accepts = "token2"
        self.status = 401
        self.body = REFUSED
        self.chunked = False
        self.gzipped = False
        self.location = ""  # where it redirects to
        self.redirected = ""  # only requests with this authorization, if it is set
        self.requests: list[tuple[str, bytes]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                authorization = self.headers.get("Authorization", "")
                api.requests.append((authorization, body))
                if api.location and self.path != "/there" and api.redirected in ("", authorization):
                    self.answer(307, b"", api.location)
                elif authorization == f"Bearer {api.accepts}":
                    self.answer(200, b"done")
                else:
                    self.answer(api.status, api.body)

            do_POST = do_GET  # noqa: N815

            def answer(self, status: int, body: bytes, location: str = "") -> None:
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                if api.gzipped:
                    self.send_header("Content-Encoding", "gzip")
                    body = gzip.compress(body)
                if api.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for start in range(0, len(body), 10_000):
                        part = body[start : start + 10_000]
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.stop()


@pytest.fixture
def issuing(broker: Broker, api: Api) -> Broker:
    """A broker that issues another token after a report."""

    def get(request: pb.GetTokenRequest, _: object) -> pb.GetTokenResponse:
        token = answer(request.newer_than_generation + 1)
        token.access_token = f"token{token.generation}"
        token.api_base_url = api.url + "/api"
        return token

    broker.get = get
    outcome = pb.ReportRejectedTokenResponse.OUTCOME_REISSUING
    broker.report = lambda _: pb.ReportRejectedTokenResponse(outcome=outcome)
    return broker


Send = Callable[..., "tuple[int, str]"]


def with_httpx(config: Config, url: str, body: Any = None, stream: bool = False) -> tuple[int, str]:
    with TokenClient(config) as client, httpx.Client(auth=HttpxAuth(client, "acme"), follow_redirects=True) as http:
        if stream:
            with http.stream("POST", url, content=body) as response:
                return response.status_code, "".join(response.iter_text())
        response = http.post(url, content=body)
        return response.status_code, response.text


def with_httpx_async(config: Config, url: str, body: Any = None, stream: bool = False) -> tuple[int, str]:
    async def generate() -> Any:
        for part in body:
            yield part

    content = body if body is None or isinstance(body, str) else generate()

    async def main() -> tuple[int, str]:
        async with (
            AsyncTokenClient(config) as client,
            httpx.AsyncClient(auth=AsyncTokenAuth(client, "acme"), follow_redirects=True) as http,
        ):
            if stream:
                async with http.stream("POST", url, content=content) as response:
                    return response.status_code, "".join([part async for part in response.aiter_text()])
            response = await http.post(url, content=content)
            return response.status_code, response.text

    return asyncio.run(main())


def with_requests(config: Config, url: str, body: Any = None, stream: bool = False) -> tuple[int, str]:
    with TokenClient(config) as client, requests.Session() as session:
        session.auth = RequestsAuth(client, "acme")
        response = session.post(url, data=body, stream=stream)
        if stream:
            return response.status_code, b"".join(response.iter_content(1000)).decode()
        return response.status_code, response.text


@pytest.fixture(params=[with_httpx, with_httpx_async, with_requests], ids=["httpx", "httpx-async", "requests"])
def send(request: pytest.FixtureRequest, issuing: Broker) -> Send:
    config = Config([issuing.endpoint])
    adapter: Send = request.param
    return lambda *arguments, **options: adapter(config, *arguments, **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("chunked", "gzipped"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_refused_token_is_reported_and_the_request_sent_again_once_with_the_next_one(
    send: Send, api: Api, issuing: Broker, chunked: bool, gzipped: bool, stream: bool
) -> None:
    api.chunked, api.gzipped = chunked, gzipped
    assert send(api.url + "/x", "hello", stream=stream) == (200, "done")
    assert api.requests == [("Bearer token1", b"hello"), ("Bearer token2", b"hello")]
    assert issuing.reported == 1


def test_what_is_answered_to_the_second_request_is_given_to_the_program(send: Send, api: Api) -> None:
    api.accepts = "none"
    assert send(api.url) == (401, REFUSED.decode())
    assert len(api.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("status", "body"),
    [(403, b'{"error":{"code":"63001"}}'), (500, b"61003"), (401, b'{"code":"61003","text":"%s"}' % (b"x" * 70_000))],
    ids=["63001", "no JSON", "too long"],
)
def test_other_answers_are_given_to_the_program_as_they_are(
    send: Send, api: Api, issuing: Broker, status: int, body: bytes, chunked: bool, stream: bool
) -> None:
    api.accepts, api.status, api.body, api.chunked = "none", status, body, chunked
    assert send(api.url, stream=stream) == (status, body.decode())
    assert (len(api.requests), issuing.reported) == (1, 0)


def test_the_raw_body_of_an_error_can_be_read(api: Api, issuing: Broker) -> None:
    api.status, api.gzipped, api.body = 500, True, b'{"error":{"code":"63001"}}'
    with TokenClient(Config([issuing.endpoint])) as client, httpx.Client(auth=HttpxAuth(client, "acme")) as http:
        with http.stream("GET", api.url) as response:
            assert gzip.decompress(b"".join(response.iter_raw())) == api.body
        with http.stream("GET", api.url) as response:
            assert b"".join(response.iter_bytes()) == api.body

    async def main() -> bytes:
        async with (
            AsyncTokenClient(Config([issuing.endpoint])) as client,
            httpx.AsyncClient(auth=AsyncTokenAuth(client, "acme")) as http,
            http.stream("GET", api.url) as response,
        ):
            return b"".join([part async for part in response.aiter_raw()])

    assert gzip.decompress(asyncio.run(main())) == api.body


@pytest.mark.parametrize("chunked", [False, True])
def test_the_raw_body_of_an_error_can_be_read_with_requests(api: Api, issuing: Broker, chunked: bool) -> None:
    api.status, api.gzipped, api.chunked, api.body = 500, True, chunked, b"one\ntwo\n" * 50_000
    with TokenClient(Config([issuing.endpoint])) as client, requests.Session() as session:
        session.auth = RequestsAuth(client, "acme")
        assert gzip.decompress(session.get(api.url, stream=True).raw.read()) == api.body
        assert session.get(api.url, stream=True).raw.read(decode_content=True) == api.body
        assert b"".join(session.get(api.url, stream=True).raw) == api.body  # urllib3 decodes lines
        assert session.get(api.url).content == api.body


def test_a_broken_body_is_no_error_before_it_is_read(api: Api, issuing: Broker) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(500, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip"))

    with (
        TokenClient(Config([issuing.endpoint])) as client,
        httpx.Client(auth=HttpxAuth(client, "acme"), transport=httpx.MockTransport(respond)) as http,
        http.stream("GET", api.url) as response,
    ):
        assert response.status_code == 500
        with pytest.raises(httpx.DecodingError):
            response.read()


def mapped(ports: dict[int, int], library: str, authority: str) -> tuple[Any, Any]:
    """Returns a session of requests or transports of httpx that reach api.example at ports of this machine."""
    if library == "requests":
        session = requests.Session()
        session.verify, session.trust_env = authority, False  # or an environment's CA would count instead
        return session, None
    context = ssl.create_default_context(cafile=authority)
    if library == "httpx":

        class Backend(httpcore.SyncBackend):
            def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> Any:
                assert host == "api.example"
                return super().connect_tcp("127.0.0.1", ports[port], *rest, **more)

        transport = httpx.HTTPTransport(verify=context)
        transport._pool._network_backend = Backend()
        return None, transport

    class AsyncBackend(httpcore.AnyIOBackend):
        async def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> Any:
            assert host == "api.example"
            return await super().connect_tcp("127.0.0.1", ports[port], *rest, **more)

    async_transport = httpx.AsyncHTTPTransport(verify=context)
    async_transport._pool._network_backend = AsyncBackend()
    return None, async_transport


def get_mapped(
    library: str, ports: dict[int, int], authority: str, broker: Broker | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sends a request to http://api.example, with the adapter if there is a broker, and otherwise without."""
    url, headers = "http://api.example/", {} if broker else {"Authorization": "Bearer mine"}
    config = Config([broker.endpoint if broker else "http://127.0.0.1:1"])
    session, transport = mapped(ports, library, authority)
    if library == "httpx-async":

        async def main() -> None:
            async with AsyncTokenClient(config) as client:
                auth = AsyncTokenAuth(client, "acme") if broker else None
                async with httpx.AsyncClient(transport=transport, auth=auth, follow_redirects=True) as http:
                    await http.get(url, headers=headers)

        asyncio.run(main())
        return
    with TokenClient(config) as client:
        if library == "httpx":
            auth = HttpxAuth(client, "acme") if broker else None
            with httpx.Client(transport=transport, auth=auth, follow_redirects=True) as http:
                http.get(url, headers=headers)
            return
        resolve = socket.getaddrinfo
        with session, monkeypatch.context() as patch:
            patch.setattr(
                socket,
                "getaddrinfo",
                lambda host, port, *rest, **more: resolve(
                    *(("127.0.0.1", ports[port]) if host == "api.example" else (host, port)), *rest, **more
                ),
            )
            session.auth = RequestsAuth(client, "acme") if broker else None
            session.get(url, headers=headers)


@pytest.mark.parametrize("library", ["httpx", "httpx-async", "requests"])
def test_nothing_follows_a_redirect_from_http_to_https_on_the_same_host(
    library: str, broker: Broker, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = answer(1)
    token.api_base_url = "http://api.example"
    broker.get = lambda _, __: token
    authority = trustme.CA()
    file = tmp_path / "ca"
    file.write_bytes(authority.cert_pem.bytes())
    secure = Api(authority.issue_cert("api.example"))
    api.location = "https://api.example/there"
    ports = {80: api.port, 443: secure.port}
    try:
        # The libraries themselves keep the header.
        get_mapped(library, ports, str(file), None, monkeypatch)
        assert [authorization for authorization, _ in secure.requests] == ["Bearer mine"]
        with pytest.raises(WrongHost):
            get_mapped(library, ports, str(file), broker, monkeypatch)
        assert [authorization for authorization, _ in api.requests] == ["Bearer mine", f"Bearer {SECRET}"]
        assert len(secure.requests) == 1
    finally:
        secure.stop()


def test_a_redirect_within_the_api_keeps_the_token(send: Send, api: Api) -> None:
    api.location, api.accepts = "/there", "token1"
    assert send(api.url) == (200, "done")
    assert [authorization for authorization, _ in api.requests] == ["Bearer token1"] * 2


def test_a_redirect_of_the_second_attempt_has_the_next_token(send: Send, api: Api) -> None:
    api.location, api.redirected = "/there", "Bearer token2"
    assert send(api.url) == (200, "done")
    assert [authorization for authorization, _ in api.requests] == ["Bearer token1"] + ["Bearer token2"] * 2


def test_a_redirect_of_the_second_attempt_is_not_followed_elsewhere(send: Send, api: Api) -> None:
    stranger = Api()
    try:
        api.location, api.redirected = stranger.url, "Bearer token2"
        with pytest.raises(WrongHost):
            send(api.url)
        assert stranger.requests == []
    finally:
        stranger.stop()


def test_the_program_may_trace_its_requests_and_send_them_again(api: Api, issuing: Broker) -> None:
    events: list[str] = []
    with TokenClient(Config([issuing.endpoint])) as client, httpx.Client(auth=HttpxAuth(client, "acme")) as http:

        def trace(event: str, _: object) -> None:
            events.append(event)

        request = http.build_request("GET", api.url, extensions={"trace": trace})
        for _ in range(2):
            assert http.send(request).status_code == 200
            assert request.extensions["trace"].other is trace
    assert events.count("http11.send_request_headers.started") == 3


def test_a_token_goes_to_its_api_through_a_proxy(api: Api, issuing: Broker) -> None:
    """A proxy that is asked for the API's URL is simulated by the API itself."""
    proxy = Api()
    proxy.accepts = "token1"
    try:
        with (
            TokenClient(Config([issuing.endpoint])) as client,
            httpx.Client(auth=HttpxAuth(client, "acme"), proxy=proxy.url) as http,
        ):
            assert http.get(api.url).status_code == 200
        assert [authorization for authorization, _ in proxy.requests] == ["Bearer token1"]
    finally:
        proxy.stop()


def test_a_body_that_cannot_be_sent_again_is_answered_as_the_api_did(send: Send, api: Api, issuing: Broker) -> None:
    assert send(api.url, iter([b"hel", b"lo"])) == (401, REFUSED.decode())
    assert api.requests == [("Bearer token1", b"hello")]
    assert issuing.reported == 1


def test_a_token_is_sent_to_its_api_only(send: Send, api: Api, issuing: Broker) -> None:
    port = int(api.url.rpartition(":")[2])
    for url in (
        f"http://localhost:{port}",
        f"https://127.0.0.1:{port}",
        f"http://127.0.0.1:{port + 1}",
        "http://127.0.0.1",
    ):
        with pytest.raises(WrongHost):
            send(url)
    assert api.requests == []


def test_a_token_is_not_sent_after_a_redirect(send: Send, api: Api, issuing: Broker) -> None:
    stranger = Api()
    try:
        api.location = stranger.url
        with pytest.raises(WrongHost):
            send(api.url)
        assert stranger.requests == []
    finally:
        stranger.stop()


def test_a_hundred_requests_with_a_refused_token_cause_one_report_and_one_ask(api: Api, issuing: Broker) -> None:
    with TokenClient(Config([issuing.endpoint])) as client:
        client.token("acme")

        def post(_: int) -> int:
            with requests.Session() as session:
                return session.get(api.url, auth=RequestsAuth(client, "acme")).status_code

        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(post, range(100))) == {200}
    assert (issuing.reported, issuing.asked) == (1, 2)


def test_each_kind_of_httpx_client_needs_its_kind_of_auth(issuing: Broker, api: Api) -> None:
    with TokenClient(Config([issuing.endpoint])) as client:

        async def wrong() -> None:
            async with httpx.AsyncClient(auth=HttpxAuth(client, "acme")) as http:
                await http.get(api.url)

        with pytest.raises(TypeError, match="AsyncTokenAuth"):
            asyncio.run(wrong())
    auth = AsyncTokenAuth(AsyncTokenClient(Config([issuing.endpoint])), "acme")
    with httpx.Client(auth=auth) as http, pytest.raises(TypeError, match="TokenAuth"):
        http.get(api.url)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error":{"code":"61003"}}', "61003"),
        (b'{"error":{"code":61004}}', "61004"),
        (b'{"code":"61003"}', "61003"),
        (b'{"error":"denied","code":61003}', "61003"),
        (b'{"error":{"code":"61001"},"code":"61003"}', None),
        (b'{"error":{"code":"63001"}}', None),
        (b'["61003"]', None),
        (b'{"code":610030}', None),
        (b'{"code":["61003"]}', None),
        (b"61003", None),
        (b"", None),
        (b"\xff", None),
        (b"[" * 60_000, None),
    ],
)
def test_a_refusal_is_found_by_its_code(body: bytes, code: str | None) -> None:
    assert refusal_code(body) == code


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://API.example:443/x", True),
        ("https://api.example", True),
        ("http://api.example", False),
        ("https://api.example:444", False),
        ("https://api.example@evil.example/", False),
        ("https://api.example.org", False),
        ("not a URL", False),
    ],
)
def test_origins_are_compared_in_one_form(url: str, allowed: bool) -> None:
    token = token_of("acme", answer(1), 0)
    assert token is not None
    try:
        check_origin(token, url)
    except WrongHost:
        assert not allowed
    else:
        assert allowed
