"""What a forward pass writes: cut once from one memory, and nothing else is allocated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyserve.model import schemes
from pyserve.model.activations import ALIGNMENT, Arena, AttentionActivations, MLPActivations
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.placement import META, Placement
from pyserve.model.schemes import Dense
from pyserve.ops import max_norm_rows
from tests.engine.tiny import CONFIG
from tests.model.driver import Driver

CPU = torch.device("cpu")


def memory(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def make_decoder(num_layers: int, dtype: torch.dtype = torch.bfloat16, **placement: Any) -> Decoder:
    config = ModelConfig.from_hf(CONFIG | {"num_hidden_layers": num_layers})
    decoder = build_model(config, Placement(dtype, CPU, **placement))
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
        assert isinstance(attention, AttentionActivations) and isinstance(mlp, MLPActivations)
        assert attention.qkv.data_ptr() == mlp.gate_up.data_ptr()
        assert attention.q.shape == attention.heads.shape == (num_tokens, 4, 16)
        assert attention.joined.shape == (num_tokens, 64) and attention.joined.is_contiguous()
        assert acts.output.numel() == 0, "every block adds to the residual itself"
        assert acts.squares is None, "a CPU's norms are calls of their own"
        written = [acts.hidden, acts.residual]
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


FEW_CALLS = {
    "pyserve.linear.default": 1.0,
    "pyserve.linear_add.default": 2.0,
    "pyserve.linear_silu_mul.default": 1.0,
}
MANY_CALLS = {
    "aten.linear.out": 2.0,
    "aten.addmm_.default": 2.0,
    "aten.t.default": 2.0,
    "pyserve.silu_mul.default": 1.0,
}


@pytest.mark.parametrize("num_tokens", [1, 65])
def test_a_layer_is_eight_calls_none_of_which_allocates(num_tokens: int) -> None:
    """With many tokens torch multiplies, where it is faster: the activation is then a call of its
    own."""
    is_own = torch.ops.pyserve.serves_linear(torch.empty(8, 8, dtype=torch.bfloat16), num_tokens, 0)
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
        "pyserve.rms_norm.default": 2.0,
    } | (FEW_CALLS if is_own else MANY_CALLS)
    assert not {name for name in four if "empty" in name or "zeros" in name}


class Plain(Dense):
    """A scheme that declines what it could do at once."""

    add = silu_mul = None  # type: ignore[assignment]


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize(
    "declining",
    [
        ("o_proj",),
        ("down_proj",),
        ("gate_proj", "up_proj"),
        ("o_proj", "down_proj", "gate_proj", "up_proj"),
    ],
)
def test_what_a_scheme_declines_is_done_plainly(
    declining: tuple[str, ...], num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At float32 a fused step rounds what a plain one does: the logits are the same bits."""
    monkeypatch.setitem(schemes.SCHEMES, "plain", Plain)  # type: ignore[misc]
    results = []
    for names in ((), declining):
        torch.manual_seed(1)
        plain = {
            f"model.layers.{index}.{block}.{name}": "plain"
            for index in (0, 2)  # a layer that adds stands between
            for block in ("self_attn", "mlp")
            for name in names
        }
        decoder = make_decoder(4, torch.float32, schemes=plain)
        for index, layer in enumerate(decoder.layers):
            is_plain = bool(names) and index in (0, 2)
            assert layer.attention.is_adding != (is_plain and "o_proj" in names)
            assert layer.mlp.is_adding != (is_plain and "down_proj" in names)
        arena = Arena.endless()
        output = decoder.activations(arena, num_tokens).output
        assert len(output) == (num_tokens if {"o_proj", "down_proj"} & set(names) else 0)
        results.append(Driver(decoder).step({0: range(num_tokens)}))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_norms_of_few_tokens_may_be_factors(num_tokens: int, dtype: torch.dtype) -> None:
    """As on a card: six calls a layer, and the logits of norms that are calls of their own."""
    names: list[Counter[str]] = []
    logits = []
    for most in (0, 8):
        for num_layers in (1, 4):
            torch.manual_seed(3)
            decoder = make_decoder(num_layers, dtype)
            decoder._max_norm_rows = most
            with Calls() as calls:
                result = Driver(decoder).step({0: range(num_tokens)})
            names.append(calls.names)
        logits.append(result)
    one, four = (
        Counter({name: count for name, count in calls.items() if "pyserve" in name})
        for calls in names[2:]
    )
    assert {name: (four[name] - one[name]) / 3 for name in four if four[name] != one[name]} == {
        "pyserve.linear.default": 1.0,
        "pyserve.rope_write_kv.default": 1.0,
        "pyserve.paged_attention.default": 1.0,
        "pyserve.linear_add.default": 2.0,
        "pyserve.linear_silu_mul.default": 1.0,
    }
    plain, few = logits
    error = (few.double() - plain.double()).norm() / plain.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
    assert not torch.equal(plain, few) or dtype == torch.bfloat16, "another order of rounding"


def test_norms_of_many_tokens_are_calls_of_their_own() -> None:
    decoder = make_decoder(2)
    decoder._max_norm_rows = 8
    for num_tokens in (8, 9):
        squares = decoder.activations(Arena.endless(), num_tokens).squares
        assert (squares is None) == (num_tokens > 8)


def test_norms_are_factors_on_a_card_where_the_dtype_has_the_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to what one pass over a weight serves there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert max_norm_rows(torch.device("cuda"), torch.bfloat16) == 8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    most = {
        (device, dtype): max_norm_rows(torch.device(device), dtype)
        for device in ("cuda", "cpu", "meta")
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert {key: rows for key, rows in most.items() if rows} == {("cuda", torch.bfloat16): 32}
