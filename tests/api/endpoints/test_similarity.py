"""/v1/score and /v1/rerank of an embedding model: cosines, what is embedded, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyserve.client import PoolingInfo
from tests.api.endpoints.test_embeddings import WIDTH, vector_of
from tests.api.fakes import CONTEXT, Server, run_server

RERANK, SCORE = "/v1/rerank", "/v1/score"


@pytest.fixture(scope="module")
def shared(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder, pooling=PoolingInfo("embed", WIDTH)) as running:
        running.engine.pool = vector_of
        yield running


@pytest.fixture
def embedder(shared: Server) -> Server:
    shared.play("")
    return shared


def cosine(server: Server, one: str, other: str) -> float:
    first, second = (
        vector_of(server.tokenizer.encode(text, add_special_tokens=True)).astype("f8")
        for text in (one, other)
    )
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def texts_of(server: Server) -> list[str]:
    decode = server.tokenizer.decode
    return [decode(item.prompt, skip_special_tokens=True) for item in server.engine.submitted]


@pytest.mark.parametrize(
    ("queries", "documents", "embedded"),
    [
        ("q", "good", ["q", "good"]),
        ("q", ["good", "bad"], ["q", "good", "bad"]),
        (["q", "r"], "fair", ["q", "r", "fair"]),
        (["q", "r"], ["bad", "good"], ["q", "r", "bad", "good"]),
        ("q", ["a", "a", "q"], ["q", "a", "q"]),
    ],
)
def test_scores_are_cosines(
    embedder: Server, queries: Any, documents: Any, embedded: list[str]
) -> None:
    answer = embedder.post(SCORE, {"text_1": queries, "text_2": documents})
    assert texts_of(embedder) == embedded, "each text once"
    queries, documents = ([x] if isinstance(x, str) else x for x in (queries, documents))
    count = max(len(queries), len(documents))
    pairs = zip(*(x * count if len(x) == 1 else x for x in (queries, documents)), strict=True)
    expected = [cosine(embedder, *pair) for pair in pairs]
    assert [item["score"] for item in answer["data"]] == pytest.approx(expected, abs=1e-6)
    num_tokens = sum(len(item.prompt) for item in embedder.engine.submitted)
    assert answer["usage"]["prompt_tokens"] == num_tokens


def test_a_ranking(embedder: Server) -> None:
    documents = ["good", "bad", "fair", "which?"]
    body = {"query": "which?", "documents": documents, "top_n": 3}
    results = embedder.post(RERANK, body)["results"]
    scores = [cosine(embedder, "which?", document) for document in documents]
    assert results[0]["index"] == 3 and results[0]["relevance_score"] == pytest.approx(1)
    assert [one["index"] for one in results] == sorted(range(4), key=lambda i: -scores[i])[:3]


def test_a_vector_of_nothing_is_like_nothing(embedder: Server) -> None:
    embedder.engine.pool = lambda ids: np.zeros(WIDTH, np.float32)
    try:
        answer = embedder.post(SCORE, {"text_1": "a", "text_2": "b"})
    finally:
        embedder.engine.pool = vector_of
    assert [item["score"] for item in answer["data"]] == [0.0]


def test_what_is_cut(embedder: Server) -> None:
    long = "Hello world, how are you? " * 200
    error = embedder.error(SCORE, {"text_1": "q", "text_2": ["a", long]})
    assert str(CONTEXT) in error["message"] and error["param"] == "text_2"
    embedder.post(SCORE, {"text_1": long, "text_2": "a", "truncate_prompt_tokens": 7})
    assert len(embedder.engine.submitted[0].prompt) == 7
    embedder.engine.submitted.clear()
    body = {"query": long[:400], "documents": [long, "a"], "max_tokens_per_doc": 5}
    embedder.post(RERANK, body)
    query, *documents = (len(item.prompt) for item in embedder.engine.submitted)
    assert query > 7 and max(documents) == 5


def test_what_has_no_effect_is_named(embedder: Server) -> None:
    body = {"text_1": "a", "text_2": "b", "instruction": "x", "use_activation": False}
    status, headers, _ = embedder.request("POST", SCORE, body)
    assert status == 200 and headers["x-pyserve-ignored"] == "instruction, use_activation"


def test_the_most_texts(embedder: Server) -> None:
    many = [f"t{i}" for i in range(2048)]
    assert len(embedder.post(SCORE, {"text_1": "q", "text_2": many})["data"]) == 2048
    embedder.engine.submitted.clear()
    error = embedder.error(SCORE, {"text_1": [f"q{i}" for i in range(2048)], "text_2": many})
    assert error["param"] == "text_2" and "hold 4096 different texts" in error["message"]
    for fields in ({"text_1": "", "text_2": "a"}, {"text_1": "a", "text_2": ["b", ""]}):
        assert "must not be empty" in embedder.error(SCORE, fields)["message"]
    assert embedder.engine.submitted == []
