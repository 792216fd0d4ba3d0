"""The engine on 4-bit integers and 8-bit floats: the tokens of the same numbers in float32, in any
batch."""

from __future__ import annotations

import pytest
import torch

from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.layers.linear import Linear
from pyserve.model.placement import Placement
from pyserve.model.quantised_scheme import QuantisedScheme
from pyserve.model.schemes import Dense
from pyserve.ops import fp8, quantised, w4a16
from tests.engine.driver import Reader
from tests.engine.test_runner import assert_near_tie, generate, make_engine
from tests.engine.tiny import CONFIG

CPU = torch.device("cpu")
CONFIGS = {
    "4 bits": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32},
    "8 bits": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.fixture(scope="module", params=CONFIGS)
def decoders(request: pytest.FixtureRequest) -> tuple[Decoder, Decoder]:
    """Of quantised matrices, and of the numbers that they stand for."""
    raw = CONFIG | {"intermediate_size": 96, "quantization_config": CONFIGS[request.param]}
    stored = build_model(ModelConfig.from_hf(raw), Placement(torch.float32, CPU))
    del raw["quantization_config"]
    plain = build_model(ModelConfig.from_hf(raw), Placement(torch.float32, CPU))
    generator = torch.Generator().manual_seed(5)
    for ours, theirs in zip(stored.layer_linears(), plain.layer_linears(), strict=True):
        assert isinstance(ours.matrix, QuantisedScheme) and isinstance(theirs.matrix, Dense)
        fill(ours.matrix.matrix, ours, generator)
        theirs.matrix.weight.copy_(ours.matrix.plain())
    others = plain.destinations()
    for name, place in stored.destinations().items():
        if name in others and place.dummy is None:
            noise = torch.randn(place.view.shape, generator=generator)
            place.view.copy_(1 + 0.1 * noise if "norm" in name else 0.35 * noise)
            others[name].view.copy_(place.view)
    return stored, plain


def fill(matrix: quantised.Matrix, linear: Linear, generator: torch.Generator) -> None:
    if isinstance(matrix, quantised.W4A16Matrix):
        shape = linear.out_features, linear.in_features
        w4a16.fill_with_noise(matrix.packed, *shape, 0.35, generator)
    else:
        assert isinstance(matrix, quantised.Fp8Matrix)
        unit = fp8.fill_with_noise(matrix.weight.view(fp8.E4M3), generator)
        matrix.scales.fill_(0.35 * unit)


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
