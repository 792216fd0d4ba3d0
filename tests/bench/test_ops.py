"""bench.ops on sizes that take no time: every op gets a row, every figure is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import ops as bench_ops
from pyserve.ops import fakes

TINY = bench_ops.Shape(
    hidden=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate=64,
    vocab_size=100,
    context=32,
    batches=(1, 3),
    prefill=20,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_op_is_measured(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_ops, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(bench_ops, "GEMM_SIZE", 64)
    path = tmp_path / "out.json"
    threads = str(torch.get_num_threads())
    bench_ops.main(["--dtype", dtype, "--seconds", "0", "--json", str(path), "--threads", threads])
    data = json.loads(path.read_text())
    measured = {result["op"] for result in data["results"]}
    others = {"plan_attention", "rope_attention", "serves_linear"}
    others |= {"serves_linear_w4a16", "serves_linear_fp8", "try_linear_w4a16"}
    others |= {"linear_w8a8", "serves_linear_w8a8", "try_linear_w8a8"}  # of a card alone
    # Of these bench.gpu_lora tells, on a card.
    others |= {"lora_shrink", "lora_expand", "lora_expand_silu_mul", "linear_lora"}
    others |= {"serves_linear_lora"}
    # And bench.gpu_peers of these, on several.
    others |= {"all_reduce_add_norm", "all_reduce_one_shot", "all_reduce_two_shot", "gather_rows"}
    others |= {"broadcast_tokens"}
    assert measured == {*fakes.OP_NAMES, "pack_step"} - others
    for result in data["results"]:
        assert result["us"] > 0 and result["floor_us"] > 0 and result["twin_us"] > 0
        assert result["ratio"] == pytest.approx(result["us"] / result["floor_us"])
    assert "paged_attention" in capsys.readouterr().out


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_ops.main(["--shapes", "13b"])
    assert "choose from demo, 7b" in capsys.readouterr().err
