"""Adapters on a card: the base model and three of them by the ratio rule, whatever the engine does;
the same tokens recorded or not; and a server that loads and unloads them beside streams."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.server_process import ServerProcess
from pyserve.client import Adapter
from pyserve.config import DEMO_MODEL
from pyserve.model.adapter_weights import read_adapter
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import META, Placement
from tests.gpu.test_full_model import (
    DEVICE,
    SETTINGS,
    Checkpoint,
    assert_ratio,
    load_on_card,
)
from tests.gpu.test_run_ahead import assert_replays
from tests.gpu.test_server import SMALL, chat, metric, server_on_card, text_of
from tests.model import peft
from tests.model.oracle import load_theirs, make_model

MAX_RANK = 64
NUM_ADAPTERS = 3
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 256, "head_dim": 64, "attention_bias": True}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "phi3-fused": ("phi3", {"hidden_size": 192, "num_attention_heads": 2}),
    "glm4-pairs": ("glm4", {"head_dim": 128, "attention_bias": True}),
    "gemma2-norms-after": ("gemma2", {"head_dim": 256, "initializer_range": 0.1}),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Adapted(Checkpoint):
    """With adapters of several ranks, for all modules and for some."""

    def __init__(
        self, folder: Path, model: tuple[str, dict[str, Any]], dtype: torch.dtype, num_slots: int
    ) -> None:
        family, changes = model
        made = make_model(family, **changes).to(dtype)
        made.save_pretrained(folder)
        super().__init__(
            load_on_card(folder, dtype, num_adapter_slots=num_slots, max_adapter_rank=MAX_RANK),
            folder,
        )
        shapes = peft.shapes_of(made)
        adapters: list[Adapter | None] = [None]
        for number, rank in enumerate((16, 5, MAX_RANK)):
            only = "" if number != 1 else "v_proj|qkv_proj|down_proj"
            name = f"a{number}"
            path = peft.write_adapter(
                folder / name, shapes, rank=rank, seed=number, only=only, size=0.5
            )
            weights = read_adapter(
                path, self.ours.adapter_targets(), max_rank=MAX_RANK, dtype=dtype
            )
            adapters.append(Adapter(name, number + 1, weights))
            plain, exact = (
                peft.merged(load_theirs(folder, kind), path, dtype).to(DEVICE)
                for kind in (dtype, torch.float64)
            )
            self._theirs[name] = plain, exact
        # Of the six requests the first two have a prompt's beginning in common.
        self.adapters = [adapters[number] for number in (1, 1, 0, 2, 0, 3)]


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    family: str = request.param
    return family


@pytest.fixture(scope="module", params=DTYPES)
def checkpoint(
    name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Adapted:
    folder = tmp_path_factory.mktemp("model")
    return Adapted(folder, MODELS[name], DTYPES[request.param], NUM_ADAPTERS)


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_by_the_ratio_rule(settings: str, checkpoint: Adapted) -> None:
    assert_ratio(checkpoint, settings)


def test_adapters_take_each_other_s_slots(tmp_path: Path) -> None:
    assert_ratio(Adapted(tmp_path, MODELS["llama"], torch.bfloat16, NUM_ADAPTERS - 1), "chunks")


def test_replays_and_running_ahead_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Steps with adapters and without have records of their own."""
    adapted = Adapted(tmp_path, MODELS[name], torch.bfloat16, NUM_ADAPTERS)
    assert_replays(adapted.ours, adapted.adapters)
    assert_replays(adapted.ours)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Adapters of the demo model: one that adds nothing, two that change every answer."""
    config = ModelConfig.from_path(DEMO_MODEL)
    placement = Placement(torch.bfloat16, META, num_adapter_slots=1, max_adapter_rank=16)
    targets = build_model(config, placement, max_model_len=1).adapter_targets()
    shapes = {name: (it.out_features, it.in_features) for name, it in targets.items()}
    root = tmp_path_factory.mktemp("adapters")
    sizes = {"nothing": 0.0, "one": 2.0, "other": 2.0}
    yield {
        name: peft.write_adapter(root / name, shapes, rank=16, seed=seed, size=size)
        for seed, (name, size) in enumerate(sizes.items())
    }


def change(server: ServerProcess, what: str, **body: str) -> None:
    """Load or unload an adapter; what is answered is plain text."""
    request = urllib.request.Request(
        f"{server.url}/v1/{what}_lora_adapter",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.read().startswith(b"Success")


def test_a_server_loads_and_unloads_them_beside_streams(folders: dict[str, Path]) -> None:
    """With a slot less than adapters: also they take each other's places."""
    question = "What is the capital of France?"
    flags = ("--enable-lora", "--max-loras", "2", "--lora-modules", f"nothing={folders['nothing']}")

    def ask(model: str) -> str:
        return text_of(chat(server, question, model=model, max_tokens=40, ignore_eos=False))

    with server_on_card(*SMALL, *flags) as server, ThreadPoolExecutor(8) as threads:
        base = ask("pyserve-demo")
        assert "Paris" in base
        for _ in range(6):
            running = [
                threads.submit(ask, model)
                for model in ("pyserve-demo", "nothing")
                for _ in range(3)
            ]
            for name in ("one", "other"):
                change(server, "load", lora_name=name, lora_path=str(folders[name]))
            changed = {name: threads.submit(ask, name) for name in ("one", "other")}
            assert all("Paris" not in answer.result() for answer in changed.values())
            assert changed["one"].result() != changed["other"].result()
            for name in ("one", "other"):
                change(server, "unload", lora_name=name)
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    ask(name)
            assert all("Paris" in answer.result() for answer in running)
        assert metric(server, "pyserve:adapter_loads_total") >= 12
