"""Bearers and certificates in files that are read again when they change."""

from __future__ import annotations

import logging
import os
import ssl
import sys
import threading
import time
from dataclasses import dataclass

from ._config import Config
from ._core import LOOK_INTERVAL
from ._errors import InvalidArgument
from ._log import log
from ._paths import Unusable, begins_with_mark, read, shown


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
    content = read(path).strip()
    if not content:
        raise Unusable(f"{shown(path)} is empty")
    if any(byte <= 0x20 or byte > 0x7E for byte in content):
        raise Unusable(f"{shown(path)} has a character that cannot be part of a bearer")
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

    ca, cert, key = (read(path) if path else None for path in (config.ca_file, config.client_cert, config.client_key))
    certificates = Certificates(ca, cert, key)
    if certificates == known:
        return certificates
    if certificates.ca is not None:
        try:
            # A comment between the certificates may have any character; Python takes ASCII only.
            ssl.create_default_context(cadata=certificates.ca.decode("ascii", "ignore"))
        except (ValueError, ssl.SSLError):
            raise Unusable(f"{shown(config.ca_file)} has no certificates in PEM form") from None
    if config.client_cert and cert is not None and key is not None:
        _check_pair(config, cert + b"\n" + key)
    return certificates


def _check_pair(config: Config, pair: bytes) -> None:
    """Fails unless the files are a certificate and its key. Only files can be checked. If they were replaced since they
    were read, the next look finds that."""
    cert, key = config.client_cert or "", config.client_key or ""
    if _fit(cert, key):
        return
    is_marked = begins_with_mark(cert) or begins_with_mark(key)
    if not is_marked or not _fit_as_text(pair):
        raise Unusable(f"{shown(cert)} and {shown(key)} are no certificate in PEM form and its key")


def _fit(cert: str | os.PathLike[str], key: str | os.PathLike[str] | None = None) -> bool:
    """Returns whether the files are a certificate and its key."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError, ssl.SSLError):
        return False
    return True


def _fit_as_text(pair: bytes) -> bool:
    """Does what `_fit` does for files that it cannot read because of their encoding. Without files in memory, which
    only Linux has, and not in each sandbox, that is left to gRPC: a copy of a key on a disk would be worse."""
    is_plausible = b"-----BEGIN CERTIFICATE-----" in pair
    if not sys.platform.startswith("linux"):
        return is_plausible
    try:
        descriptor = os.memfd_create("certificate")
    except OSError:
        return is_plausible
    with open(descriptor, "wb") as file:
        file.write(pair)
        file.flush()
        return _fit(f"/proc/self/fd/{file.fileno()}")


def _no_password() -> str:
    """Answers the question for a password, so that no terminal asks it."""
    raise ValueError("the key is encrypted")
