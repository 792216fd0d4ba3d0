"""Both sides get the same prompts and count the same tokens; the ratio is that of the medians."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from bench.make_model import make_model
from bench.stub import StubConfig, running_stub
from bench.stub import __file__ as stub_path
from bench.vs_transformers import Generate, Server, Timing, compare, ordinary_ids, render, run

STUB = (sys.executable, str(stub_path))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, "tiny", {"torch_dtype": "float32"}, has_weights=True)
    return folder


@pytest.fixture
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def test_generate_gives_the_asked_tokens_with_either_cache(
    model: Path, tokenizer: Tokenizer
) -> None:
    generate = Generate(model, torch.float32, tokenizer)
    ids = ordinary_ids(model, tokenizer)
    assert len(ids) == 1020  # not the four special tokens
    prompts = [ids[:5], ids[100:105]]
    _, dynamic = generate.run(prompts, 12, "dynamic")
    _, static = generate.run(prompts, 12, "static")
    assert dynamic == static and len(dynamic) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_side_checks_what_comes(stream: bool) -> None:
    with running_stub() as (url, _):
        seconds, texts = asyncio.run(Server(url).run([[1], [2]], 4, stream=stream))
        assert seconds > 0 and len(texts) == 2 and texts[0] != texts[1]
    with running_stub(StubConfig(short_by=1)) as (url, _):
        with pytest.raises(RuntimeError, match="3 tokens came, asked for 4"):
            asyncio.run(Server(url).run([[1]], 4, stream=stream))


def test_rounds_share_prompts_and_the_first_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.vs_transformers.PAUSE_S", 0.0)
    seen: dict[str, list[list[list[int]]]] = {"transformers, x": [], "pyserve": []}

    def contender(name: str, seconds: float) -> object:
        def run(prompts: list[list[int]]) -> tuple[float, list[str]]:
            seen[name].append(prompts)
            return (99.0 if len(seen[name]) == 1 else seconds), ["a", name]

        return run

    contenders = {"transformers, x": contender("transformers, x", 2.0)}
    contenders["pyserve"] = contender("pyserve", 0.5)
    timings = compare(contenders, lambda number: [[number], [number]], 10, 3)  # type: ignore[arg-type]
    assert seen["pyserve"] == seen["transformers, x"] == [[[i], [i]] for i in range(4)]
    assert timings["pyserve"].tokens_per_s == [40.0] * 3
    text, ratio = render(1, timings)
    assert ratio == 4.0
    assert "3/6" in text and "reached 4.00x: met" in text


def test_the_faster_cache_is_the_one_to_beat() -> None:
    timings = {
        "transformers, dynamic": Timing([10.0], [["a"]]),
        "transformers, static": Timing([20.0], [["a"]]),
        "pyserve": Timing([30.0], [["a"]]),
    }
    text, ratio = render(16, timings)
    assert ratio == 1.5 and "reached 1.50x: MISSED" in text


def test_a_whole_run_against_the_stub(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class StubArguments(argparse.Namespace):
        model: Path
        dtype, batch, prompt_len, new_tokens, rounds, threads, seed = None, [2], 4, 3, 1, 1, 0
        flags: list[str] = []

    args = StubArguments(model=model)
    figures = run(args, command=STUB)
    assert figures["batch_2"]["ratio"] > 0
    assert "transformers, static cache" in capsys.readouterr().out
