"""A model's tokenizer: text -> token ids and back, its special tokens, its generation defaults.

Thread-safe after construction: the backend does not change any more, and encoding releases the
interpreter's lock.

In a plain prompt, special tokens that are spelled out are parsed, as the reference implementation
does: "<s>" becomes the token. Prompts written by hand and fill-in-the-middle need this. In a chat
only the template may write special tokens, and those in a user's text stay text (guard.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import decoders, models

from pyserve.errors import CheckpointError, ConfigError, InvalidRequestError
from pyserve.limits import MAX_STOP_TOKEN_IDS
from pyserve.model_files import guarded, is_panic, read_object
from pyserve.params import INT32_MAX, MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY, MIN_TOP_P
from pyserve.text.decoding import TokenDecoder, parse_layout
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.guard import ChatPrompt
from pyserve.text.tokenizer_class import class_of, set_surroundings, warn_of_flags
from pyserve.text.tokenizer_files import (
    TokenizerFiles,
    add_tokens,
    check_surroundings,
    extra_tokens,
    make_special,
    named_tokens,
    said_of_text,
    warn_of_ids,
)
from pyserve.text.tokenizer_json import TOKENIZER_FILE, place_of, read_backend, try_out

PIECE_TOKENS = 2**16  # decoded at a time, which takes a few milliseconds
NO_LIMIT = 2**62
MAX_TOKEN_BYTES = 1000  # llguidance takes 1024 with its marks
MAX_EOS_IDS = MAX_STOP_TOKEN_IDS - 1  # in a file; the tokenizer may name one more

_SURROGATE = re.compile("[\ud800-\udfff]").search


@dataclass(frozen=True, slots=True)
class Converted:
    """A tokenizer that was made from other files than tokenizer.json.

    source            the file that its vocabulary comes from.
    names             special tokens that this file itself names: "bos_token" and so on -> its
                      string.
    is_sentencepiece  whether that file is a SentencePiece model.
    """

    backend: tokenizers.Tokenizer
    source: str
    names: Mapping[str, str] = field(default_factory=dict)
    is_sentencepiece: bool = False


class Tokenizer:
    """The tokenizer that the files of a folder describe.

    folder             the folder of these files.
    config             tokenizer_config.json; {} if there is none.
    special_tokens     name of a special token, such as "bos_token" -> its string; chat templates
                       use these names.
    special_token_ids  ids that skip_special_tokens leaves out of a text.
    control_tokens     strings of these special tokens.
    eos_token_id       the model's primary EOS token; None if the folder names none.
    vocab_size         all ids, those of added tokens too, are in [0, vocab_size); not all of them
                       need have a token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        folder: Path,
        config: Mapping[str, Any],
        special_tokens: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.config = config
        self.special_tokens = special_tokens
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.control_tokens = frozenset(token.content for token in added.values() if token.special)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        self.eos_token_id = self.token_to_id(self.special_tokens.get("eos_token", ""))
        spec = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
        self.decoder = TokenDecoder(
            parse_layout(spec),
            self.id_to_token,
            plain_token_ids=_plain_token_ids(backend),
            special_token_ids=self.special_token_ids,
        )
        _check_lengths(vocab, self.decoder, folder)

    @classmethod
    def from_folder(cls, folder: Path, *, converted: Converted | None = None) -> Tokenizer:
        """Read tokenizer.json and the files beside it. `converted` replaces tokenizer.json.

        Raises CheckpointError naming the file that is missing or wrong, or two files that disagree.
        """
        with guarded(f"{folder}: the tokenizer's files"):
            return cls._from_folder(folder, converted)

    @classmethod
    def _from_folder(cls, folder: Path, converted: Converted | None) -> Tokenizer:
        files = TokenizerFiles.read(folder)
        config = files.config
        if converted is None:
            backend, is_byte_level = read_backend(folder / TOKENIZER_FILE)
        else:
            backend = converted.backend
            is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        backend.no_truncation()  # some folders have settings left over from training
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        try_out(backend, folder / (converted.source if converted else TOKENIZER_FILE))
        found = None
        if isinstance(backend.model, models.BPE):
            found = class_of(config, files.model_config, is_byte_level=is_byte_level)
        if found is not None and converted is None:
            found.rebuild(backend, config)
        defaults = found.defaults if found else converted.names if converted else {}
        named = named_tokens(config, defaults)
        add_tokens(
            backend, files, named,
            source=converted.source if converted else TOKENIZER_FILE,
            is_literal=converted is not None and converted.is_sentencepiece,
        )  # fmt: skip
        names = {name: str(token) for name, token in named.items()}
        if found is not None and found.is_special_by_name:
            make_special(backend, [*names.values(), *map(str, extra_tokens(config))])
        has_bos = found is not None and found.has_bos
        if converted is not None or has_bos:
            has_bos = config.get("add_bos_token", has_bos) if converted else has_bos
            adds_eos = converted is not None and config.get("add_eos_token")
            set_surroundings(
                backend,
                bos=names.get("bos_token") if has_bos else None,
                eos=names.get("eos_token") if adds_eos else None,
            )
        else:
            warn_of_flags(backend, config, names)
        check_surroundings(backend, files)
        warn_of_ids(backend, files, names)
        backend.encode_special_tokens = config.get("split_special_tokens") is True
        return cls(backend, folder=folder, config=config, special_tokens=names)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        param: str = "prompt",
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a text. Special tokens spelled in it are parsed.

        add_special_tokens  add the tokens that the model's post-processor puts around a text, such
                            as BOS.
        param               the request field that errors name.
        max_tokens          maximum number of tokens. It is checked before the list of ids is made,
                            which holds the interpreter's lock, 20 ms for a million ids; counting
                            them does not.

        Raises InvalidRequestError if the text is not Unicode, has no tokens in this model or has
        more than `max_tokens`.
        """
        encoding = self._encoding(text, add_special_tokens, param)
        if max_tokens is not None and len(encoding) > max_tokens:
            raise InvalidRequestError(
                f"{param} makes {len(encoding)} tokens, the limit is {max_tokens}", param
            )
        ids: list[int] = encoding.ids
        return ids

    def count(self, text: str, *, param: str = "prompt") -> int:
        """Number of tokens that `encode` returns without special tokens around the text. Raises
        InvalidRequestError.
        """
        return len(self._encoding(text, False, param))

    def _encoding(self, text: str, add_special_tokens: bool, param: str) -> tokenizers.Encoding:
        try:  # a batch of one text keeps no offsets, which takes half the time of `encode`
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except Exception as error:
            if match := _SURROGATE(text):
                raise InvalidRequestError(
                    f"{param} is not Unicode text: a lone surrogate U+{ord(match[0]):04X} "
                    f"at character {match.start()}",
                    param,
                ) from error
            raise InvalidRequestError(
                f"{param} holds text that this model's tokenizer has no tokens for", param
            ) from error
        except BaseException as error:  # a panic of the library must fail this request alone
            if is_panic(error):
                raise RuntimeError("the tokenizer has panicked") from error
            raise

    def encode_chat(
        self, prompt: str, *, add_special_tokens: bool = False, max_tokens: int = NO_LIMIT
    ) -> list[int]:
        """Token ids of a prompt from ChatTemplate.render.

        add_special_tokens  add BOS and so on around it, even if the template wrote them as well.
        max_tokens          encoding stops once there are more tokens than this, and the result is
                            incomplete. A special token that is spelled out makes several tokens, so
                            a short text can make many.

        Where a user's text spells a special token, the prompt is cut within it, so that it is
        encoded as text. A plain str has no such cuts. Raises InvalidRequestError.
        """
        breaks = prompt.breaks if isinstance(prompt, ChatPrompt) else ()
        if not breaks:
            return self.encode(str(prompt), add_special_tokens=add_special_tokens, param="messages")
        cuts = [0, *breaks, len(prompt)]
        pieces = [prompt[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        ids = self.encode(pieces[0], add_special_tokens=False, param="messages")
        anchor = self.encode("\n", add_special_tokens=False)
        for piece in pieces[1:]:
            if len(ids) > max_tokens:
                break
            ids += self._encode_continuation(piece, anchor)
        before, behind = self.surroundings() if add_special_tokens else ([], [])
        return [*before, *ids, *behind]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a list of ids. Ids without a token, such as those that pad a vocabulary, are
        skipped.
        """
        detokenizer = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        texts = [  # in pieces, so that other threads can run in between
            detokenizer.push(ids[start : start + PIECE_TOKENS])
            for start in range(0, len(ids), PIECE_TOKENS)
        ]
        return "".join(texts) + detokenizer.flush()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token with exactly this string; None if there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def ids_of(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """Ids of tokens that the model must have. Raises ConfigError if it lacks one."""
        found = {token: self.token_to_id(token) for token in tokens}
        for token, token_id in found.items():
            if token_id is None:
                raise ConfigError(
                    f"{self.folder}: the tokenizer has no token {token[:40]!r}, whose logit makes "
                    "the score"
                )
        return tuple(id_ for id_ in found.values() if id_ is not None)

    def id_to_token(self, token_id: int) -> str | None:
        """A token's string as in the vocabulary ("Ġthe", "▁the"); None if the id has no token."""
        if not 0 <= token_id < 2**32:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def surroundings(self) -> tuple[list[int], list[int]]:
        """Ids of the tokens that add_special_tokens puts before and after a text."""
        inner = self.encode("a", add_special_tokens=False)
        outer = self.encode("a", add_special_tokens=True)
        num_before = place_of(inner, outer)
        assert num_before is not None, "post_processor holds a text once"
        return outer[:num_before], outer[num_before + len(inner) :]

    def encode_inner(self, text: str) -> list[int]:
        """Token ids of a text in the middle of another one, without special tokens around it."""
        return self._encode_continuation(text, self.encode("\n", add_special_tokens=False))

    def _encode_continuation(self, text: str, anchor: list[int]) -> list[int]:
        """Token ids of a text that does not start a prompt.

        SentencePiece tokenizers put a space before any text. A line break before the text takes
        that space, and its tokens, `anchor`, are removed from the result.
        """
        ids = self.encode("\n" + text, add_special_tokens=False, param="messages")
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
        return self.encode(text, add_special_tokens=False, param="messages")


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults from generation_config.json for sampling parameters that a request leaves out; None
    if the file does not set one.

    eos_token_ids  ids that end an answer, the primary one first; from config.json if
                   generation_config.json has none.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 turns it off
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, *, has_sampling: bool = True) -> GenerationDefaults:
        """Read both files; either may be absent. Raises CheckpointError naming file and field.

        has_sampling  False reads only the EOS ids (`--generation-config vllm`).
        """
        path = folder / "generation_config.json"
        raw = read_object(path) or {}
        eos = _eos_ids(path, raw.get("eos_token_id"))
        if not eos:
            config_path = folder / "config.json"
            config = read_object(config_path) or {}
            eos = _eos_ids(config_path, said_of_text(config, "eos_token_id"))
        if not has_sampling:
            return cls(eos_token_ids=eos)
        top_k = _int_in(path, raw, "top_k", -1, INT32_MAX)
        return cls(
            temperature=_number_in(path, raw, "temperature", 0.0, 2.0),
            top_p=_number_in(path, raw, "top_p", MIN_TOP_P, 1.0),
            top_k=None if top_k is None else max(top_k, 0),
            min_p=_number_in(path, raw, "min_p", 0.0, 1.0),
            repetition_penalty=_number_in(
                path, raw, "repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
            ),
            max_new_tokens=_int_in(path, raw, "max_new_tokens", 1, INT32_MAX),
            eos_token_ids=eos,
        )


def _check_lengths(vocab: Mapping[str, int], decoder: TokenDecoder, folder: Path) -> None:
    """Refuse a token so long that llguidance panics, and that the guard of chats takes GBs for."""
    for text, token_id in vocab.items():
        if 4 * len(text) <= MAX_TOKEN_BYTES:
            continue
        num_bytes = len(decoder.pieces(skip_special_tokens=False)[token_id])
        if num_bytes > MAX_TOKEN_BYTES:
            raise CheckpointError(
                f"{folder}: the tokenizer's token {token_id}, {text[:40]!r}..., has {num_bytes} "
                f"bytes, the limit is {MAX_TOKEN_BYTES}"
            )


def _plain_token_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids of added tokens, whose text is their string as it is written.

    Single characters that are also tokens of the vocabulary are left out. They belong to the
    byte-level alphabet, where each stands for a byte that other texts need, even if somebody has
    added it as a token.
    """
    id_of = backend.model.token_to_id
    added = backend.get_added_tokens_decoder()
    return frozenset(
        id_ for id_, token in added.items()
        if len(token.content) > 1 or id_of(token.content) != id_
    )  # fmt: skip


def _eos_ids(path: Path, value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id <= INT32_MAX:
            raise CheckpointError(
                f"{path}: eos_token_id must be a token id or a list of them, got {token_id!r:.80}"
            )
    distinct = tuple(dict.fromkeys(ids))
    if len(distinct) > MAX_EOS_IDS:  # else each request would be refused for it
        raise CheckpointError(
            f"{path}: eos_token_id has {len(distinct)} ids, the limit is {MAX_EOS_IDS}"
        )
    return distinct


def _number_in(
    path: Path, raw: Mapping[str, Any], name: str, low: float, high: float
) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise CheckpointError(
            f"{path}: {name} must be in [{low:g}, {high:g}], got {value!r:.80}; "
            "--generation-config vllm ignores the file's sampling values"
        )
    return value


def _int_in(path: Path, raw: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = _number_in(path, raw, name, low, high)
    if value is not None and not isinstance(value, int):
        raise CheckpointError(f"{path}: {name} must be an integer, got {value!r}")
    return value
