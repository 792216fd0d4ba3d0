"""The bundled demo model as package data, and the generator of what it was trained on."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import tokenizers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench.demo_train import data, evaluate, phrasing, slots, speed  # noqa: E402

DEMO = ROOT / "pyserve" / "demo"
FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}
CITY_TOOL: dict[str, Any] = evaluate.WEATHER_TOOL


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def test_package_directory_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir() if path.is_file()}
    assert set(sizes) >= FILES
    assert sum(sizes.values()) <= 12_000_000


def test_weights_have_the_standard_names_and_shapes() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    kv_size = config["num_key_value_heads"] * head_dim
    with safetensors.safe_open(DEMO / "model.safetensors", "pt") as file:
        names = set(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names}
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert head_dim == 64 and dtypes == {"BF16"}
    assert "lm_head.weight" not in names
    assert len(names) == 2 + 9 * config["num_hidden_layers"]
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], hidden]
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == [kv_size, hidden]


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "¡Hola! ¿Cuál es la capital de España? Año, pingüino.",
        "日本語 中文 한국어 👩‍👩‍👧 🦊❤️",
        "  two  blanks\n\n\ttab\r\n",
        "e\u0301 decomposed, \u00a0 no-break, \u200b zero width, \x00 nul",
        '{"a": [1, 2.5, {"b": null}]}',
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_marks_and_tags_are_single_tokens(tokenizer: tokenizers.Tokenizer) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert tokenizer.get_vocab_size() <= config["vocab_size"]
    assert generation["eos_token_id"] == [
        tokenizer.token_to_id("<|im_end|>"),
        tokenizer.token_to_id("<|endoftext|>"),
    ]
    text = "<think>a</think><tool_call>b</tool_call>"
    ids = tokenizer.encode(text).ids
    assert len(ids) == 6
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    marked = tokenizer.encode("<|im_start|>a<|im_end|>").ids
    assert len(marked) == 3 and tokenizer.decode(marked, skip_special_tokens=True) == "a"


# Chat template --------------------------------------------------------------------------------


def test_template_writes_system_and_turns() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": " spaces kept "},
    ]
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    tail = "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n spaces kept <|im_end|>\n"
    assert data.render(messages, None) == head + tail
    prompt = data.render(messages, None, add_generation_prompt=True)
    assert prompt == head + tail + "<|im_start|>assistant\n"


@pytest.mark.parametrize("arguments", [{"city": "París"}, '{"city": "París"}'])
def test_template_writes_tools_calls_and_results(arguments: object) -> None:
    call: dict[str, object] = {"id": "1", "type": "function"}
    call |= {"function": {"name": "get_weather", "arguments": arguments}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "¿Clima?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"temp": 20}'},
    ]
    text = data.render(messages, [CITY_TOOL], add_generation_prompt=True)
    function = json.dumps(CITY_TOOL["function"], ensure_ascii=False)
    said = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "París"}}\n</tool_call>'
    assert text == (
        f"<|im_start|>system\n<tools>\n{function}\n</tools><|im_end|>\n"
        "<|im_start|>user\n¿Clima?<|im_end|>\n"
        f"<|im_start|>assistant\n{said}\n{said}<|im_end|>\n"
        '<|im_start|>tool\n{"temp": 20}<|im_end|>\n<|im_start|>assistant\n'
    )


def test_template_puts_system_text_before_tools_and_reasoning_before_content() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "reasoning_content": "so\n", "content": "42"},
    ]
    text = data.render(messages, [CITY_TOOL])
    assert text.startswith("<|im_start|>system\nBe kind.\n\n<tools>\n{")
    assert text.count("<|im_start|>system") == 1
    assert text.endswith("assistant\n<think>\nso\n</think>\n\n42<|im_end|>\n")


# Data -----------------------------------------------------------------------------------------


def test_documents_are_the_same_for_the_same_seed() -> None:
    first = list(data.documents(7, 60))
    assert first == list(data.documents(7, 60))
    assert first != list(data.documents(8, 60))


def test_training_and_held_out_values_are_disjoint() -> None:
    assert len(phrasing.ALL_SPLITS) > 80
    for split in phrasing.ALL_SPLITS:
        train = {_plain(text) for value in split.train for text in phrasing.expand(value)}
        held = {_plain(text) for value in split.held_out for text in phrasing.expand(value)}
        assert held and train and not train & held


def _plain(text: str) -> str:
    """Without case, accents and marks: phrasings that differ only in those are the same."""
    return phrasing.strip_accents(text).casefold().rstrip(".!?")


def test_made_up_values_are_split_by_hash() -> None:
    rng = random.Random(0)
    for make in (slots.made_up_word, slots.odd_string):
        assert all(phrasing.is_held_out(make(rng, True)) for _ in range(50))
        assert not any(phrasing.is_held_out(make(rng, False)) for _ in range(200))


def test_alternatives_are_all_of_a_template() -> None:
    assert phrasing.expand("a (/b/c d) e") == ["a e", "a b e", "a c d e"]
    split = phrasing.Split(["(x/y) {slot}"], ["z"])
    phrasing.ALL_SPLITS.remove(split)
    rng = random.Random(0)
    assert {split.pick(rng, False) for _ in range(50)} == {"x {slot}", "y {slot}"}


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_reference_answers_are_right_and_wrong_ones_wrong(task: str) -> None:
    for lang in ("en", "es"):
        for question in evaluate.questions(task, lang, 20, 0):
            reference = question.reference.removesuffix("<|im_end|>\n")
            assert evaluate.grade(question.check, reference), question
            assert not evaluate.grade(question.check, "No.")


def test_loss_counts_what_the_assistant_says(tokenizer: tokenizers.Tokenizer) -> None:
    marks = data.marks_of(tokenizer)
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    ids = np.array(tokenizer.encode(data.render(messages, None)).ids)
    for learned, said in (([True, True], "onetwo"), ([False, True], "two"), ([False, False], "")):
        mask = data.loss_mask(ids, learned, marks)
        assert tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True) == said


def test_long_division_steps_give_the_quotient() -> None:
    assert speed.long_division(510, 6) == "51 / 6 = 8 r 3, 30 / 6 = 5 r 0"
    for dividend, divisor in ((1350, 9), (240, 3), (96, 12), (1000, 8)):
        steps = speed.long_division(dividend, divisor).split(", ")
        digits = "".join(step.split(" = ")[1].split()[0] for step in steps)
        assert int(digits) == dividend // divisor
