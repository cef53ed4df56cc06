"""Bearers and certificates in files that are read again when they change."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from dataclasses import dataclass

from ._config import Config
from ._core import LOOK_INTERVAL
from ._errors import InvalidArgument
from ._log import log


class Unusable(Exception):
    """A file cannot be used. The text never quotes its content."""


class BearerFile:
    """The bearer in a file."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = path
        self._bearer = ""
        self._problem = ""  # why the file could not be used when it was last read; logged once
        self._read_at = time.monotonic()
        if path is not None:
            try:
                self._bearer = read_bearer(path)
            except Unusable as problem:
                raise InvalidArgument(f"the bearer's file cannot be used: {problem}") from None

    def current(self) -> str:
        """Returns the bearer, or an empty text if the client has none."""
        if self._path is not None and time.monotonic() - self._read_at > LOOK_INTERVAL:
            self._read(self._path)
        return self._bearer

    def changed_from(self, used: str) -> bool:
        """Reads the file at once. Returns whether it has another bearer than the given one."""
        if self._path is None:
            return False
        self._read(self._path)
        return self._bearer != used

    def _read(self, path: str | os.PathLike[str]) -> None:
        """Keeps the old bearer if the file cannot be used, such as in the middle of a replacement."""
        self._read_at = time.monotonic()
        try:
            self._bearer, self._problem = read_bearer(path), ""
        except Unusable as error:
            problem, known = str(error), self._problem
            self._problem = problem
            if problem != known:
                log(logging.WARNING, "the bearer's file cannot be used, so the bearer read before is: %s", problem)


def read_bearer(path: str | os.PathLike[str]) -> str:
    """Returns the bearer in the file, without the white space around it."""
    try:
        with open(path, "rb") as file:
            content = file.read().strip()
    except OSError as error:
        raise Unusable(str(error)) from None
    if not content:
        raise Unusable(f"{os.fspath(path)} is empty")
    if any(byte <= 0x20 or byte > 0x7E for byte in content):
        raise Unusable(f"{os.fspath(path)} has a character that cannot be part of a bearer")
    return content.decode("ascii")


@dataclass(frozen=True)
class Certificates:
    """The content of the files for TLS."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None

    def __repr__(self) -> str:
        return "<Certificates>"


class CertificateFiles:
    """The files for TLS."""

    def __init__(self, config: Config) -> None:
        self.any = bool(config.ca_file or config.client_cert)
        self._config = config
        self._lock = threading.Lock()
        self._problem = ""
        self._read_at = time.monotonic()
        try:
            self.current = read_certificates(config)
        except Unusable as problem:
            raise InvalidArgument(f"the certificates cannot be used: {problem}") from None

    def reset_lock(self) -> None:
        """Makes a new lock, in the child of a fork, because the old one may be held by a thread of the parent."""
        self._lock = threading.Lock()

    def changed(self) -> bool:
        """Reads the files again if that is due. Returns whether they have changed and can be used."""
        problem = ""
        with self._lock:
            if not self.any or time.monotonic() - self._read_at < LOOK_INTERVAL:
                return False
            self._read_at = time.monotonic()
            before, known = self.current, self._problem
            try:
                self.current = read_certificates(self._config, before)
            except Unusable as error:
                problem = str(error)
            self._problem = problem
            changed = self.current != before
        if problem and problem != known:
            log(logging.WARNING, "the certificates cannot be used, so those read before are: %s", problem)
        return changed


def read_certificates(config: Config, known: Certificates | None = None) -> Certificates:
    """Returns the content of the files. They must be usable and fit together, which is not examined again if they are
    as they are known: that would take much of the processor each second."""

    def read(path: str | os.PathLike[str] | None) -> bytes | None:
        if not path:
            return None
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise Unusable(str(error)) from None

    certificates = Certificates(read(config.ca_file), read(config.client_cert), read(config.client_key))
    if certificates == known:
        return certificates
    if certificates.ca is not None:
        try:
            ssl.create_default_context(cadata=certificates.ca.decode("ascii"))
        except (ValueError, ssl.SSLError):
            raise Unusable(f"{config.ca_file} has no certificates in PEM form") from None
    if config.client_cert:
        # Only files can be checked. If they were replaced since they were read, the next look finds that.
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
                config.client_cert, config.client_key, password=_no_password
            )
        except (OSError, ValueError, ssl.SSLError):
            text = f"{config.client_cert} and {config.client_key} are no certificate in PEM form and its key"
            raise Unusable(text) from None
    return certificates


def _no_password() -> str:
    """Answers the question for a password, so that no terminal asks it."""
    raise ValueError("the key is encrypted")
