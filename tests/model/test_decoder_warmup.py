"""A warm-up pass calls, in fewer layers, whatever a whole pass does, with the same shapes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyserve.model import schemes
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.context import ForwardContext
from pyserve.model.decoder import _one_of_each_kind
from pyserve.model.placement import Placement
from tests.engine.tiny import CONFIG
from tests.model.described import with_windows
from tests.model.driver import Driver
from tests.model.test_activations import Plain

LAYERS = ModelConfig.from_hf(CONFIG | {"num_hidden_layers": 6})


class Calls(TorchDispatchMode):
    """Every call with its shapes, dtypes and numbers, and how often it came."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        said = [*args, *sorted((kwargs or {}).items())]
        self.counts[f"{func}{[_described(value) for value in said]}"] += 1
        return func(*args, **kwargs or {})


def _described(value: object) -> object:
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value


PLAIN = {f"model.layers.{index}.mlp.down_proj": "plain" for index in (0, 2, 3)}


@pytest.mark.parametrize("num_tokens", [1, 6, 40])
@pytest.mark.parametrize("most", [0, 8], ids=["norms", "factors"])
@pytest.mark.parametrize(
    ("config", "stored", "indices"),
    [
        (LAYERS, {}, [0, 1, 5]),
        (with_windows(LAYERS, 9, 9, 0, 9, 0, 9, 9, 9), {}, [0, 1, 2, 3, 7]),
        (LAYERS, PLAIN, [0, 1, 2, 3, 5]),
    ],
    ids=["alike", "windows", "schemes"],
)
def test_whatever_is_called_is_called(
    config: ModelConfig, stored: dict[str, Any], indices: list[int], most: int, num_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(schemes.SCHEMES, "plain", Plain)  # type: ignore[misc]
    placement = Placement(torch.bfloat16, torch.device("cpu"), schemes=stored)
    decoder = build_model(config, placement)
    for place in decoder.destinations().values():
        place.view.normal_(0, 0.1)
    decoder._max_norm_rows = most  # as on a card, where norms of few tokens are factors
    driver = Driver(decoder)
    driver.step({0: range(num_tokens)})  # what is asked once and for all
    with Calls() as whole:
        driver.step({0: range(num_tokens)})
    ran: list[int] = []

    class Caches(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            ran.append(index)
            return super().__getitem__(index)

    def warm_up(ctx: ForwardContext) -> torch.Tensor:
        decoder.warm_up(ctx)
        return ctx.activations.hidden

    driver.kv_caches = Caches(driver.kv_caches)
    monkeypatch.setattr(decoder, "forward", warm_up)
    with Calls() as warmup:
        driver.step({0: range(num_tokens)})
    assert warmup.counts.keys() == whole.counts.keys()
    assert warmup.counts.total() < whole.counts.total()
    assert ran == indices


def test_a_layer_alone_is_of_every_kind() -> None:
    assert _one_of_each_kind("a") == [0]
    assert _one_of_each_kind("aa") == [0, 1]
