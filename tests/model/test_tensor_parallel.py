"""A model that several ranks share computes what one rank does, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyserve.errors import CheckpointError, ConfigError
from pyserve.model.adapter_weights import AdapterWeights, Pair
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.layers.attention import Attention
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.model.schemes import Dense
from pyserve.model.sharing import check_sharing, tp_sizes
from pyserve.ops.group import LEADER, Group
from tests.model import oracle, quantised
from tests.model.driver import Driver
from tests.model.ranks import ThreadGroup, on_all_ranks

PROMPT = torch.randint(
    oracle.VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)
).tolist()
CHUNKS = PROMPT[:33], PROMPT[33:34], PROMPT[34:]
UNEVEN = ("qwen2-moe-normalized", "glm4-moe-lite")  # experts of 33 and 17; five heads
CPU = torch.device("cpu")


def placed(group: Group | None, **rest: object) -> Placement:
    if group is None:
        return Placement(torch.float32, CPU, **rest)  # type: ignore[arg-type]
    ranks = {"tp_rank": group.tp_rank, "tp_size": group.tp_size, "group": group}
    return Placement(torch.float32, CPU, **ranks, **rest)  # type: ignore[arg-type]


def load(folder: Path, group: Group | None) -> Decoder:
    return load_model(
        folder, ModelConfig.from_path(folder), placed(group), load_format="auto", seed=0,
        progress=lambda done, total: None,
    )  # fmt: skip


def logits_of(decoder: Decoder) -> torch.Tensor:
    driver = Driver(decoder)
    return torch.cat([driver.step({0: chunk}) for chunk in CHUNKS])


@pytest.mark.parametrize("name", oracle.CASES)
def test_ranks_compute_what_one_does(name: str, tmp_path: Path) -> None:
    case = oracle.CASES[name]
    oracle.make_model(case.family, **case.changes).save_pretrained(tmp_path)
    sizes = tp_sizes(ModelConfig.from_path(tmp_path))
    if sizes == [1]:
        assert name in UNEVEN
    expected = logits_of(load(tmp_path, None))
    for tp_size in [it for it in sizes if 1 < it <= 4]:
        logits = on_all_ranks(tp_size, lambda group: logits_of(load(tmp_path, group)))[LEADER]
        assert oracle.relative_error(logits, expected.double()) < 2e-6
        assert torch.equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("tp_size", [4, 8])
def test_ranks_share_the_heads_of_a_70b(tp_size: int, tmp_path: Path) -> None:
    """64 of queries, 8 of keys and values: two of the latter a rank of four, one of eight."""
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 16}
    model = oracle.make_model("llama", num_hidden_layers=2, intermediate_size=256, **heads)
    model.save_pretrained(tmp_path)
    expected = logits_of(load(tmp_path, None))
    logits = on_all_ranks(tp_size, lambda group: logits_of(load(tmp_path, group)))[LEADER]
    assert oracle.relative_error(logits, expected.double()) < 2e-6
    assert torch.equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("kind", ["awq-gemm", "gptq", "asymmetric"])
def test_ranks_share_integers(kind: str, tmp_path: Path) -> None:
    quantised.save(
        tmp_path, quantised.formats(32)[kind], 32, hidden_size=128, intermediate_size=256
    )
    assert tp_sizes(ModelConfig.from_path(tmp_path)) == [1, 2]
    expected = logits_of(load(tmp_path, None))
    logits = on_all_ranks(2, lambda group: logits_of(load(tmp_path, group)))[LEADER]
    assert oracle.relative_error(logits, expected.double()) < 2e-5


def test_ranks_share_adapters(tmp_path: Path) -> None:
    """Two adapters and none, in one step, of ranks that differ."""
    oracle.make_model("llama").save_pretrained(tmp_path)
    config = ModelConfig.from_path(tmp_path)
    slots = {"num_adapter_slots": 2, "max_adapter_rank": 8}
    targets = build_model(config, placed(None, **slots)).adapter_targets()
    generator = torch.Generator().manual_seed(3)
    all_weights = [
        AdapterWeights(
            {
                name: Pair(
                    torch.randn(size, target.in_features, generator=generator) / 8,
                    torch.randn(target.out_features, size, generator=generator) / size,
                    0.7,
                )
                for name, target in targets.items()
            },
            "",
        )
        for size in (3, 8)
    ]

    def run(group: ThreadGroup | None) -> torch.Tensor:
        decoder = load_model(
            tmp_path, config, placed(group, **slots), load_format="auto", seed=0,
            progress=lambda done, total: None,
        )  # fmt: skip
        assert decoder.adapter_targets() == targets
        for slot, weights in enumerate(all_weights):
            decoder.put_adapter(slot, weights)
        driver = Driver(decoder, num_seqs=3)
        return driver.step({0: PROMPT[:9], 1: PROMPT[9:20], 2: PROMPT[20:]}, 0, [0, 9, 20])

    expected = run(None)
    for tp_size in (2, 4):
        logits = on_all_ranks(tp_size, run)[LEADER]
        assert oracle.relative_error(logits, expected.double()) < 2e-6


@pytest.mark.parametrize("tp_size", [1, 2])
def test_each_rank_holds_a_tied_head_against_its_rows(tp_size: int, tmp_path: Path) -> None:
    oracle.make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path)
    on_all_ranks(tp_size, lambda group: load(tmp_path, group))
    head[-1, -1] += 1  # of the last rank
    save_file(tensors | {"lm_head.weight": head}, path)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens"):
        on_all_ranks(tp_size, lambda group: load(tmp_path, group))


def test_made_up_weights_are_alike_where_ranks_hold_the_same(tmp_path: Path) -> None:
    """Norms and replicated heads; and a matrix that they share is not one part twice."""
    oracle.make_model("llama", num_key_value_heads=1).save_pretrained(tmp_path)
    config = ModelConfig.from_path(tmp_path)

    def run(group: ThreadGroup) -> list[torch.Tensor]:
        decoder = load_model(
            tmp_path, config, placed(group), load_format="dummy", seed=3,
            progress=lambda done, total: None,
        )  # fmt: skip
        layer = decoder.layers[0]
        assert isinstance(layer.attention, Attention)
        matrix = layer.attention.qkv.matrix
        assert isinstance(matrix, Dense)
        return [layer.norms[0].weight, *matrix.weight.split((32, 16, 16))]

    (norm, q, k, v), others = on_all_ranks(2, run)
    assert torch.equal(norm, others[0]) and torch.equal(k, others[2]) and torch.equal(v, others[3])
    assert not torch.equal(q, others[1])


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_do() -> None:
    raw = oracle.TINY | {"num_attention_heads": 6, "architectures": ["LlamaForCausalLM"]}
    config = ModelConfig.from_hf(raw | {"head_dim": 16, "torch_dtype": "float32"})
    check_sharing(config, 2)
    with pytest.raises(ConfigError, match="--tensor-parallel-size 4: 6 heads, .* 1, 2 cards"):
        check_sharing(config, 4)
