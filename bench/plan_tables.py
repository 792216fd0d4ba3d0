"""The README's tables of what fits, from the formulas the server itself plans with.

    python -m bench.plan_tables

Shapes are those of the models' config.json; nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.model_presets import PRESETS
from pyserve.config import EngineConfig
from pyserve.engine.planner import GIB, MAX_NUM_BATCHED_TOKENS
from pyserve.errors import PlanError
from pyserve.model.config import ModelConfig
from pyserve.plan.capacity import UNLIMITED, Capacity, find_capacity, named_memory, sizes_on_card
from pyserve.plan.cards import CARDS, Card
from pyserve.plan.roofline import ModelSizes

AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_QWEN25: dict[str, Any] = {
    **PRESETS["qwen2.5-7b"], "hidden_size": 5120, "num_attention_heads": 40,
    "num_key_value_heads": 8,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B": PRESETS["llama-3.2-3b"],
    "Qwen3-4B": {
        **PRESETS["qwen3-8b"], "hidden_size": 2560, "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "Mistral-7B": PRESETS["mistral-7b"],
    "Qwen2.5-7B": PRESETS["qwen2.5-7b"],
    "Llama-3.1-8B": PRESETS["llama-3.1-8b"],
    "Qwen2.5-14B": {**_QWEN25, "intermediate_size": 13824, "num_hidden_layers": 48},
    "Qwen2.5-32B": {**_QWEN25, "intermediate_size": 27648, "num_hidden_layers": 64},
    "Qwen2.5-72B": {
        **_QWEN25, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama-3.1-70B": PRESETS["llama-3.3-70b"],
    "CodeLlama-34B": {
        **PRESETS["llama-3-8b"], "vocab_size": 32000, "hidden_size": 8192,
        "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
        "max_position_embeddings": 16384, "rope_theta": 1e6,
    },
    "Phi-4": PRESETS["phi-4"],
    "Gemma-2-9B": PRESETS["gemma-2-9b"],
    "Qwen3-30B-A3B": PRESETS["qwen3-30b-a3b"],
    "Mixtral-8x7B": PRESETS["mixtral-8x7b"],
    "DeepSeek-V2-Lite": PRESETS["deepseek-v2-lite"],
    # As it is published.
    "DeepSeek-V3 FP8": {**PRESETS["deepseek-v3"], "quantization_config": FP8},
    "GLM-4.7-Flash": PRESETS["glm-4.7-flash"],
}  # fmt: skip
# Their layers' matrices too are in the table as these store them.
QUANTISED = {
    "AWQ": (AWQ, ("Mistral-7B", "Llama-3.1-8B", "Qwen2.5-14B", "Qwen2.5-32B", "Llama-3.1-70B",
                  "Qwen3-30B-A3B", "Mixtral-8x7B")),
    "FP8": (FP8, ("Llama-3.1-8B", "Qwen2.5-32B", "Qwen3-30B-A3B")),
}  # fmt: skip
# GB that a renter's guide to vLLM tells for these contexts, and of which model ours are.
GUIDE_CONTEXTS = (4096, 8192, 16384, 32768)
GUIDE = {
    "8B FP16": ("Llama-3.1-8B", (18, 22, 30, 46)),
    "8B AWQ": ("Llama-3.1-8B AWQ", (8, 10, 14, 22)),
    "70B FP16": ("Llama-3.1-70B", (145, 160, 190, 250)),
    "70B AWQ": ("Llama-3.1-70B AWQ", (42, 50, 66, 98)),
}
CONTEXTS = (4096, 8192, 16384, 32768, 131072)
NO = "-"


@dataclass(frozen=True)
class Row:
    """A model in one form of its weights."""

    name: str
    model: ModelConfig
    sizes: ModelSizes


def main() -> None:
    rows = list(models())
    for table in (memory_table, guide_table, card_table):
        print(table(rows), end="\n\n")


def models() -> Iterator[Row]:
    for name, raw in SHAPES.items():
        model = ModelConfig.from_hf(raw)
        yield Row(name, model, sizes_on_card(model, _config()))
    for form, (quantization, names) in QUANTISED.items():
        for name in names:
            model = ModelConfig.from_hf(SHAPES[name] | {"quantization_config": quantization})
            yield Row(f"{name} {form}", model, sizes_on_card(model, _config()))


def memory_table(models: Sequence[Row]) -> str:
    """GiB that a card must show for one sequence of a context, by model."""
    header = ["GiB", "weights", *(f"{length // 1024}k" for length in CONTEXTS)]
    rows = []
    for row in models:
        cells = _gib_by_context(row, CONTEXTS)
        rows.append([row.name, f"{row.sizes.weight_bytes / GIB:.1f}", *cells])
    return _markdown(header, rows)


def guide_table(models: Sequence[Row]) -> str:
    """What the guide tells of memory against context, and what it is here."""
    header = ["the guide's GB / GiB here", *(f"{length // 1024}k" for length in GUIDE_CONTEXTS)]
    by_name = {row.name: row for row in models}
    rows = []
    for form, (name, told) in GUIDE.items():
        here = _gib_by_context(by_name[name], GUIDE_CONTEXTS)
        rows.append([form, *(f"{gb} / {gib}" for gb, gib in zip(told, here, strict=True))])
    return _markdown(header, rows)


def card_table(models: Sequence[Row]) -> str:
    """The longest context that one sequence can have, by model and cards that agree in all; without
    models that no card holds alone."""
    known = sorted(CARDS, key=lambda card: card.memory_mib)
    columns = {row.name: [_longest(row, card) for card in known] for row in models}
    held = {name: cells for name, cells in columns.items() if set(cells) != {NO}}
    header = ["cards (GiB as CUDA shows)", *held]
    cards: dict[tuple[str, ...], list[str]] = {}
    for card, *cells in zip(known, *held.values(), strict=True):
        cards.setdefault(tuple(cells), []).append(f"{card.name} ({card.memory_mib / 1024:.1f})")
    return _markdown(header, [[", ".join(names), *cells] for cells, names in cards.items()])


def _config(**settings: Any) -> EngineConfig:
    return EngineConfig(model_path=Path("shapes"), device="cuda", **settings)


def _gib_by_context(row: Row, lengths: Sequence[int]) -> list[str]:
    config = _config(max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS)
    capacity = find_capacity(row.model, config, row.sizes, UNLIMITED)
    return [_card_gib(capacity, length) for length in lengths]


def _card_gib(capacity: Capacity, length: int) -> str:
    if length > capacity.model.max_model_len:
        return NO
    utilization = capacity.config.gpu_memory_utilization
    gib = capacity.bytes_for(length, num_seqs=1) / utilization / GIB
    return f"{math.ceil(gib * 10) / 10:.1f}"


def _longest(row: Row, card: Card) -> str:
    try:
        capacity = find_capacity(row.model, _config(), row.sizes, named_memory(card))
    except PlanError:
        return NO
    longest = capacity.longest_context(1)
    if longest == row.model.max_model_len:
        return "all"
    return f"{longest // 1024}k" if longest >= 1024 else str(longest)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
