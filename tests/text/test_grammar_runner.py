"""A compile of a grammar has an end, at least for who asked for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from pyserve.errors import InvalidRequestError, UnavailableError
from pyserve.text import grammar, grammar_runner
from pyserve.text.grammar import Choice, GrammarCache, compile_grammar
from pyserve.text.grammar_runner import MAX_LATE
from tests.text.grammars import vocabulary
from tests.waiting import wait_until


def choice(*texts: str) -> Choice:
    return Choice(param="c", texts=list(texts))


def test_compiling_leaves_the_size_of_stacks_as_it_was() -> None:
    before = threading.stack_size()
    compile_grammar(choice("x"), vocabulary())
    assert threading.stack_size() == before


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Compiles take 0.02 s of work at most, and until this is set they end for no other reason."""
    release = threading.Event()
    monkeypatch.setattr(grammar_runner, "MAX_COMPILE_S", 0.02)
    monkeypatch.setattr(grammar, "_compile", lambda spec, vocab: work_until(release))
    yield release
    release.set()
    monkeypatch.undo()
    wait_until(is_taken, pause_s=0.05)  # the threads have an end


def is_taken() -> bool:
    with suppress(UnavailableError):
        compile_grammar(choice("x"), vocabulary())
        return True
    return False


def work_until(release: threading.Event) -> None:
    while not release.is_set():
        pass


def test_a_compile_has_an_end(release: threading.Event) -> None:
    """One that goes on behind it is waited for by nobody; of many of them no more are begun."""
    for _ in range(MAX_LATE):
        with pytest.raises(InvalidRequestError, match="^c takes longer than 0.02 s to compile"):
            compile_grammar(choice("x"), vocabulary())
    with pytest.raises(UnavailableError, match="earlier grammars still compile"):
        compile_grammar(choice("x"), vocabulary())


def test_what_took_too_long_is_not_tried_again(release: threading.Event) -> None:
    cache = GrammarCache()
    for _ in range(MAX_LATE + 1):
        with pytest.raises(InvalidRequestError, match="^c takes longer than 0.02 s to compile"):
            compile_grammar(choice("x"), vocabulary(), cache=cache)


def test_a_machine_that_is_busy_is_not_the_grammars_doing(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compile that waits for a core for longer than it may work is waited for."""
    monkeypatch.setattr(grammar, "_compile", lambda spec, vocab: release.wait(30))
    threading.Timer(0.3, release.set).start()
    assert compile_grammar(choice("x"), vocabulary())
    release.clear()
    monkeypatch.setattr(grammar_runner, "MAX_WAIT_S", 0.1)
    with pytest.raises(InvalidRequestError, match="^c takes longer than"):
        compile_grammar(choice("x"), vocabulary())
