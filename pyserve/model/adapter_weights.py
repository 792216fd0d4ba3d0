"""Reads a LoRA adapter that PEFT has saved: adapter_config.json and adapter_model.safetensors.

Adapters are untrusted files, as checkpoints are: headers are checked before any tensor is read, and
only safetensors files are read. The tensors tell which modules the adapter has, and their ranks
must agree with the config. Everything is checked before an AdapterWeights is returned, so a bad
adapter never gets near a device. All errors are CheckpointError naming the file and the tensor or
field.
"""

from __future__ import annotations

import os
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
_PREFIXES = ("model.", "language_model.")
_MAX_PREFIXES = 3  # "model.language_model.model." has three; patterns run on what is in front
# For example "model.layers.0.mlp.up_proj.lora_A.weight"; ".<adapter name>" may precede ".weight".
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
# PEFT saves copies of the base model's embeddings if the vocabulary was resized; they are ignored.
_BASE_COPY = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.base_layer\.weight")
_REFUSED_NAMES = (
    (re.compile(r".*\.lora_magnitude_vector(\..*)?"), "DoRA is not supported"),
    (re.compile(r".*\.lora_embedding_[AB]"), "an adapter of the embedding is not supported"),
    (re.compile(r".*\.lora_B(\.[^.]+)?\.bias"), "a bias of its own is not supported"),
    (re.compile(r".*\.trainable_tokens_.*"), "embeddings of its own are not supported"),
    (re.compile(r".*\.modules_to_save\..*"), "a module that is replaced is not supported"),
)


class Target(NamedTuple):
    """The shape of a base-model matrix that an adapter may change."""

    out_features: int
    in_features: int


class Pair(NamedTuple):
    """What an adapter adds to the output of a module: y += scale * (x a^T) b^T.

    a  [rank, in_features]
    b  [out_features, rank]
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class _Stored(NamedTuple):
    """The stored tensors of one module; `name` is its name for the config's patterns."""

    name: str
    a: StoredTensor
    b: StoredTensor


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """An adapter in host memory; it is never modified.

    pairs       by the module's name in the base model's checkpoint.
    base_model  the model that it says it was trained on; "" where it does not say.
    unknown     names of fields of its config that are set and that pyserve does not know.
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
    """Read the adapter in `folder`, converted to `dtype`.

    targets   the modules of the base model that an adapter may change, by name.
    max_rank  the highest rank that any module may have.

    Raises CheckpointError, also for values that are not finite in `dtype`.
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
    """Convert a module's name in a PEFT file to its name in the model's own checkpoint.

    The prefixes of PEFT ("base_model.model.") and transformers ("model.") may be missing, and the
    text model within a multimodal one has "language_model." in its names.
    """
    name = name.removeprefix(_PEFT_PREFIX)
    for _ in range(_MAX_PREFIXES):
        if name.startswith(_PREFIXES):
            name = name.partition(".")[2]
    return f"model.{name}"


def _trained_name(saved: str, module: str) -> str:
    """The module's name that PEFT matched its patterns with. A file without PEFT's prefix may hold
    only the end of it."""
    name = saved.removeprefix(_PEFT_PREFIX)
    return name if name != saved or name.startswith(_PREFIXES) else module


def _index(folder: Path, targets: Mapping[str, Target]) -> dict[str, _Stored]:
    """The stored tensors of each module in the file, by the module's name in the base model."""
    path = folder / WEIGHTS_FILE
    if not os.path.lexists(path):
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
        names[module] = _trained_name(match["module"], module)
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
    """Check dtypes and shapes of one module's tensors. size: its rank according to the config."""
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
