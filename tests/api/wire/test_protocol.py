"""Every field of a request works, or has one row in the table of features."""

from __future__ import annotations

import msgspec
import pytest

from pyserve.api.wire.pooling import EmbeddingRequest, PoolingFields
from pyserve.api.wire.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    SamplingFields,
    StreamOptions,
    TokenizeRequest,
)
from pyserve.api.wire.responses import ResponsesRequest
from pyserve.features import FEATURES, NO_EFFECT, fields_of

REQUESTS = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]


BUILT = frozenset(
    "model max_tokens max_completion_tokens n temperature top_p top_k min_p repetition_penalty "
    "presence_penalty frequency_penalty logit_bias seed stop stop_token_ids "
    "include_stop_str_in_output ignore_eos min_tokens skip_special_tokens stream stream_options "
    "priority cache_salt request_id best_of add_special_tokens messages prompt tokens echo "
    "truncate_prompt_tokens truncation_side add_generation_prompt continue_final_message "
    "chat_template chat_template_kwargs documents return_token_strs reasoning_effort "
    "tools tool_choice parallel_tool_calls functions function_call "
    "include_reasoning allowed_token_ids bad_words "
    "thinking_token_budget logprobs top_logprobs prompt_logprobs return_tokens_as_token_ids "
    "return_token_ids response_format structured_outputs guided_json guided_regex guided_choice "
    "guided_grammar guided_whitespace_pattern use_beam_search length_penalty "
    "return_prompt_text".split()
)


@pytest.mark.parametrize("request_type", REQUESTS)
def test_every_field_is_built_or_has_a_row(request_type: type[msgspec.Struct]) -> None:
    rows = fields_of(request_type)
    for name in request_type.__struct_fields__:
        assert (name in BUILT) + (name in rows) == 1, name
    assert set(rows) <= set(request_type.__struct_fields__)


def test_every_row_is_a_field_of_the_types_it_names() -> None:
    others = (SamplingFields, Message, ResponsesRequest, PoolingFields, EmbeddingRequest)
    types = {wire_type.__name__: wire_type for wire_type in (*REQUESTS, *others)}
    rows = [*NO_EFFECT, *(row for feature in FEATURES.values() for row in feature.fields)]
    seen = [(row.name, wire_type) for row in rows for wire_type in row.of]
    assert len(seen) == len(set(seen))
    for name, wire_type in seen:
        assert name in types[wire_type].__struct_fields__, (name, wire_type)
    fields = {name for request_type in REQUESTS for name in request_type.__struct_fields__}
    assert BUILT <= fields


def test_a_row_is_of_the_type_it_names() -> None:
    """The same name may work in one request and be refused in another."""
    assert fields_of(ChatRequest)["logits_processors"].neutral == ([],)
    assert "suffix" in fields_of(CompletionRequest) and "suffix" not in fields_of(ChatRequest)
    assert (
        not fields_of(Message) and not fields_of(DetokenizeRequest) and not fields_of(StreamOptions)
    )
