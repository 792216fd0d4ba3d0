"""What the leader has all ranks do, as values: the same calls of a StepExecutor, in one order."""

from __future__ import annotations

import msgspec

from pyserve.engine.batch import StepShape


class Call(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One of the following, as bytes of MessagePack."""


class Bring(Call, frozen=True, array_like=True):
    words: bytes  # of a packed step


class Forward(Call, frozen=True, array_like=True):
    shape: StepShape
    is_warmup: bool = False


class Sample(Call, frozen=True, array_like=True):
    """prompt_rows: of Asked, which all ranks compute logits for; what is masked or asked else is
    the leader's affair."""

    shape: StepShape
    prompt_rows: list[int]


class Record(Call, frozen=True, array_like=True):
    shape: StepShape


class Reset(Call, frozen=True, array_like=True):
    pass


class AllocateKV(Call, frozen=True, array_like=True):
    num_blocks: int


class FreeKV(Call, frozen=True, array_like=True):
    pass


class DropModel(Call, frozen=True, array_like=True):
    pass


class TakeModel(Call, frozen=True, array_like=True):
    """Load it again, and tell the leader then: a step of ranks that still load would not end."""


class StoredPair(msgspec.Struct, frozen=True, array_like=True):
    """An adapter's a [size, in_features] and b [out_features, size] of a module, in a file."""

    module: str
    size: int
    in_features: int
    out_features: int
    scale: float


class PutAdapter(Call, frozen=True, array_like=True):
    """The matrices lie one after the other in the file `path`, as numbers of torch's `dtype`."""

    slot: int
    path: str
    dtype: str
    pairs: list[StoredPair]


class Close(Call, frozen=True, array_like=True):
    """End: there will be no other call."""


class Measure(Call, frozen=True, array_like=True):
    """Tell the leader what memory the card shows now."""


AnyCall = (
    Bring | Forward | Sample | Record | Reset | AllocateKV | FreeKV | DropModel | TakeModel
    | PutAdapter | Measure | Close
)  # fmt: skip
