"""tokenizer.model -> a tokenizer with SentencePiece's ids, which is checked on a number of texts.

Merges are ranked by the scores of their pieces. transformers ranks them by ids for some classes,
which turns runs of spaces, and so all indented code, into other tokens. The packages sentencepiece
and protobuf are needed only for folders without tokenizer.json.

Known difference: if a model normalises its text (T5 does; Llama, Mistral and Gemma do not), the
`tokenizers` library leaves some letters with several combining marks unchanged.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from pyserve.errors import CheckpointError
from pyserve.model_files import guarded, read_bytes
from pyserve.text.tokenizer import Converted
from pyserve.text.tokenizer_class import prefix_of
from pyserve.text.tokenizer_files import TokenizerFiles

try:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
except ImportError:  # either package is missing
    SentencePieceProcessor = None

MODEL_FILE = "tokenizer.model"
_PACKAGES = "sentencepiece protobuf"
_REMEDY = "--tokenizer names another folder that has tokenizer.json"

_UNIGRAM, _BPE = 1, 2  # values of trainer_spec.model_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of a piece's type
_NUM_SHUFFLED = 20
_PROBE = [
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "don't, won't; it's 3.14159 or 1,000,000",
    "a b  c   d    e     f      g       h        i" + " " * 16 + "j" + " " * 33 + "k",
    "two\n\nlines\n",
    "\tone tab\t\ttwo",
    "trailing   ",
    "if x:\n    return [1, 2]\n\n\nelse:\n        y = 0",
    "def f(a, b=None):\n    for i in range(10):\n        if a[i] != b:\n            print(i)\n",
    '<div class="x">\n  <p>&nbsp;</p>\n</div>',
    '{"key": [true, null, -1.5e-3],\n  "b": {}}',
    "La capital de Francia es París; ¿qué más?",
    "Straße, Ærøskøbing, Žluťoučký kůň",
    "Съешь же ещё этих мягких булок",
    "中文分词很有意思，今天天气不错。𠀀",
    "日本語のテキスト、カタカナ",
    "한국어 문장",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "😀👩\u200d👩\u200d👧 ✊🏿",
    "e\u0301 \ufb01 Ａ ²",
    "\u00a0 \u3000 \u200b",
]
_SPACE_FIRST = [" a", "  indented", "    return x", " ", "     "]


def convert_model(folder: Path) -> Converted:
    """The tokenizer for a folder's tokenizer.model.

    Raises CheckpointError naming a remedy if a package is missing, the file is not a SentencePiece
    model, or the converted tokenizer gives other ids for any text of the probe.
    """
    path = folder / MODEL_FILE
    if SentencePieceProcessor is None:
        raise CheckpointError(
            f"{folder}: no tokenizer.json; to convert {MODEL_FILE}, pip install {_PACKAGES}, "
            f"or {_REMEDY}"
        )
    with guarded(str(path)):
        return _convert(folder, path)


def _convert(folder: Path, path: Path) -> Converted:
    files = TokenizerFiles.read(folder)
    prefix = prefix_of(files.config, files.model_config)
    model = sentencepiece_model_pb2.ModelProto()
    content = read_bytes(path)
    try:
        model.ParseFromString(content or b"")
        model.normalizer_spec.add_dummy_prefix &= prefix != "never"
        processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # they raise exceptions of many types
        raise CheckpointError(f"{path}: not a SentencePiece model; {_REMEDY}") from error
    trainer = model.trainer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
        raise CheckpointError(
            f"{path}: neither BPE nor Unigram with the spaces before the words; {_REMEDY}"
        )
    backend = _tokenizer(model, prefix)
    _hold_against(processor, backend, model, path, _PROBE + _SPACE_FIRST * (prefix != "first"))
    names = {"bos_token": trainer.bos_piece if trainer.bos_id >= 0 else "",
             "eos_token": trainer.eos_piece if trainer.eos_id >= 0 else "",
             "unk_token": trainer.unk_piece if trainer.unk_id >= 0 else ""}  # fmt: skip
    return Converted(backend, MODEL_FILE, names, is_sentencepiece=True)


def _tokenizer(model: Any, prefix: str) -> tokenizers.Tokenizer:
    """The tokenizer for a SentencePiece model.

    prefix  where a space is added, as in `prefix_of`. With "first", none is added to a text that
            begins with a space.
    """
    normal = model.normalizer_spec
    own = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    make = _bpe if model.trainer_spec.model_type == _BPE else _unigram
    backend = tokenizers.Tokenizer(make(model))
    steps: list[normalizers.Normalizer] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if normal.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    # Metaspace adds no prefix to a text that begins with "▁", so one is added here.
    if normal.add_dummy_prefix and prefix == "always":
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    backend.normalizer = normalizers.Sequence(steps)
    words: list[pre_tokenizers.PreTokenizer] = []
    if normal.add_dummy_prefix:
        words.append(pre_tokenizers.Metaspace("▁", prepend_scheme=prefix, split=False))
    if own:  # user-defined pieces are never parts of longer ones
        pattern = "|".join(re.escape(piece) for piece in sorted(own, key=len, reverse=True))
        words.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    strip = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(
        [AddedToken(piece.piece, special=True, normalized=False)
         for piece in model.pieces if piece.type == _CONTROL]
    )  # fmt: skip
    return backend


def _bpe(model: Any) -> models.BPE:
    scores = {piece.piece: (-piece.score, token_id) for token_id, piece in enumerate(model.pieces)
              if piece.type == _NORMAL}  # fmt: skip
    merges = [
        (*rank, token[:at], token[at:])
        for token, rank in scores.items()
        for at in range(1, len(token))
        if token[:at] in scores and token[at:] in scores
    ]
    return models.BPE(
        {piece.piece: token_id for token_id, piece in enumerate(model.pieces)},
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=any(piece.type == _USER_DEFINED for piece in model.pieces),
    )


def _unigram(model: Any) -> models.Unigram:
    return models.Unigram(
        [(piece.piece, piece.score) for piece in model.pieces],
        unk_id=model.trainer_spec.unk_id,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _hold_against(
    processor: Any, backend: tokenizers.Tokenizer, model: Any, path: Path, probe: list[str]
) -> None:
    """Raise CheckpointError if the converted tokenizer gives other ids than SentencePiece for any
    text of `probe`, or for texts made of the model's own pieces.
    """
    rng = random.Random(0)
    pieces = [piece.piece.replace("▁", " ") for piece in model.pieces if piece.type == _NORMAL]
    own = [piece.piece.replace("▁", " ") for piece in model.pieces if piece.type == _USER_DEFINED]
    shuffled = ["a" + "".join(rng.choices(pieces, k=100)) for _ in range(_NUM_SHUFFLED)]
    for text in [*probe, *(f"x{piece}y {piece}" for piece in own[:100]), *shuffled]:
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise CheckpointError(
                f"{path}: converted, it gives other tokens than sentencepiece for {text[:40]!r}; "
                f"{_REMEDY}"
            )
