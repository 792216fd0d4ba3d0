"""`pyserve plan`: its ledger is the planner's, its figures follow from card and config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from bench.model_presets import PRESETS
from pyserve import cli
from pyserve.config import DEMO_MODEL, EngineConfig
from pyserve.engine import devices
from pyserve.engine.planner import MIB, CardMemory, format_ledger
from pyserve.model.config import ModelConfig
from pyserve.ops import cuda_card
from pyserve.plan.capacity import (
    UNLIMITED,
    Capacity,
    find_capacity,
    named_memory,
    sizes_on_card,
)
from pyserve.plan.cards import CARDS, find_card
from pyserve.plan.command import main
from tests.hub.hub_stub import running_hub

LLAMA = PRESETS["llama-3.1-8b"]
CARD = find_card("RTX 4090")


def write_config(folder: Path, **overrides: Any) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA | overrides))
    return str(folder)


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the rows below the line that starts with `title`."""
    lines = text.split(f"\n{title}")[1].splitlines()[1:]
    rows = []
    for line in lines:
        if not line.startswith("  "):
            break
        rows.append(re.split(r"\s{2,}", line.strip()))
    return rows


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def refusal(caplog: pytest.LogCaptureFixture, *argv: str) -> str:
    caplog.clear()
    assert main(list(argv)) == 2
    return caplog.messages[-1]


def capacity_of(**settings: Any) -> Capacity:
    model = ModelConfig.from_hf(LLAMA)
    config = EngineConfig(model_path=Path("unused"), **settings)
    return find_capacity(model, config, sizes_on_card(model, config), named_memory(CARD))


def test_the_ledger_is_what_the_server_would_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(capsys, "--model", write_config(tmp_path), "--gpu", "4090")
    capacity = capacity_of()
    assert format_ledger(capacity.plan.ledger) in text
    assert capacity.plan.total_bytes <= 0.9 * CARD.memory_mib * MIB
    assert f"KV cache: {capacity.num_tokens:,} tokens of 128 KiB" in text
    assert f"{capacity.plan.max_model_len:,} would be served" in text
    assert "8.03 G parameters, bfloat16, context 131,072" in text
    assert "24,084 MiB as CUDA shows it" in text
    eager = run(capsys, "--model", write_config(tmp_path), "--gpu", "4090", "--enforce-eager")
    without_graphs = capacity_of(enforce_eager=True)
    assert format_ledger(without_graphs.plan.ledger) in eager
    assert without_graphs.num_tokens > capacity.num_tokens


def test_sequences_share_the_kv_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, write_config(tmp_path), "--gpu", "4090", "--max-num-seqs", "100")
    counts, tokens = table(text, "the longest context of each:")
    assert counts[1:] == ["1", "8", "100"]
    num_blocks = capacity_of(max_num_seqs=100).plan.num_blocks
    assert tokens[1:] == [f"{num_blocks // n * 16:,}" for n in (1, 8, 100)]


def test_contexts_against_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, write_config(tmp_path), "--gpu", "4090")
    rows = {row[0]: row[1:] for row in table(text, "GiB that all of it needs")[1:]}
    assert list(rows)[0] == "2,048" and list(rows)[-1] == "131,072"
    longest = f"{capacity_of().plan.max_model_len:,}"
    fits = [row[1] for row in rows.values()]
    # Everything up to what would be served fits, nothing beyond does.
    assert fits == ["yes"] * (list(rows).index(longest) + 1) + ["no"] * (
        len(rows) - list(rows).index(longest) - 1
    )
    assert rows["32,768"][0] == "20.2" and rows["32,768"][2:] == ["48.2", "no"]


def test_bytes_for_a_context_are_the_ledger_of_exactly_that() -> None:
    capacity = capacity_of()
    one, eight = capacity.bytes_for(8192, 1), capacity.bytes_for(8192, 8)
    assert eight - one == 7 * 8192 * 128 * 1024
    exact = find_capacity(
        capacity.model,
        EngineConfig(model_path=Path("unused"), max_model_len=8192, max_num_batched_tokens=2048),
        capacity.sizes,
        UNLIMITED,
    )
    fixed = sum(num_bytes for name, num_bytes in exact.plan.ledger if name != "KV cache")
    assert one == fixed + 8192 * 128 * 1024


def test_rates_and_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(
        capsys, write_config(tmp_path), "--gpu", "h200", "--mean-context", "384",
        "--price-per-day", "86.4",
    )  # fmt: skip
    header, *rows = table(text, "roofline of decoding with 384 tokens behind each sequence:")
    assert header[-1] == "$ per million tokens"
    assert [row[0] for row in rows] == ["1", "8", "64"]
    for batch, each, together, milliseconds, bound, dollars in rows:
        assert bound == "bandwidth"
        rate = float(together.replace(",", ""))
        assert rate == pytest.approx(int(batch) * float(each), rel=0.01)
        assert float(milliseconds) * rate == pytest.approx(1000 * int(batch), rel=0.01)
        assert float(dollars) == pytest.approx(0.001 / rate * 1e6, rel=0.01)  # 0.001 $ a second
    assert rows[-1][3] == "4.34"
    assert "real servers reach 60-90 %" in text


def test_a_batch_that_does_not_fit_is_the_largest_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(capsys, write_config(tmp_path), "--gpu", "4090", "--mean-context", "10k")
    rows = table(text, "roofline of decoding")
    assert [row[0] for row in rows[1:]] == ["1", str(capacity_of().num_tokens // 10_000)]
    assert len(rows[0]) == 5, "no price, no column of it"


def test_awq_is_sized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_config(tmp_path)
    assert "does not fit" in refusal(caplog, folder, "--gpu", "3060")
    text = run(capsys, folder, "--gpu", "3060", "--quantization", "awq")
    assert "rounded to 4 bits as it is loaded" in text and "NOT SERVED" not in text
    assert re.search(r"weights +5,540\.5 MiB", text), text
    stored = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    folder = write_config(tmp_path, quantization_config=stored)
    of_a_checkpoint = run(capsys, folder, "--gpu", "3060")
    assert "4-bit awq in groups of 128" in of_a_checkpoint
    assert of_a_checkpoint.splitlines()[1:] == text.splitlines()[1:]
    assert run(capsys, folder, "--gpu", "3060", "-q", "awq") == of_a_checkpoint
    assert "is awq; leave the flag out" in refusal(caplog, folder, "--gpu", "3060", "-q", "gptq")
    folder = write_config(tmp_path, quantization_config=stored | {"bits": 8})
    assert "bits must be 4, got 8" in refusal(caplog, folder, "--gpu", "3060")


def test_what_does_not_fit_is_refused_with_the_ledger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    message = refusal(caplog, write_config(tmp_path), "--gpu", "4090", "--max-model-len", "64k")
    assert message.startswith("a context of 64000 tokens does not fit:")
    assert "--max-model-len 40512 is the most that would" in message
    assert "KV cache" in message and "total" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "plan needs one model"),
        (["MODEL", "--model", "MODEL"], "plan needs one model"),
        (["MODEL", "x"], "unexpected argument 'x'"),
        (["MODEL", "--gpus", "4090"], "unknown flag --gpus, did you mean --gpu?"),
        (["MODEL", "--gpu", "RTX 4900"], "--gpu RTX 4900 is not in the table; did you mean"),
        (["MODEL", "--gpu", "4090", "--price-per-day", "0"], "--price-per-day must be in"),
        (["MODEL", "--gpu", "4090", "--price-per-day", "nan"], "--price-per-day must be in"),
        (["MODEL", "--gpu", "4090", "--mean-context", "0"], "--mean-context must be at least 1"),
        (["MODEL", "--gpu", "4090", "--max-num-seqs", "0"], "--max-num-seqs must be in"),
        (["MODEL", "--gpu", "4090", "--quantization", "fp6"], "must be awq, gptq, compressed"),
        (["MODEL", "--gpu", "4090", "--max-model-len", "1Q"], "must be a number such as 4096"),
        (["MODEL", "--price-per-day", "8"], "--price-per-day 8: of which card?"),
        (
            ["MODEL", "--price-per-day", "RTX 4900=8"],
            "--price-per-day RTX 4900 is not in",
        ),
        (["MODEL", "--price-per-day", "3090=x"], "--price-per-day must be in (0, 1000000), got x"),
        (["MODEL", "--gpu", "4090", "-tp", "3"], "--tensor-parallel-size"),
        (["MODEL", "--max-model-len", "131073"], "the limit of this model is 131072"),
        (["MODEL/none", "--gpu", "4090"], "neither a folder nor a name on the hub"),
    ],
)
def test_bad_arguments(
    argv: list[str], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_config(tmp_path)
    assert message in refusal(caplog, *(word.replace("MODEL", folder) for word in argv))


def test_without_a_card_none_is_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_card, "has_card", lambda: False)
    message = refusal(caplog, write_config(tmp_path), "--gpu", "here")
    assert message == "--gpu here: no NVIDIA card is here; name one, or leave --gpu out"


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA Something New"])
def test_the_card_that_is_here(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = CardMemory(total_bytes=24_000 * MIB, used_bytes=2_000 * MIB)  # others hold 976 MiB
    monkeypatch.setattr(cuda_card, "has_card", lambda: True)
    monkeypatch.setattr(cuda_card, "check_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(devices, "card_memory", lambda device: shown)
    text = run(capsys, write_config(tmp_path), "--gpu", "here")
    assert f"on {name} (the one here): 24,000 MiB as CUDA shows it" in text
    assert ("0.94 TB/s" in text) == ("4090" in name)
    assert ("roofline" in text) == ("4090" in name)
    longest = table(text, "the longest context of each:")[1][1]
    fits = {row[0]: row[2] for row in table(text, "GiB that all of it needs")[1:]}
    assert fits[longest] == "yes" and fits["65,536"] == "no"


def test_which_card_names_each_that_holds_the_model_and_how_many_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_card, "has_card", lambda: False)
    text = run(capsys, write_config(tmp_path))
    header, *rows = table(text, "the known cards that hold it, 1 or 2 or 4 of a kind:")
    assert "$ a day" not in header
    counts = {row[0].partition(" x ")[2]: int(row[0].partition(" x ")[0]) for row in rows}
    assert set(counts) == {card.name for card in CARDS}
    assert (counts["RTX 4090"], counts["RTX 3080 10GB"], counts["RTX 3070"]) == (1, 2, 4)
    memory = [float(row[1].replace(",", "")) for row in rows]
    assert memory == sorted(memory), "without prices the smallest come first"
    (row,) = (row for row in rows if row[0] == "1 x RTX 4090")
    capacity = capacity_of()
    assert row[2] == f"{capacity.longest_context(1):,}"
    assert row[3] == f"{capacity.num_tokens // 1024:,}"
    # Every row is what --gpu says of that card.
    alone = run(capsys, write_config(tmp_path), "--gpu", "3070", "-tp", "4")
    assert "on 4 x RTX 3070: 7,967 MiB each" in alone and "NOT SERVED" not in alone
    (row,) = (row for row in rows if row[0] == "4 x RTX 3070")
    assert table(alone, "the longest context of each:")[1][1] == row[2]
    assert table(alone, "roofline of decoding")[1][2] == row[4]


def test_which_card_by_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["RTX 4090=8.64", "H200=86.4", "3070=0.5"]
    text = run(capsys, write_config(tmp_path), "--price-per-day", *prices)
    header, *rows = table(text, "the known cards that hold it")
    assert header[-2:] == ["$ a day", "$ per million"]
    assert [row[0] for row in rows[:3]] == ["4 x RTX 3070", "1 x RTX 4090", "1 x H200"]
    assert [row[-2] for row in rows[:4]] == ["2.00", "8.64", "86.40", "-"]
    for row in rows[:3]:
        rate, a_day = (float(row[column].replace(",", "")) for column in (5, 6))
        assert float(row[7]) == pytest.approx(a_day / 86_400 / rate * 1e6, abs=5e-4)


def test_which_card_with_so_many_of_it_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    folder = write_config(tmp_path, **big, num_attention_heads=64)
    one = table(run(capsys, folder, "-tp", "1"), "the known cards that hold it, one alone:")
    assert [row[0] for row in one[1:]] == ["1 x B200"]
    four = table(run(capsys, folder, "-tp", "4"), "the known cards that hold it, 4 of a kind:")
    assert {"4 x A100 40GB", "4 x H200"} <= {row[0] for row in four[1:]}
    message = refusal(caplog, folder, "-tp", "1", "--max-model-len", "128000")
    assert f"fits none of the {len(CARDS)} known cards, one alone" in message


def test_one_of_several_cards_holds_its_part(tmp_path: Path) -> None:
    model = ModelConfig.from_hf(LLAMA)
    config = EngineConfig(model_path=Path("unused"))
    whole = sizes_on_card(model, config)
    for count in (2, 4, 8):
        part = sizes_on_card(model, config, tp_size=count)
        norms = (2 * len(model.layers) + 1) * model.hidden_size * 2
        assert (part.weight_bytes - norms) * count == whole.weight_bytes - norms
        assert part.kv_bytes_per_token * count == whole.kv_bytes_per_token
        assert part.num_params == whole.num_params
        assert part.head_bytes * count == whole.head_bytes
    # Fewer KV heads than cards: each card holds one of them.
    narrow = ModelConfig.from_hf(LLAMA | {"num_key_value_heads": 2})
    parts = [sizes_on_card(narrow, config, tp_size=count) for count in (2, 4, 8)]
    assert len({part.kv_bytes_per_token for part in parts}) == 1
    assert parts[-1].shapes.layers[0].attention.sizes == (4, 1, 128)


def test_a_mixture_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PRESETS["mixtral-8x7b"]))
    for where in ([], ["--gpu", "h200"]):
        text = run(capsys, str(folder), *where)
        assert "46.70 G parameters, 12.88 G of them active, bfloat16" in text
        assert "32 of 32 layers have 8 experts of 352.3 MB, 2 a token" in text
        assert "NOT SERVED" not in text.partition("\n\n")[0]
    assert re.search(r"weights +89,07\d\.\d MiB", text), text
    assert "experts: as if a step's tokens drew theirs evenly" in text
    (folder / "config.json").write_text(
        json.dumps(PRESETS["qwen3-30b-a3b"] | {"mlp_only_layers": [0, 1]})
    )
    text = run(capsys, str(folder), "--gpu", "h200")
    assert "46 of 48 layers have 128 experts of 9.4 MB, 8 a token" in text


def test_a_model_that_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path)
    argv = [folder, "--gpu", "4090", "--mean-context", "512", "--price-per-day", "8.64"]
    generating = run(capsys, *argv)
    text = run(capsys, *argv, "--runner", "embed")
    assert "NOT SERVED YET" not in text
    assert "decoding" in generating and "decoding" not in text
    head_bytes = 2 * 128256 * 4096
    sizes = [float(re.findall(r"  weights +([\d,.]+) MiB", t)[0].replace(",", "")) * MIB
             for t in (generating, text)]  # fmt: skip
    assert sizes[0] - sizes[1] == pytest.approx(head_bytes, rel=1e-3), "it holds no output head"
    ((ms, texts, rate),) = re.findall(
        r"512 tokens takes at least ([\d.]+) ms .* ([\d,]+) texts/s, ([\d,]+) tokens/s", text
    )
    tokens = float(rate.replace(",", ""))
    assert tokens == pytest.approx(512 / (float(ms) / 1e3), rel=1e-3)
    assert float(texts.replace(",", "")) == pytest.approx(tokens / 512, abs=1)
    assert f"${1e-4 / tokens * 1e6:,.4f} per million tokens read, at 8.64 a day" in text


def test_what_no_card_can_run_yet_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for where in ([], ["--gpu", "4090"]):
        text = run(capsys, write_config(tmp_path, head_dim=80), *where)
        assert "NOT SERVED YET on a card, sizes only: head_dim 80" in text
        assert "NOT SERVED" not in run(capsys, write_config(tmp_path), *where).partition("\n\n")[0]


@pytest.mark.parametrize("dtype", ["float", "float32"])
def test_a_dtype_that_no_card_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    for where in ([], ["--gpu", "4090"]):
        message = refusal(caplog, write_config(tmp_path), "--dtype", dtype, *where)
        assert message.startswith("--dtype float32 is not supported on an NVIDIA card")


def test_heads_that_cannot_be_shared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_config(tmp_path, num_attention_heads=28, num_key_value_heads=4, head_dim=128)
    message = refusal(caplog, folder, "--gpu", "4090", "-tp", "8")
    assert message.startswith("--tensor-parallel-size 8: 28 heads, 4 KV heads")
    assert message.endswith("can be shared by 1, 2, 4 cards")


def test_a_model_on_the_hub_by_its_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    weights = (DEMO_MODEL / "model.safetensors").stat().st_size
    with running_hub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        stub.add_folder("org/demo", DEMO_MODEL)
        place = ["--download-dir", str(tmp_path)]
        assert cli.main(["plan", "org/demo", "--gpu", "l4", *place]) == 0
        assert stub.sent("safetensors") < weights / 10
        text = capsys.readouterr().out
        assert text.startswith("org/demo: LlamaForCausalLM, 0.01 G parameters")
        assert "GB of weights in its files" in text
        config = json.loads(stub.repos["org/demo"]["config.json"])
        stub.repos["org/demo"]["config.json"] = json.dumps(
            config | {"intermediate_size": 64}
        ).encode()
        message = refusal(caplog, "org/demo", "--gpu", "l4", *place)
    assert message.startswith("model.safetensors: ") and "config.json makes it [64," in message
    assert not any(tmp_path.rglob("*.safetensors"))
