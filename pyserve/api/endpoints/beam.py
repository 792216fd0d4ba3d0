"""The request fields of beam search, and the checks of fields that cannot be combined with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyserve.api.generation.job import BeamSearch, Prompt
from pyserve.api.wire.protocol import (
    MAX_BEAM_TOKENS,
    MAX_BEAM_WIDTH,
    MAX_LENGTH_PENALTY,
    SamplingFields,
)
from pyserve.client import Constraint
from pyserve.errors import InvalidRequestError
from pyserve.params import SamplingParams, shown

# Fields that only affect sampling: with beam search they are reported as ignored.
WITHOUT_EFFECT = ("temperature", "top_p", "top_k", "min_p", "seed")
# Fields that are refused with beam search -> the values, besides null, that do not use them.
REFUSED: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
}
# Fields that can make a constraint, which is refused too; the error names the first that is given.
CONSTRAINING = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "thinking_token_budget", "response_format", "tool_choice", "tools",
)  # fmt: skip


def read_beam(
    body: SamplingFields,
    *,
    width: int,
    make_constraint: Callable[[], Constraint | None],
    ignored: list[str],
) -> BeamSearch | None:
    """Read and check the fields of beam search; None if the request does not use it.

    width            number of beams: best_of, or n if best_of is not given.
    make_constraint  makes the constraint of an answer, or None; beam search allows none.
    ignored          collects the names of fields that have no effect.

    Raises InvalidRequestError naming the field.
    """
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    if not abs(penalty) <= MAX_LENGTH_PENALTY:
        raise InvalidRequestError(
            f"length_penalty must be in [-{MAX_LENGTH_PENALTY}, {MAX_LENGTH_PENALTY}], "
            f"got {shown(penalty)}",
            "length_penalty",
        )
    if not body.use_beam_search:
        if penalty != 1.0:
            ignored.append("length_penalty")
        return None
    for name, neutral in REFUSED.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            _refuse(name)
    if make_constraint() is not None:
        given = [name for name in CONSTRAINING if getattr(body, name, None) not in (None, "auto")]
        _refuse(given[0] if given else "tool_choice")
    if width > MAX_BEAM_WIDTH:
        name = "n" if body.best_of is None else "best_of"
        raise InvalidRequestError(
            f"{name} must be in [1, {MAX_BEAM_WIDTH}] with use_beam_search, got {width}", name
        )
    ignored += [name for name in WITHOUT_EFFECT if getattr(body, name) is not None]
    return BeamSearch(width, penalty)


def check_beam_work(
    beam: BeamSearch | None,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    limit_name: str,
) -> None:
    """Refuse a beam search that could process more than MAX_BEAM_TOKENS tokens.

    limit_name  the field that limits the output, which the InvalidRequestError names.
    """
    if beam is None:
        return
    num_tokens = sum(
        beam.width * own.max_tokens * (len(prompt.token_ids) + own.max_tokens)
        for prompt, own in zip(prompts, params, strict=True)
    )
    if num_tokens > MAX_BEAM_TOKENS:
        longest = max(own.max_tokens for own in params)
        raise InvalidRequestError(
            f"a beam search of width {beam.width} for {longest} tokens would read {num_tokens} "
            f"tokens of prompts and beams, the limit is {MAX_BEAM_TOKENS}: give a smaller "
            f"{limit_name}",
            limit_name,
        )


def _refuse(name: str) -> None:
    raise InvalidRequestError(f"{name} cannot be combined with use_beam_search", name)
