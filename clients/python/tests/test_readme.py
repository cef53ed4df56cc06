"""The program of the README, and the lines of it in `docs/clients.md`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .broker import Broker
from .simulation import SECRET, answer
from .test_adapters import Api, api

__all__ = ["api"]

README = Path(__file__).parent.parent / "README.md"
# Is missing where the package is tested without the repository.
CLIENTS = README.parent.parent.parent / "docs" / "clients.md"


def block(document: Path) -> str:
    """Returns the code of a document."""
    return document.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def test_the_program_of_the_readme_sends_the_token(broker: Broker, api: Api, bearer_file: Path) -> None:
    token = answer(1)
    token.api_base_url = api.url
    broker.get = lambda _, __: token
    api.accepts = SECRET
    environment = {
        **os.environ,
        "TOKEN_BROKER_ENDPOINT": broker.endpoint,
        "TOKEN_BROKER_BEARER_FILE": str(bearer_file),
    }
    program = [sys.executable, "-c", block(README)]
    ended = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    assert ended.stdout == "200\n"


def test_the_lines_in_the_documents_are_those_of_the_program() -> None:
    if CLIENTS.exists():
        program = block(README).splitlines()
        assert [line for line in block(CLIENTS).splitlines() if line not in program] == []
