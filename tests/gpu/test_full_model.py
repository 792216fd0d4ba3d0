"""The engine on a card, with tiny random checkpoints of each family, against transformers.

Teacher-forced: transformers gets the tokens that the engine has chosen. The error of the engine's
logits against float64 is at most twice that of transformers in the same dtype, plus 1e-6, whatever
the engine does with a request: batch mates, chunks, cached prefixes, preemption.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyserve.client import Adapter, SequenceRequest
from pyserve.engine.adapter_slots import AdapterSlots
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.sequence import Sequence
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.model.quantization import Method
from pyserve.params import SamplingParams
from tests.model.oracle import VOCAB_SIZE, load_theirs, make_model, relative_error, rope

DEVICE = torch.device("cuda", 0)
BLOCK_SIZE = 16
MAX_MODEL_LEN = 256
NUM_SLOTS = 8
NUM_OUTPUT_TOKENS = 24
LLAMA3 = rope(
    "llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 64, "tie_word_embeddings": False}),
    "llama3-gqa4": ("llama", {"head_dim": 128, "num_key_value_heads": 1, **LLAMA3}),
    "mistral-window": (
        "mistral", {"head_dim": 64, "sliding_window": 20, "num_attention_heads": 8}
    ),
    "mistral": ("mistral", {"head_dim": 128, "sliding_window": None}),
    "qwen2": ("qwen2", {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen2-window": (
        "qwen2",
        {
            "hidden_size": 256, "use_sliding_window": True, "sliding_window": 17,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "batch": {},
    "alone": {"alone": True},
    "chunks": {"budget": 19},
    "prefix cache": {"caching": True},
    "preemption": {"num_blocks": 24},
    "all": {"num_blocks": 14, "budget": 19, "caching": True},
    # What nobody wrote must not be read, masked or not: a NaN would survive a weight of zero.
    "poisoned cache": {"poison": True, "budget": 50},
}


class Checkpoint:
    """One model in one dtype: ours, and transformers' in that dtype and in float64."""

    def __init__(self, ours: Decoder, theirs: Path) -> None:
        """`theirs`: the folder that transformers reads."""
        self.ours = ours
        self.adapters: list[Adapter | None] = [None]  # that requests use in turns
        self._theirs = {"": (load_theirs(theirs, ours.dtype), load_theirs(theirs, torch.float64))}
        for model in self._theirs[""]:
            model.to(DEVICE)

    @classmethod
    def made(
        cls, folder: Path, model: tuple[str, dict[str, Any]], dtype: torch.dtype
    ) -> Checkpoint:
        family, changes = model
        make_model(family, **changes).to(dtype).save_pretrained(folder)
        return cls(load_on_card(folder, dtype), folder)

    def theirs(self, token_ids: list[int], adapter: Adapter | None) -> tuple[Tensor, Tensor]:
        """[len, vocab_size] in the dtype and in float64."""
        ids = torch.tensor([token_ids], device=DEVICE)
        plain, exact = self._theirs["" if adapter is None else adapter.name]
        with torch.inference_mode():
            return plain(ids).logits[0], exact(ids).logits[0]


def load_on_card(
    folder: Path, dtype: torch.dtype, *, method: Method | None = None, **placed: Any
) -> Decoder:
    """Our model of a checkpoint; `placed`: further fields of its Placement."""
    config = ModelConfig.from_path(folder).quantised_as(method)
    assert not config.lacking_on_cuda()
    return load_model(
        folder, config, Placement(dtype, DEVICE, **placed), load_format="auto", seed=0,
        progress=lambda done, total: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Checkpoint]:
    class Made(dict[Any, Checkpoint]):
        def __missing__(self, key: tuple[str, torch.dtype]) -> Checkpoint:
            name, dtype = key
            self[key] = Checkpoint.made(tmp_path_factory.mktemp("model"), MODELS[name], dtype)
            return self[key]

    return Made()


def make_engine(
    decoder: Decoder, *, num_blocks: int = 128, budget: int = 512, caching: bool = False,
    poison: bool = False,
) -> Engine:  # fmt: skip
    executor = StepExecutor(
        decoder,
        StepLimits(
            block_size=BLOCK_SIZE,
            num_slots=NUM_SLOTS,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            logits_tile_rows=4,
        ),
    )
    # Without records: `run` listens to the calls that compute logits.
    runner = CudaRunner(executor, is_eager=True)
    runner.allocate_kv(num_blocks)
    if poison:
        for caches in executor._kv_caches:
            for cache in caches:
                cache.fill_(torch.nan)
        torch.cuda.synchronize()
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=budget,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
        adapters=AdapterSlots(decoder.num_adapter_slots),
    )
    return Engine(
        scheduler, runner, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, policy="fcfs"
    )


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of mixed lengths, some with a common beginning; greedy and drawn."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()
        return drawn

    prefix = ids(50)
    prompts = [prefix + ids(3), prefix + ids(40), ids(1), ids(130), prefix, ids(17)]
    params = [
        SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0),
        SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=1.0, seed=3),
    ]
    return [(prompt, params[number % 2]) for number, prompt in enumerate(prompts)]


def run(
    engine: Engine, decoder: Decoder, *, alone: bool, adapters: list[Adapter | None]
) -> list[tuple[Sequence, Tensor]]:
    """Each request's sequence and the logits [num_output_tokens, vocab_size] it was drawn from."""
    tiles: list[Tensor] = []
    rows: dict[int, list[Tensor]] = defaultdict(list)
    seqs: dict[int, Sequence] = {}
    compute_logits = decoder.compute_logits

    def spy(hidden: Tensor, out: Tensor, parts: Tensor | None = None) -> None:
        compute_logits(hidden, out, parts)
        tiles.append(out.clone())

    def drain() -> None:
        while (step := engine.schedule()) is not None:
            tiles.clear()
            output = engine.runner.run(step)
            num_rows = len(output.token_ids)
            logits = torch.cat(tiles)[:num_rows] if num_rows else torch.empty(0)
            drawn = [
                seq for seq, is_drawn in zip(step.seqs, step.row_samples, strict=True) if is_drawn
            ]
            for seq, row in zip(drawn, logits, strict=True):
                rows[seq.stream.seq_id].append(row.clone())
                seqs[seq.stream.seq_id] = seq
            engine.update(step, output)

    decoder.compute_logits = spy  # type: ignore[method-assign]
    try:
        for (prompt, params), adapter in zip(requests(), cycle(adapters), strict=False):
            engine.add(SequenceRequest(prompt, params, adapter=adapter))
            if alone:
                drain()
        drain()
    finally:
        decoder.compute_logits = compute_logits  # type: ignore[method-assign]
    engine.check_invariants()
    return [(seqs[seq_id], torch.stack(rows[seq_id])) for seq_id in sorted(rows)]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_by_the_ratio_rule(
    name: str, dtype: torch.dtype, settings: str, checkpoints: dict[Any, Checkpoint]
) -> None:
    assert_ratio(checkpoints[name, dtype], settings)


def assert_ratio(checkpoint: Checkpoint, settings: str, allowed: float = 1e-6) -> None:
    options = {**SETTINGS[settings]}
    alone = options.pop("alone", False)
    engine = make_engine(checkpoint.ours, **options)
    results = run(engine, checkpoint.ours, alone=alone, adapters=checkpoint.adapters)
    if "num_blocks" in options:
        assert engine.scheduler.num_preemptions > 0
    if options.get("caching"):
        assert engine.scheduler.num_cached_tokens > 0
    engine.runner.close()
    assert len(results) == len(requests())
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for (prompt, params), (seq, logits) in zip(requests(), results, strict=True):
        assert len(logits) == NUM_OUTPUT_TOKENS
        output = seq.token_ids[len(prompt) :]
        if params.temperature == 0:
            assert logits.argmax(-1).tolist() == output
        plain, exact = checkpoint.theirs(seq.token_ids[:-1], seq.adapter)
        parts.append((logits, plain[len(prompt) - 1 :], exact[len(prompt) - 1 :]))
    ours, plain, exact = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    error, plain_error = relative_error(ours, exact), relative_error(plain, exact)
    assert error <= 2 * plain_error + allowed  # false for NaN
