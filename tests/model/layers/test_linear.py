"""Linear: what each rank holds and computes, against the whole, without communication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyserve.errors import ConfigError
from pyserve.model.adapter_weights import Pair
from pyserve.model.context import AdapterRows
from pyserve.model.destination import Destination, Destinations, Part, finish_loading
from pyserve.model.layers import adapters as adapters_module
from pyserve.model.layers import linear as linear_module
from pyserve.model.layers.embedding import Embedding
from pyserve.model.layers.linear import Linear, Output, ShardRule
from pyserve.model.placement import META, Placement, Rows, Shard
from pyserve.model.schemes import Dense
from pyserve.model.weights import CheckpointReader, bytes_to_read, index_checkpoint
from pyserve.ops import lora, reference

CPU = torch.device("cpu")
HIDDEN, HEAD_DIM = 24, 4
TP_SIZES = (2, 4)
QKV = [Output("q", 8, HEAD_DIM), Output("k", 2, HEAD_DIM), Output("v", 2, HEAD_DIM)]
FUSED_QKV = [output._replace(name="qkv") for output in QKV]


def place(tp_rank: int = 0, tp_size: int = 1, **rest: object) -> Placement:
    return Placement(torch.float32, CPU, tp_rank=tp_rank, tp_size=tp_size, **rest)  # type: ignore[arg-type]


def load(destinations: Destinations, folder: Path, buffer_bytes: int = 1024) -> None:
    """From the file of the folder; a buffer that small cuts every tensor."""
    stored = index_checkpoint(folder)
    with CheckpointReader(buffer_bytes) as reader:
        for name, destination in destinations.items():
            assert stored[name].shape == destination.shape
            for part in destination.parts:
                assert sum(reader.copy(stored[name], part)) == bytes_to_read(stored[name], part)
    finish_loading(destinations.values())


def apply(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(x), linear.out_features), torch.nan, dtype=x.dtype)
    linear(x, out)
    return out


def save(folder: Path, outputs: Sequence[Output], in_features: int, *, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in dict.fromkeys(output.name for output in outputs):
        size = sum(output.size for output in outputs if output.name == name)
        tensors[f"{name}.weight"] = torch.randn(size, in_features, generator=generator)
        if has_bias:
            tensors[f"{name}.bias"] = torch.randn(size, generator=generator)
    save_file(tensors, folder / "model.safetensors")


def ranks(
    folder: Path, outputs: Sequence[Output], in_features: int, tp_size: int, shard: ShardRule,
    *, has_bias: bool,
) -> list[Linear]:  # fmt: skip
    made = []
    for rank in range(tp_size):
        linear = Linear(
            outputs, in_features, place(rank, tp_size), has_bias=has_bias, shard=shard
        )  # fmt: skip
        load(linear.destinations(), folder)
        made.append(linear)
    return made


def whole(folder: Path, outputs: Sequence[Output], in_features: int, *, has_bias: bool) -> Linear:
    return ranks(folder, outputs, in_features, 1, "whole", has_bias=has_bias)[0]


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("outputs", [QKV, FUSED_QKV], ids=["three", "fused"])
def test_columns_put_together_are_the_whole(
    outputs: list[Output], tp_size: int, tmp_path: Path
) -> None:
    """Two KV heads: with four ranks each is held by two of them."""
    save(tmp_path, outputs, HIDDEN, has_bias=True)
    x = torch.randn(5, HIDDEN)
    sizes = [output.size for output in outputs]
    q, k, v = apply(whole(tmp_path, outputs, HIDDEN, has_bias=True), x).split(sizes, dim=1)
    made = ranks(tmp_path, outputs, HIDDEN, tp_size, "column", has_bias=True)
    held = [place(0, tp_size).share(output.num_units, HEAD_DIM).size for output in outputs]
    assert held == [8 * HEAD_DIM // tp_size, max(1, 2 // tp_size) * HEAD_DIM] + held[1:2]
    parts = [apply(linear, x).split(held, dim=1) for linear in made]
    copies = max(1, tp_size // 2)
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), q)
    torch.testing.assert_close(torch.cat([part[1] for part in parts[::copies]], 1), k)
    torch.testing.assert_close(torch.cat([part[2] for part in parts[::copies]], 1), v)
    for rank, part in enumerate(parts):  # ranks that share a KV head hold the same one
        first = rank // copies * copies
        assert torch.equal(part[1], parts[first][1])


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_rows_add_up_to_the_whole(tp_size: int, has_bias: bool, tmp_path: Path) -> None:
    outputs, in_features = [Output("o", 20)], 32
    save(tmp_path, outputs, in_features, has_bias=has_bias)
    x = torch.randn(5, in_features)
    expected = apply(whole(tmp_path, outputs, in_features, has_bias=has_bias), x)
    made = ranks(tmp_path, outputs, in_features, tp_size, "row", has_bias=has_bias)
    pieces = x.split(in_features // tp_size, dim=1)
    results = [apply(linear, piece) for linear, piece in zip(made, pieces, strict=True)]
    total = torch.stack(results).sum(0)
    torch.testing.assert_close(total, expected)
    # A bias that another rank holds is known by its name and shape all the same.
    names = {name for linear in made for name in linear.destinations()}
    assert names == ({"o.weight", "o.bias"} if has_bias else {"o.weight"})


@pytest.mark.parametrize("tp_size", TP_SIZES)
@pytest.mark.parametrize("vocab_size", [64, 61, 5])
def test_a_vocabulary_need_not_divide(vocab_size: int, tp_size: int, tmp_path: Path) -> None:
    outputs = [Output("head", vocab_size)]
    save(tmp_path, outputs, HIDDEN, has_bias=False)
    x = torch.randn(5, HIDDEN)
    made = ranks(tmp_path, outputs, HIDDEN, tp_size, "vocabulary", has_bias=False)
    logits = torch.cat([apply(linear, x) for linear in made], 1)
    expected = apply(whole(tmp_path, outputs, HIDDEN, has_bias=False), x)
    torch.testing.assert_close(logits[:, :vocab_size], expected)
    assert logits[:, vocab_size:].abs().sum() == 0
    # The embedding that the head may be tied to holds the same rows.
    for rank, linear in enumerate(made):
        embedding = Embedding("head", vocab_size, HIDDEN, place(rank, tp_size))
        load(embedding.destinations(), tmp_path)
        assert torch.equal(apply(Linear.tied(embedding.weight), x), apply(linear, x))


def test_a_tied_linear_loads_nothing() -> None:
    assert Linear.tied(torch.zeros(3, 4)).destinations() == {}


def test_what_ranks_cannot_share_is_a_fault_of_ours() -> None:
    for num_units, tp_size in ((3, 2), (3, 4), (6, 4)):
        with pytest.raises(AssertionError, match=f"{num_units} among {tp_size} ranks"):
            place(0, tp_size).share(num_units)


class Turned:
    """A scheme unlike Dense: stored transposed as integers, fused along dim 1, with a last step."""

    num_finished = 0
    is_fusing = True

    def __init__(self, rows: Sequence[Rows], columns: Shard, placement: Placement) -> None:
        self._rows, self._columns = rows, columns
        shape = columns.size, sum(part.size for part in rows)
        self.stored = torch.full(shape, -1, dtype=torch.int32)
        self.weight = torch.empty(shape, dtype=placement.dtype)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        out.copy_(x @ self.weight)

    def destinations(self) -> Destinations:
        made: Destinations = {}
        begin = 0
        for part in self._rows:
            view = self.stored.narrow(1, begin, part.size)
            begin += part.size
            piece = Part(view, 1, part.start)
            if self._columns.size != self._columns.whole:
                piece = Part(view, 0, self._columns.start)
            shape = self._columns.whole, part.whole
            made[f"{part.name}.qweight"] = Destination(
                shape, (piece,), dtypes=("I32",), finish=self.finish
            )
        return made

    def finish(self) -> None:
        self.num_finished += 1
        self.weight.copy_(self.stored * 0.5)


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Placement]:
    monkeypatch.setattr(linear_module, "SCHEMES", {"dense": Dense, "turned": Turned})

    def make(tp_rank: int = 0, tp_size: int = 1) -> Placement:
        return place(tp_rank, tp_size, schemes=dict.fromkeys(("gate", "other", "down"), "turned"))

    return make


def test_a_scheme_says_what_is_loaded_and_how(
    turned: Callable[..., Placement], tmp_path: Path
) -> None:
    """Slices along either dimension, parts fused along the second one, integers, a last step."""
    stored = {f"{name}.qweight": torch.randint(-9, 9, (HIDDEN, 8), dtype=torch.int32)
              for name in ("gate", "other", "down")}  # fmt: skip
    save_file(stored, tmp_path / "model.safetensors")
    gate, up, down = (stored[f"{name}.qweight"] * 0.5 for name in ("gate", "other", "down"))
    outputs = [Output("gate", 8), Output("other", 8)]
    x = torch.randn(3, HIDDEN)
    for tp_size in (1, *TP_SIZES):
        gates, ups, sums = [], [], []
        for rank in range(tp_size):
            linear = Linear(outputs, HIDDEN, turned(rank, tp_size), shard="column")
            load(linear.destinations(), tmp_path)
            assert isinstance(linear.matrix, Turned)
            assert linear.matrix.num_finished == 1, "once for two tensors"
            here = apply(linear, x).chunk(2, dim=1)
            gates.append(here[0])
            ups.append(here[1])
            last = Linear([Output("down", 8)], HIDDEN, turned(rank, tp_size), shard="row")
            load(last.destinations(), tmp_path)
            sums.append(apply(last, x.chunk(tp_size, dim=1)[rank]))
        torch.testing.assert_close(torch.cat(gates, 1), x @ gate)
        torch.testing.assert_close(torch.cat(ups, 1), x @ up)
        torch.testing.assert_close(torch.stack(sums).sum(0), x @ down)


def test_what_stands_between_is_not_skipped(turned: Callable[..., Placement]) -> None:
    """Ranks' sums are added up before they are whole; a scheme need not have an epilogue."""
    for tp_size in (1, 2):
        down = Linear([Output("down_too", HIDDEN)], HIDDEN, turned(0, tp_size), shard="row")
        assert down.has_add == (tp_size == 1)
        gate_up = Linear([Output("up", 8), Output("too", 8)], HIDDEN, turned(0, tp_size))
        assert gate_up.has_silu_mul and gate_up.has_add
        other = Linear([Output("gate", 8), Output("other", 8)], HIDDEN, turned(0, tp_size))
        assert not other.has_add and not other.has_silu_mul


def test_adding_and_activating_are_what_is_called_plainly() -> None:
    torch.manual_seed(0)
    gate_up = Linear([Output("gate", 8), Output("up", 8)], HIDDEN, place(), has_bias=True)
    gate_up.matrix.weight.normal_()  # type: ignore[attr-defined]
    assert gate_up.bias is not None
    gate_up.bias.normal_()
    x, residual = torch.randn(3, HIDDEN), torch.randn(3, 16)
    expected = residual + apply(gate_up, x)
    gate_up.add(x, residual)
    torch.testing.assert_close(residual, expected)
    gate, up = apply(gate_up, x).chunk(2, 1)
    activated = torch.full((3, 8), torch.nan)
    gate_up.silu_mul(x, torch.empty(3, 16), activated)
    torch.testing.assert_close(activated, torch.nn.functional.silu(gate) * up)


def test_shapes_can_be_made_without_memory() -> None:
    linear = Linear(QKV, HIDDEN, Placement(torch.bfloat16, META, tp_size=4), shard="column")
    assert sum(place.nbytes for place in linear.destinations().values()) == 2 * 16 * HIDDEN


def test_outputs_that_are_not_stored_alike(turned: Callable[..., Placement]) -> None:
    with pytest.raises(ConfigError, match="gate and plain, whose matrices lie together"):
        Linear([Output("gate", 8), Output("plain", 8)], HIDDEN, turned())


def test_one_kernel_for_matrix_and_adapters_is_called_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the twin of what cards have, against shrink and expand, in all that a Linear does."""
    torch.manual_seed(0)
    outputs, num_rows = [Output("gate", 32), Output("up", 32)], 6
    linear = Linear(
        outputs, 48, place(num_adapter_slots=2, max_adapter_rank=8), has_bias=True
    )  # fmt: skip
    assert isinstance(linear.matrix, Dense) and linear.bias is not None
    linear.matrix.weight.normal_()
    linear.bias.normal_()
    assert linear.adapters is not None
    for slot in range(2):
        pairs = {it.name: Pair(torch.randn(5, 48), torch.randn(32, 5), 0.5) for it in outputs}
        linear.adapters.put(slot, pairs)
    shrunk = torch.full((1, num_rows, 2, 8), torch.nan)
    rows = AdapterRows(torch.tensor([1, 3, 5], dtype=torch.int32), {2: shrunk})
    x, residual, norm_weight = torch.randn(num_rows, 48), torch.randn(num_rows, 64), torch.randn(64)
    x_squares = torch.rand(num_rows, 3) * 90

    def run() -> list[torch.Tensor]:
        stored, added, normed, of_scaled = (residual.clone() for _ in range(4))
        activated = [torch.full((num_rows, 32), torch.nan) for _ in range(2)]
        scaled, squares = torch.full_like(residual, torch.nan), torch.empty(num_rows, 4)
        room = torch.empty_like(residual)
        linear(x, stored, rows)
        linear.add(x, added, rows)
        linear.add_for_norm(x, normed, norm_weight, scaled, squares, rows)
        linear.of_scaled(x, x_squares, 1e-5, of_scaled, rows)
        linear.silu_mul(x, room, activated[0], rows)
        linear.silu_mul_of_scaled(x, x_squares, 1e-5, room, activated[1], rows)
        return [stored, added, normed, scaled, squares, of_scaled, *activated]

    expected, num_calls = run(), 0

    def linear_lora(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        epilogue: int, adapters: lora.LinearLora, *norm: object,
    ) -> None:  # fmt: skip
        nonlocal num_calls
        num_calls += 1
        reference.linear_lora(x, weight, bias, out, epilogue, *adapters, *norm)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters_module, "serves_linear_lora", lambda *_: True)
    monkeypatch.setattr(adapters_module, "linear_lora", linear_lora)
    shrunk.fill_(torch.nan)
    torch.testing.assert_close(run(), expected, rtol=2e-5, atol=2e-5)
    assert num_calls == 6
