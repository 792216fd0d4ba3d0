"""Masks of many answers in one call, and copies of a grammar."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import numpy as np
import pytest
from numpy.typing import NDArray

from pyserve.text.grammar import Compiled, Grammars, JsonSchema, Regex, Spec, compile_grammar
from pyserve.text.grammar_constraint import GrammarConstraint
from tests.text.grammars import allowed, vocabulary

PEOPLE = {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}}
SPECS: list[Spec] = [JsonSchema(param="s", schema=PEOPLE), Regex(param="r", pattern="[a-z ]{200}")]


def started(compiled: Compiled, seed: int) -> GrammarConstraint:
    """An answer that has gone on for some tokens."""
    constraint, rng = compiled.constraint(), random.Random(seed)
    for _ in range(seed % 12):
        choices = allowed(constraint, vocabulary())
        constraint.accept([int(choices[rng.randrange(len(choices))])])
        if constraint.is_finished:
            return compiled.constraint()
    return constraint


def masks(num_rows: int) -> NDArray[np.int32]:
    return np.full((num_rows, (vocabulary().vocab_size + 31) // 32), 7, np.int32)


def fill(
    constraints: list[GrammarConstraint], bitmask: NDArray[np.int32], *, is_alone: bool = False
) -> None:
    """Mask i goes to row 2 * i."""
    filler = constraints[0].filler
    assert filler is not None
    filler.fill(constraints, range(0, 2 * len(constraints), 2), bitmask, is_alone=is_alone)


@pytest.mark.parametrize(("is_alone", "quick_s"), [(True, 9.0), (True, 2e-4), (False, 9.0)])
@pytest.mark.parametrize("max_call_s", [1.0, 0.0])
def test_masks_of_many_are_what_each_would_be(
    max_call_s: float, is_alone: bool, quick_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_CALL_S", max_call_s)
    monkeypatch.setattr("pyserve.text.grammar_matcher.QUICK_S", quick_s)
    grammars = Grammars(vocabulary())
    constraints = [started(grammars.compile(SPECS[i % 2]), i) for i in range(30)]
    together, alone = masks(60), masks(60)
    fill(constraints, together, is_alone=is_alone)
    for i, constraint in enumerate(constraints):
        constraint.fill_bitmask(alone[2 * i])
        assert constraint.error is None
    assert np.array_equal(together, alone)
    assert (together[1::2] == 7).all()


def test_a_batch_behind_one_that_took_long_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mask by itself, so that what takes too long is found, and no other."""
    grammars = Grammars(vocabulary())
    slow, other = (grammars.compile(spec) for spec in SPECS)
    constraints = [slow.constraint(), other.constraint(), slow.constraint()]
    monkeypatch.setattr("pyserve.text.grammar_matcher.LONG_CALL_S", 0.0)
    monkeypatch.setattr("pyserve.text.grammar_constraint._FILLER._batch._num_long", 0)
    fill(constraints, masks(6))
    assert not any(constraint.error for constraint in constraints)
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_MASK_S", 0.0)
    fill(constraints[:1], masks(2))
    assert "takes longer than the limit of" in str(constraints[0].error)
    monkeypatch.undo()
    fill(constraints[1:], masks(4))
    assert constraints[1].error is None
    assert constraints[2].error == constraints[0].error


def test_a_mask_that_cannot_be_filled_fails_alone() -> None:
    """Its states are full, and its own too: the others of the call have theirs."""
    grammars = Grammars(vocabulary())
    spec = Regex(param="r", pattern="[b-d]{60}" + "a?" * 2000)
    bad, good = grammars.compile(spec).constraint(), grammars.compile(SPECS[0]).constraint()
    bitmask = masks(4)
    for _ in range(61):
        fill([bad, good], bitmask)
        if bad.error is not None:
            break
        bad.accept([vocabulary().tokenizer.encode_inner("b")[0]])
    assert bad.error is not None and good.error is None
    expected = masks(1)
    good.fill_bitmask(expected[0])
    assert np.array_equal(bitmask[2], expected[0])


def test_a_grammar_whose_masks_take_long_has_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(vocabulary())
    first = grammars.compile(SPECS[1])
    num_bytes = first.num_bytes
    monkeypatch.setattr("pyserve.text.grammar.num_threads", lambda: 4)
    monkeypatch.setattr("pyserve.text.grammar.MAX_COPY_S", 1e-12)
    monkeypatch.setattr("pyserve.text.grammar.MIN_SIDE_BY_SIDE_S", 0.0)
    assert grammars.get(SPECS[1]) is None
    assert grammars.compile(SPECS[1]) is first
    assert grammars.get(SPECS[1]) is first and grammars.get(SPECS[0]) is None
    constraints = [grammars.compile(SPECS[1]).constraint() for _ in range(12)]
    assert all(constraint.filler is not None for constraint in constraints)
    keys = [
        constraint.filler.work(constraint)[0] for constraint in constraints if constraint.filler
    ]
    counts = {id(key): keys.count(key) for key in keys}
    assert len(counts) == 4 and max(counts.values()) <= 4
    assert first.num_bytes == 4 * num_bytes
    assert grammars.get(SPECS[1]) is first  # there may be no more
    monkeypatch.setattr("pyserve.text.grammar.MAX_COPIES", 8)
    monkeypatch.setattr("pyserve.text.grammar.num_threads", lambda: 8)
    assert grammars.get(SPECS[1]) is None
    monkeypatch.setattr("pyserve.text.grammar.MAX_COPY_S", 1.0)
    assert grammars.get(SPECS[1], n=64) is first


def test_no_copy_is_made_where_masks_are_quick_or_a_compile_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyserve.text.grammar.num_threads", lambda: 4)
    monkeypatch.setattr("pyserve.text.grammar.MAX_COPY_S", 1.0)
    grammars = Grammars(vocabulary())
    compiled = grammars.compile(SPECS[0])
    constraints = [compiled.constraint() for _ in range(64)]
    assert grammars.get(SPECS[0]) is compiled and len(constraints) == 64
    monkeypatch.setattr("pyserve.text.grammar.MAX_COPY_S", 1e-12)
    monkeypatch.setattr("pyserve.text.grammar.MIN_SIDE_BY_SIDE_S", 1.0)
    assert grammars.get(SPECS[0]) is compiled
    monkeypatch.setattr("pyserve.text.grammar.MIN_SIDE_BY_SIDE_S", 0.0)
    assert grammars.get(SPECS[0]) is None
    monkeypatch.setattr("pyserve.text.grammar.MAX_RENEWAL_S", 0.0)
    assert grammars.get(SPECS[0]) is compiled


def test_what_is_too_slow_is_so_in_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.text.grammar.num_threads", lambda: 4)
    monkeypatch.setattr("pyserve.text.grammar.MAX_COPY_S", 1e-12)
    monkeypatch.setattr("pyserve.text.grammar.MIN_SIDE_BY_SIDE_S", 0.0)
    grammars = Grammars(vocabulary())
    constraints = [grammars.compile(SPECS[1]).constraint() for _ in range(4)]
    monkeypatch.setattr("pyserve.text.grammar_matcher.MAX_MASK_S", 0.0)
    allowed(constraints[0], vocabulary())
    monkeypatch.undo()
    for constraint in constraints:
        allowed(constraint, vocabulary())
        assert "takes longer than the limit of" in str(constraint.error)


def test_copies_are_filled_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many threads, and as they would be on one."""
    monkeypatch.setattr("pyserve.text.grammar.num_threads", lambda: 3)
    monkeypatch.setattr("pyserve.text.grammar.MAX_COPY_S", 1e-12)
    monkeypatch.setattr("pyserve.text.grammar.MIN_SIDE_BY_SIDE_S", 0.0)
    grammars = Grammars(vocabulary())
    constraints = [started(grammars.compile(SPECS[1]), i) for i in range(24)]
    together, alone = masks(48), masks(48)
    groups: dict[int, list[int]] = {}
    for i, constraint in enumerate(constraints):
        assert constraint.filler is not None
        groups.setdefault(id(constraint.filler.work(constraint)[0]), []).append(i)
        constraint.fill_bitmask(alone[2 * i])
    assert len(groups) == 3

    def work(group: list[int]) -> None:
        its = [constraints[i] for i in group]
        for _ in range(20):
            assert its[0].filler is not None
            its[0].filler.fill(its, [2 * i for i in group], together, is_alone=False)

    threads = [threading.Thread(target=work, args=(group,)) for group in groups.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert np.array_equal(together, alone)


def test_a_grammar_that_nobody_has_any_more_is_freed_at_once() -> None:
    """Its states may take hundreds of megabytes, and the collector comes late."""
    compiled = compile_grammar(SPECS[0], vocabulary())
    constraint = compiled.constraint()
    fill([constraint], masks(2))
    shared = weakref.ref(constraint.filler.work(constraint)[0]) if constraint.filler else None
    assert shared is not None and shared() is not None
    gc.disable()
    try:
        del compiled, constraint
        assert shared() is None
    finally:
        gc.enable()
