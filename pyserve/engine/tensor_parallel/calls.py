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
    """Load it again where it was dropped."""


class PutAdapter(Call, frozen=True, array_like=True):
    """The adapter's matrices are in the safetensors file `path`: "a" and "b" and the module."""

    slot: int
    path: str
    scales: dict[str, float]


class Measure(Call, frozen=True, array_like=True):
    """Tell the leader what memory the card shows now."""


AnyCall = (
    Bring | Forward | Sample | Record | Reset | AllocateKV | FreeKV | DropModel | TakeModel
    | PutAdapter | Measure
)  # fmt: skip
