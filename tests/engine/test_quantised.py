"""The engine on 4-bit integers: the tokens of the same numbers in float32, in any batch."""

from __future__ import annotations

import pytest
import torch

from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.placement import Placement
from pyserve.model.schemes import Dense
from pyserve.model.w4a16 import W4A16
from pyserve.ops import w4a16
from tests.engine.driver import Reader
from tests.engine.test_runner import assert_near_tie, generate, make_engine
from tests.engine.tiny import CONFIG

AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32}
PLACEMENT = Placement(torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def decoders() -> tuple[Decoder, Decoder]:
    """Of integers, and of the numbers that they stand for."""
    raw = CONFIG | {"intermediate_size": 96, "quantization_config": AWQ}
    integers = build_model(ModelConfig.from_hf(raw), PLACEMENT)
    del raw["quantization_config"]
    plain = build_model(ModelConfig.from_hf(raw), PLACEMENT)
    generator = torch.Generator().manual_seed(5)
    others = plain.destinations()
    for name, place in integers.destinations().items():
        if place.sink is None:
            noise = torch.randn(place.view.shape, generator=generator)
            place.view.copy_(1 + 0.1 * noise if "norm" in name else 0.35 * noise)
            others[name].view.copy_(place.view)
    for ours, theirs in zip(integers.layer_linears(), plain.layer_linears(), strict=True):
        assert isinstance(ours.matrix, W4A16) and isinstance(theirs.matrix, Dense)
        shape = ours.out_features, ours.in_features
        w4a16.fill_with_noise(ours.matrix.packed, *shape, 0.35, generator)
        theirs.matrix.weight.copy_(w4a16.dequantised(ours.matrix.packed, *shape))
    return integers, plain


@pytest.fixture(scope="module")
def expected(decoders: tuple[Decoder, Decoder]) -> list[Reader]:
    readers = generate(make_engine(decoders[1]), alone=True)
    assert len(set(readers[0].output)) > 10, "a model that repeats itself shows little"
    return readers


@pytest.mark.parametrize(
    "settings", [{"budget": 9}, {"num_blocks": 17, "budget": 100, "caching": True}]
)
def test_the_same_tokens(
    settings: dict[str, int], decoders: tuple[Decoder, Decoder], expected: list[Reader]
) -> None:
    readers = generate(make_engine(decoders[0], **settings), depth=1)  # type: ignore[arg-type]
    for reader, other in zip(readers, expected, strict=True):
        if reader.output != other.output:
            assert reader.params.temperature == 0.0, "sampled differently"
            assert_near_tie(decoders[1], reader, other)
