"""Messages by which the leader has all other ranks make the same StepExecutor calls as itself, in
the same order."""

from __future__ import annotations

import msgspec

from pyserve.engine.batch import StepShape


class Call(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the messages; encoded as MessagePack."""


class Bring(Call, frozen=True, array_like=True):
    """As StepExecutor.bring."""

    words: bytes  # int32 words of a packed step


class Forward(Call, frozen=True, array_like=True):
    """As StepExecutor.forward."""

    shape: StepShape
    is_warmup: bool = False


class Sample(Call, frozen=True, array_like=True):
    """As StepExecutor.sample, which all ranks must call as they compute the logits together.

    prompt_rows is that of Asked, since prompt logprobs need further logits. Masks and everything
    else about logprobs concern the leader alone.
    """

    shape: StepShape
    prompt_rows: list[int]


class Record(Call, frozen=True, array_like=True):
    """As StepExecutor.record."""

    shape: StepShape


class Reset(Call, frozen=True, array_like=True):
    """As StepExecutor.reset."""


class AllocateKV(Call, frozen=True, array_like=True):
    """As StepExecutor.allocate_kv."""

    num_blocks: int


class FreeKV(Call, frozen=True, array_like=True):
    """As StepExecutor.free_kv."""


class DropModel(Call, frozen=True, array_like=True):
    """As StepExecutor.drop_model."""


class TakeModel(Call, frozen=True, array_like=True):
    """Load the model again and report Loaded. The leader waits for that before it runs a step, as
    the step could not end on ranks that still load."""


class StoredPair(msgspec.Struct, frozen=True, array_like=True):
    """Describes one module's adapter matrices, a [size, in_features] and b [out_features, size],
    which lie in a file."""

    module: str
    size: int
    in_features: int
    out_features: int
    scale: float


class PutAdapter(Call, frozen=True, array_like=True):
    """The file `path` holds the matrices of `pairs` in order, a before b, in torch's `dtype`."""

    slot: int
    path: str
    dtype: str
    pairs: list[StoredPair]


class Close(Call, frozen=True, array_like=True):
    """The last message: the rank ends."""


class Measure(Call, frozen=True, array_like=True):
    """Report Shown: the memory in use on the card now."""


AnyCall = (
    Bring | Forward | Sample | Record | Reset | AllocateKV | FreeKV | DropModel | TakeModel
    | PutAdapter | Measure | Close
)  # fmt: skip
