"""What a folder's files say about added and special tokens, merged as transformers merges them.

tokenizer_config.json lists added tokens under `added_tokens_decoder`. Older folders lack that:
there added_tokens.json lists the added tokens, and special_tokens_map.json names the special tokens
and takes precedence over tokenizer_config.json. tokenizer.json may know none of them. If two files
give one token two ids, or one id two tokens, no merge is right, so the folder is refused.
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
    """A token to which a file gives an id.

    file  name of the file, for errors.
    """

    file: str
    token_id: int
    token: AddedToken


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The files beside tokenizer.json.

    config        tokenizer_config.json, merged with special_tokens_map.json if it lists no added
                  tokens.
    model_config  config.json; {} if the folder has none.
    added         the tokens to add, in the order of their ids.
    ignored       tokens of added_tokens.json that are not added, because `added_tokens_decoder` is
                  there.
    """

    folder: Path
    config: Mapping[str, Any]
    model_config: Mapping[str, Any]
    added: tuple[Listed, ...]
    ignored: tuple[Listed, ...]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read the files of a folder. Raises CheckpointError naming the file and the field that is
        wrong.
        """
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
        """Number of ids that the model has an embedding for; 0 if config.json does not say."""
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
    """The special tokens that a config names: "bos_token" and so on, and names of the model's own.

    defaults  name -> string, for names that the config lacks; from the tokenizer's class.
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
    """The special tokens that a config lists without names."""
    return _tokens(config, _LIST if isinstance(config.get(_LIST), list) else _OLD_LIST)


def add_tokens(
    backend: tokenizers.Tokenizer,
    files: TokenizerFiles,
    named: Mapping[str, Token],
    *,
    source: str,
    is_literal: bool = False,
) -> None:
    """Add the tokens that the files list or name to `backend`, where it lacks them.

    named       name -> token, from `named_tokens`. A token without an id in any file gets the next
                id, as in transformers, but only if the model has an embedding for that id.
    source      the file that `backend` comes from, for errors.
    is_literal  listed tokens are found in the text before it is normalised, whatever their flags
                say.

    Raises CheckpointError naming both files and the token if two files contradict each other.
    """
    _check_agreement(backend, files, source)
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    names = {str(token) for token in named.values()}  # a token with a name becomes special
    # A special token stays special.
    names |= {text for text, token in known.items() if token.special}
    new = [_made_special(item.token, names) for item in files.added]
    backend.add_tokens([_with(token, normalized=False) for token in new] if is_literal else new)
    for item in files.added:
        given = backend.token_to_id(item.token.content)
        if given != item.token_id:
            raise CheckpointError(
                f"{files.folder}: {item.file} gives the token {item.token.content!r} the id "
                f"{item.token_id}, but {source} has no tokens for the ids {given} and on before it"
            )
    if "added_tokens_decoder" not in files.config:  # the flags in tokenizer.json apply then
        backend.add_tokens([_made_special(token, names) for token in known.values()])
    in_files = {*known, *(item.token.content for item in files.added)}
    for token in (*named.values(), *extra_tokens(files.config)):
        text = str(token)
        next_id = backend.get_vocab_size(with_added_tokens=True)
        is_free = next_id < files.num_embeddings and backend.id_to_token(next_id) is None
        if text not in in_files and (backend.token_to_id(text) is not None or is_free):
            added = AddedToken(text, special=True) if isinstance(token, str) else token
            backend.add_tokens([_made_special(added, names)])


def check_surroundings(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Refuse a tokenizer that puts ids around every text that the model has no embedding for."""
    size = files.num_embeddings
    beyond = [token_id for token_id in backend.encode("").ids if token_id >= size > 0]
    if beyond:
        raise CheckpointError(
            f"{files.folder}: the tokenizer puts the id {beyond[0]} around every text, which is "
            f"beyond the vocab_size of config.json, {size}"
        )


def warn_of_ids(
    backend: tokenizers.Tokenizer, files: TokenizerFiles, names: Mapping[str, str]
) -> None:
    """Log a warning if the EOS has no id, so that it ends no answer, and one if ids of added tokens
    are beyond the model's vocabulary.
    """
    eos = names.get("eos_token")
    if eos is not None and backend.token_to_id(eos) is None:
        log.get_logger().warning(
            "%s: eos_token %r has no id in any file, so it ends no answer", files.folder, eos
        )
    size = files.num_embeddings
    ids = set(backend.get_added_tokens_decoder())
    if backend.get_vocab_size(with_added_tokens=True) > size:  # the whole of it takes 0.1 s
        ids |= set(backend.get_vocab().values())
    beyond = sorted(token_id for token_id in ids if token_id >= size > 0)
    if beyond:
        log.get_logger().warning(
            "%s: the id of %s, %d, is beyond the vocab_size of config.json, %d%s; "
            "prompts that hold it are refused",
            files.folder, (backend.id_to_token(beyond[0]) or "")[:40], beyond[0], size,
            f", and {len(beyond) - 1} more" if len(beyond) > 1 else "",
        )  # fmt: skip


def make_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Make special tokens, which are found as written, of those that the tokenizer has."""
    backend.add_tokens(
        [
            AddedToken(token, special=True)
            for token in dict.fromkeys(tokens)
            if backend.token_to_id(token) is not None
        ]
    )


def _made_special(token: AddedToken, names: set[str]) -> AddedToken:
    """The token, made special if its text is among the names."""
    return _with(token, special=token.special or token.content in names)


def _with(token: AddedToken, **changes: bool) -> AddedToken:
    flags = {name: getattr(token, name) for name in _FLAGS} | changes
    return AddedToken(token.content, **flags)


def _check_agreement(backend: tokenizers.Tokenizer, files: TokenizerFiles, source: str) -> None:
    """Raise CheckpointError if two files give one token two ids, or one id two tokens."""
    ids: dict[str, tuple[int, str]] = {}
    # Not from id_to_token: the library returns the normalised form of an added token there
    # ("▁<pad>").
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
    """The tokens of `added_tokens_decoder`: {"32000": {"content": "<|im_end|>", "special": true,
    ...}}. Raises CheckpointError.
    """
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
    """The tokens of added_tokens.json: {"<pad>": 32000}. Raises CheckpointError."""
    listed = []
    for text, token_id in ids.items():
        if isinstance(token_id, bool) or not _is_id(str(token_id)):
            raise CheckpointError(f"{path}: {text!r:.60} must have an id, got {token_id!r:.60}")
        is_special = text in special
        token = AddedToken(text, normalized=not is_special, special=is_special)
        listed.append(Listed(path.name, int(token_id), token))
    return tuple(item for item in listed if str(item.token))


def _is_id(text: str) -> bool:
    return len(text) <= 10 and text.isascii() and text.isdigit() and int(text) < 2**32


def _with_map(config: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """A config merged with special_tokens_map.json, whose tokens replace the config's; lists are
    joined.
    """
    merged = dict(config)
    for name, value in names.items():
        had = merged.get(name) or []
        if name == _LIST and isinstance(value, list):
            if isinstance(had, dict):  # the config's are named, so the map's go to the older list
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
    """A token from a config file: its string, or {"content": its string, "lstrip": false, ...}.
    None if the value is neither, or empty.
    """
    if isinstance(value, str):
        return value or None
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(value["content"], **flags)
