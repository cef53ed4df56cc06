"""Keeps the upstream tokens of accounts for a program, as Token Broker issues them.

A `TokenClient`, or an `AsyncTokenClient` with asyncio, asks the broker for a token once, keeps it for as long as the
broker says, and watches for its replacement. So `token` returns at once nearly always, also while the broker is away.

`token_broker.httpx` and `token_broker.requests` put tokens on the requests of these libraries, and report tokens that
the API refuses. No text form and no log line contains a token or a bearer.
"""

import os as _os

# Read by gRPC when it is loaded. Without it, gRPC does not survive a fork reliably.
_os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "true")

from ._aio import AsyncTokenClient
from ._config import Config
from ._core import Outcome, Report
from ._errors import (
    AccountDisabled,
    Cancelled,
    Closed,
    CredentialRejected,
    DeadlineExceeded,
    EgressRejected,
    Internal,
    InvalidArgument,
    Kind,
    NoSuchAccount,
    NotGranted,
    Overloaded,
    TokenBrokerError,
    Unauthenticated,
    Unavailable,
    WrongHost,
)
from ._sync import Cancellation, TokenClient
from ._token import Token

__version__ = "0.1.0"
__all__ = [
    "AccountDisabled",
    "AsyncTokenClient",
    "Cancellation",
    "Cancelled",
    "Closed",
    "Config",
    "CredentialRejected",
    "DeadlineExceeded",
    "EgressRejected",
    "Internal",
    "InvalidArgument",
    "Kind",
    "NoSuchAccount",
    "NotGranted",
    "Outcome",
    "Overloaded",
    "Report",
    "Token",
    "TokenBrokerError",
    "TokenClient",
    "Unauthenticated",
    "Unavailable",
    "WrongHost",
]
