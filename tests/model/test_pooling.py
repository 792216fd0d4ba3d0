"""Which models pool, and how, by their files and by the command line; what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyserve.config import EngineConfig, Use
from pyserve.errors import CheckpointError, ConfigError, StartupError
from pyserve.model.config import ModelConfig
from pyserve.model.pooling import Pooling
from tests.engine.tiny import CONFIG

HIDDEN = 32  # of CONFIG
ST = "sentence_transformers.models."
EMBED = [{"path": "", "type": f"{ST}Transformer"}, {"path": "1_Pooling", "type": f"{ST}Pooling"}]
NORMALIZE = {"path": "2_Normalize", "type": f"{ST}Normalize"}
RERANK = [
    {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {"path": "1_LogitScore", "type": "sentence_transformers.cross_encoder.modules.LogitScore"},
]
LAST = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}


def write(folder: Path, *, modules: Any = None, module: Any = None, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    if module is not None:
        name = "1_LogitScore" if modules == RERANK else "1_Pooling"
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(module))
    return folder


def architecture(end: str) -> dict[str, Any]:
    return {"architectures": [f"Llama{end}"]}


@pytest.mark.parametrize(
    ("use", "files", "expected"),
    [
        ("auto", {}, None),
        ("pooling", {}, Pooling(kind="embed")),
        ("embed", {}, Pooling(kind="embed")),
        ("score", {}, Pooling(kind="score", answers=("no", "yes"))),
        ("score", {"classifier_from_token": ["0", "1"]}, Pooling(kind="score", answers=("0", "1"))),
        ("auto", architecture("Model"), Pooling(kind="embed")),
        ("auto", {"modules": EMBED, "module": LAST}, Pooling(kind="embed", is_normalized=False)),
        ("auto", {"modules": [*EMBED, NORMALIZE], "module": LAST}, Pooling(kind="embed")),
        ("auto", {"modules": EMBED, "module": {"pooling_mode": "lasttoken"}},
         Pooling(kind="embed", is_normalized=False)),
        ("generate", {"modules": EMBED, "module": {"pooling_mode": "mean"}}, None),
        ("auto", {"modules": RERANK, "module": {"true_token_id": 5, "false_token_id": 3}},
         Pooling(kind="score", answer_ids=(3, 5))),
        ("auto", {"modules": RERANK, "module": {"true_token_id": 5, "false_token_id": None}},
         Pooling(kind="score", answer_ids=(5,))),
        ("auto", {**architecture("ForSequenceClassification"), "num_labels": 1},
         Pooling(kind="score")),
        ("auto", {**architecture("ForSequenceClassification"), "id2label": {"0": "x"}},
         Pooling(kind="score")),
        ("auto", {**architecture("ForSequenceClassification"), "modules": RERANK[:1],
                  "num_labels": 1}, Pooling(kind="score")),
        ("auto", {**architecture("ForSequenceClassification"),
                  "classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True},
         Pooling(kind="score", answers=("no", "yes"))),
        ("embed", {"matryoshka_dimensions": [8, 16]}, Pooling(kind="embed", dimensions=(8, 16))),
        ("embed", {"is_matryoshka": True}, Pooling(kind="embed")),
        ("embed", {"is_matryoshka": False}, Pooling(kind="embed", dimensions=(HIDDEN,))),
    ],
)  # fmt: skip
def test_what_a_folder_is_for(
    tmp_path: Path, use: Use, files: dict[str, Any], expected: Pooling | None
) -> None:
    config = ModelConfig.from_path(write(tmp_path, **files), use=use)
    assert config.pooling == expected
    assert config.architecture == "LlamaForCausalLM" and config.unknown_fields == ()


@pytest.mark.parametrize(
    ("use", "files", "words"),
    [
        ("auto", {"modules": EMBED, "module": {"pooling_mode_mean_tokens": True}},
         "1_Pooling/config.json: the pooling mode must be lasttoken, got mean_tokens"),
        ("auto", {"modules": EMBED, "module": LAST | {"pooling_mode_cls_token": True}},
         "must be lasttoken, got lasttoken, cls_token"),
        ("auto", {"modules": EMBED, "module": {}}, "must be lasttoken, got none"),
        ("auto", {"modules": EMBED, "module": LAST | {"word_embedding_dimension": 5}},
         "word_embedding_dimension must be hidden_size"),
        ("auto", {"modules": EMBED}, "1_Pooling/config.json: No such file"),
        ("auto", {"modules": [*EMBED, {"path": "2_Dense", "type": f"{ST}Dense"}], "module": LAST},
         "modules.json: a module Dense is not supported"),
        ("auto", {"modules": {}}, "must hold a JSON list, not dict"),
        ("auto", {"modules": []}, "must list 1 to 16 modules"),
        ("auto", {"modules": EMBED * 20}, "must list 1 to 16 modules"),
        ("auto", {"modules": [5]}, "must have a type and a path"),
        ("auto", {"modules": [{"type": "Pooling", "path": "../.."}]}, "must be a folder's name"),
        ("auto", {"modules": [{"type": "Pooling", "path": "/etc"}]}, "must be a folder's name"),
        ("auto", {"modules": RERANK, "module": {"false_token_id": 3}}, "true_token_id is missing"),
        ("auto", {"modules": RERANK, "module": {"true_token_id": -1}}, "true_token_id must be an"),
        ("auto", {"modules": RERANK, "module": {"true_token_id": 97}}, "the token 97, whose logit"),
        ("auto", architecture("ForSequenceClassification"), "num_labels, or the entries .* got 2"),
        ("auto", {**architecture("ForSequenceClassification"), "num_labels": 3}, "got 3"),
        ("generate", architecture("Model"), "LlamaModel has no output head that generates"),
        ("score", architecture("Model"), "LlamaModel has no output head, so it cannot score"),
        ("score", {"classifier_from_token": ["yes"]}, "must hold 2 tokens"),
        ("embed", {"auto_map": {"AutoModel": "modeling.X"}}, "auto_map names code"),
        ("embed", {"is_causal": False}, "is_causal is false"),
        ("embed", {"matryoshka_dimensions": [HIDDEN + 1]}, "matryoshka_dimensions must be a list"),
        ("auto", architecture("ForTokenClassification"), "must hold one of"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, use: Use, files: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        ModelConfig.from_path(write(tmp_path, **files), use=use)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "modules.json").write_text("[{]")
    with pytest.raises(CheckpointError, match="modules.json: is not JSON"):
        ModelConfig.from_path(tmp_path)


@pytest.mark.parametrize(
    ("settings", "use"),
    [
        ({}, "auto"), ({"runner": "pooling"}, "pooling"), ({"convert": "embed"}, "embed"),
        ({"runner": "pooling", "convert": "classify"}, "score"), ({"convert": "none"}, "auto"),
        ({"runner": "generate", "convert": "none"}, "generate"),
    ],
)  # fmt: skip
def test_what_the_flags_say_together(tmp_path: Path, settings: dict[str, Any], use: Use) -> None:
    assert EngineConfig(model_path=tmp_path, **settings).use == use


def test_flags_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--convert embed contradicts --runner generate"):
        EngineConfig(model_path=tmp_path, runner="generate", convert="embed")
