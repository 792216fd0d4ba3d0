"""/v1/embeddings over HTTP: every form of an input and of a vector, refusals, other endpoints."""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyserve.client import PoolingInfo
from tests.api.fakes import CONTEXT, MODEL, PADDED_VOCAB, Server, run_server
from tests.waiting import wait_until

PATH = "/v1/embeddings"
WIDTH = 6


def vector_of(token_ids: list[int]) -> np.ndarray:
    """Made up: it tells the ids and their order."""
    places = np.arange(1, WIDTH + 1, dtype=np.float32)
    return np.array(
        [np.sin(p * sum(i * t for i, t in enumerate(token_ids, 1))) for p in places], np.float32
    )


@pytest.fixture(scope="module")
def shared(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder, pooling=PoolingInfo("embed", WIDTH)) as running:
        running.engine.pool = vector_of
        yield running


@pytest.fixture
def embedder(shared: Server) -> Server:
    shared.play("")
    return shared


def normalised(vector: np.ndarray) -> list[float]:
    return [float(x) for x in vector / np.linalg.norm(vector)]


def test_a_whole_answer(embedder: Server) -> None:
    answer = embedder.post(PATH, {"input": "hi", "model": MODEL, "user": "me"})
    assert answer.pop("id").startswith("embd-")
    assert isinstance(answer.pop("created"), int)
    [item] = answer["data"]
    ids = embedder.tokenizer.encode("hi", add_special_tokens=True)
    assert embedder.engine.submitted[0].prompt == ids
    assert item.pop("embedding") == pytest.approx(normalised(vector_of(ids)))
    assert answer == {
        "object": "list", "model": MODEL, "data": [{"index": 0, "object": "embedding"}],
        "usage": {
            "prompt_tokens": len(ids), "total_tokens": len(ids), "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "given", ["hi", ["hi", "Hello"], [80, 81], [[80, 81], [82]], ["a"] * 2048], ids=range(5)
)
def test_forms_of_an_input(embedder: Server, given: Any) -> None:
    answer = embedder.post(PATH, {"input": given})
    texts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    expected = [
        embedder.tokenizer.encode(one, add_special_tokens=True) if isinstance(one, str) else one
        for one in texts
    ]
    assert [item.prompt for item in embedder.engine.submitted] == expected
    assert [item["index"] for item in answer["data"]] == list(range(len(expected)))
    for item, ids in zip(answer["data"], expected, strict=True):
        assert item["embedding"] == pytest.approx(normalised(vector_of(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize("dimensions", [None, 1, 4, WIDTH])
@pytest.mark.parametrize("is_normalised", [None, True, False])
def test_cut_then_normalised_then_encoded(
    embedder: Server, dimensions: int | None, is_normalised: bool | None
) -> None:
    body = {"input": [80, 81], "dimensions": dimensions, "use_activation": is_normalised}
    [numbers] = embedder.post(PATH, {**body, "encoding_format": "float"})["data"]
    [text] = embedder.post(PATH, {**body, "encoding_format": "base64"})["data"]
    vector = vector_of([80, 81])[:dimensions]
    if is_normalised is not False:
        assert math.hypot(*numbers["embedding"]) == pytest.approx(1)
        vector = vector / np.linalg.norm(vector)
    assert numbers["embedding"] == pytest.approx([float(x) for x in vector], rel=1e-6)
    assert np.frombuffer(b64decode(text["embedding"]), "<f4").tolist() == numbers["embedding"]


def test_a_vector_of_nothing_is_nothing(embedder: Server) -> None:
    embedder.engine.pool = lambda ids: np.zeros(WIDTH, np.float32)
    try:
        [item] = embedder.post(PATH, {"input": "hi"})["data"]
    finally:
        embedder.engine.pool = vector_of
    assert item["embedding"] == [0.0] * WIDTH


def test_texts_that_are_too_long_are_cut_where_it_is_asked_for(embedder: Server) -> None:
    ids = list(range(3, 400)) * 2
    assert len(ids) > CONTEXT
    for cut, expected in (
        ({"truncate_prompt_tokens": -1}, ids[:CONTEXT]),
        ({"truncate_prompt_tokens": 7}, ids[:7]),
        ({"truncate_prompt_tokens": 7, "truncation_side": "right"}, ids[:7]),
        ({"truncate_prompt_tokens": 7, "truncation_side": "left"}, ids[-7:]),
    ):
        embedder.engine.submitted.clear()
        embedder.post(PATH, {"input": ids, **cut})
        assert embedder.engine.submitted[0].prompt == expected
    embedder.post(PATH, {"input": "Hello world. " * 3000, "truncate_prompt_tokens": -1})
    assert len(embedder.engine.submitted[-1].prompt) == CONTEXT
    embedder.post(PATH, {"input": ids[:CONTEXT]})
    assert len(embedder.engine.submitted[-1].prompt) == CONTEXT, "all of it, no room for an answer"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "missing"),
    ({"input": None}, "input", "missing"),
    ({"input": ""}, "input", "must not be empty"),
    ({"input": []}, "input", "got 0"),
    ({"input": [""]}, "input", "must not be empty"),
    ({"input": [[]]}, "input", "must not be empty"),
    ({"input": [1, "a"]}, "input", "must not mix"),
    ({"input": ["a"] * 2049}, "input", "1 to 2048 entries, got 2049"),
    ({"input": ["a"] * 100_000}, "input", "1 to 2048 entries, got 100000"),
    ({"input": [[1]] * 100_000}, "", "more than 32768 values"),
    ({"input": [-1]}, "input", "token id -1"),
    ({"input": [PADDED_VOCAB]}, "input", f"[0, {PADDED_VOCAB - 1}]"),
    ({"input": [80] * (CONTEXT + 1)}, "input", f"input[0] has {CONTEXT + 1}"),
    ({"input": [[80], [80] * (CONTEXT + 1)]}, "input", "input[1] has"),
    ({"input": "word " * 2000}, "input", str(CONTEXT)),
    ({"input": [1.5]}, "input[0]", "whole number"),
    ({"input": {"a": 1}}, "input", "expected"),
    ({"input": [None]}, "input[0]", "expected"),
    ({"input": [[["a"]]]}, "input[0][0]", "expected"),
    ({"input": [{"role": "user", "content": "hi"}]}, "input[0]", "expected"),
    ({"input": "a", "dimensions": 0}, "dimensions", f"[1, {WIDTH}]"),
    ({"input": "a", "dimensions": WIDTH + 1}, "dimensions", f"[1, {WIDTH}], got 7"),
    ({"input": "a", "dimensions": -1}, "dimensions", "got -1"),
    ({"input": "a", "dimensions": 2**70}, "dimensions", "got 118"),
    ({"input": "a", "dimensions": "4"}, "dimensions", "expected"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float or base64, got hex"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "got 0"),
    ({"input": "a", "truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens", "-1 or in"),
    ({"input": "a", "truncation_side": "up"}, "truncation_side", "left or right"),
    ({"input": "a", "use_activation": "yes"}, "use_activation", "expected"),
    ({"input": "a", "normalize": False}, "normalize", "send use_activation"),
    ({"input": "a", "embed_dtype": "int8"}, "embed_dtype", "not built yet"),
    ({"input": "a", "messages": [{"role": "user"}]}, "messages", "not built yet"),
    ({"input": "a", "model": "other"}, "model", "does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=range(len(BAD)))
def test_bad_requests(embedder: Server, body: dict[str, Any], param: str, words: str) -> None:
    error = embedder.error(PATH, body, 404 if "model" in body else 400)
    assert (error["param"] or "") == param and words in error["message"], error
    assert embedder.engine.submitted == []


def test_nan_is_no_number(embedder: Server) -> None:
    for body in (b'{"input": [NaN]}', b'{"input": "a", "dimensions": NaN}', b'{"input": [1e999]}'):
        assert embedder.request("POST", PATH, body)[0] == 400
    assert embedder.engine.submitted == []


def test_what_has_no_effect_is_named(embedder: Server) -> None:
    body = {"input": "hi", "truncation_side": "left", "priority": 3, "task": "retrieval"}
    status, headers, _ = embedder.request("POST", PATH, body)
    assert status == 200
    assert headers["x-pyserve-ignored"] == "priority, task, truncation_side"


def test_a_model_that_embeds_does_nothing_else(embedder: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
    ):
        error = embedder.error(path, body)
        assert error["param"] == "model"
        assert "makes embeddings: ask /v1/embeddings, /v1/score" in error["message"]
    status, _, reply = embedder.request("POST", "/v1/messages", chat)
    assert status == 400 and b"makes embeddings" in reply
    assert embedder.engine.submitted == []
    assert embedder.post("/tokenize", {"prompt": "hi"})["count"] > 0


def test_a_model_that_generates_makes_no_embeddings(server: Server) -> None:
    error = server.error(PATH, {"input": "hi"})
    assert error["param"] == "model" and "--runner embed" in error["message"]
    assert "generates text: ask /v1/chat/completions" in error["message"]


def test_only_the_dimensions_that_a_model_was_made_for(tokenizer_folder: Path) -> None:
    pooling = PoolingInfo("embed", WIDTH, is_normalized=False, dimensions=(2, 4))
    with run_server(tokenizer_folder, pooling=pooling) as running:
        running.engine.pool = vector_of
        error = running.error(PATH, {"input": [80], "dimensions": 3})
        assert error["param"] == "dimensions"
        assert "must be one of 2, 4, 6 for this model, got 3" in error["message"]
        for dimensions in (2, 4, WIDTH):
            body = {"input": [80], "dimensions": dimensions}
            [item] = running.post(PATH, body)["data"]
            plain = [float(x) for x in vector_of([80])[:dimensions]]
            assert item["embedding"] == plain, "as its files say, it is not normalised"
            [item] = running.post(PATH, {**body, "use_activation": True})["data"]
            assert math.hypot(*item["embedding"]) == pytest.approx(1)


def test_the_sdk_as_it_is(embedder: Server) -> None:
    """It asks for base64 by itself, or not, by version; its answer is numbers."""
    with embedder.sdk() as client:
        answer = client.embeddings.create(model=MODEL, input=["hi", "Hello world"])
        asked = client.embeddings.create(
            model=MODEL, input="hi", dimensions=3, encoding_format="base64"
        )
    ids = embedder.tokenizer.encode("hi", add_special_tokens=True)
    assert answer.data[0].embedding == pytest.approx(normalised(vector_of(ids)))
    assert [item.index for item in answer.data] == [0, 1] and answer.usage.prompt_tokens > 2
    assert isinstance(asked.data[0].embedding, str)


def test_it_is_counted(embedder: Server) -> None:
    def metric(name: str) -> float:
        lines = embedder.request("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    names = ("vllm:request_prompt_tokens_sum", "vllm:request_prefill_time_seconds_count",
             "vllm:request_params_max_tokens_count", "vllm:request_generation_tokens_sum",
             'vllm:time_to_first_token_seconds_count')  # fmt: skip
    before = [metric(name) for name in names]
    embedder.post(PATH, {"input": [[80, 81], [82]]})
    assert [metric(name) - old for name, old in zip(names, before, strict=True)] == [3, 2, 0, 0, 0]


def test_a_client_that_leaves_frees_its_sequences(embedder: Server) -> None:
    embedder.play("", delay_s=20)
    sock = embedder.connect(PATH, {"input": ["a", "b"]})
    wait_until(lambda: len(embedder.engine.running()) == 2)
    sock.close()
    wait_until(lambda: not embedder.engine.running())
    assert [item.is_aborted for item in embedder.engine.submitted] == [True, True]
