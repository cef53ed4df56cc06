"""The code of the README, which is the body of `example`."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import httpx
import pytest

from token_broker import TokenClient
from token_broker.httpx import TokenAuth

from .broker import Broker
from .simulation import SECRET, answer
from .test_adapters import Api, api

__all__ = ["api"]


def example() -> httpx.Response:
    client = TokenClient.from_env()
    api_url = client.token("acme").api_base_url
    api = httpx.Client(auth=TokenAuth(client, "acme"))
    response = api.get(api_url + "/whoami")

    api.close()
    client.close()
    return response


def test_the_example_of_the_readme_works(
    broker: Broker,
    api: Api,
    bearer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = answer(1)
    token.api_base_url = api.url
    broker.get = lambda _, __: token
    api.accepts = SECRET
    monkeypatch.setenv("TOKEN_BROKER_ENDPOINT", broker.endpoint)
    monkeypatch.setenv("TOKEN_BROKER_BEARER_FILE", str(bearer_file))
    assert example().text == "done"


def test_the_readme_shows_the_tested_example() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    assert block.strip() in textwrap.dedent(inspect.getsource(example).partition("\n")[2])
