"""A pipeline of ranks that torchrun has started: when it is chosen, and steps that run along it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from pyserve.config import EngineConfig, Use
from pyserve.engine import load as engine_load
from pyserve.engine.batch import Step, pack
from pyserve.engine.devices import CPU, check_cards
from pyserve.engine.executor import StepExecutor
from pyserve.engine.load import settle_sharing, settle_start
from pyserve.engine.state import StepLimits
from pyserve.engine.tensor_parallel import link as of_link
from pyserve.engine.tensor_parallel.link import Estimate, Link, Work, estimate, measure
from pyserve.engine.warmup import graph_steps
from pyserve.errors import ConfigError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.loader import load_model
from pyserve.model.placement import META, Placement
from pyserve.ops.group import LEADER, Group, ProcessGroup
from tests.engine.test_pooling import CASES, NO, YES
from tests.engine.tiny import engine_config, write_model
from tests.model import oracle
from tests.model.ranks import on_all_ranks

LIMITS = StepLimits(
    num_slots=8, max_num_batched_tokens=64, max_model_len=64, block_size=16, logits_tile_rows=3
)
# An 8B in bfloat16 on cards that read 4 TB/s and compute 600 TFLOP/s.
WORK_8B = Work(num_layers=32, token_bytes=8192, read_bytes=14 * 10**9, num_params=7 * 10**9)
BESIDE = Link(latency_s=20e-6, bytes_per_s=200e9, read_bytes_per_s=4e12, flop_per_s=6e14)
APART = BESIDE._replace(latency_s=100e-6, bytes_per_s=1e9)


def results_of(folder: Path, use: Use, group: Group | None) -> list[torch.Tensor]:
    """Of steps with tokens of their own in each row, and one that goes on from the last of them."""
    placement = Placement(torch.float32, CPU)
    if group is not None:
        stage = {"pp_rank": group.tp_rank, "pp_size": group.tp_size, "group": group}
        placement = Placement(torch.float32, CPU, **stage)  # type: ignore[arg-type]
    config = ModelConfig.from_path(folder, use=use)
    if use == "score":
        config = config.answering_by((NO, YES))
    executor = StepExecutor(
        load_model(
            folder, config, placement, load_format="auto", seed=0,
            progress=lambda done, total: None, max_model_len=LIMITS.max_model_len,
        ), LIMITS,
    )  # fmt: skip
    executor.allocate_kv(32)
    found = []

    def run(step: Step) -> None:
        words = torch.zeros_like(executor.step_input)
        executor.bring(words[: pack(step, words.numpy())])
        executor.forward(step.shape)
        found.append(executor.sample(step.shape)[: step.shape.num_samples].clone())

    for step in graph_steps(LIMITS, num_blocks=32, vocab_size=oracle.VOCAB_SIZE):
        executor.reset()
        run(step)
    num_rows = len(step.row_slots)
    run(
        Step(
            row_slots=step.row_slots, query_lens=[1] * num_rows, host_tokens=[None] * num_rows,
            row_samples=[True] * num_rows, num_tokens=num_rows,
        )
    )  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["qwen3", "capped reranker", "that generates"])
def test_steps_run_along_the_ranks(kind: str, tmp_path: Path) -> None:
    """Tokens are drawn, or texts pooled, by the leader."""
    use: Use = "auto"
    if kind in CASES:
        save, use, _ = CASES[kind]
        save(tmp_path)
    else:
        oracle.make_model("gemma2").save_pretrained(tmp_path)
    expected = results_of(tmp_path, use, None)
    assert len(expected) > 3 and len({it.numpy().tobytes() for it in expected}) > 3
    found = on_all_ranks(3, lambda group: results_of(tmp_path, use, group))[LEADER]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_work_is_divided_where_the_link_is_fast() -> None:
    tensor_s, pipeline_s = estimate(BESIDE, WORK_8B, 2)
    # 3.5 ms of reading, 47.8 of computing; 64 all-reduces of 20 us, and of 104 for a chunk.
    assert tensor_s == pytest.approx(0.0239 + 0.0067 + 256 * (0.00175 + 0.00128), rel=0.02)
    assert pipeline_s == pytest.approx(0.0478 + 0.0002 + 256 * (0.0035 + 0.00004), rel=0.02)
    assert tensor_s < pipeline_s


def test_and_not_where_it_is_slow() -> None:
    tensor_s, pipeline_s = estimate(APART, WORK_8B, 2)
    assert pipeline_s < 1.1 < 2 * tensor_s
    far = APART._replace(bytes_per_s=BESIDE.bytes_per_s)
    assert estimate(far, WORK_8B, 2).pipeline_s < estimate(far, WORK_8B, 2).tensor_s
    thin = BESIDE._replace(bytes_per_s=APART.bytes_per_s)
    assert estimate(thin, WORK_8B, 2).pipeline_s < estimate(thin, WORK_8B, 2).tensor_s


def test_work_counts_the_experts_that_a_token_meets(tmp_path: Path) -> None:
    def of(**changes: int) -> Work:
        model = oracle.make_model("mixtral", num_hidden_layers=2, **changes)
        model.save_pretrained(tmp_path)
        config = ModelConfig.from_path(tmp_path)
        return Work.of(build_model(config, Placement(torch.float32, META), max_model_len=1))

    few, many = of(num_local_experts=4), of(num_local_experts=8)
    assert few == many and few.num_layers == 2 and few.token_bytes == 4 * 64
    one = of(num_local_experts=4, num_experts_per_tok=1)
    assert few.num_params - one.num_params == 2 * 3 * 64 * 96
    assert few.read_bytes == 4 * few.num_params


def test_all_ranks_measure_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_link, "HOST_SIZE", 64)
    monkeypatch.setattr(of_link, "LARGE_BYTES", 2**16)
    first, *others = on_all_ranks(3, lambda group: measure(group, CPU))
    assert others == [first, first]
    assert all(figure > 0 for figure in first) and first.latency_s < 1


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the leader of three ranks."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("world", "seconds", "num_layers", "chosen"),
    [
        ("2", Estimate(1.0, 2.0), 2, (2, 1)),
        ("2", Estimate(2.0, 1.0), 2, (1, 2)),
        ("2", Estimate(2.0, 1.0), 1, (2, 1)),  # more ranks than layers
        ("3", Estimate(1.0, 2.0), 3, (1, 3)),  # three cannot share four heads
    ],
)
@pytest.mark.usefixtures("three")
def test_what_is_faster_is_chosen(
    world: str, seconds: Estimate, num_layers: int, chosen: tuple[int, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(ProcessGroup, "launched", lambda device: None)
    monkeypatch.setattr(engine_load, "measure", lambda group, device: BESIDE)
    monkeypatch.setattr(engine_load, "estimate", lambda link, work, num_ranks: seconds)
    asked = engine_config(write_model(tmp_path / "m", num_hidden_layers=num_layers))
    with caplog.at_level(logging.INFO, logger="pyserve"):
        config = settle_sharing(asked)
    assert (config.tensor_parallel_size, config.pipeline_parallel_size) == chosen
    assert f"all-reduce of {world} ranks takes 20 us and 200.000 GB/s" in caplog.text
    way = "tensor" if chosen[0] > 1 else "pipeline"
    assert f"--{way}-parallel-size {world} it is" in caplog.text
    assert settle_sharing(config) is config, "a flag has the last word"


def test_one_process_has_nothing_to_choose() -> None:
    config = EngineConfig(model_path=Path("/m"))
    assert settle_sharing(config) is config


def test_what_cannot_be_a_pipeline_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 3 .* torchrun starts"):
        check_cards(CPU, 1, 3)
    with pytest.raises(ConfigError, match="size 2 with --pipeline-parallel-size 3 is not built"):
        EngineConfig(model_path=tmp_path, tensor_parallel_size=2, pipeline_parallel_size=3)
    request.getfixturevalue("three")
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 2, but .* 3 processes"):
        check_cards(CPU, 1, 2)
    config = engine_config(write_model(tmp_path / "m"), pipeline_parallel_size=3)
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 3: .* model's are 2"):
        settle_start(config)


@pytest.mark.usefixtures("three")
def test_each_rank_plans_for_its_own_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", num_hidden_layers=7)
    config = engine_config(folder, pipeline_parallel_size=3)
    plans = [settle_start(config, tp_rank=rank).plan for rank in range(3)]
    block_bytes = 2 * 16 * 2 * 16 * 4
    assert [plan.block_bytes // block_bytes for plan in plans] == [2, 2, 3]
    first, second, third = (dict(plan.ledger)["weights"] for plan in plans)
    assert second < third < first + second  # the first has embedding and head
    assert not config.has_graphs
