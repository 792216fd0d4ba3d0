from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from pyserve.text.stop import StopChecker
from tests.text.samples import random_split, splits


def oracle(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The first match, as if the whole text were read character by character."""
    for end in range(len(text) + 1):
        matches = [string for string in stop if text[:end].endswith(string)]
        if matches:
            found = max(matches, key=len)  # max keeps the first of equals
            return text[: end if include else end - len(found)], found
    return text, None


def check(stop: list[str], include: bool, pushes: Sequence[Sequence[str]]) -> None:
    """A stream gives what the oracle gives, and holds back nothing that is settled."""
    checker = StopChecker(stop, include)
    seen, given, found = "", "", None
    for push in pushes:
        text = "".join(push)
        seen += text
        settled, found = checker.push(text)
        given += settled
        if found is not None:
            break
        held = seen[len(given) :]
        longest = max(
            (n for string in stop for n in range(len(string)) if seen.endswith(string[:n])),
            default=0,
        )
        assert len(held) == longest
    else:
        given += checker.flush()
    assert (given, found) == oracle("".join("".join(p) for p in pushes), stop, include)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["END"], "the EN END x"),
        (["aab", "ab"], "aaaabb"),
        (["ab", "aab"], "xaaab"),
        (["abcd", "bc"], "zabcd"),  # bc ends first
        (["bc", "abc"], "zabcd"),  # they end together: abc starts first
        (["aaaa"], "aaabaaaac"),
        (["\n\n", "\nUser:"], "x\ny\nUser: \n\n"),
        (["é😀", "😀😀"], "aé😀😀😀"),
        (["never"], "nevenevene"),
        ([], "no stop"),
    ],
)
def test_every_split(stop: list[str], text: str, include: bool) -> None:
    for pushes in splits(text):
        check(stop, include, pushes)


def test_random_strings_over_a_small_alphabet() -> None:
    rng = random.Random(5)
    for _ in range(4000):
        alphabet = rng.choice(["ab", "abc", "a.*[", "xé漢😀"])
        stop = ["".join(rng.choices(alphabet, k=rng.randrange(1, 6)))
                for _ in range(rng.randrange(5))]  # fmt: skip
        text = "".join(rng.choices(alphabet, k=rng.randrange(30)))
        check(stop, rng.random() < 0.5, random_split(text, rng))


def test_text_that_cannot_match_passes_at_once() -> None:
    checker = StopChecker(["<stop>", "halt"], False)
    assert checker.push("a < b") == ("a < b", None)
    assert checker.push(" <st") == (" ", None)
    assert checker.push("and h") == ("<stand ", None)
    assert checker.flush() == "h"


def test_equal_strings_and_what_follows_the_match() -> None:
    assert StopChecker(["x", "x"], False).push("axb") == ("a", "x")
    assert StopChecker(["x", "x"], True).push("axb") == ("ax", "x")


def test_hostile_strings_stay_linear() -> None:
    stop = ["a" * n + "b" for n in range(500, 560)]
    checker = StopChecker(stop, False)
    start = time.process_time()
    text = "".join(checker.push("aaaa")[0] for _ in range(20_000)) + checker.flush()
    assert time.process_time() - start < 2
    assert text == "a" * 80_000
