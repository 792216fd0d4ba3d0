"""The README's two tables of what fits, from the formulas the server itself plans with.

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
    "Llama-3.1-70B": PRESETS["llama-3.3-70b"],
    "Qwen3-30B-A3B": PRESETS["qwen3-30b-a3b"],
    "Mixtral-8x7B": PRESETS["mixtral-8x7b"],
    "DeepSeek-V2-Lite": PRESETS["deepseek-v2-lite"],
    "GLM-4.7-Flash": PRESETS["glm-4.7-flash"],
}  # fmt: skip
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# Their layers' matrices too are in the table as these store them.
QUANTISED = {
    "AWQ": (AWQ, ("Mistral-7B", "Llama-3.1-8B", "Qwen2.5-14B", "Qwen2.5-32B", "Llama-3.1-70B",
                  "Qwen3-30B-A3B", "Mixtral-8x7B")),
    "FP8": (FP8, ("Llama-3.1-8B", "Qwen2.5-32B", "Qwen3-30B-A3B")),
}  # fmt: skip
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
    print(memory_table(rows))
    print()
    print(card_table(rows))


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
        config = _config(max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS)
        capacity = find_capacity(row.model, config, row.sizes, UNLIMITED)
        cells = [_card_gib(capacity, length) for length in CONTEXTS]
        rows.append([row.name, f"{row.sizes.weight_bytes / GIB:.1f}", *cells])
    return _markdown(header, rows)


def card_table(models: Sequence[Row]) -> str:
    """The longest context that one sequence can have, by model and cards that agree in all."""
    header = ["cards (GiB as CUDA shows)", *(row.name for row in models)]
    cards: dict[tuple[str, ...], list[str]] = {}
    for card in sorted(CARDS, key=lambda card: card.memory_mib):
        cells = tuple(_longest(row.model, row.sizes, card) for row in models)
        cards.setdefault(cells, []).append(f"{card.name} ({card.memory_mib / 1024:.1f})")
    return _markdown(header, [[", ".join(names), *cells] for cells, names in cards.items()])


def _config(**settings: Any) -> EngineConfig:
    return EngineConfig(model_path=Path("shapes"), device="cuda", **settings)


def _card_gib(capacity: Capacity, length: int) -> str:
    if length > capacity.model.max_model_len:
        return NO
    utilization = capacity.config.gpu_memory_utilization
    gib = capacity.bytes_for(length, num_seqs=1) / utilization / GIB
    return f"{math.ceil(gib * 10) / 10:.1f}"


def _longest(model: ModelConfig, sizes: ModelSizes, card: Card) -> str:
    try:
        capacity = find_capacity(model, _config(), sizes, named_memory(card))
    except PlanError:
        return NO
    longest = capacity.longest_context(1)
    if longest == model.max_model_len:
        return "all"
    return f"{longest // 1024}k" if longest >= 1024 else str(longest)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
