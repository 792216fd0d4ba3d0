"""Shared by embeddings and scores: token ids -> a Job that generates nothing."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pyserve.api.endpoints.openai import check_priority, checked_name
from pyserve.api.endpoints.prompts import Truncation, check_total, truncation
from pyserve.api.generation.job import Ending, Job, Prompt
from pyserve.api.state import Loaded
from pyserve.api.wire.pooling import PoolingFields
from pyserve.errors import ContextError
from pyserve.params import POOLED
from pyserve.text.detokenizer import Detokenizer

NO_ENDING = Ending(stop=[], is_stop_kept=False, eos_token_id=None, min_tokens=0)
MIN_LENGTH = 1e-12  # smallest divisor when a vector is normalised, as in torch's normalize
WHOLE_CONTEXT = -1  # the value of truncate_prompt_tokens that stands for max_model_len


def read_truncation(body: PoolingFields, loaded: Loaded, ignored: list[str]) -> Truncation | None:
    """Read the fields of truncation; by default the beginning of each text is kept.

    ignored  collects the names of fields that have no effect.

    Raises InvalidRequestError naming the field.
    """
    max_model_len = loaded.engine.info.max_model_len
    if body.truncate_prompt_tokens is None and body.truncation_side is not None:
        ignored.append("truncation_side")
    side = body.truncation_side or "right"
    num_tokens = body.truncate_prompt_tokens
    if num_tokens == WHOLE_CONTEXT:  # nothing is generated, so the text may fill the whole context
        num_tokens = max_model_len
    settled = msgspec.structs.replace(body, truncate_prompt_tokens=num_tokens, truncation_side=side)
    return truncation(settled, max_model_len=max_model_len, max_tokens=0)


def check_fits(token_ids: list[int], name: str, index: int, max_model_len: int) -> None:
    """Raise ContextError if a text, at `index` in the field `name`, is longer than the context."""
    if len(token_ids) > max_model_len:
        raise ContextError(
            f"{name}[{index}] has {len(token_ids)} (truncate_prompt_tokens: -1 cuts it)",
            name,
            num_tokens=len(token_ids),
            max_model_len=max_model_len,
        )


def pooling_job(
    body: PoolingFields, loaded: Loaded, token_ids: Sequence[list[int]], *, name: str,
    ignored: list[str],
) -> Job:  # fmt: skip
    """Make the Job for texts that have been tokenised.

    name     the field with the texts, which errors name.
    ignored  names of fields that are already known to have no effect.

    Raises InvalidRequestError naming the field.
    """
    info = loaded.engine.info
    priority = check_priority(body.priority or 0)
    cache_salt = checked_name("cache_salt", body.cache_salt)
    for index, ids in enumerate(token_ids):
        check_fits(ids, name, index, info.max_model_len)
    check_total(sum(map(len, token_ids)), n=1, param=name)
    without_effect = {
        "priority": priority and not info.has_priorities,
        "cache_salt": cache_salt and not info.enable_prefix_caching,
    }
    detokenizer = Detokenizer(loaded.tokenizer, skip_special_tokens=True)
    return Job(
        prompts=[Prompt(ids, "", detokenizer) for ids in token_ids],
        params=[POOLED] * len(token_ids),
        ending=NO_ENDING,
        priority=priority,
        cache_salt=cache_salt,
        request_id=checked_name("request_id", body.request_id),
        ignored=[*ignored, *(name for name, is_so in without_effect.items() if is_so)],
    )
