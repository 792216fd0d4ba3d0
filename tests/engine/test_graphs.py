"""What an executor records, where a launch that is called again stands in for a CUDA graph.

Graphs themselves are in tests/gpu/test_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import SimpleNamespace

import pytest
import torch

from pyserve.engine import executor
from pyserve.engine.batch import StepShape, pack
from pyserve.engine.executor import StepExecutor
from pyserve.engine.graphs import GraphCache
from pyserve.engine.warmup import graph_steps
from pyserve.errors import DeviceError
from pyserve.model.decoder import Decoder
from tests.engine.test_adapters_on_a_model import make_decoder as make_adapted_decoder
from tests.engine.test_runner import NAN_TOKEN, limits, make_decoder
from tests.engine.tiny import VOCAB_SIZE

NUM_BLOCKS = 128


class RepeatedLaunches(GraphCache):
    """A record is the launch itself."""

    def record(self, key: Hashable, launch: Callable[[], object]) -> None:
        self._graphs[key] = SimpleNamespace(replay=launch)  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "GraphCache", RepeatedLaunches)


def make_executor(model: Decoder) -> StepExecutor:
    executor = StepExecutor(model, limits(64, 8))
    executor.allocate_kv(NUM_BLOCKS)
    return executor


def record_all(executor: StepExecutor) -> list[StepShape]:
    shapes = []
    for step in graph_steps(
        executor.limits, num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE,
        num_adapter_slots=executor.num_adapter_slots,
    ):  # fmt: skip
        pack(step, executor.step_input.numpy())
        executor.record(step.shape)
        shapes.append(step.shape)
    return shapes


def test_steps_with_adapters_have_records_of_their_own() -> None:
    executor = make_executor(make_adapted_decoder(3))
    shapes = record_all(executor)
    assert {shape.has_adapters for shape in shapes} == {False, True}
    assert all(executor.has_graph(shape) for shape in shapes)
    executor.close()


@pytest.mark.parametrize("has_nan", [False, True])
def test_a_record_that_computes_the_same_is_kept(has_nan: bool) -> None:
    model = make_decoder()
    if has_nan:
        model.embedding.weight[NAN_TOKEN] = torch.nan
    executor = make_executor(model)
    shapes = record_all(executor)
    assert shapes and all(executor.has_graph(shape) for shape in shapes)
    executor.close()


def test_a_record_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RepeatedLaunches, "replay", lambda self, key: key in self)
    executor = make_executor(make_decoder())
    with pytest.raises(DeviceError, match="computes something else than .*--enforce-eager"):
        record_all(executor)
    executor.close()


def test_another_kv_cache_takes_the_records_of_the_first_with_it() -> None:
    executor = make_executor(make_decoder())
    shapes = record_all(executor)
    executor.allocate_kv(NUM_BLOCKS // 2)
    assert shapes and not any(executor.has_graph(shape) for shape in shapes)
    executor.close()


class VoidGraph:
    """A CUDA graph whose capture a failed launch has made void."""

    num_ended = 0

    def capture_begin(self, **options: object) -> None:
        pass

    def capture_end(self) -> None:
        VoidGraph.num_ended += 1
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_launch_that_fails_says_why_and_not_what_became_of_the_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def launch() -> None:
        raise ValueError("a shape that no kernel has")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", VoidGraph)
    cache = GraphCache()
    with pytest.raises(ValueError, match="no kernel has"):
        cache.record("key", launch)
    assert VoidGraph.num_ended == 1 and "key" not in cache
