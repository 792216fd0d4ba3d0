"""Hostile JSON: request bodies with wrong fields, and bodies that are no JSON at all.

Bodies are made as text, not from objects: duplicate keys, NaN, 1e999, lone surrogates and numbers
of a thousand digits exist only there.
"""

from __future__ import annotations

import random

MESSAGES = '[{"role":"user","content":"Hello!"}]'
BASES = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": "2"},
    "/v1/completions": {"prompt": '"Hello"', "max_tokens": "2"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": "2"},
    "/tokenize": {"prompt": '"Hello"'},
    "/detokenize": {"tokens": "[5,6,7]"},
}

_BIG = "1" * 400
_NOT_A_NUMBER = ('"x"', "[]", "{}", "true", "NaN", "Infinity", "-Infinity", "1e999", "-1e999")
_NOT_A_COUNT = (*_NOT_A_NUMBER, "1.5", "1e-5", "-" + _BIG, str(-(2**63) - 1), '"1"', '"1.0"')
_NOT_AN_INT = (*_NOT_A_COUNT, _BIG, str(2**64))
_NOT_A_BOOL = ('"true"', "1", "0", "[]", "{}", "1e999", "NaN")
_NOT_TEXT = ("1", "true", "[]", "{}", "1e999", r'"\ud800x"', r'"\udc00\ud800"')
_NOT_IDS = ("1", '"x"', "{}", "[null]", '["x"]', "[1.5]", "[-1]", f"[{2**31}]", f"[{2**64}]",
            f"[{_BIG}]", "[[1]]", "[true]", "[1e999]", "[99999999]")  # fmt: skip

# Values that no version may accept: 400, whatever stands beside them.
REFUSED: dict[str, tuple[str, ...]] = {
    "temperature": (*_NOT_A_NUMBER, "-1", "-1e-9", "2.1", "1e308", str(2**64), _BIG),
    "top_p": (*_NOT_A_NUMBER, "0", "-0.1", "1.1", "1e308"),
    "top_k": (*_NOT_AN_INT, "-2", str(2**31), str(2**63)),
    "min_p": (*_NOT_A_NUMBER, "-0.1", "1.1"),
    "repetition_penalty": (*_NOT_A_NUMBER, "0", "-1", "1e300"),
    "presence_penalty": (*_NOT_A_NUMBER, "-2.1", "2.1"),
    "frequency_penalty": (*_NOT_A_NUMBER, "-2.1", "2.1"),
    "max_tokens": (*_NOT_A_COUNT, "-1"),
    "min_tokens": (*_NOT_AN_INT, "-1", "3", "1000000000"),
    "n": (*_NOT_AN_INT, "0", "-1", "129", "1000000000", str(2**31)),
    "seed": (*_NOT_AN_INT,),
    "stop": ("1", "{}", "true", "[1]", '[""]', '""', '"' + "x" * 2000 + '"', "[[]]",
             "[" + ",".join(['"x"'] * 65) + "]", "[" + ",".join(['"x"'] * 5000) + "]",
             r'"\ud800"'),
    "stop_token_ids": (*_NOT_IDS, "[" + ",".join(map(str, range(100))) + "]"),
    "logit_bias": ("1", '"x"', '[]', '{"x":1}', '{"-1":1}', '{"1.5":1}', '{"5":"x"}', '{"5":101}',
                   '{"5":-101}', '{"5":NaN}', '{"5":1e999}', '{"99999999":1}', '{"٣":1}', '{"":1}',
                   '{"0x5":1}', "{" + ",".join(f'"{i}":1' for i in range(400)) + "}",
                   '{"' + "9" * 5000 + '":1}', '{"5":null}', '{"5":[]}'),
    "stream": (*_NOT_A_BOOL,),
    "ignore_eos": (*_NOT_A_BOOL,),
    "skip_special_tokens": (*_NOT_A_BOOL,),
    "include_stop_str_in_output": (*_NOT_A_BOOL,),
    "add_special_tokens": (*_NOT_A_BOOL,),
    "stream_options": ("1", '"x"', "[]", '{"include_usage":"x"}', '{"include_usage":1}'),
    "priority": (*_NOT_AN_INT,),
    "cache_salt": _NOT_TEXT,
    "request_id": _NOT_TEXT,
    "user": _NOT_TEXT,
    "guided_json": ("1", "[]", '"x"', '{"type":"x"}', '{"$ref":"#/nowhere"}'),
    "guided_regex": ("1", '"("', '"a{1,999999999}"', '"(?=a)b"', "[]"),
    "guided_choice": ("1", '"x"', "[1]", "[null]"),
    "guided_grammar": ("1", '"%%%"', '"root ::= nowhere"', "[]"),
    "use_beam_search": ("1", "[]"),
    "length_penalty": _NOT_A_NUMBER,
    "return_token_ids": _NOT_A_BOOL,
    "return_tokens_as_token_ids": _NOT_A_BOOL,
    "truncate_prompt_tokens": (*_NOT_A_COUNT, "-2"),
    "guided_whitespace_pattern": ("1", "[]"),
    "bad_words": ("1", "[1]", '[""]', "{}"),
    "allowed_token_ids": _NOT_IDS,
    "kv_transfer_params": ("1", '{"a":1}'),
    "logits_processors": ('["os.system"]', "1"),
    "prompt_logprobs": ('"x"', "-5", "1e999", _BIG),
    "response_format": ("1", '{"type":"x"}', "{}", '{"type":1}', '{"type":"json_schema"}',
                        '{"type":"json_schema","json_schema":{"schema":{"type":"x"}}}',
                        '{"type":"json_schema","json_schema":1}', '{"type":"structural_tag"}'),
    "structured_outputs": ("1", "[]", '{"regex":"("}', '{"regex":"a","choice":["b"]}',
                           '{"choice":[]}', '{"json":1}', '{"grammar":"%%%"}'),
}  # fmt: skip
CHAT_REFUSED: dict[str, tuple[str, ...]] = {
    "messages": ("null", "1", '"x"', "{}", "[]", "[1]", "[null]", "[[]]", "[{}]", '[{"role":1}]',
                 '[{"role":"user","content":1}]', '[{"role":"user","content":[1]}]',
                 '[{"role":"user","content":[{"type":"image_url","image_url":{"url":"file:///"}}]}]',
                 '[{"role":"user","content":[{"type":"text","text":1}]}]', '[{"content":"x"}]',
                 '[{"role":"user","content":[{"type":"input_audio"}]}]', '[{"role":null}]',
                 r'[{"role":"user","content":"\ud800"}]', '[{"role":"' + "x" * 3000 + '"}]',
                 '[{"role":"wizard","content":"x"}]', "[" + ",".join(['{"role":"user"}'] * 5000)
                 + "]", '[{"role":"user","content":"' + "word " * 5000 + '"}]'),
    "max_completion_tokens": (*_NOT_A_COUNT, "-1"),
    "logprobs": ('"x"', "1", "[]"),
    "top_logprobs": ('"x"', "-1", "1000000", "1.5", _BIG),
    "tools": ("1", '"x"', "{}", '[{"type":"function","function":{"name":"f"}}]', "[1]"),
    "tool_choice": ("1", '"required"', '{"type":"function","function":{"name":"f"}}'),
    "chat_template": ("1", '"{{ 1/0 }}"', '"{% for i in range(10**9) %}x{% endfor %}"',
                      "\"{{ ''.__class__.__mro__[1].__subclasses__() }}\"",
                      '"{% include \'x\' %}"'),
    "chat_template_kwargs": ("1", '"x"', "[]"),
    "documents": ('"x"', '[{"a":1}]'),
    "include_reasoning": _NOT_A_BOOL,
    "thinking_token_budget": (*_NOT_A_COUNT, "-2"),
    "reasoning_effort": ("1", "[]", "{}"),
    "parallel_tool_calls": _NOT_A_BOOL,
    "add_generation_prompt": (*_NOT_A_BOOL,),
    "continue_final_message": (*_NOT_A_BOOL,),
}  # fmt: skip
PROMPT_REFUSED: dict[str, tuple[str, ...]] = {
    "prompt": ("null", "1", "{}", "true", "[]", "[[]]", '[""]', '""', "[null]", '[1,"x"]',
               '["x",1]', "[[1],2]", "[[1],null]", *_NOT_IDS[5:10], '"' + "word " * 5000 + '"',
               "[" + ",".join(["5"] * 20_000) + "]", "[" + ",".join(['"x"'] * 3000) + "]",
               r'"\ud800"', "[[[1]]]"),
    "suffix": ('"x"', "1"),
    "echo": _NOT_A_BOOL,
    "logprobs": ('"x"', "-2", "1000000", "1.5", "true"),
    "best_of": ('"x"', "129", "0", _BIG),
}  # fmt: skip
TOKENIZE_REFUSED: dict[str, tuple[str, ...]] = {
    "prompt": ("1", "[]", "{}", "true", "null", r'"\ud800"'),
    "messages": ("1", "[]", '"x"', MESSAGES),  # beside a prompt: one of them too many
    "add_special_tokens": _NOT_A_BOOL,
}
DETOKENIZE_REFUSED: dict[str, tuple[str, ...]] = {"tokens": ("null", *_NOT_IDS)}
_TURN = '[{"role":"user","content":[%s]}]'
_ANSWERED = (
    '[{"role":"user","content":"x"},{"role":"assistant","content":[%s]},'
    '{"role":"user","content":[%s]}]'
)
_USE = '{"type":"tool_use","id":"a","name":"f","input":{}}'
# Blocks of /v1/messages where they may not stand, whose ids do not match, or that hold too much.
ANTHROPIC_REFUSED: dict[str, tuple[str, ...]] = {
    "messages": (
        "1", '"x"', "{}", "null", "[]", "[1]", "[{}]", '[{"role":"user"}]', MESSAGES[:-1] + ",0]",
        '[{"role":"tool","content":"x"}]', '[{"role":"user","content":null}]', _TURN % "",
        *(_TURN % block for block in (
            "1", "{}", '{"type":1}', '{"type":"x"}', '{"type":"text"}', '{"type":"text","text":1}',
            '{"type":"image"}', '{"type":"document","source":{"type":"base64","data":"AA=="}}',
            _USE, '{"type":"thinking","thinking":"x"}', '{"type":"server_tool_use"}',
            '{"type":"tool_result"}', '{"type":"tool_result","tool_use_id":"a","content":"x"}',
            r'{"type":"text","text":"\ud800"}',
        )),
        '[{"role":"user","content":"x"},{"role":"assistant","content":[' + _USE + "]}]",
        *(_ANSWERED % (use, block) for use, block in (
            (_USE, '{"type":"tool_result","tool_use_id":"b"}'),
            (_USE, '{"type":"tool_result","tool_use_id":"a","content":[{"type":"image"}]}'),
            (_USE, '{"type":"tool_result","tool_use_id":"a","content":{"type":"text"}}'),
            (_USE, '{"type":"tool_result","tool_use_id":"a","is_error":"x"}'),
            ('{"type":"tool_use","id":"","name":"f"}', '{"type":"text","text":"x"}'),
            ('{"type":"tool_use","id":"a","name":"f","input":[]}', '{"type":"text","text":"x"}'),
            ('{"type":"tool_use","id":"a","name":"f","input":{"a":' + _BIG + "}}",
             '{"type":"text","text":"x"}'),
            ('{"type":"tool_use","id":"a","name":"f","input":' + '{"a":' * 80 + "1" + "}" * 81,
             '{"type":"text","text":"x"}'),
            ('{"type":"thinking","thinking":"","signature":"pyserve:%"}',
             '{"type":"text","text":"x"}'),
        )),
    ),
    "max_tokens": (*_NOT_A_COUNT, "-1", "0", "null"),
    "system": ("1", "{}", "[1]", '[{"type":"image"}]', '[{"type":"text"}]'),
    "thinking": ("1", '"enabled"', "{}", '{"type":"x"}', '{"type":"enabled"}',
                 '{"type":"enabled","budget_tokens":1023}',
                 '{"type":"enabled","budget_tokens":1024}',  # which is more than max_tokens
                 '{"type":"enabled","budget_tokens":' + _BIG + "}",
                 '{"type":"adaptive","display":"x"}'),
    "output_config": ("1", '{"effort":"x"}', '{"effort":1}', '{"format":{}}',
                      '{"format":{"type":"x"}}', '{"format":{"type":"json_schema"}}',
                      '{"format":{"type":"json_schema","schema":{"type":"x"}}}'),
    "tool_choice": ("1", '"auto"', "{}", '{"type":"x"}', '{"type":"any"}', '{"type":"tool"}',
                    '{"type":"tool","name":"x"}'),
    "tools": ("1", "{}", "[1]", '[{"name":"a"}]', '[{"input_schema":{}}]',
              '[{"name":"a b","input_schema":{}}]', '[{"name":"a","input_schema":1}]',
              '[{"name":"a","input_schema":{}},{"name":"a","input_schema":{}}]',
              "[" + ",".join(['{"type":"x"}'] * 1025) + "]"),
    "stop_sequences": ("1", '"x"', "{}", "[1]", '[""]', "[" + ",".join(['"x"'] * 65) + "]"),
    "chat_template_kwargs": ("1", "[]", '{"messages":1}'),
    **{name: REFUSED[name] for name in (
        "temperature", "top_p", "top_k", "stream", "cache_salt",
    )},
}  # fmt: skip
REFUSED_BY_PATH = {
    "/v1/messages": ANTHROPIC_REFUSED,
    "/v1/chat/completions": {**REFUSED, **CHAT_REFUSED},
    "/v1/completions": {**REFUSED, **PROMPT_REFUSED},
    "/tokenize": TOKENIZE_REFUSED,
    "/detokenize": DETOKENIZE_REFUSED,
}

# Put into any field: whether it is legal there is not known here, only that it may not hurt.
WEIRD = ("null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e308", "5e-324", "1e999",
         "-1e999",
         "NaN", "-Infinity", str(2**31), str(2**63), str(2**64), _BIG, '""', '" "', '"null"',
         '"%s%n"',
         r'"\ud800"', r'"\ud83d\ude00"', r'"\u0000"', r'"\uffff\ufeff\u202e"',
         '"' + "a" * 5000 + '"',
         '"é\U0001f600"', r'"\r\nX-Injected: 1"', '"\x7f"', '"../../etc/passwd"', '"<script>"',
         "[]",
         "[[]]", "[null]", '[1,"x",{}]', "[1e999]", "{}", '{"a":{}}', '{"__proto__":1}', '{"":""}',
         '{"a":1,"a":2}', "[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40,
         "[" * 3000 + "]" * 3000,
         "[" + "0," * 999 + "0]", '"{{ 7*7 }}"', "1" + "0" * 5000, "0." + "0" * 3000 + "1", "-0",
         "1E+2", '"\\ud83d"', '"\\/\\b\\f"', r'"\u0041"')  # fmt: skip
UNKNOWN_NAMES = ("x", "", "__class__", "constructor", r"\u0000", r"\ud800", "a" * 3000, "é",
                 "temperature ",
                 r"\r\nX-Injected: 1", "Temperature", "model.x", "max-tokens", "😀", "$ref",
                 "self")  # fmt: skip
# Legal values of these can be long work: such a case is hung up on.
COSTLY = frozenset(("max_tokens", "max_completion_tokens", "n", "best_of", "ignore_eos", "prompt"))


def chat_body(**fields: str) -> bytes:
    """A good chat request; `fields` are raw JSON."""
    return _join([("messages", MESSAGES), *fields.items()])


def hostile_fields(rng: random.Random, path: str) -> tuple[bytes, str, tuple[int, ...], bool]:
    """Body, what is wrong with it, the statuses it may get (none: any), and if it may be costly."""
    fields = list(BASES[path].items())
    refused = REFUSED_BY_PATH[path]
    if rng.random() < 0.6:
        name = rng.choice(list(refused))
        value = rng.choice(refused[name])
        fields = [(key, raw) for key, raw in fields if key != name]
        fields.insert(rng.randint(0, len(fields)), (name, value))
        if path != "/detokenize" and rng.random() < 0.2:
            fields.append(("stream", "true")) if name != "stream" else None
        return _join(fields), f"{name}: {value[:60]}", (400,), False
    names = []
    is_costly = False
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*refused, "model", rng.choice(UNKNOWN_NAMES)])
        value = rng.choice(WEIRD)
        is_costly |= name in COSTLY
        if rng.random() < 0.8:
            fields = [(key, raw) for key, raw in fields if key != name]
        fields.insert(rng.randint(0, len(fields)), (name, value))
        names.append(f"{name[:40]}: {value[:40]}")
    return _join(fields), ", ".join(names), (), is_costly


def hostile_text(rng: random.Random) -> tuple[bytes, str, tuple[int, ...]]:
    """A body that is no JSON object of ours, its name, and the statuses it may get (none: any)."""
    good = chat_body(max_tokens="2")
    kind = rng.randrange(10)
    if kind == 0:
        return good[: rng.randrange(len(good))], "cut off", (400,)
    if kind == 1:
        coding = rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp037"])
        text = good.decode().replace("!", "é") if coding != "cp037" else good.decode()
        is_legal = coding in ("utf-7", "utf-8-sig")
        return text.encode(coding), f"in {coding}", () if is_legal else (400,)
    if kind == 2:
        bad = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80",
        b"\x00",
                          b"\n", b"\x1f", b"\xe2\x82"])  # fmt: skip
        return good.replace(b"Hello", bad), f"{bad!r} in a string", (400,)
    if kind == 3:
        depth = rng.choice([100, 1000, 10_000, 100_000])
        opening = rng.choice(["[", '{"a":', '[{"messages":'])
        return (opening * depth).encode(), f"{depth} deep", (400,)
    if kind == 4:
        depth = rng.choice([100, 1000, 20_000])
        nested = (
            '{"a":' * depth + "1" + "}" * depth if rng.random() < 0.5 else "[" * depth + "]" * depth
        )
        return (
            _join([("messages", MESSAGES), ("x", nested), ("max_tokens", "0")]),
            "deep field",
            (400,),
        )
    if kind == 5:
        count = rng.choice([100, 5000, 20_000])
        wide = ",".join(f'"k{i}":{i}' for i in range(count))
        return (
            b'{"messages":%b,"max_tokens":0,%b}' % (MESSAGES.encode(), wide.encode()),
            "wide",
            (400,),
        )
    if kind == 6:
        other = rng.choice([b"", b" ", b"null", b"1", b'"x"', b"[]", b"true", b"\x00", b"{}",
                           b"{]", b"[}",
                            b"<xml/>", b"a=b&c=d", b"undefined", b"NaN", b"'x'", b"// x\n{}",
                            b"{,}",
                            b"\n" * 5000, b" " * 200_000, b"--x\r\n",
                            b"\x1f\x8b\x08\x00"])  # fmt: skip
        return other, f"not an object: {other[:20]!r}", (400,)
    if kind == 7:
        tail = rng.choice([b"x", b"{}", b",", b"]", b"\x00", b"\xff", b"//", good])
        return good + tail, f"followed by {tail[:10]!r}", (400,)
    if kind == 8:
        twice = [
            ("messages", MESSAGES),
            ("max_tokens", "2"),
            ("max_tokens", rng.choice(["0", '"x"'])),
        ]
        return _join(twice), "a field twice", (400,)
    noise = bytearray(good)
    for _ in range(rng.randint(1, 6)):
        noise[rng.randrange(len(noise))] = rng.randrange(256)
    return bytes(noise), "changed bytes", ()


def _join(fields: list[tuple[str, str]]) -> bytes:
    parts = (f'"{name}":{value}' for name, value in fields)
    return ("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass")
