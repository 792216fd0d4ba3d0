from __future__ import annotations

import random
import re
import time

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text import guard as guard_module
from pyserve.text.guard import ControlGuard, strings_in, unused_noncharacters

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s", "\n"]
MARKS = "\ufdd0\ufdd1"


def test_user_text_never_holds_a_whole_token_between_breaks() -> None:
    """Random users' strings and template literals, side by side: control tokens of the cut text
    are those of the template alone."""
    guard = ControlGuard(TOKENS)
    control = re.compile("|".join(map(re.escape, sorted(TOKENS[:-1], key=len, reverse=True))))
    rng = random.Random(7)
    atoms = ["<", "|", "im_end", ">", "<|", "|>", "<s>", "</s", "[INST]", "]", "/INST", "a", " "]
    num_marked = 0
    for _ in range(4000):
        user = ["".join(rng.choices(atoms, k=rng.randrange(6))) for _ in range(3)]
        if not guard.concerns(user):
            marked = user
        else:
            num_marked += 1
            marked = guard.mark(user, MARKS)
        literals = [rng.choice(["<|im_start|>", "<|im_end|>", "</s>", ": ", "\n"])
                    for _ in range(4)]  # fmt: skip
        order = [literals[0], marked[0], marked[1], literals[1], marked[2], *literals[2:]]
        prompt = guard.settle("".join(order), MARKS)
        assert prompt == "".join([literals[0], *user[:2], literals[1], user[2], *literals[2:]])
        cuts = [0, *prompt.breaks, len(prompt)]
        assert cuts == sorted(set(cuts)) or prompt == ""
        found = [token for a, b in zip(cuts, cuts[1:], strict=False)
                 for token in control.findall(prompt[a:b])]  # fmt: skip
        assert found == control.findall("\0".join(literals))
    assert num_marked > 1000


def test_what_a_template_does_to_a_string_does_no_harm() -> None:
    guard = ControlGuard(TOKENS)
    marked = guard.mark("a <|im_end|> b </s> c", MARKS)
    assert "<|im_end|>" in marked  # templates look for tokens in contents
    before, after = marked.split("</s>")
    prompt = guard.settle(f"{before}|{after.strip()}<|im_end|>", MARKS)
    assert prompt == "a <|im_end|> b | c<|im_end|>".replace(" c", "c")
    assert prompt.breaks[0] == prompt.index("<|im_end|>") + 1
    assert max(prompt.breaks) < prompt.rindex("<|im_end|>")


def test_keys_numbers_and_nesting() -> None:
    guard = ControlGuard(TOKENS)
    value = {"a": [1, None, True, {"k</s>": "x"}], "b": 2.5}
    assert guard.concerns(value)
    assert not guard.concerns({"a": [1, None, "<", "<|", "ok"][:1]})
    assert guard.mark(value, MARKS) == {"a": [1, None, True, {"k\ufdd0</s>": "x"}], "b": 2.5}
    assert list(strings_in(value)) == ["a", "k</s>", "x", "b"]


def test_an_end_that_begins_a_token_is_cut() -> None:
    guard = ControlGuard(TOKENS)
    assert guard.concerns("1 <") and guard.concerns("x<|im_e") and not guard.concerns("x<|im_e ")
    prompt = guard.settle(guard.mark("x<|im_", MARKS) + guard.mark("end|>", MARKS), MARKS)
    assert (prompt, prompt.breaks) == ("x<|im_end|>", (6,))


@pytest.mark.parametrize("piece_chars", [1, 2, 5, 11])
def test_tokens_across_pieces_are_found_once(
    monkeypatch: pytest.MonkeyPatch, piece_chars: int
) -> None:
    whole = ControlGuard(TOKENS[:-1])
    text = "a<|im_end|><|im_start|></s><s><s>[/INST] <|im_ <|im_end|>"
    marked, holds = whole.mark(text, MARKS), whole.concerns(text + " ")
    assert marked.count(MARKS[0]) == 7 and holds
    monkeypatch.setattr(guard_module, "PIECE_CHARS", piece_chars)
    assert whole.mark(text, MARKS) == marked
    for token in TOKENS[:-1]:
        for before in range(2 * piece_chars):
            assert whole.concerns("x" * before + token + " ")
    assert not whole.concerns("<|im_ end|> /s> INST] ")


def test_no_tokens_no_work() -> None:
    guard = ControlGuard([])
    assert not guard.concerns("<s> \n")
    assert guard.settle("plain", MARKS).breaks == ()


def test_noncharacters_of_the_request_are_left_alone() -> None:
    assert unused_noncharacters(2, ["\ufdd0", {"\ufdd2": 1}], source="\ufdd1") == "\ufdd3\ufdd4"
    everything = "".join(chr(code) for code in range(0xFDD0, 0xFDF0))
    with pytest.raises(InvalidRequestError, match="noncharacters"):
        unused_noncharacters(1, [everything], source="")


def test_a_thousand_reserved_tokens_cost_little() -> None:
    guard = ControlGuard([f"<|reserved_special_token_{i}|>" for i in range(1000)])
    text = "<p>x</p> <|res " * 20_000
    start = time.process_time()
    assert not guard.concerns([text])
    assert time.process_time() - start < 0.5
    assert guard.concerns(text + "<|reserved_special_token_999|>")
