"""bench.gpu_ops on sizes that take no time, on a CPU: its calls are legal, its verdicts right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from bench import experts, gpu_attention, gpu_ops, gpu_rows, latent, w4a16, w8a8
from bench.gpu_timing import Timing
from pyserve import ops
from pyserve.ops import build, fakes


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sizes, the clock, and what only a card has; returns the ops that stood in."""
    build.load_native(is_reference_allowed=False, progress=print)
    sizes = {
        "DEVICE": torch.device("cpu"), "ROTATED_BYTES": 1, "COPY_BYTES": 1000, "GEMM_SIZE": 16,
        "VOCAB_SIZE": 100, "HIDDEN": 64, "INTERMEDIATE": 96, "NUM_HEADS": 4, "NUM_KV_HEADS": 2,
        "HEAD_DIM": 16, "MATRICES": {"o": (32, 64)}, "ROWS": (6, 1), "DECODES": ((2, 33),),
        "PREFILLS": {"prefill 40": [(40, 40)]}, "CHAIN_ROWS": (1, 3), "LAYERS": ((2, 33),),
        "OTHER_HEADS": {gpu_attention.Heads(4, 2, 32, 50.0, "Other"): ((2, 33),)},
        "OTHER_PREFILL": 20,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_ops, name, value)
    planned: list[str] = []
    for name in ("plan_attention", "rope_attention"):
        monkeypatch.setattr(ops, name, partial(lambda op, *_, **__: planned.append(op), name))

    def time_sets(sets: Sequence[Callable[[], object]], seconds: float) -> Timing:
        for run in sets:
            run()
        return Timing(us=2.0, spread_us=0.1, is_graph=True)

    monkeypatch.setattr(gpu_rows, "ROWS", (2, 9, 33))
    monkeypatch.setattr(experts, "LAYERS", {"8x7b": experts.Layer(64, 32, 4, 2, (1, 3))})
    monkeypatch.setattr(latent, "CARD_HEADS", {"2 heads": 2})
    monkeypatch.setattr(latent, "CARD_LOADS", {"decode 2 x 33": [(1, 33)] * 2})
    monkeypatch.setattr(w4a16, "prompts", partial(w4a16.prompts, rows=(3,)))
    monkeypatch.setattr(w4a16, "switch", lambda *_: planned.append("try_linear_w4a16"))
    monkeypatch.setattr(w8a8, "multiply", lambda *_: planned.append("linear_w8a8"))
    monkeypatch.setattr(w8a8, "switch", lambda *_: planned.append("try_linear_w8a8"))
    monkeypatch.setattr(gpu_ops, "time_sets", time_sets)
    monkeypatch.setattr(gpu_ops, "copy_us", lambda destination, source: 1.0)
    return planned


def test_every_op_has_a_row(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu_ops.run([""], 0.0)["results"]
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    names = {"attention" if name == "paged_attention" else name for name in fakes.OP_NAMES}
    # Which compute nothing.
    names -= {"serves_linear", "serves_linear_w4a16"}
    names -= {"try_linear_w4a16"}
    # By bench.gpu_lora.
    names -= {"lora_shrink", "lora_expand", "lora_expand_silu_mul", "linear_lora"}
    names -= {"serves_linear_lora"}
    names -= {"all_reduce_add_norm", "all_reduce_one_shot", "all_reduce_two_shot", "gather_rows"}
    names -= {"broadcast_tokens"}  # by bench.gpu_peers, like those above
    names -= {"serves_linear_fp8", "serves_linear_w8a8", "try_linear_w8a8"}
    ways = {"cuBLAS", "cuBLAS and silu_mul", "own"}
    ways |= {"plain numbers", "own linear_w4a16", "own linear_fp8", "experts", "int4 experts"}
    ways |= {f"tiling {number + 1}" for number in range(len(w4a16.TILINGS))}
    ways |= {"cuBLAS of 16 bits"}
    ways |= {f"8-bit tiling {1 + i}" for i in range(len(w8a8.TILINGS))}
    assert {result["op"] for result in results} == {*names, *ways, "linear chain", "layer"}
    stood_in = {"plan_attention", "rope_attention", "try_linear_w4a16"}
    assert set(tiny) == stood_in | {"linear_w8a8", "try_linear_w8a8"}
    for result in results:
        assert result["ratio"] == pytest.approx(100 / result["percent"])
        assert result["floor_us"] > 0
    others = {result["load"] for result in results if result["load"].startswith("Other")}
    assert others == {"Other: decode 2 x 33", "Other: prefill 20"}
    assert "= linear o, us of ours / cuBLAS by rows: 1: 2.0/2.0, 2: 2.0/2.0" in printed
    assert "= own linear_w4a16 o, us of ours / linear_w4a16 by rows: 1: 2.0/2.0" in printed
    assert len(re.findall(r"^= own linear_w4a16 .* % \(target >= ", printed, re.M)) == 2
    all_read = r"^= grouped_linear\w* 4 experts, a token each, 8x7b: \d+ % \(target >= 85\)"
    assert len(re.findall(all_read, printed, re.M)) == 2
    assert "= 33 rows, us, fastest (cuBLAS): qkv cuBLAS 2.0 (2.0); o cuBLAS" in printed


def test_the_fastest_way_by_rows(capsys: pytest.CaptureFixture[str]) -> None:
    def result(rows: int, part: str, op: str, us: float) -> dict[str, object]:
        return {"load": f"{rows} rows, {part} and what follows", "op": op, "us": us}

    times = [result(16, "o", "cuBLAS", 12.5), result(16, "o", "own, 32 a group", 8.04)]
    times += [result(64, "layer", "cuBLAS", 126), {"load": "1 rows, 4 matrices", "op": "x"}]
    gpu_rows.print_winners([*times, {"op": "failed", "error": "what"}])
    assert capsys.readouterr().out.splitlines() == [
        "= 16 rows, us, fastest (cuBLAS): o own, 32 a group 8.0 (12.5)",
        "= 64 rows, us, fastest (cuBLAS): layer cuBLAS 126.0 (126.0)",
    ]


def test_an_op_that_fails_is_named_and_the_others_measured(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel\nbelow")

    monkeypatch.setattr(ops, "silu_mul", broken)
    results = gpu_ops.run(["norm", "activation", "plan"], 0.0)["results"]
    assert "FAILED activation: RuntimeError: no kernel\n" in capsys.readouterr().out
    assert {r["op"] for r in results} > {"rms_norm", "plan_step"}


@pytest.mark.parametrize(
    ("target", "met"),
    [(("%", 80.0), True), (("%", 90.0), False), (("us", 300.0), True), (("us", 9.0), False),
     (("TFLOP/s", 0.1), False)],
)  # fmt: skip
def test_a_target_is_met_or_missed(target: tuple[str, float], met: bool) -> None:
    case = gpu_ops.Case("norm", "8192 x 4096", [], num_bytes=85, target=target)
    figures = {"percent": 85.0, "tflops": 0.0, "us": 10.0}
    line = gpu_ops.verdict(case, figures)
    assert line is not None and line.endswith("met" if met else "MISSED")
