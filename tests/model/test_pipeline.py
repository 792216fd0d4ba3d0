"""A model whose layers lie on several ranks, one after the other, computes what one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyserve.errors import CheckpointError, ConfigError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import META, Placement
from pyserve.model.sharing import check_pipeline
from pyserve.ops.group import LEADER, Group
from tests.model import oracle, quantised
from tests.model.ranks import on_all_ranks
from tests.model.test_tensor_parallel import CPU, logits_of


def load(
    folder: Path, group: Group | None, load_format: str = "auto", quantization: Any = None
) -> Decoder:
    placement = Placement(torch.float32, CPU)
    if group is not None:
        stage = {"pp_rank": group.tp_rank, "pp_size": group.tp_size, "group": group}
        placement = Placement(torch.float32, CPU, **stage)  # type: ignore[arg-type]
    return load_model(
        folder, ModelConfig.from_path(folder).quantised_as(quantization), placement,
        load_format=load_format, seed=0, progress=lambda done, total: None,
    )  # fmt: skip


@pytest.mark.parametrize("name", oracle.CASES)
def test_a_pipeline_computes_what_one_rank_does(name: str, tmp_path: Path) -> None:
    case = oracle.CASES[name]
    oracle.make_model(case.family, **case.changes).save_pretrained(tmp_path)
    expected = logits_of(load(tmp_path, None))
    for pp_size in (2, 3):
        logits = on_all_ranks(pp_size, lambda group: logits_of(load(tmp_path, group)))[LEADER]
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", ["awq-gemm", "gptq"])
def test_of_integers_too(kind: str, tmp_path: Path) -> None:
    quantised.save(
        tmp_path, quantised.formats(32)[kind], 32, hidden_size=128, intermediate_size=256
    )
    expected = logits_of(load(tmp_path, None))
    logits = on_all_ranks(2, lambda group: logits_of(load(tmp_path, group)))[LEADER]
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("quantization", ["awq", "fp8"])
def test_made_up_weights_are_rounded_on_every_rank(quantization: str, tmp_path: Path) -> None:
    """A rank behind the first has no tensor that stays plain in front of its rounded ones."""
    oracle.make_model("llama", hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    expected = logits_of(load(tmp_path, None, "dummy", quantization))
    logits = on_all_ranks(2, lambda group: logits_of(load(tmp_path, group, "dummy", quantization)))
    assert torch.equal(logits[LEADER], expected)


def test_each_rank_holds_its_layers_alone(tmp_path: Path) -> None:
    """What they hold together is the model, once but for the last norm; and what is made up is the
    same, whoever makes it."""
    oracle.make_model("qwen3", num_hidden_layers=5).save_pretrained(tmp_path)
    whole = load(tmp_path, None, "dummy")
    parts = on_all_ranks(2, lambda group: load(tmp_path, group, "dummy"))
    assert [len(part.layers) for part in parts] == [2, 3]
    assert [len(part.kv_specs()) for part in parts] == [2, 3]
    first, second = (part.destinations() for part in parts)
    assert first.keys() | second.keys() == whole.destinations().keys()
    assert first.keys() & second.keys() == {"model.norm.weight"}
    assert "lm_head.weight" in first and "model.embed_tokens.weight" in first
    for name, destination in whole.destinations().items():
        found = (first if name in first else second)[name]
        for ours, theirs in zip(found.parts, destination.parts, strict=True):
            assert torch.equal(ours.view, theirs.view), name


@pytest.mark.parametrize(
    "extra", ["model.layers.0.x.weight", "model.layers.2.x.weight", "model.layers.3.x.weight", "x"]
)
def test_what_no_rank_wants_is_refused(extra: str, tmp_path: Path) -> None:
    oracle.make_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {extra: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=f"does not have .*{extra}"):
        on_all_ranks(3, lambda group: load(tmp_path, group))


def test_where_layers_go() -> None:
    def of(num_layers: int, pp_size: int) -> list[list[int]]:
        ranks = range(pp_size)
        places = [Placement(torch.float32, META, pp_rank=i, pp_size=pp_size) for i in ranks]
        return [list(place.layers(num_layers)) for place in places]

    assert of(3, 1) == [[0, 1, 2]]
    assert of(5, 2) == [[0, 1], [2, 3, 4]]
    assert of(8, 3) == [[0, 1], [2, 3, 4], [5, 6, 7]]


def test_more_ranks_than_layers_are_refused(tmp_path: Path) -> None:
    raw = oracle.TINY | {"architectures": ["LlamaForCausalLM"], "head_dim": 16}
    config = ModelConfig.from_hf(raw | {"torch_dtype": "float32"})
    check_pipeline(config, 3)
    build_model(config, Placement(torch.float32, META, pp_rank=2, pp_size=3))
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 4: each .* model's are 3"):
        check_pipeline(config, 4)
