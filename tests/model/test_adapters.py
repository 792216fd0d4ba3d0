"""Adapters on a model against the mathematics of PEFT, W + scale * B A in transformers: logits by
the ratio rule, whatever the family, the rank, the modules and the company."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyserve.model.adapter_weights import read_adapter
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from tests.model import oracle, peft
from tests.model.driver import Driver
from tests.model.oracle import VOCAB_SIZE, relative_error
from tests.model.test_activations import Calls

PROMPTS = [random.Random(seed).choices(range(VOCAB_SIZE), k=9 + 3 * seed) for seed in range(9)]
MAX_RANK = 256
NUM_SLOTS = 8


def make(family: str, folder: Path, dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    model = oracle.make_model(family, **changes).to(dtype)
    model.save_pretrained(folder)
    return model


def load_with_slots(
    folder: Path, dtype: torch.dtype = torch.float32, *, num_slots: int, max_rank: int
) -> Decoder:
    """Our model of a checkpoint, with room for adapters."""
    placement = Placement(
        dtype, torch.device("cpu"), num_adapter_slots=num_slots, max_adapter_rank=max_rank
    )
    return load_model(
        folder, ModelConfig.from_path(folder), placement, load_format="auto", seed=0,
        progress=lambda done, total: None,
    )  # fmt: skip


def put(decoder: Decoder, slot: int, folder: Path) -> None:
    weights = read_adapter(
        folder, decoder.adapter_targets(), max_rank=decoder.max_adapter_rank, dtype=decoder.dtype
    )
    decoder.put_adapter(slot, weights)


def exact_and_allowed(
    base: Path, adapter: Path, prompt: list[int], dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Logits of the merged model at float64, and the error that the ratio rule allows."""
    exact, plain = (
        oracle.their_logits(
            peft.merged(oracle.load_theirs(base, kind), adapter, dtype), prompt, is_stepwise=False
        )
        for kind in (torch.float64, dtype)
    )
    return exact, 2 * relative_error(plain, exact) + 1e-6


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name -> family, what is special in its config, what is in the adapter
    "llama": ("llama", {}, {"rank": 16, "alpha": 32}),
    "llama-rank1": ("llama", {}, {"rank": 1, "alpha": 2}),
    "llama-rank256": ("llama", {}, {"rank": 256, "alpha": 256}),
    "llama-rslora": ("llama", {"attention_bias": True, "mlp_bias": True},
                     {"rank": 9, "use_rslora": True}),
    "llama-patterns": ("llama", {}, {"rank_pattern": {"q_proj": 33, r"layers\.1\..*": 4},
                                     "alpha_pattern": {"down_proj": 3, "mlp.up_proj": 50}}),
    "llama-some": ("llama", {}, {"only": r"layers\.[02].*(v_proj|gate_proj|down_proj)"}),
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "phi3-fused": ("phi3", {"hidden_size": 192, "num_attention_heads": 2}, {}),
    "gemma2-norms-after": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 9}, {}),
    "glm4-pairs": ("glm4", {"head_dim": 32, "attention_bias": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_logits_obey_the_ratio_rule(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, changes, config = CASES[name]
    model = make(family, tmp_path / "base", dtype, **changes)
    adapter = peft.write_adapter(tmp_path / "adapter", peft.shapes_of(model), **config)
    exact, allowed = exact_and_allowed(tmp_path / "base", adapter, PROMPTS[5], dtype)
    decoder = load_with_slots(tmp_path / "base", dtype, num_slots=2, max_rank=MAX_RANK)
    put(decoder, 1, adapter)
    num_tokens = len(PROMPTS[5])
    logits = Driver(decoder).step({0: PROMPTS[5]}, 3, adapter_starts=[0, 0, num_tokens])
    assert relative_error(logits[:num_tokens], exact) <= allowed
    # It matters, or a wrong one would not be seen; and nothing of it is left without it.
    plain = Driver(decoder).step({0: PROMPTS[5]})
    assert relative_error(plain, exact) > (20 if dtype == torch.float32 else 2) * allowed
    without_slots = oracle.load_ours(tmp_path / "base", dtype)
    assert torch.equal(plain, Driver(without_slots).step({0: PROMPTS[5]}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_norms_of_few_tokens_may_be_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    """As on a card: nothing that the base model fuses becomes a call of its own for adapters."""
    prompt = PROMPTS[5]
    model = make("llama", tmp_path / "base", dtype)
    adapter = peft.write_adapter(tmp_path / "adapter", peft.shapes_of(model), rank=16, alpha=32)
    exact, allowed = exact_and_allowed(tmp_path / "base", adapter, prompt, dtype)
    decoder = load_with_slots(tmp_path / "base", dtype, num_slots=2, max_rank=MAX_RANK)
    put(decoder, 1, adapter)
    decoder._max_norm_rows = 32
    with Calls() as calls:
        logits = Driver(decoder).step({0: prompt}, 3, adapter_starts=[0, 0, len(prompt)])
    assert relative_error(logits[: len(prompt)], exact) <= allowed
    called = {name.split(".")[1]: count for name, count in calls.names.items() if "lora" in name}
    num_layers = len(decoder.layers)
    assert called == {
        "lora_shrink": 4 * num_layers,
        "lora_expand": 3 * num_layers,
        "lora_expand_silu_mul": num_layers,
    }
    norms = [count for name, count in calls.names.items() if "rms_norm" in name]
    assert sum(norms) == 2, "the first and the last"
    assert "pyserve.silu_mul.default" not in calls.names


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, list[tuple[Tensor, float]]]:
    """A model with 8 adapters of different ranks and modules in its slots, and what it and each of
    them make of their prompts: the base model first."""
    root = tmp_path_factory.mktemp("adapters")
    model = make("llama", root / "base", torch.float32)
    shapes = peft.shapes_of(model)
    decoder = load_with_slots(root / "base", num_slots=NUM_SLOTS, max_rank=max(RANKS))
    expected = []
    theirs = oracle.load_theirs(root / "base", torch.float64)
    exact = oracle.their_logits(theirs, PROMPTS[0], is_stepwise=False)
    plain = oracle.their_logits(
        oracle.load_theirs(root / "base", torch.float32), PROMPTS[0], is_stepwise=False
    )
    expected.append((exact, 2 * relative_error(plain, exact) + 1e-6))
    for slot, rank in enumerate(RANKS):
        only = "" if slot % 3 else "q_proj|up_proj|down_proj"
        adapter = peft.write_adapter(root / str(slot), shapes, rank=rank, seed=slot, only=only)
        put(decoder, slot, adapter)
        expected.append(exact_and_allowed(root / "base", adapter, PROMPTS[slot + 1], torch.float32))
    return decoder, expected


RANKS = [1, 2, 7, 8, 16, 33, 64, 128]
Served = tuple[Decoder, list[tuple[Tensor, float]]]


@pytest.mark.parametrize("chunk", [100, 4, 1], ids=["whole", "chunks", "tokens"])
def test_the_base_model_and_eight_adapters_in_one_step(served: Served, chunk: int) -> None:
    decoder, expected = served
    driver = Driver(decoder, num_seqs=len(PROMPTS))
    logits: list[list[Tensor]] = [[] for _ in PROMPTS]
    for begin in range(0, max(map(len, PROMPTS)), chunk):
        rows = {seq: prompt[begin : begin + chunk] for seq, prompt in enumerate(PROMPTS)}
        rows = {seq: tokens for seq, tokens in rows.items() if tokens}
        counts = [len(rows.get(seq, ())) for seq in range(len(PROMPTS))]
        starts = [sum(counts[: slot + 1]) for slot in range(NUM_SLOTS + 1)]
        out = driver.step(rows, 2, adapter_starts=starts)[: sum(counts)]
        parts = out.split([len(tokens) for tokens in rows.values()])
        for seq, part in zip(rows, parts, strict=True):
            logits[seq].append(part)
    for parts, (exact, allowed) in zip(logits, expected, strict=True):
        assert relative_error(torch.cat(parts), exact) <= allowed


def test_alone_as_in_company(served: Served) -> None:
    """Bit for bit, of so few rows: the base model too, in steps with adapters and without."""
    decoder, _ = served
    driver = Driver(decoder, num_seqs=len(PROMPTS))
    rows = {seq: prompt[:1] for seq, prompt in enumerate(PROMPTS)}
    together = driver.step(rows, adapter_starts=list(range(1, NUM_SLOTS + 2)))
    for seq, prompt in enumerate(PROMPTS):
        starts = None if seq == 0 else [0] * seq + [1] * (NUM_SLOTS + 1 - seq)
        alone = Driver(decoder).step({0: prompt[:1]}, adapter_starts=starts)
        assert torch.equal(alone[0], together[seq])


def test_a_slot_that_is_overwritten(tmp_path: Path) -> None:
    """By an adapter of a lower rank and of fewer modules: nothing of the old one is left."""
    model = make("llama", tmp_path / "base", torch.float32)
    shapes = peft.shapes_of(model)
    decoder = load_with_slots(tmp_path / "base", num_slots=2, max_rank=16)
    small = peft.write_adapter(tmp_path / "small", shapes, rank=3, only="k_proj", seed=77)
    put(decoder, 0, peft.write_adapter(tmp_path / "large", shapes, rank=16))
    num_tokens = len(PROMPTS[2])
    before = Driver(decoder).step({0: PROMPTS[2]}, adapter_starts=[0, num_tokens, num_tokens])
    put(decoder, 0, small)
    put(decoder, 1, small)
    after = Driver(decoder).step({0: PROMPTS[2]}, adapter_starts=[0, num_tokens, num_tokens])
    fresh = Driver(decoder).step({0: PROMPTS[2]}, adapter_starts=[0, 0, num_tokens])
    assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_what_may_have_an_adapter(served: Served) -> None:
    decoder, _ = served
    targets = decoder.adapter_targets()
    assert len(targets) == 3 * 7 and "lm_head" not in targets
    assert targets["model.layers.2.mlp.down_proj"] == (64, 96)
    assert targets["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert decoder.adapter_bytes > 4 * NUM_SLOTS * max(RANKS) * 3 * 64
