"""StepState: what it holds is what it says, on a CPU and as a card would have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pyserve.engine.state import StepLimits, StepState
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import META, Placement
from tests.engine.tiny import CONFIG

CONFIGS = {
    "plain": CONFIG,
    "windows": CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": 20},
}
LIMITS = StepLimits(
    num_slots=6, max_num_batched_tokens=40, max_model_len=100, block_size=16, logits_tile_rows=4
)


def tensors(thing: object) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors(value)
    elif isinstance(thing, tuple):
        for value in thing:
            yield from tensors(value)
    elif type(thing).__module__.startswith("pyserve."):
        for name in getattr(type(thing), "__slots__", None) or vars(thing):
            yield from tensors(getattr(thing, name))


@pytest.mark.parametrize("is_card", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_ledger_holds_every_tensor(name: str, is_card: bool) -> None:
    config = ModelConfig.from_hf(CONFIGS[name])
    model = build_model(config, Placement(torch.bfloat16, torch.device("cpu")))
    state = StepState(model, LIMITS, is_card=is_card)
    held = {id(tensor): tensor for tensor in tensors(state)}
    assert sum(tensor.nbytes for tensor in held.values()) == sum(dict(state.ledger()).values())
    assert {"attention plans", "sampling"} <= dict(state.ledger()).keys() or not is_card
    shapes = build_model(config, Placement(torch.bfloat16, META), max_model_len=1)
    assert StepState(shapes, LIMITS, is_card=is_card).ledger() == state.ledger()


def test_a_tile_has_no_more_rows_than_there_are_slots() -> None:
    model = build_model(ModelConfig.from_hf(CONFIG), Placement(torch.float32, META))
    assert len(StepState(model, replace(LIMITS, num_slots=2), is_card=True).logits) == 2
