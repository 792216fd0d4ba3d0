from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders

from pyserve.errors import CheckpointError
from pyserve.text.decoding import parse_layout
from pyserve.text.tokenizer import Tokenizer
from tests.text import samples

NO_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def sentencepiece_decode(tokens: list[str]) -> str:
    """Byte fallback as SentencePiece does it, character by character: the oracle where the
    tokenizers library gives up a whole run of bytes."""
    text, run = "", b""
    for token in [*tokens, ""]:
        if NO_BYTE.fullmatch(token):
            run += bytes([int(token[3:5], 16)])
            continue
        while run:
            for length in range(1, 5):
                try:
                    text, run = text + run[:length].decode(), run[length:]
                    break
                except UnicodeDecodeError:
                    continue
            else:
                text, run = text + "\ufffd", run[1:]
        text += token.replace("▁", " ")
    return text.removeprefix(" ")


@pytest.mark.parametrize("skip", [True, False])
def test_texts_decode_as_in_the_library(tokenizer: Tokenizer, skip: bool) -> None:
    backend = samples.backend_of(tokenizer)
    for text in samples.TEXTS:
        text = f"<|im_start|>{text}<|im_end|>{samples.WORD}{text}</s>"
        ids = backend.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=skip) == samples.library_decode(
            backend, ids, skip=skip
        )


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_decode_as_in_the_library(tokenizer: Tokenizer, skip: bool) -> None:
    backend = samples.backend_of(tokenizer)
    tokens = [backend.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
    is_byte = [NO_BYTE.fullmatch(token) is not None for token in tokens]
    rng = random.Random(1)
    num_broken = 0
    for _ in range(1500):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(1, 40))
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        kept = [i for i in ids if not (skip and i in tokenizer.special_token_ids)]
        if any(is_byte[i] for i in kept):
            num_broken += 1
            assert text == sentencepiece_decode([tokens[i] for i in kept])
        else:
            assert text == samples.library_decode(backend, ids, skip=skip)
    assert (num_broken > 500) == any(is_byte)


def test_all_byte_pairs_and_lead_bytes_read_as_in_the_library(byte_level: Tokenizer) -> None:
    backend = samples.backend_of(byte_level)
    by_byte = [
        backend.encode(bytes([byte]).decode("latin-1")).ids[-1] if byte < 128 else None
        for byte in range(256)
    ]
    vocabulary = backend.get_vocab(with_added_tokens=False)
    alphabet = {byte_level.decoder.layout.piece(token, False): id_
                for token, id_ in vocabulary.items()}  # fmt: skip
    ids = [alphabet[bytes([byte])] for byte in range(256)]
    assert all(a is None or a == b for a, b in zip(by_byte, ids, strict=True))
    rng = random.Random(2)
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0,
             0xE1, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]  # fmt: skip
    for first in edges:
        for second in edges:
            for rest in (rng.choices(edges, k=2), rng.choices(edges, k=3)):
                stream = [ids[byte] for byte in (first, second, *rest)]
                assert byte_level.decode(stream, skip_special_tokens=True) == backend.decode(stream)


def test_added_tokens_read_as_they_are_written(byte_level: Tokenizer) -> None:
    """Alone, in a text, behind a character that is cut off, and as what the logprobs show."""
    backend = samples.backend_of(byte_level)
    for token in samples.PLAIN_TOKENS:
        token_id = byte_level.token_to_id(token) or 0
        assert byte_level.encode(f"ein {token}!", add_special_tokens=False).count(token_id) == 1
        assert byte_level.decode([token_id], skip_special_tokens=True) == token
        text = f"ein {token} 漢{token}{token} é"
        ids = byte_level.encode(text, add_special_tokens=False)
        assert byte_level.decode(ids, skip_special_tokens=True) == text
        cut = [*byte_level.encode("漢", add_special_tokens=False)[:-1], token_id]
        assert byte_level.decode(cut, skip_special_tokens=True) == f"\ufffd{token}"
    broken = [token for token in samples.PLAIN_TOKENS
              if backend.decode([byte_level.token_to_id(token) or 0]) != token]  # fmt: skip
    assert broken == ["café", "schöner", "Ġmo"]  # the library: why it is no oracle here


def test_a_byte_that_was_added_stays_a_byte(tmp_path: Path) -> None:
    """Others need it: "é" stands for the first byte of many Chinese characters."""
    for in_vocabulary, text in [(True, "\ufffd"), (False, "é")]:
        backend = samples.byte_level()
        if not in_vocabulary:
            model = json.loads(backend.to_str())["model"]
            model["vocab"]["<gone>"] = model["vocab"].pop("é")
            merges = [tuple(pair) for pair in model["merges"] if "é" not in "".join(pair)]
            backend.model = tokenizers.models.BPE(model["vocab"], merges)
        backend.add_tokens(["é"])
        tokenizer = Tokenizer.from_folder(samples.save(backend, tmp_path))
        ids = tokenizer.encode("é", add_special_tokens=False)
        assert ids == [tokenizer.token_to_id("é")]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        if in_vocabulary:
            ids = tokenizer.encode("語", add_special_tokens=False)
            assert tokenizer.decode(ids, skip_special_tokens=True) == "語"


def test_a_vocabulary_keeps_its_bytes_and_its_plain_text(byte_level: Tokenizer) -> None:
    """What is not an added token stands for bytes, if each of its characters does."""
    layout = byte_level.decoder.layout
    assert layout.piece("schÃ¶n", False) == "schön".encode()
    assert layout.piece("schön", False) == b"sch\xf6n"
    assert layout.piece("schön", False, is_plain=True) == "schön".encode()
    assert layout.piece("<｜User｜>", False) == "<｜User｜>".encode()


def test_byte_fallback_keeps_what_is_whole(sentencepiece: Tokenizer) -> None:
    backend = samples.backend_of(sentencepiece)
    ids: Any = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode() + b"\xe5\xa5"]
    assert backend.decode(ids) == "\ufffd" * 5  # the library takes the whole run
    assert sentencepiece.decode(ids, skip_special_tokens=True) == "你\ufffd\ufffd"


def test_ids_without_a_token_are_empty_and_not_kept(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.decoder.pieces(skip_special_tokens=True)
    size = len(pieces)
    unknown = [tokenizer.vocab_size, 10**6, 2**32, 2**63, -1]
    assert tokenizer.decode(unknown, skip_special_tokens=True) == ""
    assert len(pieces) <= size + 1


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Replace("l", "L"),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Sequence([]),
        decoders.Sequence([decoders.ByteLevel()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence(
            [
                decoders.Sequence([decoders.Replace("▁", "_"), decoders.Replace("_", " ")]),
                decoders.Fuse(),
                decoders.Strip(" ", 3, 0),
            ]
        ),
    ],
)
def test_each_supported_decoder(decoder: decoders.Decoder | None) -> None:
    tokens = ["▁", "▁▁", "he", "▁▁l", "llo", "Ġé", "<0x41>", "<0xC3>", "<0xA9>", "▁w", "语"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="he")
    )
    if decoder is not None:
        backend.decoder = decoder
    layout = parse_layout(None if decoder is None else json.loads(decoder.__getstate__()))
    rng = random.Random(3)
    for _ in range(300):
        ids = rng.choices([i for i in range(len(tokens)) if i not in (7, 8)], k=rng.randrange(9))
        if rng.random() < 0.5:
            ids += [7, 8]
        data = b"".join(layout.piece(tokens[id_], i == 0) for i, id_ in enumerate(ids))
        text = data.decode("utf-8", "replace")
        for _ in range(layout.strip_count):
            text = text.removeprefix(layout.strip_char)
        assert text == backend.decode(ids)


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"),
        (decoders.Strip(" ", 1, 0), "Strip"),
        (decoders.Replace(tokenizers.Regex("a+"), "b"), "Replace"),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), "Metaspace"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), "ByteFallback"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), "Strip"),
    ],
)
def test_decoders_that_are_not_local_are_refused_by_name(
    decoder: decoders.Decoder, name: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: the decoder {name} is not"):
        parse_layout(json.loads(decoder.__getstate__()))
