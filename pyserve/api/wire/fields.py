"""Bounds and descriptions of request fields for /openapi.json, beyond what their types express.

The endpoints check the ranges themselves, with better error messages than a schema could give. The
bounds here use the same constants, and a test sends values on both sides of each.
"""

from __future__ import annotations

from typing import Any

from pyserve.api.wire.messages import (
    FORMAT_TYPES,
    MIN_THINKING_TOKENS,
    THINKING_DISPLAYS,
    THINKING_TYPES,
    TOOL_CHOICE_TYPES,
    TURN_ROLES,
)
from pyserve.api.wire.pooling import ENCODINGS
from pyserve.api.wire.protocol import (
    EFFORTS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS_CHARS,
    MAX_BEAM_WIDTH,
    MAX_DOCUMENTS,
    MAX_LENGTH_PENALTY,
    MAX_MESSAGES,
    MAX_N,
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    MAX_SEQUENCES,
    MAX_STOP_CHARS,
    MAX_STOP_CHARS_IN_ALL,
    MAX_STOP_STRINGS,
    MAX_TEMPLATE_CHARS,
    MAX_TEMPLATE_KWARGS,
    ROLES,
)
from pyserve.api.wire.responses import LOGPROBS, MAX_LABEL_CHARS, MAX_PAIRS, TRUNCATIONS
from pyserve.api.wire.tools import ALLOWED_MODES, MAX_TOOLS, TOOL_CHOICES
from pyserve.limits import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, TOP_LOGPROBS
from pyserve.params import (
    INT64_MAX,
    INT64_MIN,
    MAX_REPETITION_PENALTY,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from pyserve.text.chat_messages import PART_TYPES

Schema = dict[str, Any]

_ID = {"minimum": 0, "maximum": 2**31 - 1}
_LOGPROBS = {"minimum": 0, "maximum": TOP_LOGPROBS}
_NAME = {"string": {"minLength": 1, "maxLength": MAX_NAME_CHARS}}
_STOP = {"minLength": 1, "maxLength": MAX_STOP_CHARS}
# Name of a field -> JSON type of its value -> keywords added to the schema of that type.
BOUNDS: dict[str, dict[str, Schema]] = {
    "max_tokens": {"integer": {"minimum": 1}},
    "max_completion_tokens": {"integer": {"minimum": 1}},
    "min_tokens": {"integer": {"minimum": 0}},
    "n": {"integer": {"minimum": 1, "maximum": MAX_N}},
    "best_of": {"integer": {"minimum": 1, "maximum": MAX_N}},
    "length_penalty": {"number": {"minimum": -MAX_LENGTH_PENALTY, "maximum": MAX_LENGTH_PENALTY}},
    "temperature": {"number": {"minimum": 0, "maximum": 2}},
    "top_p": {"number": {"exclusiveMinimum": 0, "maximum": 1}},
    "top_k": {"integer": {"minimum": -1, "maximum": MAX_TOP_K}},
    "min_p": {"number": {"minimum": 0, "maximum": 1}},
    "repetition_penalty": {
        "number": {"minimum": MIN_REPETITION_PENALTY, "maximum": MAX_REPETITION_PENALTY}
    },
    "presence_penalty": {"number": {"minimum": -2, "maximum": 2}},
    "frequency_penalty": {"number": {"minimum": -2, "maximum": 2}},
    "seed": {"integer": {"minimum": INT64_MIN, "maximum": INT64_MAX}},
    "logprobs": {"integer": _LOGPROBS},
    "top_logprobs": {"integer": _LOGPROBS},
    "prompt_logprobs": {"integer": _LOGPROBS},
    "priority": {"integer": {"minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY}},
    "cache_salt": _NAME,
    "request_id": _NAME,
    "stop": {
        "string": _STOP,
        "array": {"maxItems": MAX_STOP_STRINGS, "items": {"type": "string", **_STOP}},
    },
    "stop_token_ids": {
        "array": {"maxItems": MAX_STOP_TOKEN_IDS, "items": {"type": "integer", **_ID}}
    },
    "allowed_token_ids": {"array": {"minItems": 1, "items": {"type": "integer", **_ID}}},
    "bad_words": {
        "array": {
            "maxItems": MAX_BAD_WORDS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_CHARS},
        }
    },
    "logit_bias": {
        "object": {
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    },
    "messages": {"array": {"minItems": 1, "maxItems": MAX_MESSAGES}},
    "tools": {"array": {"maxItems": MAX_TOOLS}},
    "tool_choice": {"string": {"enum": list(TOOL_CHOICES)}},
    "documents": {"array": {"maxItems": MAX_DOCUMENTS}},
    "chat_template_kwargs": {"object": {"maxProperties": MAX_TEMPLATE_KWARGS}},
    "truncate_prompt_tokens": {"integer": {"minimum": -1, "not": {"const": 0}}},
    "truncation_side": {"string": {"enum": ["left", "right"]}},
    "reasoning_effort": {"string": {"enum": list(EFFORTS)}},
    "thinking_token_budget": {"integer": {"minimum": -1}},
    "role": {"string": {"enum": list(ROLES)}},
    "type": {"string": {"enum": list(PART_TYPES)}},
    "max_output_tokens": {"integer": {"minimum": 1}},
    "truncation": {"string": {"enum": list(TRUNCATIONS)}},
    "safety_identifier": {"string": {"maxLength": MAX_LABEL_CHARS}},
    "prompt_cache_key": {"string": {"maxLength": MAX_LABEL_CHARS}},
    "tokens": {"array": {"items": {"type": "integer", **_ID}}},
    "chat_template": {"string": {"maxLength": MAX_TEMPLATE_CHARS}},
    "encoding_format": {"string": {"enum": list(ENCODINGS)}},
    "dimensions": {"integer": {"minimum": 1}},
    "top_n": {"integer": {"minimum": 0}},
    "max_tokens_per_doc": {"integer": {"minimum": 0}},
}
DESCRIPTIONS = {
    "model": "A served name; the served model where it is absent.",
    "messages": "The conversation, oldest message first.",
    "prompt": "A text, token ids, or a list of either (at most "
    f"{MAX_SEQUENCES} prompts, each with its own choices).",
    "max_tokens": "Output tokens at most, and no more than the prompt leaves of the context; where "
    "that is less, the header x-pyserve-clamped says how many.",
    "max_completion_tokens": "As max_tokens, and before it where both are given.",
    "min_tokens": "No stop before so many output tokens; at most max_tokens.",
    "n": f"Choices for each prompt; at most {MAX_SEQUENCES} in one request, 1 where greedy.",
    "best_of": "At least n: so many are generated for each prompt, and the n with the highest mean "
    "logprob are the choices; not with stream. With use_beam_search the width.",
    "use_beam_search": "Search for the most likely answers instead of sampling, with best_of or n "
    f"beams, at most {MAX_BEAM_WIDTH}. Not with stream, stop, penalties, biases or anything that "
    "says what an answer must be.",
    "length_penalty": "Of use_beam_search: the logprob of a beam is divided by the length of "
    "prompt and answer to this power.",
    "temperature": "0 is greedy.",
    "top_k": "The so many most likely tokens; 0 and -1 keep all.",
    "top_p": "The most likely tokens whose probability reaches so much.",
    "min_p": "Drops tokens less likely than so much of the most likely one.",
    "repetition_penalty": "Above 1 against tokens of prompt and output.",
    "logit_bias": "Token id -> value added to its logit.",
    "seed": "The same seed, parameters and prompt give the same answer; -1 is none.",
    "stop": "Ends the answer, which does not hold it; at most "
    f"{MAX_STOP_CHARS_IN_ALL} characters in all.",
    "stop_token_ids": "Ids that end the answer, beside the model's own.",
    "allowed_token_ids": "No other token is sampled: without the model's EOS among them the answer "
    "goes on to max_tokens.",
    "bad_words": "Words whose tokens never come one after another in the answer; at most "
    f"{MAX_BAD_WORDS_CHARS} characters in all.",
    "response_format": "The answer is text, a JSON object, JSON valid by a schema, or text with "
    "structural tags. What cannot be enforced is refused by its JSON pointer.",
    "structured_outputs": "One of json (a schema), json_object, regex, choice, grammar (Lark or "
    "GBNF) and structural_tag: what the answer is, in whole.",
    "strict": "A schema is enforced either way.",
    "disable_any_whitespace": "JSON without white space; else at most a space, or a line break "
    "with its indentation, at each place.",
    "disable_additional_properties": "Of objects whose schema does not say so.",
    "whitespace_pattern": "Of spaces, tabs and line breaks; at most 32 where it has no end.",
    "guided_json": "As structured_outputs.json.",
    "guided_regex": "As structured_outputs.regex.",
    "guided_choice": "As structured_outputs.choice.",
    "guided_grammar": "As structured_outputs.grammar.",
    "guided_whitespace_pattern": "As structured_outputs.whitespace_pattern, with guided_json.",
    "include_stop_str_in_output": "Leave in the answer what ended it.",
    "ignore_eos": "Go on to max_tokens.",
    "stream": "Answer as server-sent events.",
    "stream_options": "Of no effect without stream.",
    "include_usage": "One more frame, before [DONE], with the usage.",
    "continuous_usage_stats": "With include_usage: every frame has the usage of its choice so far.",
    "echo": "Show the prompt before the answer; in a chat, the assistant's last message.",
    "truncate_prompt_tokens": "Keep so many tokens of each prompt, at most the context; -1: as "
    "many as leave room for max_tokens, all where that fills the context.",
    "truncation_side": "left, the default, keeps a prompt's last tokens, right its first.",
    "add_generation_prompt": "End the prompt with what begins an answer; the default is true.",
    "continue_final_message": "The answer continues the last message.",
    "chat_template": "Only with --trust-request-chat-template; bounded in length, time and output.",
    "chat_template_kwargs": "Variables for the chat template.",
    "documents": "For chat templates that show documents.",
    "reasoning_effort": "For chat templates with the variable reasoning_effort or enable_thinking.",
    "thinking_token_budget": "Behind so many tokens of thinking it is closed; -1: never. Only with "
    "--reasoning-parser.",
    "include_reasoning": "false: what the model thinks is left out; only with --reasoning-parser.",
    "tools": "What the model may call; shown to it by the chat template.",
    "tool_choice": "auto is the default; required and a function's name make the answer a "
    "call; none keeps tools out of the prompt; allowed_tools shows some of them alone.",
    "parallel_tool_calls": "false keeps the first call only.",
    "tool_calls": "Calls of an earlier answer.",
    "tool_call_id": "Of a message with the role tool: the call that it answers.",
    "return_token_strs": "Also the tokens as they stand in the vocabulary.",
    "priority": "Lower goes first; only with --scheduling-policy priority.",
    "cache_salt": "The prefix cache is shared only by requests with the same one.",
    "request_id": "Becomes part of the answer's id.",
    "input": "What the user says, or items: messages, thinking, calls of tools and what they gave, "
    "references to items of stored responses. Those of other kinds are passed over.",
    "instructions": "What the system says first; not carried over to the next response.",
    "max_output_tokens": "Output tokens at most, as max_tokens of a chat.",
    "text": "What the answer's text is: text, a JSON object, or JSON valid by a schema.",
    "reasoning": "effort as reasoning_effort of a chat; with a summary, what the model thinks is "
    "told as one.",
    "include": f"{LOGPROBS} alone has an effect.",
    "store": "false: the response cannot be asked for again.",
    "previous_response_id": "Go on with a stored response and all those before it.",
    "background": "Answer at once and generate without a client; needs store.",
    "truncation": "auto cuts the beginning of a prompt that is too long.",
    "metadata": f"Shown again in the response; at most {MAX_PAIRS} entries.",
    "safety_identifier": "Shown again in the response.",
    "prompt_cache_key": "Shown again in the response; prompts are cached either way.",
    "add_special_tokens": "Let the tokenizer add its own; true for text, false for messages.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "system": "What the model is told first; a text, or blocks of text.",
    "stop_sequences": "As stop in a chat: each ends the answer, which does not hold it.",
    "thinking": "Without it the model is asked not to think, and what it thinks is not shown.",
    "output_config": "effort: how much to think; format: a JSON schema for the answer.",
    "input_schema": "JSON schema of the arguments; a tool without one is refused.",
    "defer_loading": "true: shown to the model once a tool_reference names it.",
    "disable_parallel_tool_use": "true keeps the first call only.",
    "tool_use_id": "Of a tool_result: the call that it answers, which must stand before it.",
    "is_error": "true: the result begins with Error: in the prompt.",
    "encoding_format": "float, the default, or base64: of float32, the lowest byte first.",
    "dimensions": "Keep so many numbers of each vector, the first ones, at most all of them.",
    "use_activation": "Of embeddings: divide them by their length; as the model says where it is "
    "absent. Of scores false gives logits in place of numbers between 0 and 1.",
    "queries": "One or as many as there are documents; text_1 and data_1 are the same field.",
    "text_1": "As queries.",
    "data_1": "As queries.",
    "items": "As documents.",
    "text_2": "As documents.",
    "data_2": "As documents.",
    "instruction": "What a document is to be judged by; the model has one of its own.",
    "query": "What is looked for.",
    "top_n": "So many of the results, the best ones; 0, the default, is all.",
    "max_tokens_per_doc": "Of a longer document the first so many tokens count; 0 is any number.",
    "return_documents": "false leaves their texts out of the results.",
    "signature": "Of a thinking: what came with it; it brings back a thinking that was not shown.",
}

_FUNCTION = {"properties": {"type": {"enum": ["function"]}}}
_IDS = {"type": "array", "items": {"type": "integer", **_ID}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_LISTED = {"type": "array", "minItems": 1, "maxItems": MAX_SEQUENCES}
_PROMPTS = [_TEXT, _IDS, {**_LISTED, "items": _TEXT}, {**_LISTED, "items": _IDS}]
_POOLED_CUT = {
    "description": "Keep so many tokens of each text, at most the context; -1: as many as that "
    "has. Of a pair the document is cut.",
    "anyOf": [{"type": "integer", "minimum": -1, "not": {"const": 0}}, {"type": "null"}],
    "default": None,
}
_POOLED_SIDE = {
    "description": "right, the default, keeps the beginning of a text, left its end.",
    "anyOf": [{"type": "string", "enum": ["left", "right"]}, {"type": "null"}], "default": None,
}  # fmt: skip
_POOLED = {"truncate_prompt_tokens": _POOLED_CUT, "truncation_side": _POOLED_SIDE}
_ANY_TYPE = {"type": {"type": "string"}}  # the allowed types depend on where the block stands


def _one_of(values: tuple[str, ...]) -> Schema:
    return {"type": "string", "enum": list(values)}


# Name of a wire type -> what replaces parts of its schema; properties are replaced one by one.
REPLACED: dict[str, Schema] = {
    "CompletionRequest": {
        "properties": {
            "prompt": {
                "description": DESCRIPTIONS["prompt"],
                "anyOf": _PROMPTS,
            },
            "max_tokens": {
                "description": DESCRIPTIONS["max_tokens"] + " 0 only with echo.",
                "anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}],
                "default": 16,
            },
        },
        "required": ["prompt"],
    },
    "EmbeddingRequest": {
        "properties": {
            **_POOLED,
            "input": {
                "description": "A text, token ids, or a list of either, at most "
                f"{MAX_SEQUENCES} in all.",
                "anyOf": _PROMPTS,
            },
        },
        "required": ["input"],
    },
    "ScoreRequest": {
        "properties": {
            **_POOLED,
            "documents": {
                "description": "One or as many as there are queries, at most "
                f"{MAX_SEQUENCES}; items, text_2 and data_2 are the same field.",
                "anyOf": [
                    {"type": "string"}, {**_LISTED, "items": {"type": "string"}}, {"type": "null"},
                ],
                "default": None,
            },
        },
    },
    "RerankRequest": {
        "properties": {
            **_POOLED,
            "documents": {
                "description": "Texts, or objects with a text.",
                **_LISTED,
                "items": {
                    "anyOf": [
                        {"type": "string"}, {"$ref": "#/components/schemas/TextDocument"},
                    ],
                },
            },
        },
    },
    "TextDocument": {"properties": {"text": {"type": "string"}}},
    "TokenizeRequest": {
        "oneOf": [
            {"required": [name], "properties": {name: {"type": kind}}}
            for name, kind in (("prompt", "string"), ("messages", "array"))
        ],
    },
    "Tool": _FUNCTION,
    "ToolChoice": {"properties": {"type": {"enum": ["function", "allowed_tools"]}}},
    "AllowedTools": {"properties": {"mode": {"enum": list(ALLOWED_MODES)}}},
    "MessageCall": {"properties": {"type": {"enum": ["function", None]}}},
    "Message": {
        "anyOf": [  # only a message of the assistant may have no content
            {"properties": {"role": {"const": "assistant"}}},
            {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
        ],
    },
    "ContentPart": {
        "anyOf": [
            {"properties": {"type": {"const": kind}, kind: {"type": "string"}}, "required": [kind]}
            for kind in PART_TYPES
        ],
    },
    "Turn": {"properties": {"role": _one_of(TURN_ROLES)}},
    "Block": {
        "properties": {
            **_ANY_TYPE,
            "thinking": {
                "anyOf": [{"type": "string"}, {"type": "null"}], "default": None,
                "description": "Of a thinking: what the model thought.",
            },
        },
    },
    "ResultBlock": {"properties": _ANY_TYPE},
    "MessagesTool": {
        "properties": {
            "type": {
                "anyOf": [{"type": "string"}, {"type": "null"}],
                "description": "custom, or none; a tool of any other type is left out.",
            }
        },
    },
    "MessagesToolChoice": {"properties": {"type": _one_of(TOOL_CHOICE_TYPES)}},
    "Thinking": {
        "properties": {
            "type": _one_of(THINKING_TYPES),
            "budget_tokens": {
                "anyOf": [{"type": "integer", "minimum": MIN_THINKING_TOKENS}, {"type": "null"}],
                "description": "Less than max_tokens.",
            },
            "display": {
                "anyOf": [_one_of(THINKING_DISPLAYS), {"type": "null"}],
                "description": "omitted: the thinking is in the signature alone.",
            },
        },
    },
    "OutputFormat": {"properties": {"type": _one_of(FORMAT_TYPES)}},
}  # fmt: skip
