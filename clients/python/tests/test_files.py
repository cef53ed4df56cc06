"""The files of bearers and certificates."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import trustme

from token_broker import Config, InvalidArgument, TokenClient
from token_broker._files import read_bearer, read_certificates
from token_broker._paths import Unusable, shown

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"]
ENDPOINT = "https://localhost:1"


def encode(text: str, encoding: str) -> bytes:
    return (f"\ufeff{text}" if encoding.startswith("utf-16") else text).encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_files_are_read_in_every_encoding_with_a_mark(tmp_path: Path, encoding: str) -> None:
    authority = trustme.CA()
    identity, other = authority.issue_cert("a@x"), authority.issue_cert("b@x")
    texts = {
        "bearer": "tbk_x\r\n",
        "ca": authority.cert_pem.bytes().decode(),
        "cert": identity.cert_chain_pems[0].bytes().decode(),
        "key": identity.private_key_pem.bytes().decode(),
        "other": other.private_key_pem.bytes().decode(),
    }
    files = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        files[name].write_bytes(encode(text, encoding))
    assert read_bearer(files["bearer"]) == "tbk_x"
    config = Config([ENDPOINT], ca_file=files["ca"], client_cert=files["cert"], client_key=files["key"])
    assert read_certificates(config).key == texts["key"].encode()
    with pytest.raises(Unusable, match="and its key"):
        read_certificates(Config([ENDPOINT], client_cert=files["cert"], client_key=files["other"]))


def no_files_in_memory(_: str) -> int:
    raise OSError(errno.ENOSYS, "not implemented")


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_without_files_in_memory_only_files_with_a_mark_are_left_to_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "memfd_create", no_files_in_memory, raising=False)
    authority = trustme.CA()
    identity, other = authority.issue_cert("a@x"), authority.issue_cert("b@x")
    cert, key = tmp_path / "cert", tmp_path / "key"
    config = Config([ENDPOINT], client_cert=cert, client_key=key)
    cert.write_bytes(identity.cert_chain_pems[0].bytes())
    key.write_bytes(identity.private_key_pem.bytes())
    assert read_certificates(config).cert == cert.read_bytes()
    key.write_bytes(other.private_key_pem.bytes())
    with pytest.raises(Unusable, match="and its key"):
        read_certificates(config)
    for encoding in ENCODINGS[1:]:
        key.write_bytes(encode(identity.private_key_pem.bytes().decode(), encoding))
        assert read_certificates(config).key == identity.private_key_pem.bytes()
    cert.write_bytes(encode("no certificate", "utf-8-sig"))
    with pytest.raises(Unusable, match="and its key"):
        read_certificates(config)


@pytest.mark.parametrize("content", [b"\xff\xfet", b"\xff\xfe\x00\xd8", b"\xff\xfe\0\0t\0\0\0", b"t\0b\0"])
def test_malformed_text_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bearer"
    file.write_bytes(content)
    with pytest.raises(Unusable):
        read_bearer(file)


@pytest.mark.parametrize(
    "secret",
    [
        "tbk_canary",
        "can/ary",
        "can\\nary",
        "/canary",
        "//canary",
        "///canary",
        "/canary/canary",
        "canary\0",
        "/etc/canary\n",
        "https://canary",
        f"{__file__}/canary",
        "canary/" + "x" * 300 + "/y",
        "-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n",
    ],
)
@pytest.mark.parametrize("setting", ["bearer_file", "ca_file", "client_cert", "client_key"])
def test_a_secret_that_is_given_instead_of_a_path_is_not_quoted(setting: str, secret: str) -> None:
    paths: dict[str, Any] = {setting: secret}
    if setting.startswith("client"):
        paths = {"client_cert": __file__, "client_key": __file__, **paths}
    with pytest.raises(InvalidArgument) as raised:
        TokenClient(Config([ENDPOINT], **paths))
    text = repr(raised.value) + "".join(traceback.format_exception_only(type(raised.value), raised.value))
    text += repr(raised.value.__cause__) + repr(Config([ENDPOINT], **paths))
    assert not any(part in text for part in ("canary", "can/ary", "can\\", "BEGIN"))


def test_a_path_is_shown_if_it_or_its_directory_exists(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert shown(path) == str(path)
