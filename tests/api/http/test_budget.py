"""Bytes for all, and for one of them."""

from __future__ import annotations

from pyserve.api.http.budget import ByteBudget


def test_room_is_what_is_left_for_all_and_for_one() -> None:
    budget = ByteBudget(100, 60)
    assert budget.has_room("a", 60) and not budget.has_room("a", 61)
    budget.add("a", 50)
    assert budget.has_room("a", 10) and not budget.has_room("a", 11)
    assert budget.has_room("b", 50) and not budget.has_room("b", 51)
    budget.add("b", 55)
    assert budget.num_bytes == 105
    assert budget.largest_client == "b"
    assert not budget.has_room("c", 1) and not budget.has_room("c", 0)
    budget.add("b", -10)
    assert budget.largest_client == "a"


def test_who_holds_nothing_is_forgotten() -> None:
    """There are as many clients as there are addresses."""
    budget = ByteBudget(100, 60)
    for number in range(1000):
        budget.add(str(number), 5)
        budget.add(str(number), -5)
    assert (budget.num_bytes, budget.largest_client, budget._by_client) == (0, None, {})
