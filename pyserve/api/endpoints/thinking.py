"""thinking_token_budget of a chat -> a constraint that ends the thinking of each answer in time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pyserve.api.endpoints.conversation import Conversation
from pyserve.api.state import Loaded
from pyserve.client import Constraint
from pyserve.constraints import unconstrained
from pyserve.errors import InvalidRequestError
from pyserve.params import shown
from pyserve.text.thinking_budget import ThinkingBudget

NAME = "thinking_token_budget"
NO_BUDGET = -1


def makes_thinking_budget(
    budget: int | None, loaded: Loaded, conversation: Conversation, ignored: list[str]
) -> Callable[[], Constraint | None]:
    """Check the budget and return what makes the constraint of each answer.

    budget   the field's value in tokens; None and NO_BUDGET: no limit.
    ignored  gets the field's name if the prompt itself closes the thinking, so no budget matters.

    Raises InvalidRequestError naming the field.
    """
    if budget is None or budget == NO_BUDGET:
        return unconstrained
    if budget < 0:
        raise InvalidRequestError(
            f"{NAME} must be at least 0, or {NO_BUDGET} for none, got {shown(budget)}", NAME
        )
    parser = loaded.reasoning
    if parser is None:
        raise InvalidRequestError(
            f"{NAME}: this server does not tell a model's thinking from its answer "
            "(--reasoning-parser)",
            NAME,
        )
    if conversation.opening == "closed":
        ignored.append(NAME)
        return unconstrained
    marker = parser.format.ends[0]
    end_ids = loaded.tokenizer.encode_inner(marker)
    if not end_ids or max(end_ids) >= loaded.engine.info.vocab_size:
        raise InvalidRequestError(f"{NAME}: this model has no tokens for {marker}", NAME)
    return partial(
        ThinkingBudget,
        budget,
        partial(parser.stage, conversation.opening),
        conversation.prompt.detokenizer,
        end_ids,
    )
