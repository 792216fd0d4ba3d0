"""Reads a LoRA adapter that PEFT has saved: adapter_config.json and adapter_model.safetensors.

An adapter is a stranger's file as a checkpoint is: headers are checked before anything is read, and
only safetensors are. The tensors decide which modules it has and at which rank; the config must
agree with them. Everything is checked before the first byte is kept, so that a bad adapter harms
nobody. All errors are CheckpointError naming the file, and the tensor or the field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from pyserve.checkpoint_files import MAX_SHOWN_CHARS
from pyserve.errors import CheckpointError
from pyserve.model.adapter_config import CONFIG_FILE, AdapterConfig
from pyserve.model.destination import FLOATS, Part
from pyserve.model.weights import CheckpointReader, StoredTensor, name_some, read_header

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
BUFFER_BYTES = 4 * 2**20

_PEFT_PREFIX = "base_model.model."
# "model.layers.0.mlp.up_proj.lora_A.weight"; the adapter's name may stand before "weight".
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
# What PEFT saves of the base model's own embeddings, where their vocabulary is another one.
_BASE_COPY = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.base_layer\.weight")
_REFUSED_NAMES = (
    (re.compile(r".*\.lora_magnitude_vector(\..*)?"), "DoRA is not supported"),
    (re.compile(r".*\.lora_embedding_[AB]"), "an adapter of the embedding is not supported"),
    (re.compile(r".*\.lora_B(\.[^.]+)?\.bias"), "a bias of its own is not supported"),
    (re.compile(r".*\.trainable_tokens_.*"), "embeddings of its own are not supported"),
    (re.compile(r".*\.modules_to_save\..*"), "a module that is replaced is not supported"),
)


class Target(NamedTuple):
    """The shape of a module that an adapter may have a pair for."""

    out_features: int
    in_features: int


class Pair(NamedTuple):
    """What an adapter adds to a module: y += scale * (x a^T) b^T.

    a  [rank, in_features]
    b  [out_features, rank]
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class _Stored(NamedTuple):
    """The tensors of one module; `name` is what the config's patterns are matched with."""

    name: str
    a: StoredTensor
    b: StoredTensor


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """An adapter in the host's memory, read only.

    pairs       by module, as the base model's checkpoint calls it.
    base_model  which model it says it was trained on; "": it does not say.
    unknown     fields of its config that are set and mean nothing here.
    """

    pairs: Mapping[str, Pair]
    base_model: str
    unknown: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    @property
    def largest(self) -> int:
        """The highest rank of its modules."""
        return max(len(pair.a) for pair in self.pairs.values())


def read_adapter(
    folder: Path, targets: Mapping[str, Target], *, max_rank: int, dtype: torch.dtype
) -> AdapterWeights:
    """The adapter in `folder`, converted to `dtype`.

    targets   the modules of the base model that may have one.
    max_rank  of any module.
    """
    config = AdapterConfig.from_folder(folder)
    stored = _index(folder, targets)
    for module, pair in stored.items():
        _check_pair(pair, targets[module], config.rank_of(pair.name), max_rank)
    sides: dict[str, torch.Tensor] = {}
    wanted = sorted((it for pair in stored.values() for it in (pair.a, pair.b)), key=_offset)
    with CheckpointReader(BUFFER_BYTES) as reader:
        for tensor in wanted:
            kept = sides[tensor.name] = torch.empty(tensor.shape, dtype=dtype)
            for _ in reader.copy(tensor, Part(kept)):
                pass
            if not bool(kept.isfinite().all()):
                raise CheckpointError(
                    f"{tensor.file}: {_shown(tensor)} holds a number that is not finite as {dtype}"
                )
    return AdapterWeights(
        pairs={
            module: Pair(sides[pair.a.name], sides[pair.b.name], config.scale_of(pair.name))
            for module, pair in stored.items()
        },
        base_model=config.base_model,
        unknown=config.unknown,
    )


def plain_module(name: str) -> str:
    """A module's name as PEFT saves it -> as the model's own checkpoint calls it.

    Names may lack what PEFT or transformers puts before them; a text model within one for images
    has "language_model" in its own.
    """
    name = name.removeprefix(_PEFT_PREFIX)
    while name.startswith(("model.", "language_model.")):
        name = name.partition(".")[2]
    return f"model.{name}"


def _index(folder: Path, targets: Mapping[str, Target]) -> dict[str, _Stored]:
    """The tensors of each module that the file has a pair for."""
    path = folder / WEIGHTS_FILE
    if not path.exists():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            raise CheckpointError(
                f"{folder} holds {pickles[0]} and no {WEIGHTS_FILE}: pickles are not read, as they "
                "may run any code; save_pretrained of PEFT 0.7 and later writes safetensors"
            )
        raise CheckpointError(f"{folder} holds {CONFIG_FILE} and no {WEIGHTS_FILE}")
    sides: dict[tuple[str, str], StoredTensor] = {}
    names: dict[str, str] = {}
    for tensor in read_header(path):
        if _BASE_COPY.fullmatch(tensor.name):
            continue
        match = _PAIR.fullmatch(tensor.name)
        if match is None:
            raise CheckpointError(f"{path}: {_shown(tensor)}: {_why_refused(tensor.name)}")
        module = plain_module(match["module"])
        if module not in targets:
            raise CheckpointError(f"{path}: {_shown(tensor)}: {_why_no_target(module, targets)}")
        if (module, match["side"]) in sides:
            other = sides[module, match["side"]]
            raise CheckpointError(f"{path}: {_shown(tensor)} and {_shown(other)} are of one module")
        sides[module, match["side"]] = tensor
        names[module] = match["module"].removeprefix(_PEFT_PREFIX)
    if not sides:
        raise CheckpointError(f"{path} holds no LoRA tensors")
    halves = [module for module in names if not {(module, "A"), (module, "B")} <= sides.keys()]
    if halves:
        raise CheckpointError(f"{path} lacks lora_A or lora_B of {name_some(halves)}")
    return {
        module: _Stored(name, sides[module, "A"], sides[module, "B"])
        for module, name in names.items()
    }


def _why_refused(name: str) -> str:
    for pattern, why in _REFUSED_NAMES:
        if pattern.fullmatch(name):
            return why
    return "is no LoRA tensor: a module that is replaced as a whole is not supported"


def _why_no_target(module: str, targets: Mapping[str, Target]) -> str:
    if module in ("model.lm_head", "model.embed_tokens"):
        return f"an adapter of {module.removeprefix('model.')} is not supported"
    if ".experts" in module:
        return "an adapter of experts is not supported"
    kinds = sorted({name.rpartition(".")[2] for name in targets})
    return f"the model has no such module; those of its layers are {', '.join(kinds)}"


def _check_pair(pair: _Stored, target: Target, size: int, max_rank: int) -> None:
    """`size` is the rank that the config gives the module."""
    for tensor in (pair.a, pair.b):
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.file}: {_shown(tensor)} is {tensor.dtype}, supported are "
                f"{', '.join(FLOATS)}"
            )
    for tensor, shape in (
        (pair.a, (size, target.in_features)),
        (pair.b, (target.out_features, size)),
    ):
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: {_shown(tensor)} has shape {list(tensor.shape)}, the base model "
                f"and rank {size} of {CONFIG_FILE} make it {list(shape)}"
            )
    if size > max_rank:
        raise CheckpointError(
            f"{pair.a.file}: {_shown(pair.a)} has rank {size}, --max-lora-rank is {max_rank}"
        )


def _offset(tensor: StoredTensor) -> int:
    return tensor.offset


def _shown(tensor: StoredTensor) -> str:
    return tensor.name[:MAX_SHOWN_CHARS]
