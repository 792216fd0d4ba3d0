"""How long the event loop stands still under the largest requests to models that pool.

As test_stalls.py has it of models that generate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyserve.api.wire.json_size import MAX_BODY_IDS
from pyserve.api.wire.protocol import MAX_SEQUENCES
from pyserve.client import PoolingInfo
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.load import POOLING_QUEUE
from tests.api.fakes import PADDED_VOCAB, Server, run_server
from tests.api.http.test_stalls import CONTEXT, NUM_SLOTS, check, ids
from tests.api.instant import make_engine
from tests.machine import freeze

WIDTH = 4096  # of the largest embedding models
TEXTS = ["the quick brown fox " * 100] * MAX_SEQUENCES
SHORT = ["fox"] * MAX_SEQUENCES


@pytest.fixture(scope="module")
def servers(tokenizer_folder: Path) -> Iterator[dict[str, Server]]:
    """By what their models are for."""
    with ExitStack() as running:
        found: dict[str, Server] = {}
        for info in (PoolingInfo("embed", WIDTH), PoolingInfo("score", 1)):
            engine = make_engine(
                PADDED_VOCAB, max_model_len=CONTEXT, num_slots=NUM_SLOTS, kind=AsyncEngine,
                pooling=info, max_queue=POOLING_QUEUE,
            )  # fmt: skip
            found[info.kind] = running.enter_context(run_server(tokenizer_folder, other=engine))
        freeze()
        yield found


def embed(given: object, **fields: object) -> bytes:
    return json.dumps({"input": given, **fields}).encode()


# kind, route, what is large -> the body
REQUESTS: dict[tuple[str, str, str], Callable[[], bytes]] = {
    ("embed", "/v1/embeddings", "texts"): lambda: embed(TEXTS, encoding_format="base64"),
    ("embed", "/v1/embeddings", "ids"): lambda: embed(
        ids(MAX_SEQUENCES, MAX_BODY_IDS // MAX_SEQUENCES), encoding_format="base64"
    ),
    ("embed", "/v1/embeddings", "an answer of numbers"): lambda: embed(SHORT),
    ("embed", "/v1/score", "texts"): lambda: json.dumps(
        {"text_1": "x", "text_2": [f"{i} {text}" for i, text in enumerate(TEXTS)]}
    ).encode(),
    ("score", "/v1/score", "pairs"): lambda: json.dumps(
        {"text_1": "x", "text_2": TEXTS}
    ).encode(),
    ("score", "/v1/rerank", "documents that are cut"): lambda: json.dumps(
        {"query": "x", "documents": TEXTS, "max_tokens_per_doc": 100}
    ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda asked: " ".join(asked[1:]))
def test_the_largest_body(servers: dict[str, Server], asked: tuple[str, str, str]) -> None:
    kind, path, _ = asked
    check(servers[kind], "POST", path, REQUESTS[asked](), (200,))
