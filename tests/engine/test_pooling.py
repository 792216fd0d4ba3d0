"""Embeddings and scores against transformers in float32, whatever happens to their sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pyserve.client import SequenceRequest
from pyserve.config import Use
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cpu_runner import CpuRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.errors import ContextError, EngineError
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.params import POOLED
from tests.engine.driver import Driver, Reader
from tests.model.oracle import VOCAB_SIZE, make_model

MAX_MODEL_LEN, BLOCK_SIZE, NUM_SLOTS = 128, 16, 8
NO, YES = 17, 180
MODULE = "sentence_transformers.models."
SETTINGS: dict[str, dict[str, Any]] = {
    "in company": {},
    "chunks": {"budget": 11},
    "chunks of one": {"budget": 1, "num_slots": 1},
    "prefix hits": {"caching": True},
    "few blocks": {"num_blocks": 9, "budget": 20},
    "everything": {"num_blocks": 12, "budget": 13, "caching": True},
}

Vector = NDArray[np.float32]


def write_modules(folder: Path, **modes: object) -> None:
    """As sentence-transformers saves a model that takes the last token and normalises."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"idx": i, "path": path, "type": MODULE + kind}
               for i, (kind, path) in enumerate(kinds.items())]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    said = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True} | modes
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))


def save_embedding(folder: Path, family: str, **changes: Any) -> None:
    """As Qwen3-Embedding is stored: the model without its head, and what its vectors are."""
    make_model(family, **changes).base_model.save_pretrained(folder)
    write_modules(folder)


def save_classifier(folder: Path) -> None:
    torch.manual_seed(3)
    model = make_model("qwen3", head_dim=32)
    kind = AutoModelForSequenceClassification.from_config(
        model.config.__class__(**{**model.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    )
    kind.model.load_state_dict(model.model.state_dict())
    torch.nn.init.normal_(kind.score.weight, std=0.3)
    kind.save_pretrained(folder)


def their_embeddings(folder: Path, prompts: list[list[int]]) -> list[Vector]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0, -1].numpy() for ids in prompts]


def their_scores(folder: Path, prompts: list[list[int]]) -> list[Vector]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([ids])).logits[0, -1].numpy() for ids in prompts]
    return [row[YES : YES + 1] - row[NO] for row in logits]


def their_classes(folder: Path, prompts: list[list[int]]) -> list[Vector]:
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


Save = Callable[[Path], None]
Oracle = Callable[[Path, list[list[int]]], list[Vector]]
CASES: dict[str, tuple[Save, Use, Oracle]] = {
    "qwen3": (lambda at: save_embedding(at, "qwen3", head_dim=32), "auto", their_embeddings),
    "mistral": (
        lambda at: save_embedding(at, "mistral", sliding_window=20), "auto", their_embeddings
    ),
    "untied, by flag": (
        lambda at: make_model("qwen2", tie_word_embeddings=False).save_pretrained(at), "pooling",
        their_embeddings,
    ),
    "reranker": (
        lambda at: make_model("qwen3", tie_word_embeddings=True).save_pretrained(at), "score",
        their_scores,
    ),
    "untied reranker": (
        lambda at: make_model("qwen2", tie_word_embeddings=False).save_pretrained(at), "score",
        their_scores,
    ),
    "capped reranker": (
        lambda at: make_model("gemma2", final_logit_softcapping=3.0).save_pretrained(at), "score",
        their_scores,
    ),
    "classifier": (save_classifier, "auto", their_classes),
}  # fmt: skip


def load(folder: Path, use: Use = "auto", load_format: str = "auto") -> Decoder:
    config = ModelConfig.from_path(folder, use=use).answering_by((NO, YES))
    return load_model(
        folder, config, Placement(torch.float32, torch.device("cpu")), load_format=load_format,
        seed=0, progress=lambda done, total: None, max_model_len=MAX_MODEL_LEN,
    )  # fmt: skip


def make_engine(
    decoder: Decoder, *, num_blocks: int = 64, budget: int = 256, caching: bool = False,
    num_slots: int = NUM_SLOTS,
) -> Engine:  # fmt: skip
    limits = StepLimits(
        num_slots=num_slots, max_num_batched_tokens=budget, max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE, logits_tile_rows=3,
    )  # fmt: skip
    executor = StepExecutor(decoder, limits)
    executor.allocate_kv(num_blocks)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching),
        SlotAllocator(num_slots),
        max_num_batched_tokens=budget,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
    )
    return Engine(
        scheduler, CpuRunner(executor, num_threads=1), max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE, policy="fcfs", is_pooling=True,
    )  # fmt: skip


def prompts() -> list[list[int]]:
    """Of every length around a block, and all that fits; many begin alike."""
    random = Random(5)
    prefix = [random.randrange(VOCAB_SIZE) for _ in range(MAX_MODEL_LEN)]
    lens = [1, 2, 15, 16, 17, 33, 48, 70, 100, MAX_MODEL_LEN]
    return [prefix[: n - 1] + [random.randrange(VOCAB_SIZE)] for n in lens]


def pooled(engine: Engine, *, depth: int = 0) -> list[Reader]:
    driver = Driver(engine, depth)
    for prompt in prompts():
        driver.submit(prompt, POOLED)
    driver.drain()
    engine.check_invariants()
    return driver.readers


def check(readers: list[Reader], expected: list[Vector]) -> None:
    for reader, vector in zip(readers, expected, strict=True):
        assert (reader.output, reader.finish_reason, reader.error) == ([], "stop", None)
        ours = reader.stream.pooled
        assert ours is not None and ours.dtype == np.float32 and ours.shape == vector.shape
        np.testing.assert_allclose(ours, vector, rtol=1e-4, atol=1e-4)
        assert reader.stream.first_token_s >= reader.stream.scheduled_s > 0


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_computes(name: str, tmp_path: Path) -> None:
    save, use, oracle = CASES[name]
    save(tmp_path)
    decoder, expected = load(tmp_path, use), oracle(tmp_path, prompts())
    assert np.ptp([vector[0] for vector in expected]) > 0.1, "prompts that are alike show little"
    for settings in SETTINGS.values() if name == "qwen3" else [{}, SETTINGS["everything"]]:
        for depth in (0, 1):
            engine = make_engine(decoder, **settings)
            check(pooled(engine, depth=depth), expected)
            if settings.get("caching"):
                before = engine.scheduler.num_cached_tokens
                check(pooled(engine, depth=depth), expected)
                assert engine.scheduler.num_cached_tokens > before
            engine.runner.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_preempted_and_aborted_at_any_moment(depth: int, tmp_path: Path) -> None:
    save_embedding(tmp_path, "qwen3", head_dim=32)
    decoder, expected = load(tmp_path), their_embeddings(tmp_path, prompts())
    engine = make_engine(decoder, budget=23, num_blocks=20, caching=True)
    driver, random = Driver(engine, depth), Random(depth)
    asked: list[tuple[Reader, Vector]] = []
    aborted: set[int] = set()
    for _ in range(300):
        number = random.randrange(len(expected))
        act = random.choice(["submit", "launch", "launch", "update", "update", "preempt", "abort"])
        if act == "submit" and engine.num_seqs < 12:
            asked.append((driver.submit(prompts()[number], POOLED), expected[number]))
        elif act == "launch":
            driver.launch()
        elif act == "update":
            driver.update()
        elif act == "preempt" and random.random() < 0.3:
            engine.scheduler.preempt_all()
        elif act == "abort" and asked and random.random() < 0.3:
            stream = random.choice(asked)[0].stream
            if not stream.is_finished:
                aborted.add(stream.seq_id)
            engine.abort(stream)
        engine.check_invariants()
    driver.drain()
    kept = [pair for pair in asked if pair[0].stream.seq_id not in aborted]
    assert engine.scheduler.num_preemptions > 3 and aborted and len(kept) > 20
    check([reader for reader, _ in kept], [vector for _, vector in kept])
    assert engine.scheduler.blocks.num_free == 20 and not engine.num_seqs
    engine.runner.close()


def test_nan_fails_its_row_alone(tmp_path: Path) -> None:
    save_embedding(tmp_path, "qwen3", head_dim=32)
    decoder = load(tmp_path)
    decoder.embedding.weight[5] = torch.nan
    driver = Driver(make_engine(decoder), 0)
    bad, good = driver.submit([1, 5, 2], POOLED), driver.submit([1, 4, 2], POOLED)
    driver.drain()
    assert isinstance(bad.error, EngineError) and "not a number" in str(bad.error)
    check([good], their_embeddings(tmp_path, [[1, 4, 2]]))
    driver.engine.runner.close()


def test_a_prompt_may_fill_the_context_and_no_more(tmp_path: Path) -> None:
    save_embedding(tmp_path, "qwen3", head_dim=32)
    engine = make_engine(load(tmp_path))
    assert len(prompts()[-1]) == MAX_MODEL_LEN
    with pytest.raises(ContextError, match=f"length is {MAX_MODEL_LEN} tokens: the prompt has"):
        engine.add(SequenceRequest([1] * (MAX_MODEL_LEN + 1), POOLED))
    engine.runner.close()


@pytest.mark.parametrize(("use", "is_tied"), [("embed", False), ("score", True)])
def test_made_up_weights(use: Use, is_tied: bool, tmp_path: Path) -> None:
    """Of a folder that holds nothing but config.json."""
    make_model("qwen3", tie_word_embeddings=is_tied).config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["Qwen3ForCausalLM"]}))
    readers = pooled(make_engine(load(tmp_path, use, load_format="dummy")))
    vectors = [reader.stream.pooled for reader in readers]
    assert all(vector is not None and np.isfinite(vector).all() for vector in vectors)
    assert len({vector.tobytes() for vector in vectors if vector is not None}) == len(readers)
