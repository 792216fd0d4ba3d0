from __future__ import annotations

import random
import sys
import time

import pytest

from pyserve.text.detokenizer import Detokenizer
from pyserve.text.tokenizer import Tokenizer
from tests.text import samples
from tests.text.samples import random_split, splits, stream, text_beyond

PROMPT = "<s><|im_start|>user\nhola<|im_end|>\n"


@pytest.mark.parametrize("skip", [True, False])
def test_every_split_of_hard_characters(tokenizer: Tokenizer, skip: bool) -> None:
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    for text in ["👩‍👩‍👧", "é\u0301漢", " a  b", "</s>é<think>字", "مَ ح", "▁ ĠĊ", "🇪🇸!"]:
        ids = tokenizer.encode(text, add_special_tokens=False)[:13]
        for before in ((), prompt):
            expected = text_beyond(
                tokenizer.decode([*before, *ids], skip_special_tokens=skip),
                tokenizer.decode(before, skip_special_tokens=skip),
            )
            for pushes in splits(ids):
                assert stream(tokenizer, before, pushes, skip=skip) == expected


@pytest.mark.parametrize("skip", [True, False])
def test_texts_in_context_token_by_token(tokenizer: Tokenizer, skip: bool) -> None:
    backend = samples.backend_of(tokenizer)
    for prompt_text in ["", "<s>", PROMPT, "one", "ends with space "]:
        prompt = tokenizer.encode(prompt_text, add_special_tokens=False)
        for text in samples.TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            full = samples.library_decode(backend, [*prompt, *ids], skip=skip)
            before = samples.library_decode(backend, prompt, skip=skip)
            expected = text_beyond(full, before)
            assert stream(tokenizer, prompt, [[i] for i in ids], skip=skip) == expected


def test_special_tokens_that_are_shown_in_any_case(tokenizer: Tokenizer) -> None:
    special = sorted(tokenizer.special_token_ids)
    rng = random.Random(1)
    for _ in range(300):
        shown = frozenset(rng.sample(special, rng.randrange(len(special) + 1)))
        ids = rng.choices([*special, *range(tokenizer.vocab_size)], k=rng.randrange(8))
        hidden = tokenizer.special_token_ids - shown
        kept = [token_id for token_id in ids if token_id not in hidden]
        text = Detokenizer(tokenizer, skip_special_tokens=True, shown=shown)
        pieces = [text.push([token_id]) for token_id in ids]
        expected = tokenizer.decode(kept, skip_special_tokens=False)
        assert "".join(pieces) + text.flush() == expected


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_ids_any_split_any_prompt(tokenizer: Tokenizer, skip: bool, seed: int) -> None:
    """Random prompts end within characters, hold only special tokens, or nothing."""
    rng = random.Random(seed)
    special = sorted(tokenizer.special_token_ids)
    for _ in range(700):
        pool = special if rng.random() < 0.2 else range(tokenizer.vocab_size)
        prompt = rng.choices(pool, k=rng.choice([0, 0, 1, 2, 3, 30]))
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(12))
        expected = text_beyond(
            tokenizer.decode([*prompt, *ids], skip_special_tokens=skip),
            tokenizer.decode(prompt, skip_special_tokens=skip),
        )
        for pushes in ([[i] for i in ids], [ids], random_split(ids, rng)):
            assert stream(tokenizer, prompt, pushes, skip=skip) == expected


@pytest.mark.parametrize("skip", [True, False])
def test_every_split_around_added_tokens(byte_level: Tokenizer, skip: bool) -> None:
    """Between whole characters, halves of them and each other, in a prompt and in an output."""
    backend = samples.backend_of(byte_level)
    added = [byte_level.token_to_id(token) or 0 for token in (*samples.PLAIN_TOKENS, "</s>")]
    others = byte_level.encode("漢ö x", add_special_tokens=False)
    rng = random.Random(5)
    for _ in range(60):
        ids = [rng.choice(rng.choice([added, others])) for _ in range(8)]
        cut = rng.randrange(4)
        prompt, output = ids[:cut], ids[cut:]
        full = byte_level.decode(ids, skip_special_tokens=skip)
        assert full == samples.library_decode(backend, ids, skip=skip)
        expected = text_beyond(full, byte_level.decode(prompt, skip_special_tokens=skip))
        for pushes in splits(output):
            assert stream(byte_level, prompt, pushes, skip=skip) == expected


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_prompts_that_end_within_a_character(kind: str, request: pytest.FixtureRequest) -> None:
    """Each cut of bytes, whole and broken, between prompt and output."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    pieces = {tokenizer.decoder.layout.piece(tokenizer.id_to_token(i) or "", False): i
              for i in range(tokenizer.vocab_size)}  # fmt: skip
    sequences = ["é语😀".encode(), b"\xf0\x9f\x98a", b"\xe8\xaf\xef\xbf\xbe", b"\xc3\xc3\xa9 \x80"]
    for data in sequences:
        ids = [pieces[bytes([byte])] for byte in data]
        for cut in range(len(ids) + 1):
            prompt, output = ids[:cut], ids[cut:]
            expected = text_beyond(
                tokenizer.decode(ids, skip_special_tokens=True),
                tokenizer.decode(prompt, skip_special_tokens=True),
            )
            for pushes in splits(output):
                assert stream(tokenizer, prompt, pushes, skip=True) == expected


def test_text_comes_as_soon_as_it_is_whole(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, skip_special_tokens=True)
    deltas = [detokenizer.push([i]) for i in byte_level.encode("aé😀", add_special_tokens=False)]
    whole = [delta for delta in deltas if delta]
    assert "".join(whole) == "aé😀"
    assert deltas[-1].endswith("😀") and "\ufffd" not in "".join(deltas)
    assert detokenizer.flush() == ""


def test_flush_gives_the_broken_tail(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ok 😀", add_special_tokens=False)
    while not byte_level.decode(ids, skip_special_tokens=True).endswith("\ufffd"):
        ids = ids[:-1]
    detokenizer = Detokenizer(byte_level, skip_special_tokens=True)
    assert detokenizer.push(ids) == "ok "
    assert detokenizer.flush() == "\ufffd"


def test_a_sentencepiece_answer_keeps_its_first_space_behind_a_prompt(
    sentencepiece: Tokenizer,
) -> None:
    ids = sentencepiece.encode("fox", add_special_tokens=False)
    bos = [sentencepiece.token_to_id("<s>") or 0]
    words = sentencepiece.encode("the", add_special_tokens=True)
    assert stream(sentencepiece, words, [ids], skip=True) == " fox"
    assert stream(sentencepiece, bos, [ids], skip=True) == "fox"  # the prompt reads as nothing
    assert stream(sentencepiece, bos, [ids], skip=False) == " fox"
    assert stream(sentencepiece, [], [ids], skip=True) == "fox"


def test_a_long_prompt_costs_nothing_and_leaves_no_state(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(samples.TEXTS[0], add_special_tokens=False)
    prompt = (ids * 4000)[:100_000]
    looked_at: list[int] = []

    class Watched(list[int]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for item in super().__iter__():
                looked_at.append(item)
                yield item

        def __reversed__(self):  # type: ignore[no-untyped-def]
            for item in super().__reversed__():
                looked_at.append(item)
                yield item

    detokenizer = Detokenizer(tokenizer, Watched(prompt), skip_special_tokens=True)
    assert len(looked_at) <= 8
    for _ in range(200):
        detokenizer.push(ids)
    owned = [name for name in Detokenizer.__slots__ if name not in ("_decoder", "_piece_of")]
    assert sum(sys.getsizeof(getattr(detokenizer, name)) for name in owned) < 500


def test_it_is_fast_enough(tokenizer: Tokenizer) -> None:
    """Design: 1.5 us a token; ten times that is a bug, not a busy machine."""
    ids = tokenizer.encode(" ".join(samples.TEXTS), add_special_tokens=False) * 20
    detokenizer = Detokenizer(tokenizer, ids[:10], skip_special_tokens=True)
    detokenizer.push(ids)
    singles = [[i] for i in ids]
    start = time.process_time()
    for single in singles:
        detokenizer.push(single)
    assert (time.process_time() - start) / len(ids) < 15e-6
