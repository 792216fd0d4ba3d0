"""Rope tables: said once, said twice, said twice and differently; keys that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.errors import ConfigError
from pyserve.model.config import ModelConfig
from tests.model.test_config import LLAMA, LLAMA3_ROPE

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
TABLES = [LINEAR, YARN, LLAMA3_ROPE, {"rope_type": "dynamic", "factor": 2.0}]
KEYS = ("rope_scaling", "rope_parameters")


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(LLAMA | changes)


@pytest.mark.parametrize("empty", [{}, None])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table["rope_type"])
def test_an_empty_table_says_nothing(table: dict[str, Any], empty: dict[str, Any] | None) -> None:
    table = table | {"rope_theta": 5e5}
    plain = read(rope_parameters=table)
    assert plain.layers[0].attention.rope.type == table["rope_type"]
    assert plain.layers[0].attention.rope.theta == 5e5
    assert read(rope_scaling=empty, rope_parameters=table) == plain
    assert read(rope_scaling=table, rope_parameters=empty) == plain
    assert read(rope_scaling=empty, rope_parameters=empty) == read()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table["rope_type"])
def test_tables_that_agree_may_both_be_there(table: dict[str, Any]) -> None:
    old = {"type" if key == "rope_type" else key: value for key, value in table.items()}
    both = read(rope_theta=5e5, rope_scaling=old, rope_parameters=table | {"rope_theta": 500000})
    assert both == read(rope_theta=5e5, rope_scaling=old)


@pytest.mark.parametrize(
    ("scaling", "parameters", "words"),
    [
        # transformers 5 takes the first, and with it a theta of 10,000.
        (LINEAR, LINEAR | {"rope_theta": 1e6}, ["rope_theta", "10000", "1000000"]),
        (LINEAR, {"rope_type": "default"}, ["rope_type", "linear", "default"]),
        ({"rope_type": "default"}, YARN, ["rope_type", "default", "yarn"]),
        (LINEAR, LINEAR | {"factor": 8.0}, ["factor", "4.0", "8.0"]),
        (YARN, YARN | {"beta_fast": 16}, ["beta_fast", "32.0", "16.0"]),
        (YARN, YARN | {"original_max_position_embeddings": 8192}, ["4096", "8192"]),
    ],
)
def test_tables_that_disagree_are_refused(
    scaling: dict[str, Any], parameters: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters disagree") as refusal:
        read(rope_scaling=scaling, rope_parameters=parameters)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("top", "table", "words"),
    [
        ({"rope_theta": 1e4}, LINEAR | {"rope_theta": 5e5}, ["rope_theta", "10000", "500000"]),
        ({"rope_theta": 1e4}, {"rope_theta": 5e5}, ["rope_theta", "10000", "500000"]),
        (
            {"original_max_position_embeddings": 2048},
            YARN,
            ["original_max_position_embeddings", "2048", "4096"],
        ),
        ({}, LINEAR | {"type": "yarn"}, ["type", "linear", "yarn"]),
        ({}, {"rope_type": "default", "factor": 4.0}, ["factor", "default", "4.0"]),
        ({}, LINEAR | {"factor": "4"}, ["factor", '"4"']),
        ({}, {"rope_theta": None}, ["rope_theta", "null"]),
        ({"rope_theta": None}, LINEAR, ["rope_theta", "null"]),
    ],
)
def test_a_table_that_contradicts_itself_or_the_top_level_is_refused(
    key: str, top: dict[str, Any], table: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: ") as refusal:
        read(**top, **{key: table})
    for word in words:
        assert word in str(refusal.value)


def test_what_the_top_level_repeats_is_fine() -> None:
    plain = read(rope_theta=5e5, rope_scaling=YARN)
    table = YARN | {"rope_theta": 5e5, "type": "yarn"}
    top = {"rope_theta": 500000, "original_max_position_embeddings": 4096}
    assert read(**top, rope_scaling=table) == plain
    without = {key: value for key, value in YARN.items() if not key.startswith("original")}
    assert read(**top, rope_scaling=without) == plain


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("llama_4_scaling_beta", 0.1, 0),
        ("attn_factor", 1.2, 1.0),
        ("extrapolation_factor", 0.5, 1),
        ("alpha", 1000.0, 1.0),
        ("apply_yarn_scaling", False, True),
        ("mrope_section", [16, 24, 24], None),
        ("short_factor", [1.0], None),
        ("rope_ratio", 500, 1),
    ],
)
def test_keys_that_change_the_result_elsewhere_are_refused(
    key: str, name: str, value: object, neutral: object
) -> None:
    with pytest.raises(ConfigError, match=rf"{key}\.{name} is .*, which changes"):
        read(**{key: YARN | {name: value}})
    plain = read(**{key: YARN})
    assert read(**{key: YARN | {name: neutral}}) == plain
    assert read(**{key: YARN | {name: None}}) == plain


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_nothing_reads_are_named(key: str) -> None:
    table = YARN | {"my_trick": 2, "finetuned": True, "low_freq_factor": 1.0, "_note": "x"}
    assert read(**{key: table}).unknown_fields == (f"{key}.low_freq_factor", f"{key}.my_trick")
    table = LINEAR | {"original_max_position_embeddings": 4096}
    names = (f"{key}.original_max_position_embeddings",)
    assert read(**{key: table}).unknown_fields == names
