"""Several constraints at once."""

from __future__ import annotations

from pyserve.constraints import AllOf, all_of, makes_all_of, unconstrained
from pyserve.engine.token_masks import BadWords
from tests.engine.constraints import Scripted, always
from tests.engine.fake_runner import ALL_TOKENS
from tests.engine.test_token_masks import allowed_by


def test_several_constraints_allow_what_all_of_them_do() -> None:
    scripted = Scripted(lambda output: None if output == [1] else [1, 2, 40], end=3)
    both = AllOf([scripted, BadWords([(1, 2), (40,)])])
    assert not both.is_free and allowed_by(both) == {1, 2}
    both.accept([1])
    assert not both.is_free and allowed_by(both) == ALL_TOKENS - {2, 40}  # one of them is free
    both.accept([1, 2])
    assert both.is_finished and both.error is None and scripted.history == [1, 1, 2]
    both.rollback(2)
    assert not both.is_finished and scripted.history == [1]
    broken = AllOf([BadWords([(1, 2)]), Scripted(always(1), broken_at=1)])
    broken.accept([1])
    assert broken.error == "as scripted"


def test_none_and_one_are_what_they_are() -> None:
    one = Scripted(always(1))
    assert all_of([]) is None and all_of([None, None]) is None and all_of([None, one]) is one
    make = makes_all_of([unconstrained, unconstrained])
    assert make() is None
    make = makes_all_of([unconstrained, lambda: Scripted(always(1, 2))])
    assert isinstance(make(), Scripted) and make() is not make()
    both = makes_all_of([lambda: Scripted(always(1, 2)), lambda: Scripted(always(2, 3))])()
    assert isinstance(both, AllOf) and allowed_by(both) == {2}
