"""Texts that break careless code, and small tokenizers of each kind, trained on them.

Used by the tests, and by real_tokenizers.py on tokenizers of real models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pyserve.text.detokenizer import Detokenizer
from pyserve.text.tokenizer import Tokenizer

T = TypeVar("T")

TEXTS = [
    "The quick brown fox jumps over the lazy dog. 1234567890!",
    "  two spaces,   three,\ttab\n\n  indented\n",
    "def f(x):\n    return {'a': [x, None]}  # comment\n\n\n",
    "La capital de Francia es París; ¿qué más? El niño comió piñas.",
    "Straße, Ærøskøbing, Žluťoučký kůň, Ħamrun",
    "中文分词很有意思，今天天气不错。𠀀𠮷 汉字",
    "日本語のテキスト、カタカナとひらがな。ｶﾞ",
    "한국어 문장과 조합형 자모 각",
    "مرحبا بالعالم، كيف حالك اليوم؟ ١٢٣",
    "עברית עם נִקּוּד",
    "नमस्ते दुनिया, क्षत्रिय",
    "สวัสดีชาวโลก ไม่มีช่องว่าง",
    "e\u0301 a\u0308 o\u0302\u0323 Z\u0351\u036b\u0343",
    "😀 😃😄 👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 🇪🇸🇫🇷 ✊🏿 1️⃣",
    "math: ∑∫√ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ≤ ≠ ⟨x⟩",
    "\u200bzero\u200dwidth\ufeff and \ufffd itself, NUL \x00 and \x7f",
    "▁metaspace itself ▁▁ and Ġ Ċ of byte-level",
    "<0x41> is not a byte, nor are </s> or [INST] words",
]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORD = "<think>"  # an added token that is not special
# Added to the byte-level one, where some of their letters, or all, stand for bytes in other tokens.
PLAIN_TOKENS = ["café", "schöner", "Ġmo", "größe漢", "<｜é｜>"]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens([WORD, *PLAIN_TOKENS])
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """BPE with byte fallback, as Llama 2 and Mistral have it; adds BOS."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, limit_alphabet=70, show_progress=False)
    trained.train_from_iterator(TEXTS[:5] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(dict.fromkeys([*tokens, "▁▁", "▁▁▁▁"]))},
            [*map(tuple, model["merges"]), ("▁", "▁"), ("▁▁", "▁▁")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.add_tokens(["<norm>"])  # matched in normalised text
    backend.add_tokens([tokenizers.AddedToken(WORD, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=None, special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def unigram() -> tokenizers.Tokenizer:
    """Unigram with a Metaspace decoder, as XGLM has it."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=SPECIAL_TOKENS, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 2, trainer)
    backend.add_tokens([tokenizers.AddedToken(WORD, normalized=False)])
    return backend


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}


def save(backend: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    """A model folder's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return folder


def backend_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The oracle: the tokenizers library on the same file."""
    return tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))


def library_decode(backend: tokenizers.Tokenizer, ids: Sequence[int], *, skip: bool) -> str:
    """What the library decodes, but for PLAIN_TOKENS: it reads their letters as bytes."""
    text, run = "", []
    plain = {backend.token_to_id(token): token for token in PLAIN_TOKENS}
    plain.pop(None, None)
    for id_ in [*ids, None]:
        if id_ is not None and id_ not in plain:
            run.append(id_)
            continue
        text += backend.decode(run, skip_special_tokens=skip) if run else ""
        text, run = text + plain.get(id_, ""), []
    return text


def stream(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    pushes: Sequence[Sequence[int]],
    *,
    skip: bool,
) -> str:
    """What a client receives; checks each delta on the way."""
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    deltas = [detokenizer.push(ids) for ids in pushes]
    for delta in deltas:
        delta.encode()  # no half character: a lone surrogate would raise
    return "".join(deltas) + detokenizer.flush()


def text_beyond(full: str, prompt: str) -> str:
    """The text of the output, by definition: what prompt and output read beyond the prompt.

    A prompt that ends within a character reads U+FFFD there; where the output completes the
    character, it belongs to the output.
    """
    for num_broken in range(4):
        whole = prompt[: len(prompt) - num_broken]
        if full.startswith(whole):
            assert prompt == whole + "\ufffd" * num_broken
            return full[len(whole) :]
    raise AssertionError("the text of a prompt changed with what follows it")


def splits(ids: Sequence[T]) -> Iterator[list[Sequence[T]]]:
    """Every way to cut a short list into pushes."""
    for mask in range(2 ** max(len(ids) - 1, 0)):
        cuts = [0, *(i + 1 for i in range(len(ids) - 1) if mask >> i & 1), len(ids)]
        yield [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def random_split(ids: Sequence[T], rng: random.Random) -> list[Sequence[T]]:
    """One way to cut a list, with empty pushes among the others."""
    cuts = sorted(rng.choices(range(len(ids) + 1), k=rng.randrange(1, len(ids) + 3)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
