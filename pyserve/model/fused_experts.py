"""Checkpoints that hold the matrices of all experts of a layer in one tensor each.

Layers expect a tensor for each expert's matrix, as most checkpoints have them. Checkpoints that
transformers 5 writes may instead hold `experts.gate_up_proj` and `experts.down_proj` with all E
experts of inner width I, for a hidden size of H:

    [E, 2 I, H] and [E, H, I]   each matrix is [outputs, inputs], as other matrices of a checkpoint
    [E, H, 2 I] and [E, I, H]   each matrix is [inputs, outputs]

The shape tells which layout it is, unless H = 2 I. Either is presented to the loader as one tensor
for each expert, with an offset into the same file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from math import prod

from pyserve.errors import CheckpointError
from pyserve.model.config import ModelConfig
from pyserve.model.destination import FLOATS, Destination, Destinations, Part
from pyserve.model.experts_config import ExpertsConfig
from pyserve.model.layer_config import LayerNames
from pyserve.model.weights import StoredTensor, name_some

MLP = "mlp"  # transformers 5's name of the MLP in every family
GATE_UP, DOWN = "gate_up_proj", "down_proj"

Stored = dict[str, StoredTensor]


def as_stored(
    stored: Stored, destinations: Destinations, config: ModelConfig
) -> tuple[Stored, Destinations]:
    """Replace fused tensors of all experts by one tensor for each expert.

    Returns the stored tensors and the Destinations, both by name. Raises CheckpointError naming a
    tensor of the wrong shape, or a layer whose number of experts is not that of config.json.
    """
    if not any(isinstance(layer.mlp, ExpertsConfig) for layer in config.layers):
        return stored, destinations
    stored, destinations = dict(stored), dict(destinations)
    for index, layer in enumerate(config.layers):
        if not isinstance(layer.mlp, ExpertsConfig):
            continue
        names = layer.names
        _rename(stored, f"model.layers.{index}.{MLP}.", f"model.layers.{index}.{names.mlp}.")
        prefix = f"model.layers.{index}.{names.mlp}.{names.experts}"
        gate_up = stored.pop(f"{prefix}.{GATE_UP}", None)
        down = stored.pop(f"{prefix}.{DOWN}", None)
        if gate_up is not None and down is not None:
            split = _Split(prefix, names, layer.mlp, config.hidden_size)
            split(gate_up, down, stored, destinations)
        elif gate_up is not None or down is not None:
            lacking = GATE_UP if gate_up is None else DOWN
            raise CheckpointError(f"the checkpoint lacks: {prefix}.{lacking}")
        _check_count(prefix, stored, layer.mlp.num_experts)
    return stored, destinations


def _rename(stored: Stored, old: str, new: str) -> None:
    if old == new:
        return
    for name in [name for name in stored if name.startswith(old)]:
        tensor, name = stored.pop(name), new + name.removeprefix(old)
        if name in stored:
            raise CheckpointError(
                f"the checkpoint holds {name} twice: as {stored[name].name} and as {tensor.name}"
            )
        stored[name] = tensor


def _check_count(prefix: str, stored: Iterable[str], num_experts: int) -> None:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,9}})\..*")
    found = {int(match[1]) for name in stored if (match := pattern.fullmatch(name))}
    wanted = set(range(num_experts))
    if found == wanted or not found:
        return
    what = "lacks" if wanted - found else "also holds"
    others = name_some(f"{prefix}.{expert}" for expert in wanted - found or found - wanted)
    raise CheckpointError(
        f"{prefix}: config.json says {num_experts} experts, the checkpoint holds {len(found)}; it "
        f"{what} {others}"
    )


class _Split:
    """Replaces the two fused tensors of one layer by the tensors of each expert."""

    def __init__(
        self, prefix: str, names: LayerNames, mixture: ExpertsConfig, hidden_size: int
    ) -> None:
        assert len(names.gate_up) == 2, "gate and up are known by a name each"
        self._prefix = prefix
        self._gate, self._up = names.gate_up
        self._down = names.down
        self._count, self._size, self._hidden = mixture.num_experts, mixture.size, hidden_size

    def __call__(
        self, gate_up: StoredTensor, down: StoredTensor, stored: Stored, destinations: Destinations
    ) -> None:
        count, size, hidden = self._count, self._size, self._hidden
        first = stored.get(self._name(0, self._gate))
        if first is not None:
            raise CheckpointError(
                f"the checkpoint holds experts twice: in {gate_up.name} and in {first.name}"
            )
        for tensor in (gate_up, down):
            if tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"{tensor.file}: {tensor.name} is {tensor.dtype}: experts in one tensor must "
                    f"be plain numbers, {', '.join(FLOATS)}"
                )
        plain, transposed = (count, 2 * size, hidden), (count, hidden, 2 * size)
        if gate_up.shape not in (plain, transposed):
            raise _wrong_shape(gate_up, f"{list(plain)} or {list(transposed)}")
        if plain == transposed:
            raise CheckpointError(
                f"{gate_up.file}: {gate_up.name} has shape {list(gate_up.shape)}, which may be "
                f"[experts, 2 * {size}, hidden_size] or [experts, hidden_size, 2 * {size}], as "
                f"hidden_size is {hidden}: a tensor for each expert would tell"
            )
        is_plain = gate_up.shape == plain
        down_shape = (count, hidden, size) if is_plain else (count, size, hidden)
        if down.shape != down_shape:
            raise _wrong_shape(down, f"{list(down_shape)}, as {gate_up.name} is laid out")
        for expert in range(count):
            if is_plain:
                self._split_plain(expert, gate_up, down, stored)
            else:
                self._split_transposed(expert, gate_up, down, stored, destinations)

    def _name(self, expert: int, module: str) -> str:
        return f"{self._prefix}.{expert}.{module}.weight"

    def _split_plain(
        self, expert: int, gate_up: StoredTensor, down: StoredTensor, stored: Stored
    ) -> None:
        matrix = (self._size, self._hidden)
        for half, module in enumerate((self._gate, self._up)):
            stored[self._name(expert, module)] = _slice(gate_up, 2 * expert + half, matrix)
        stored[self._name(expert, self._down)] = _slice(down, expert, matrix[::-1])

    def _split_transposed(
        self, expert: int, gate_up: StoredTensor, down: StoredTensor, stored: Stored,
        destinations: Destinations,
    ) -> None:  # fmt: skip
        gate, up = (destinations.pop(self._name(expert, it)) for it in (self._gate, self._up))
        if gate.sink is not None:
            raise CheckpointError(
                f"{gate_up.file}: {gate_up.name} is laid out inputs by outputs, and to quantise "
                "such a one as it is loaded is not supported"
            )
        name, shape = self._name(expert, GATE_UP), (self._hidden, 2 * self._size)
        parts = (*_transposed(gate.parts, 0), *_transposed(up.parts, self._size))
        destinations[name] = Destination(shape, parts)
        stored[name] = _slice(gate_up, expert, shape)
        name = self._name(expert, self._down)
        whole = destinations[name]
        destinations[name] = replace(
            whole, shape=whole.shape[::-1], parts=tuple(_transposed(whole.parts, 0))
        )
        stored[name] = _slice(down, expert, (self._size, self._hidden))


def _slice(tensor: StoredTensor, index: int, shape: tuple[int, int]) -> StoredTensor:
    """Matrix number `index` of a tensor that holds matrices of `shape` one after the other."""
    num_bytes = tensor.num_bytes // prod(tensor.shape) * prod(shape)
    return replace(
        tensor, shape=shape, offset=tensor.offset + index * num_bytes, num_bytes=num_bytes
    )


def _transposed(parts: Iterable[Part], column: int) -> Iterable[Part]:
    """The parts of a matrix that is stored transposed, as the columns from `column` on of a wider
    matrix."""
    for part in parts:
        assert part.dim == 0 or column == 0, "one slice only"
        yield Part(part.view.t(), 1 - part.dim, column + part.start)


def _wrong_shape(tensor: StoredTensor, wanted: str) -> CheckpointError:
    shape = list(tensor.shape)
    return CheckpointError(
        f"{tensor.file}: {tensor.name} has shape {shape}, config.json makes it {wanted}"
    )
