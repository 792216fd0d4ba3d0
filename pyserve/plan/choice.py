"""Which card a model needs: compares all known cards, and finds how few of each kind suffice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyserve.config import EngineConfig
from pyserve.engine.planner import MIB
from pyserve.errors import PlanError
from pyserve.model.config import ModelConfig
from pyserve.plan.capacity import Capacity, find_capacity, named_memory, sizes_on_card
from pyserve.plan.cards import CARDS, Card
from pyserve.plan.roofline import decode_floor
from pyserve.plan.table import aligned

COUNTS = (1, 2, 4)  # numbers of cards of one kind that are tried
BATCH = 64  # batch size for the price per million tokens, or the largest that fits
SECONDS_A_DAY = 86_400


@dataclass(frozen=True, slots=True)
class CardChoice:
    """`count` cards of one kind, and how the model would run on them.

    mean_context   tokens behind each sequence
    price_per_day  in dollars, for all the cards; None if it was not given
    """

    card: Card
    count: int
    capacity: Capacity
    mean_context: int
    price_per_day: float | None

    @property
    def num_seqs(self) -> int:
        """Number of sequences of mean_context tokens that run at once."""
        return min(self.capacity.plan.num_slots, self.capacity.num_tokens // self.mean_context)

    def tokens_per_s(self, batch: int) -> float:
        """Output tokens per second of all sequences of a batch together, at the roofline."""
        floor = decode_floor(
            self.capacity.sizes, self.card, batch=batch, context_len=self.mean_context
        )
        return batch / floor.seconds

    @property
    def price_per_million(self) -> float | None:
        """Dollars per million output tokens at a batch of BATCH, or the largest that fits."""
        if self.price_per_day is None:
            return None
        rate = self.tokens_per_s(min(BATCH, self.num_seqs))
        return self.price_per_day / SECONDS_A_DAY / rate * 1e6


def find_choices(
    model: ModelConfig,
    config: EngineConfig,
    *,
    counts: Iterable[int],
    mean_context: int,
    prices: Mapping[str, float],
) -> list[CardChoice]:
    """For each card, the smallest of `counts` that holds the model; the cheapest or smallest first.
    Cards that cannot hold the model are left out.

    counts        numbers of cards, in ascending order.
    mean_context  tokens behind each sequence.
    prices        Card.name -> dollars a day for one card.

    Raises ConfigError if no card can run the model, or if that many cards cannot share its layers.
    """
    found: dict[str, CardChoice] = {}
    for count in counts:
        sizes = sizes_on_card(model, config, tp_size=count)
        for card in CARDS:
            if card.name in found:
                continue
            try:
                capacity = find_capacity(model, config, sizes, named_memory(card))
            except PlanError:
                continue
            context = min(mean_context, capacity.plan.max_model_len)
            price = prices[card.name] * count if card.name in prices else None
            found[card.name] = CardChoice(card, count, capacity, context, price)
    return sorted(found.values(), key=_rank)


def _rank(choice: CardChoice) -> tuple[float, float, float]:
    price = math.inf if choice.price_per_day is None else choice.price_per_day
    return price, choice.count * choice.card.memory_mib, choice.count * choice.card.bandwidth_tb


def choice_lines(choices: list[CardChoice], *, has_prices: bool) -> list[str]:
    """A table of the choices, and what its columns mean."""
    header = ["cards", "GiB", "context", "at once", "tokens/s of one", "of all"]
    header += ["$ a day", "$ per million"] if has_prices else []
    rows = [header]
    for choice in choices:
        longest = choice.capacity.longest_context(1)
        is_all = longest == choice.capacity.model.max_model_len
        rows.append(
            [
                f"{choice.count} x {choice.card.name}",
                f"{choice.count * choice.card.memory_mib * MIB / 2**30:,.1f}",
                "all" if is_all else f"{longest:,}",
                f"{choice.num_seqs:,}",
                f"{choice.tokens_per_s(1):,.0f}",
                f"{choice.tokens_per_s(min(BATCH, choice.num_seqs)):,.0f}",
                *(_prices(choice) if has_prices else []),
            ]
        )
    lines = [
        *aligned(rows),
        "context: tokens of one sequence that has the card for itself; at once: sequences of "
        "--mean-context tokens",
        f"tokens/s: roofline, of one sequence and of {BATCH} (or as many as fit); real servers "
        "reach 60-90 %",
    ]
    if any(choice.count > 1 for choice in choices):
        lines.append(
            "several cards share each layer (tensor parallel): what they tell each other is not "
            "counted"
        )
    return lines


def _prices(choice: CardChoice) -> list[str]:
    if choice.price_per_day is None or choice.price_per_million is None:
        return ["-", "-"]
    return [f"{choice.price_per_day:,.2f}", f"{choice.price_per_million:,.3f}"]
