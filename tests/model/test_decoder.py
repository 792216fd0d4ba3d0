"""The decoder against transformers: logits by the ratio rule, greedy tokens exactly."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyserve.model.kv import KVSpec
from tests.model import oracle
from tests.model.described import with_windows
from tests.model.driver import Driver
from tests.model.oracle import CASES, VOCAB_SIZE, relative_error

PROMPT = random.Random(1).choices(range(VOCAB_SIZE), k=53)
NUM_GREEDY = 64
DTYPES = [torch.float32, torch.bfloat16]


@functools.cache
def checkpoint(name: str, dtype: torch.dtype, root: Path) -> Path:
    folder = root / f"{name}-{dtype}"
    case = CASES[name]
    oracle.make_model(case.family, **case.changes).to(dtype).save_pretrained(folder)
    return folder


@functools.cache
def exact_and_allowed(name: str, dtype: torch.dtype, root: Path) -> tuple[Tensor, float]:
    """The logits of PROMPT at float64, and the error that the ratio rule allows in `dtype`."""
    folder, is_stepwise = checkpoint(name, dtype, root), CASES[name].is_stepwise
    exact, plain = (
        oracle.their_logits(oracle.load_theirs(folder, kind), PROMPT, is_stepwise=is_stepwise)
        for kind in (torch.float64, dtype)
    )
    return exact, 2 * relative_error(plain, exact) + 1e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("chunk", [len(PROMPT), 7, 1], ids=["whole", "chunks", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_logits_obey_the_ratio_rule(name: str, dtype: torch.dtype, chunk: int, root: Path) -> None:
    exact, allowed = exact_and_allowed(name, dtype, root)
    driver = Driver(oracle.load_ours(checkpoint(name, dtype, root), dtype))
    chunks = [PROMPT[begin : begin + chunk] for begin in range(0, len(PROMPT), chunk)]
    logits = torch.cat([driver.step({0: tokens}) for tokens in chunks])
    assert logits.dtype == dtype
    assert relative_error(logits, exact) <= allowed


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_the_same(name: str, root: Path) -> None:
    folder = checkpoint(name, torch.float32, root)
    prompt = PROMPT[:21]
    expected = oracle.their_greedy(oracle.load_theirs(folder, torch.float32), prompt, NUM_GREEDY)
    driver = Driver(oracle.load_ours(folder))
    tokens, new = [], prompt
    for _ in range(NUM_GREEDY):
        tokens.append(int(driver.step({0: new})[-1].argmax()))
        new = tokens[-1:]
    assert len(set(expected)) > 10, "a model that repeats itself shows little"
    assert tokens == expected


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window", "qwen3-bias-window"])
def test_windows_matter_where_they_end(name: str, root: Path) -> None:
    folder = checkpoint(name, torch.float32, root)
    decoder = oracle.load_ours(folder)
    window = max(layer.attention.window for layer in decoder.config.layers)
    limited = Driver(decoder).step({0: PROMPT})
    without = with_windows(decoder.config, 0, 0, 0)
    unlimited = Driver(oracle.load_ours(folder, layers=without.layers)).step({0: PROMPT})
    torch.testing.assert_close(limited[:window], unlimited[:window])
    assert relative_error(limited[window:], unlimited[window:].double()) > 0.01


def test_sequences_of_one_step_do_not_touch_each_other(root: Path) -> None:
    exact, allowed = exact_and_allowed("qwen3", torch.float32, root)
    folder = checkpoint("qwen3", torch.float32, root)
    driver = Driver(oracle.load_ours(folder), num_seqs=3)
    other = random.Random(2).choices(range(VOCAB_SIZE), k=len(PROMPT))
    rows = []
    for begin in range(0, 50, 10):
        # The chunk in question stands between a shorter one and a single token.
        mine, before, after = PROMPT[begin:][:10], other[begin:][:9], other[begin:][:1]
        rows.append(driver.step({2: before, 0: mine, 1: after})[9:19])
    assert relative_error(torch.cat(rows), exact[:50]) <= allowed


def test_padding_writes_nothing(root: Path) -> None:
    driver = Driver(oracle.load_ours(checkpoint("llama", torch.float32, root)))
    plain = driver.step({0: PROMPT[:5]})
    padded_driver = Driver(driver.decoder)
    padded = padded_driver.step({0: PROMPT[:5]}, num_padding=3)
    torch.testing.assert_close(padded[:5], plain)
    for caches, expected in zip(padded_driver.kv_caches, driver.kv_caches, strict=True):
        torch.testing.assert_close(caches, expected, equal_nan=True)


def test_kv_specs_name_heads_dtype_and_windows(root: Path) -> None:
    specs = oracle.load_ours(checkpoint("qwen2-window", torch.bfloat16, root), torch.bfloat16)
    assert specs.kv_specs() == [
        KVSpec.of_heads(2, 16, torch.bfloat16, window) for window in (0, 17, 17)
    ]
    assert specs.kv_specs()[0].bytes_per_block(16) == 2 * 16 * 2 * 16 * 2
