"""What a folder's files say about added and special tokens, merged as transformers merges them.

tokenizer_config.json lists added tokens under `added_tokens_decoder`. Older folders do not: there
added_tokens.json lists what was added, and special_tokens_map.json names the special tokens, before
tokenizer_config.json. tokenizer.json may know none of them. Where two files give one token two ids,
or one id two tokens, no merge is right, so the folder is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pyserve import log
from pyserve.errors import CheckpointError
from pyserve.model_files import read_object

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

_NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_LIST, _OLD_LIST = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


@dataclass(frozen=True, slots=True)
class Listed:
    """A token to which a file gives an id."""

    file: str
    token_id: int
    token: AddedToken


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files beside tokenizer.json.

    config        tokenizer_config.json, with special_tokens_map.json where that counts.
    model_config  config.json; {} where the folder has none.
    added         tokens that count, in the order of their ids.
    ignored       tokens of added_tokens.json where `added_tokens_decoder` stands for it.
    """

    folder: Path
    config: Mapping[str, Any]
    model_config: Mapping[str, Any]
    added: tuple[Listed, ...]
    ignored: tuple[Listed, ...]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Raises CheckpointError naming the file and the field that is wrong."""
        config = read_object(folder / CONFIG_FILE) or {}
        if _OLD_LIST in config and not config.get(_LIST):
            config[_LIST] = config.pop(_OLD_LIST)
        in_config = None
        if "added_tokens_decoder" in config:
            in_config = _listed_in_config(folder / CONFIG_FILE, config["added_tokens_decoder"])
        else:
            config = _with_map(config, read_object(folder / MAP_FILE) or {})
        named = [token for name in _NAMED if (token := _token(config.get(name)))]
        special = {str(token) for token in (*named, *_tokens(config, _LIST))}
        ids = read_object(folder / ADDED_FILE) or {}
        in_file = _listed_in_file(folder / ADDED_FILE, ids, special)
        added = in_file if in_config is None else in_config
        return cls(
            folder=folder,
            config=config,
            model_config=read_object(folder / "config.json") or {},
            added=tuple(sorted(added, key=lambda item: item.token_id)),
            ignored=() if in_config is None else in_file,
        )

    @property
    def num_embeddings(self) -> int:
        """Ids that the model has an embedding for; 0 where config.json does not say it."""
        size = said_of_text(self.model_config, "vocab_size")
        return size if isinstance(size, int) else 0


def said_of_text(config: Mapping[str, Any], key: str) -> object:
    """What config.json says of `key`; a model for more than text may leave it to text_config."""
    text = config.get("text_config")
    value = config.get(key)
    return text.get(key) if value is None and isinstance(text, dict) else value


def named_tokens(
    config: Mapping[str, Any], defaults: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Token]:
    """The tokens that a config names: "bos_token" and so on, and names of the model's own.

    defaults  names that the tokenizer's class fills where the config does not have them.
    """
    values = {name: config.get(name, defaults.get(name)) for name in _NAMED} | {
        name: value for name, value in {**defaults, **config}.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }  # fmt: skip
    extra = config.get(_LIST)
    if isinstance(extra, dict):
        values |= extra
    return {name: token for name, value in values.items() if (token := _token(value))}


def extra_tokens(config: Mapping[str, Any]) -> list[Token]:
    """The special tokens that a config lists without a name."""
    return _tokens(config, _LIST if isinstance(config.get(_LIST), list) else _OLD_LIST)


def add_tokens(
    backend: tokenizers.Tokenizer,
    files: TokenizerFiles,
    named: Mapping[str, Token],
    *,
    source: str,
    is_literal: bool = False,
) -> None:
    """Give the tokenizer the tokens that the files list or name and that it does not have.

    named       names and tokens, as of `named_tokens`. One to which no file gives an id takes the
                next one, as in transformers, but only where the model has an embedding for it.
    source      the file that `backend` comes from.
    is_literal  listed tokens are found in the text as it is, whatever their flags say.

    Raises CheckpointError naming both files and the token where two contradict each other.
    """
    _check_agreement(backend, files, source)
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    names = {str(token) for token in named.values()}  # what has a name is a special token
    names |= {text for text, token in known.items() if token.special}  # and none ceases to be one
    new = [_made_special(item.token, names) for item in files.added]
    backend.add_tokens([_with(token, normalized=False) for token in new] if is_literal else new)
    for item in files.added:
        given = backend.token_to_id(item.token.content)
        if given != item.token_id:
            raise CheckpointError(
                f"{files.folder}: {item.file} gives the token {item.token.content!r} the id "
                f"{item.token_id}, but {source} has no tokens for the ids {given} and on before it"
            )
    if "added_tokens_decoder" not in files.config:  # then the flags in tokenizer.json count
        backend.add_tokens([_made_special(token, names) for token in known.values()])
    in_files = {*known, *(item.token.content for item in files.added)}
    for token in (*named.values(), *extra_tokens(files.config)):
        text = str(token)
        next_id = backend.get_vocab_size(with_added_tokens=True)
        is_free = next_id < files.num_embeddings and backend.id_to_token(next_id) is None
        if text not in in_files and (backend.token_to_id(text) is not None or is_free):
            added = AddedToken(text, special=True) if isinstance(token, str) else token
            backend.add_tokens([_made_special(added, names)])


def warn_of_ids(
    backend: tokenizers.Tokenizer, files: TokenizerFiles, names: Mapping[str, str]
) -> None:
    """One line each for an EOS that can end no answer and for tokens that the model cannot take."""
    eos = names.get("eos_token")
    if eos is not None and backend.token_to_id(eos) is None:
        log.get_logger().warning(
            "%s: eos_token %r has no id in any file, so it ends no answer", files.folder, eos
        )
    size = files.num_embeddings
    added = backend.get_added_tokens_decoder()
    beyond = sorted(token_id for token_id in added if token_id >= size > 0)
    if beyond:
        log.get_logger().warning(
            "%s: the id of %s, %d, is beyond the vocab_size of config.json, %d%s; "
            "prompts that hold it are refused",
            files.folder, added[beyond[0]].content, beyond[0], size,
            f", and {len(beyond) - 1} more" if len(beyond) > 1 else "",
        )  # fmt: skip


def make_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Turn those of the tokens that the tokenizer has into special ones, found as written."""
    backend.add_tokens(
        [
            AddedToken(token, special=True)
            for token in dict.fromkeys(tokens)
            if backend.token_to_id(token) is not None
        ]
    )


def _made_special(token: AddedToken, names: set[str]) -> AddedToken:
    """The token; a special one where its text is among the names."""
    return _with(token, special=token.special or token.content in names)


def _with(token: AddedToken, **changes: bool) -> AddedToken:
    flags = {name: getattr(token, name) for name in _FLAGS} | changes
    return AddedToken(token.content, **flags)


def _check_agreement(backend: tokenizers.Tokenizer, files: TokenizerFiles, source: str) -> None:
    ids: dict[str, tuple[int, str]] = {}
    # The library's id_to_token gives the normalised form of an added token ("▁<pad>").
    added = backend.get_added_tokens_decoder()
    texts = {token_id: (token.content, source) for token_id, token in added.items()}
    for listed in (*files.added, *files.ignored):
        text, token_id = str(listed.token), listed.token_id
        known_id, file = ids.get(text, (backend.token_to_id(text), source))
        if known_id not in (None, token_id):
            raise CheckpointError(
                f"{files.folder}: {file} gives the token {text!r} the id {known_id}, "
                f"{listed.file} the id {token_id}; one of the two is wrong"
            )
        known, file = texts.get(token_id, (backend.id_to_token(token_id), source))
        if known not in (None, text):
            raise CheckpointError(
                f"{files.folder}: the id {token_id} is the token {known!r} in {file} and "
                f"{text!r} in {listed.file}; one of the two is wrong"
            )
        ids[text], texts[token_id] = (token_id, listed.file), (text, listed.file)


def _listed_in_config(path: Path, decoder: object) -> tuple[Listed, ...]:
    """`added_tokens_decoder`: {"32000": {"content": "<|im_end|>", "special": true, ...}}."""
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{path}: added_tokens_decoder must be an object of ids and tokens, got {decoder!r:.60}"
        )
    listed = []
    for key, value in decoder.items():
        token = _token(value)
        if not isinstance(token, AddedToken) or not _is_id(key):
            raise CheckpointError(
                f'{path}: added_tokens_decoder must hold entries like "32000": '
                f'{{"content": "<pad>"}}, got {key!r:.60}: {value!r:.60}'
            )
        listed.append(Listed(f"{path.name} (added_tokens_decoder)", int(key), token))
    return tuple(item for item in listed if str(item.token))


def _listed_in_file(path: Path, ids: Mapping[str, Any], special: set[str]) -> tuple[Listed, ...]:
    """added_tokens.json: {"<pad>": 32000}."""
    listed = []
    for text, token_id in ids.items():
        if isinstance(token_id, bool) or not _is_id(str(token_id)):
            raise CheckpointError(f"{path}: {text!r:.60} must have an id, got {token_id!r:.60}")
        is_special = text in special
        token = AddedToken(text, normalized=not is_special, special=is_special)
        listed.append(Listed(path.name, int(token_id), token))
    return tuple(item for item in listed if str(item.token))


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 2**32


def _with_map(config: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what special_tokens_map.json names in it."""
    merged = dict(config)
    for name, value in names.items():
        had = merged.get(name) or []
        if name == _LIST and isinstance(value, list):
            if isinstance(had, dict):  # these have names
                name, had = _OLD_LIST, merged.get(_OLD_LIST) or []
            value = [*had, *(item for item in value if item not in had)]
        elif isinstance(value, dict) and "content" in value:
            value = value | {"special": True}
        merged[name] = value
    return merged


def _tokens(config: Mapping[str, Any], name: str) -> list[Token]:
    value = config.get(name)
    items = value if isinstance(value, list) else []
    return [token for item in items if (token := _token(item))]


def _token(value: object) -> Token | None:
    """A token in a config file: its string, or {"content": its string, "lstrip": false, ...}."""
    if isinstance(value, str):
        return value or None
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(value["content"], **flags)
