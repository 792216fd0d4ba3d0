"""What a forward pass writes: cut once from one memory, and nothing else is allocated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyserve.model.activations import ALIGNMENT, Arena
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.placement import META, Placement
from pyserve.ops import FEW_ROWS
from tests.engine.tiny import CONFIG
from tests.model.driver import Driver

CPU = torch.device("cpu")


def memory(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def make_decoder(num_layers: int, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    config = ModelConfig.from_hf(CONFIG | {"num_hidden_layers": num_layers})
    decoder = build_model(config, Placement(dtype, CPU))
    for place in decoder.destinations().values():
        for part in place.parts:
            part.view.normal_(0, 0.1)
    return decoder


def test_an_arena_cuts_aligned_pieces_and_counts_the_most() -> None:
    arena = Arena(memory(6 * ALIGNMENT))
    first = arena.take(3, 5, dtype=torch.float32)
    with arena.reused():
        inner = arena.take(2 * ALIGNMENT, dtype=torch.uint8)
    again = arena.take(ALIGNMENT + 1, dtype=torch.uint8)
    assert first.shape == (3, 5) and first.dtype == torch.float32
    begins = [tensor.data_ptr() - first.data_ptr() for tensor in (first, inner, again)]
    assert begins == [0, ALIGNMENT, ALIGNMENT]
    assert arena.num_bytes == 3 * ALIGNMENT
    with pytest.raises(AssertionError, match="more than was planned"):
        arena.take(4 * ALIGNMENT, dtype=torch.uint8)


def test_an_endless_arena_only_counts() -> None:
    arena = Arena.endless()
    tensor = arena.take(2**20, 2**20, dtype=torch.bfloat16)
    assert tensor.device == META and arena.num_bytes == 2**41


def test_layers_share_one_memory_and_the_last_hidden_state_has_one_place() -> None:
    decoder = make_decoder(5)
    endless = Arena.endless()
    decoder.activations(endless, 64)
    buffer = memory(endless.num_bytes)
    for num_tokens in (1, 3, 64):
        acts = decoder.activations(Arena(buffer), num_tokens)
        assert acts.hidden.data_ptr() == buffer.data_ptr()
        assert all(layer is acts.layers[0] for layer in acts.layers)
        attention, mlp = acts.layers[0]
        assert attention.qkv.data_ptr() == mlp.gate_up.data_ptr()
        assert attention.q.shape == attention.heads.shape == (num_tokens, 4, 16)
        assert attention.joined.shape == (num_tokens, 64) and attention.joined.is_contiguous()
        written = [acts.hidden, acts.residual, acts.output]
        for pair in ((attention.qkv, attention.joined), (mlp.gate_up, mlp.activated)):
            spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (*written, *pair))
            ends = [end for _, end in spans]
            assert all(a <= b for a, (b, _) in zip(ends, spans[1:], strict=False)), "overlap"


class Calls(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_tokens", [1, FEW_ROWS["cpu", torch.bfloat16] + 1])
def test_a_layer_is_nine_calls_none_of_which_allocates(num_tokens: int) -> None:
    counts = []
    for num_layers in (1, 4):
        decoder = make_decoder(num_layers)
        driver = Driver(decoder)
        forward, calls = decoder.forward, Calls()

        def counted(ctx: Any, forward: Any = forward, calls: Calls = calls) -> torch.Tensor:
            with calls:
                hidden: torch.Tensor = forward(ctx)
            return hidden

        decoder.forward = counted  # type: ignore[method-assign]
        driver.step({0: range(num_tokens)})
        counts.append(calls.names)
    one, four = counts
    assert {name: (four[name] - one[name]) / 3 for name in four if four[name] != one[name]} == {
        "pyserve.rope_write_kv.default": 1.0,
        "pyserve.paged_attention.default": 1.0,
        "pyserve.silu_mul.default": 1.0,
        "pyserve.add_rms_norm.default": 2.0,
        "pyserve.linear.default" if num_tokens == 1 else "aten.linear.out": 4.0,
    }
    assert not {name for name in four if "empty" in name or "zeros" in name}
