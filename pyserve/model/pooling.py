"""Pooling: what a model computes of a whole text instead of the next token.

An embedding is the last token's hidden state after the final norm. A score is the output of a head
with one row for that hidden state, or the logit of "yes" minus that of "no". Which of them a model
computes is said by its architecture, by the files of sentence-transformers, or by the command line.
Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from pyserve.config import Use
from pyserve.errors import CheckpointError, ConfigError
from pyserve.model.fields import Fields, shown
from pyserve.model_files import read_list, read_object

Kind = Literal["embed", "score"]

# Ends of an architecture's name.
GENERATES = "ForCausalLM"
CLASSIFIES = "ForSequenceClassification"
WITHOUT_HEAD = "Model"

MODULES_FILE = "modules.json"
MAX_MODULES_BYTES = 2**20
MAX_MODULES = 16
MAX_DIMENSIONS = 256
ANSWERS = ("no", "yes")  # of a reranker that is a language model, unless its files name others

_FOLDER = re.compile(r"[A-Za-z0-9_-]{1,64}")  # allowed names of a module's folder
_LAST_TOKEN = "lasttoken"
_BY_MODE = "pooling_mode_"  # prefix of keys as "pooling_mode_lasttoken": true


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """What is computed of a text.

    kind            an embedding, or a score.
    is_normalized   embeddings are divided by their length.
    dimensions      numbers of dimensions to which an embedding may be cut; (): any number.
    answers         texts of the tokens whose logits make the score: the last one's logit, minus the
                    first one's if there are two; (): the files give answer_ids, or the model has a
                    head of its own for the score.
    answer_ids      ids of these tokens; () until they are known.
    """

    kind: Kind
    is_normalized: bool = True
    dimensions: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    answer_ids: tuple[int, ...] = ()

    @property
    def has_text_head(self) -> bool:
        """Whether the score uses rows of the head that generates text."""
        return bool(self.answers or self.answer_ids)

    @property
    def has_own_head(self) -> bool:
        """Whether the checkpoint has a head only for the score."""
        return self.kind == "score" and not self.has_text_head


def base_architecture(name: str) -> str:
    """The architecture's name for the same model with a head that generates text."""
    for end in (CLASSIFIES, WITHOUT_HEAD):
        if name.endswith(end) and not name.endswith(GENERATES):
            return name.removesuffix(end) + GENERATES
    return name


def read_pooling(
    raw: Mapping[str, Any], folder: Path | None, use: Use, *, hidden_size: int
) -> Pooling | None:
    """How the model of config.json `raw` in `folder` pools; None if it generates.

    Raises ConfigError or CheckpointError, naming the key and the value, if it pools in a way that
    is not supported, or cannot be used as `use` says.
    """
    name = raw["architectures"][0]
    modules = _read_modules(folder) if folder is not None and use != "generate" else {}
    kind = _kind(name, modules, use)
    if kind is None:
        return None
    if raw.get("auto_map"):
        raise ConfigError(
            f"config.json: auto_map names code of the model's own, which is not run here: without "
            f"it the {'embeddings' if kind == 'embed' else 'scores'} may be other ones"
        )
    if kind == "score":
        return _score(Fields(raw, "config.json"), name, folder, modules)
    return _embedding(Fields(raw, "config.json"), folder, modules, hidden_size=hidden_size)


def _kind(name: str, modules: Mapping[str, str], use: Use) -> Kind | None:
    has_no_text_head = not name.endswith(GENERATES) and base_architecture(name) != name
    if use == "generate":
        if has_no_text_head:
            raise ConfigError(f"--runner generate: {name} has no output head that generates text")
        return None
    if use in ("embed", "score"):
        return use
    if name.endswith(CLASSIFIES) or "LogitScore" in modules:
        return "score"
    if has_no_text_head or "Pooling" in modules or use == "pooling":
        return "embed"
    return None


def _score(fields: Fields, name: str, folder: Path | None, modules: Mapping[str, str]) -> Pooling:
    _check_modules(modules, ("Transformer", "LogitScore"))
    if folder is not None and "LogitScore" in modules:
        return Pooling(kind="score", answer_ids=_answer_ids(folder, modules["LogitScore"]))
    if fields.has("classifier_from_token"):
        answers = fields.strings("classifier_from_token")
        if len(answers) != len(ANSWERS):
            raise fields.refuse("classifier_from_token", "must hold 2 tokens, as no and yes")
        return Pooling(kind="score", answers=tuple(answers))
    if name.endswith(GENERATES):
        return Pooling(kind="score", answers=ANSWERS)
    if not name.endswith(CLASSIFIES):
        raise ConfigError(f"config.json: {name} has no output head, so it cannot score")
    if _num_labels(fields) != 1:
        raise ConfigError(
            f"config.json: num_labels, or the entries of id2label, must be 1 for a score, got "
            f"{_num_labels(fields)}"
        )
    return Pooling(kind="score")


def _num_labels(fields: Fields) -> int:
    """The number of labels as transformers counts them; 2 if config.json does not say."""
    if fields.has("id2label"):
        return fields.table("id2label").size
    return fields.integer("num_labels", 1, 2**20, default=2)


def _answer_ids(folder: Path, module: str) -> tuple[int, ...]:
    where = f"{module}/config.json"
    fields = Fields(_read_module(folder, module), where)
    keys = [key for key in ("false_token_id", "true_token_id") if fields.has(key)]
    if "true_token_id" not in keys:
        raise ConfigError(f"{where}: true_token_id is missing")
    return tuple(fields.integer(key, 0, 2**31 - 1) for key in keys)


def _embedding(
    fields: Fields, folder: Path | None, modules: Mapping[str, str], *, hidden_size: int
) -> Pooling:
    _check_modules(modules, ("Transformer", "Pooling", "Normalize"))
    if folder is not None and "Pooling" in modules:
        _check_pooling(folder, modules["Pooling"], hidden_size)
    dimensions: tuple[int, ...] = ()
    if fields.has("matryoshka_dimensions"):
        dimensions = fields.integers("matryoshka_dimensions", 1, hidden_size)[:MAX_DIMENSIONS]
    elif fields.has("is_matryoshka") and not fields.boolean("is_matryoshka", default=True):
        dimensions = (hidden_size,)
    is_normalized = "Normalize" in modules or not modules
    return Pooling(kind="embed", is_normalized=is_normalized, dimensions=dimensions)


def _check_pooling(folder: Path, module: str, hidden_size: int) -> None:
    where = f"{module}/config.json"
    raw = _read_module(folder, module)
    fields = Fields(raw, where)
    modes = [key.removeprefix(_BY_MODE) for key, value in raw.items()
             if key.startswith(_BY_MODE) and value is True]  # fmt: skip
    if fields.has("pooling_mode"):
        modes.append(fields.string("pooling_mode"))
    if modes != [_LAST_TOKEN]:
        raise ConfigError(
            f"{where}: the pooling mode must be {_LAST_TOKEN}, got "
            f"{', '.join(modes)[:200] or 'none'}: others are not supported"
        )
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if fields.has(key) and fields.integer(key, 1, 2**31 - 1) != hidden_size:
            raise fields.refuse(key, f"must be hidden_size ({hidden_size})")


def _check_modules(modules: Mapping[str, str], known: tuple[str, ...]) -> None:
    for kind in modules:
        if kind not in known:
            raise ConfigError(
                f"{MODULES_FILE}: a module {kind[:80]} is not supported, only {', '.join(known)}"
            )


def _read_modules(folder: Path) -> dict[str, str]:
    """The modules that modules.json lists, in order: kind -> folder. {} if there is no such file.

    A kind is the last part of a class's name, for example "Pooling".
    """
    raw = read_list(folder / MODULES_FILE, MAX_MODULES_BYTES)
    if raw is None:
        return {}
    if not 1 <= len(raw) <= MAX_MODULES:
        raise CheckpointError(f"{MODULES_FILE}: must list 1 to {MAX_MODULES} modules")
    modules = {}
    for entry in raw:
        kind = entry.get("type") if isinstance(entry, dict) else None
        path = entry.get("path", "") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not isinstance(path, str):
            raise CheckpointError(f"{MODULES_FILE}: each module must have a type and a path")
        modules[kind.rpartition(".")[2]] = path
    return modules


def _read_module(folder: Path, module: str) -> dict[str, Any]:
    """Read the config.json in a module's folder. Raises CheckpointError."""
    if not _FOLDER.fullmatch(module):
        raise CheckpointError(f"{MODULES_FILE}: path must be a folder's name, got {shown(module)}")
    path = folder / module / "config.json"
    raw = read_object(path, MAX_MODULES_BYTES)
    if raw is None:
        raise CheckpointError(f"{path}: No such file or directory")
    return raw
