"""What the commands that talk to a running server share: its flags, endpoint and model names."""

from __future__ import annotations

import argparse
import asyncio
import os

import msgspec

from pyserve.errors import ConfigError, PyserveError
from pyserve.http_client import Endpoint, fetch

DEFAULT_URL = "http://localhost:8000/v1"
CONNECT_TIMEOUT_S = 30.0


class ServerError(PyserveError):
    """No server answers, or it answers with an error; the message is one line for the terminal."""


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add --url, --model-name and --api-key, as vLLM has them."""
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of a running server [{DEFAULT_URL}]")
    parser.add_argument("--model-name", metavar="NAME", help="[the first that it serves]")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("OPENAI_API_KEY"),
        help="of the server [OPENAI_API_KEY]",
    )


def endpoint_of(url: str, api_key: str | None) -> Endpoint:
    """The endpoint at `url`. Raises ConfigError where `url` or `api_key` are invalid."""
    try:
        endpoint = Endpoint.parse(url, api_key)
        endpoint.encode("GET", "/")  # fails for characters that a header cannot hold
    except (ValueError, UnicodeEncodeError):
        raise ConfigError(f"--url must be such as {DEFAULT_URL}, got {url[:200]}") from None
    if any(character in (api_key or "") for character in "\r\n\0"):
        raise ConfigError("--api-key holds a character that no key has")
    return endpoint


def served_models(url: str, endpoint: Endpoint) -> list[str]:
    """Names of the models that the server lists, at least one. Raises ServerError."""
    reply = asyncio.run(fetch(endpoint, "/v1/models", timeout_s=CONNECT_TIMEOUT_S))
    if reply.status == 0:
        raise ServerError(
            f"no server answers at {url} ({reply.error}): start one with `pyserve serve`, or name "
            "another with --url"
        )
    if reply.error is not None:
        raise ServerError(f"{url}: {reply.error}")
    try:
        models = [model.id for model in msgspec.json.decode(reply.body, type=_Models).data]
    except msgspec.MsgspecError:
        models = []
    if not models:
        raise ServerError(f"{url} lists no models: is it the address of an OpenAI server?")
    return models
