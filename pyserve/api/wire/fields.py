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
    "model": "A served name; by default the served model.",
    "messages": "The conversation, oldest message first.",
    "prompt": "A text, a list of token ids, or a list of either (at most "
    f"{MAX_SEQUENCES} prompts, each with its own choices).",
    "max_tokens": "The largest number of output tokens. If the prompt leaves less of the context, "
    "the header x-pyserve-clamped says how many are possible.",
    "max_completion_tokens": "The same as max_tokens; takes precedence if both are given.",
    "min_tokens": "Nothing ends the answer before it has so many tokens; at most max_tokens.",
    "n": f"The number of choices for each prompt: at most {MAX_SEQUENCES} in one request, and 1 if "
    "sampling is greedy.",
    "best_of": "The number of answers that are generated for each prompt; the choices are the n "
    "with the highest mean logprob. At least n; not with stream. With use_beam_search it is the "
    "width of the beam.",
    "use_beam_search": "Search for the most likely answers instead of sampling. The width of the "
    f"beam is best_of or n, at most {MAX_BEAM_WIDTH}. Not with stream, stop, penalties, biases or "
    "structured output.",
    "length_penalty": "With use_beam_search: the logprob of a beam is divided by the length of "
    "prompt and answer to this power.",
    "temperature": "0 is greedy sampling.",
    "top_k": "Sample only from so many most likely tokens; 0 and -1 keep all tokens.",
    "top_p": "Sample only from the most likely tokens whose probabilities add up to this value.",
    "min_p": "Drop tokens whose probability is less than this fraction of the most likely one's.",
    "repetition_penalty": "Values above 1 make tokens of the prompt and the answer less likely.",
    "logit_bias": "Token id -> value that is added to its logit.",
    "seed": "Requests with the same seed, parameters and prompt get the same answer; -1: no seed.",
    "stop": "Texts that end the answer and are left out of it; at most "
    f"{MAX_STOP_CHARS_IN_ALL} characters in all.",
    "stop_token_ids": "Token ids that end the answer, besides those of the model.",
    "allowed_token_ids": "The only tokens that may be sampled. If the model's EOS token is not one "
    "of them, the answer goes on to max_tokens.",
    "bad_words": "Words whose token sequences never appear in the answer; at most "
    f"{MAX_BAD_WORDS_CHARS} characters in all.",
    "response_format": "The form of the answer: text, a JSON object, JSON that is valid by a "
    "schema, or text with structural tags. A schema that cannot be enforced is an error, which "
    "names the part by its JSON pointer.",
    "structured_outputs": "The form of the whole answer: exactly one of json (a schema), "
    "json_object, regex, choice, grammar (Lark or GBNF) and structural_tag.",
    "strict": "In a tool: true enforces the schema of its arguments even if the model is free to "
    "call it or not. In the schema of an answer it has no effect, as that is always enforced.",
    "disable_any_whitespace": "Write JSON without white space. Otherwise each place may have one "
    "space, or one line break with its indentation.",
    "disable_additional_properties": "Allow no additional properties in objects whose schema does "
    "not mention them.",
    "whitespace_pattern": "A regular expression for the white space in JSON, of spaces, tabs and "
    "line breaks. If it has no upper limit, the limit is 32 characters.",
    "guided_json": "The same as structured_outputs.json.",
    "guided_regex": "The same as structured_outputs.regex.",
    "guided_choice": "The same as structured_outputs.choice.",
    "guided_grammar": "The same as structured_outputs.grammar.",
    "guided_whitespace_pattern": "The same as structured_outputs.whitespace_pattern, for "
    "guided_json.",
    "include_stop_str_in_output": "Keep the stop text at the end of the answer.",
    "ignore_eos": "Do not end the answer at the EOS token, but go on to max_tokens.",
    "stream": "Send the answer as server-sent events.",
    "stream_options": "Has no effect without stream.",
    "include_usage": "Send one more event with the usage before [DONE].",
    "continuous_usage_stats": "With include_usage: every event has the usage of its choice so far.",
    "echo": "Put the prompt before the answer; in a chat, the assistant's last message.",
    "truncate_prompt_tokens": "Keep only so many tokens of each prompt, at most the context. -1 "
    "keeps as many as leave room for max_tokens, or all if max_tokens fills the context.",
    "truncation_side": "left, the default, keeps the last tokens of a prompt, right the first.",
    "add_generation_prompt": "End the prompt with the text that begins an answer; true by default.",
    "continue_final_message": "Continue the last message instead of beginning a new one.",
    "chat_template": "A chat template for this request. Needs --trust-request-chat-template; its "
    "length, running time and output are limited.",
    "chat_template_kwargs": "Variables for the chat template.",
    "documents": "Documents for the chat template, if it shows any.",
    "reasoning_effort": "How much the model should think. Needs a chat template with the variable "
    "reasoning_effort or enable_thinking.",
    "thinking_token_budget": "The largest number of tokens of thinking, which is then ended; -1: "
    "no limit. Needs --reasoning-parser.",
    "include_reasoning": "false leaves the thinking out of the answer. Needs --reasoning-parser.",
    "tools": "The tools that the model may call. The chat template shows them to the model.",
    "tool_choice": "auto, the default, leaves it to the model whether it calls a tool. required or "
    "the name of a function makes it call one. none leaves the tools out of the prompt. "
    "allowed_tools shows only some of them.",
    "parallel_tool_calls": "false keeps only the first call of an answer.",
    "tool_calls": "The tool calls of an earlier answer.",
    "tool_call_id": "In a message with the role tool: the id of the call that it answers.",
    "return_token_strs": "Return the tokens also as they are written in the vocabulary.",
    "priority": "Requests with a lower value are run first. Needs --scheduling-policy priority.",
    "cache_salt": "Only requests with the same value share the prefix cache.",
    "request_id": "Becomes a part of the id of the answer.",
    "input": "A text of the user, or a list of items: messages, reasoning, tool calls, results of "
    "tool calls and references to items of stored responses. Items of other kinds are ignored.",
    "instructions": "A system message for this response only, not for those that build on it.",
    "max_output_tokens": "The largest number of output tokens, as max_tokens of a chat.",
    "text": "The form of the answer: text, a JSON object, or JSON that is valid by a schema.",
    "reasoning": "effort is the reasoning_effort of a chat. If summary is given, the thinking is "
    "returned as a summary.",
    "include": f"Only {LOGPROBS} has an effect.",
    "store": "false: do not store the response.",
    "previous_response_id": "The id of a stored response: continue its conversation.",
    "background": "Answer at once and generate without a connected client. Needs store.",
    "truncation": "auto cuts the beginning of a prompt that is too long.",
    "metadata": f"Returned unchanged; at most {MAX_PAIRS} entries.",
    "safety_identifier": "Returned unchanged in the response.",
    "prompt_cache_key": "Returned unchanged in the response. Prompts are cached with or without "
    "it.",
    "add_special_tokens": "Let the tokenizer add special tokens. By default true for a text and "
    "false for messages.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "system": "The system message: a text, or blocks of text.",
    "stop_sequences": "Texts that end the answer and are left out of it.",
    "thinking": "How the model thinks. If it is absent, the model is asked not to think, and "
    "thinking is not shown.",
    "output_config": "effort says how much to think; format holds a JSON schema for the answer.",
    "input_schema": "The JSON schema of the arguments, which every tool needs.",
    "defer_loading": "true shows the tool to the model only when a tool_reference names it.",
    "disable_parallel_tool_use": "true keeps only the first call of an answer.",
    "tool_use_id": "In a tool_result: the id of the call that it answers, which must come before "
    "it.",
    "is_error": "true: the result begins with Error: in the prompt.",
    "encoding_format": "float, the default, or base64 of little-endian float32 numbers.",
    "dimensions": "Keep only so many numbers of each vector, from its start. By default all.",
    "use_activation": "For embeddings: divide each vector by its length; the default is that of "
    "the model. For scores: false returns logits instead of numbers between 0 and 1.",
    "queries": "One query, or as many as there are documents. text_1 and data_1 are other names of "
    "this field.",
    "text_1": "The same as queries.",
    "data_1": "The same as queries.",
    "items": "The same as documents.",
    "text_2": "The same as documents.",
    "data_2": "The same as documents.",
    "instruction": "Says by what documents are judged; by default an instruction of the model.",
    "query": "The text that documents are compared with.",
    "top_n": "Return only so many of the best results; 0, the default, returns all.",
    "max_tokens_per_doc": "Use only so many tokens of each document, from its start; 0: no limit.",
    "return_documents": "false leaves the texts of the documents out of the results.",
    "signature": "In a thinking block: the signature that came with it. If the thinking itself was "
    "not shown, the signature restores it.",
}

_FUNCTION = {"properties": {"type": {"enum": ["function"]}}}
_IDS = {"type": "array", "items": {"type": "integer", **_ID}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_LISTED = {"type": "array", "minItems": 1, "maxItems": MAX_SEQUENCES}
_PROMPTS = [_TEXT, _IDS, {**_LISTED, "items": _TEXT}, {**_LISTED, "items": _IDS}]
_POOLED_CUT = {
    "description": "Keep only so many tokens of each text, at most the context; -1 is the whole "
    "context. Of a pair only the document is cut.",
    "anyOf": [{"type": "integer", "minimum": -1, "not": {"const": 0}}, {"type": "null"}],
    "default": None,
}
_POOLED_SIDE = {
    "description": "right, the default, keeps the first tokens of a text, left the last.",
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
                "description": DESCRIPTIONS["max_tokens"] + " 0 needs echo.",
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
                f"{MAX_SEQUENCES}. items, text_2 and data_2 are other names of this field.",
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
                "description": "In a thinking block: what the model thought.",
            },
        },
    },
    "ResultBlock": {"properties": _ANY_TYPE},
    "MessagesTool": {
        "properties": {
            "type": {
                "anyOf": [{"type": "string"}, {"type": "null"}],
                "description": "custom or absent; a tool of any other type is ignored.",
            }
        },
    },
    "MessagesToolChoice": {"properties": {"type": _one_of(TOOL_CHOICE_TYPES)}},
    "Thinking": {
        "properties": {
            "type": _one_of(THINKING_TYPES),
            "budget_tokens": {
                "anyOf": [{"type": "integer", "minimum": MIN_THINKING_TOKENS}, {"type": "null"}],
                "description": "The largest number of tokens of thinking, less than max_tokens.",
            },
            "display": {
                "anyOf": [_one_of(THINKING_DISPLAYS), {"type": "null"}],
                "description": "omitted returns the thinking only inside the signature.",
            },
        },
    },
    "OutputFormat": {"properties": {"type": _one_of(FORMAT_TYPES)}},
}  # fmt: skip
