"""Settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from ._errors import InvalidArgument
from ._paths import shown

DEFAULT_TIMEOUT = 5.0
_PATHS = ("bearer_file", "ca_file", "client_cert", "client_key")


@dataclass(frozen=True, repr=False)
class Config:
    """The settings of a client. They contain no secrets, only the names of files that do."""

    endpoints: Sequence[str]
    """The broker's URLs, such as `https://broker.internal:50051`. A host name may stand for several addresses. Calls
    are spread over all of them. All have the same scheme, http or https."""
    bearer_file: str | os.PathLike[str] | None = None
    """Has the bearer of this caller. It is read again when it changes."""
    ca_file: str | os.PathLike[str] | None = None
    """Has the certificates that sign the broker's. Without it, the system's are used."""
    client_cert: str | os.PathLike[str] | None = None
    """Has the certificate that identifies this caller. It is read again when it changes."""
    client_key: str | os.PathLike[str] | None = None
    """Has the key of the certificate. It is read again when it changes."""
    timeout: float = DEFAULT_TIMEOUT
    """How many seconds a call takes at most if it sets no timeout of its own."""
    allow_plaintext_bearer: bool = False
    """Permits to send the bearer without TLS to other hosts than loopback."""

    def __repr__(self) -> str:
        """Shows a path only if it leads somewhere, because a bearer or a key may have been given instead of one, and no
        endpoint, because somebody may have put a password into it."""
        paths = (f"{name}={shown(getattr(self, name))}" for name in _PATHS)
        return f"<Config of {len(self.endpoints)} endpoints, {', '.join(paths)}, timeout={self.timeout}>"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Config:
        """Returns the settings in `TOKEN_BROKER_ENDPOINT` (several are separated by commas),
        `TOKEN_BROKER_BEARER_FILE`, `TOKEN_BROKER_CA_FILE`, `TOKEN_BROKER_CLIENT_CERT` and
        `TOKEN_BROKER_CLIENT_KEY`."""
        endpoints = environ.get("TOKEN_BROKER_ENDPOINT", "").split(",")
        return cls(
            endpoints=tuple(endpoint.strip() for endpoint in endpoints if endpoint.strip()),
            bearer_file=environ.get("TOKEN_BROKER_BEARER_FILE") or None,
            ca_file=environ.get("TOKEN_BROKER_CA_FILE") or None,
            client_cert=environ.get("TOKEN_BROKER_CLIENT_CERT") or None,
            client_key=environ.get("TOKEN_BROKER_CLIENT_KEY") or None,
        )


@dataclass(frozen=True)
class Endpoints:
    """The checked endpoints."""

    tls: bool
    hosts: tuple[str, ...]
    """Each as `host:port`."""


def check(config: Config) -> Endpoints:
    """Returns the endpoints. Raises `InvalidArgument` if settings cannot be used, and quotes no endpoint that could
    not be parsed, because somebody may have put a password into it."""
    if isinstance(config.endpoints, str):
        raise InvalidArgument("endpoints is a list of URLs, not one text")
    if not config.endpoints:
        raise InvalidArgument("no endpoint is set: set endpoints or TOKEN_BROKER_ENDPOINT")
    schemes, hosts = set(), []
    for number, text in enumerate(config.endpoints, 1):
        try:
            url = urlsplit(text)
            host, port = url.hostname, url.port
        except ValueError:
            host = port = None
        if (
            url.scheme not in ("http", "https")
            or not host
            or not port
            or "@" in url.netloc
            or url.path not in ("", "/")
            or url.query
            or url.fragment
        ):
            raise InvalidArgument(f"endpoint {number} is not of the form http://host:port or https://host:port")
        if url.scheme == "http" and config.bearer_file and not config.allow_plaintext_bearer and not _loopback(host):
            raise InvalidArgument(
                f"the bearer would go to {host} without TLS: use https, or set allow_plaintext_bearer"
            )
        schemes.add(url.scheme)
        hosts.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    if len(schemes) > 1:
        raise InvalidArgument("the endpoints mix http and https")
    tls = schemes == {"https"}
    if bool(config.client_cert) != bool(config.client_key):
        raise InvalidArgument("a client certificate needs both client_cert and client_key")
    if not tls and (config.ca_file or config.client_cert):
        raise InvalidArgument("certificates are set, but the endpoints are http")
    if not config.timeout > 0:
        raise InvalidArgument("the timeout is not positive")
    return Endpoints(tls, tuple(hosts))


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    # The system takes ::ffff:127.0.0.1 for 127.0.0.1, unlike `is_loopback` of older Pythons.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
