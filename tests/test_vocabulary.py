"""One word for one idea: names that another word would have, and bools that do not say so.

The terms are those of vLLM, PyTorch and the models' own code. A word that is banned for one idea
may be the right one for another: EXCEPT says where, and why.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyserve"
PYTHON = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
NATIVE = {
    str(path.relative_to(ROOT)): path
    for path in sorted((ROOT / "cuda").rglob("*"))
    if path.suffix in (".cpp", ".h", ".cu", ".cuh")
}

# term -> words that stand for the same idea elsewhere
BANNED: dict[str, tuple[str, ...]] = {
    "request": ("user_msg", "query_text"),
    "sequence, seq_id": ("req", "req_id"),
    "num_prompt_tokens, num_output_tokens": ("completion_len", "remain_len", "num_generated"),
    "num_computed_tokens": ("cached_len", "device_len", "kv_position"),
    "num_scheduled_tokens": ("extend_len", "chunk_size"),
    "step": ("iteration", "tick"),
    "schedule, execute, update": ("postprocess", "process_last_data"),
    "batch, StepInput": ("forward_input",),
    "prefill, decode, chunk": ("extend_tokens", "is_prefill"),
    "waiting, running": ("active",),
    "awaited, of a block that another sequence computes": ("pending", "deferred"),
    "preempt": ("swap", "evict_seq"),
    "max_num_batched_tokens, max_num_seqs": ("max_extend_tokens", "max_running_req"),
    "block": ("page",),
    "block_table": ("page_table", "req_to_token"),
    "slot_mapping": ("out_loc",),
    "prefix cache, hit": ("radix", "reuse"),
    "query_lens, seq_lens, cu_seqlens_q": ("query_start_loc", "qo_indptr", "context_lens"),
    "num_heads, softmax_scale, softcap": ("qo_heads", "sm_scale", "logit_cap"),
    "key_cache, value_cache": ("kv_pool", "kv_buffer", "k_pool", "v_pool"),
    "logits processor": ("filter", "warper"),
    "constraint, of which a grammar is one; bitmask, matcher": ("guided",),
    "adapter, adapter_slot": ("lora_int_id",),
    "tp_rank, tp_size, of a pipeline pp_rank, pp_size": ("(?<![tp]p_)rank", "world_size"),
    "finish_reason": ("eos_reason",),
    "dispatch, launcher, kernel": ("impl",),
    "card, for the hardware; device, where tensors are": ("gpu",),
}
# word -> a name, a file or a folder with "/" that may have it -> why
EXCEPT: dict[str, dict[str, str]] = {
    "tick": {
        "text/": "of a template's work, which no step of the engine does",
        "ops/toolchain.py": "of a clock",
    },
    "active": {
        "text/": "the environment that a thread renders in",
        "is_active": "of a thread of a block that has work",
        "api/generation/": "of a request's choices that have not ended",
    },
    "pending": {
        "Pending": "a step between its launch and its result",
        "pending": "one of these",
        "kPending": "of a barrier",
    },
    "page": {
        "api/": "of HTML",
        "hub/": "of a long list that HTTP gives in parts",
    },
    "filter": {"text/": "Jinja's word"},
    "guided": {
        "api/wire/": "fields of older clients",
        "api/endpoints/structured.py": "the same",
    },
    "(?<![tp]p_)rank": {
        "text/sentencepiece_model.py": "of a merge, as BPE calls it",
        "plan/choice.py": "the order of a list",
        "ranks": "those that share each layer, together",
        "Ranks": "likewise",
        "num_ranks": "tp_size * pp_size",
        "token_rank": "how many tokens are no less likely, as logprobs tell it",
        "token_ranks": "likewise",
        "max_adapter_rank": "of an adapter's two matrices, as the rest of these",
        "max_lora_rank": "vLLM's flag",
        "q_lora_rank": "a key of config.json",
        "kv_lora_rank": "likewise",
        "ops/lora.py": "of matrices",
        "ops/reference_lora.py": "of matrices",
        "model/adapter_config.py": "of matrices",
        "model/adapter_weights.py": "of matrices",
        "model/layers/adapters.py": "of matrices",
        "cuda/common/args/lora.h": "of matrices",
        "cuda/cpu/lora.cpp": "of matrices",
        "cuda/gpu/": "of a logit among others, and of a thread among those that sum",
    },
    "gpu": {
        "gpu_memory_utilization": "vLLM's flag",
        "plan/command.py": "the flag --gpu",
        "cuda/gpu/": "the namespace of the folder",
    },
    "swap": {"swap_lanes": "exchanges values, preempts nothing"},
    "radix": {"kRadix": "of a radix select"},
    "impl": {"cuda/": "torch's STABLE_TORCH_LIBRARY_IMPL and its m.impl"},
}

# What begins the name of a bool.
BOOL_PREFIXES = ("is_", "has_")
# Bools of formats that are not ours, by file or folder: their names are given.
FOREIGN_BOOLS: dict[str, str] = {
    "api/wire/protocol.py": "OpenAI's and vLLM's request fields",
    "api/wire/responses.py": "the same of the Responses API",
    "api/wire/responses_answer.py": "what its objects say",
    "api/wire/queries.py": "OpenAI's query parameters",
    "api/wire/tools.py": "OpenAI's fields of a tool",
    "api/wire/messages.py": "Anthropic's fields",
    "api/wire/pooling.py": "vLLM's and Cohere's fields",
    "api/wire/adapters.py": "vLLM's fields",
    "api/endpoints/models.py": "OpenAI's permissions of a model",
    "config.py": "vLLM's flags",
    "model/rope_config.py": "keys of rope_parameters",
    "text/template_filters.py": "arguments that templates give to tojson",
}
FOREIGN_NAMES = {
    "byte_level": "a decoder of tokenizers",
    "byte_fallback": "a decoder of tokenizers",
    "fuse_unk": "an argument of its models",
    "tie_word_embeddings": "a key of config.json",
    "default": "a value of any type, which may be a bool",
    "condition": "what is asserted",
}


def words(name: str) -> str:
    """A name of any style as words between underscores."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).strip("_").lower()


def python_names(tree: ast.AST) -> Iterator[str]:
    """All that a file gives a name: classes, functions, their arguments, what is assigned to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def native_names(text: str) -> set[str]:
    """Every identifier outside of comments and strings."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r'"(\\.|[^"\\\n])*"', '""', text)
    return set(re.findall(r"[A-Za-z_]\w*", text))


def synonyms(where: str, names: set[str]) -> Iterator[str]:
    """The names that have a banned word, and what to say in its place."""
    for term, banned in BANNED.items():
        for word in banned:
            pattern = re.compile(rf"(^|_){word}s?(_|$)")
            allowed = EXCEPT.get(word, {})
            if any(where == place or where.startswith(place) and place[-1] == "/"
                   for place in allowed):  # fmt: skip
                continue
            for name in sorted(names - allowed.keys()):
                if pattern.search(words(name)):
                    yield f"{where}: {name}: not {word!r} but {term}"


@pytest.mark.parametrize("where", PYTHON)
def test_names_of_python_use_the_terms(where: str) -> None:
    names = set(python_names(ast.parse(PYTHON[where].read_text())))
    assert not list(synonyms(where, names))


@pytest.mark.parametrize("where", NATIVE)
def test_names_of_the_kernels_use_the_terms(where: str) -> None:
    assert not list(synonyms(where, native_names(NATIVE[where].read_text())))


def is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


def bools(tree: ast.AST) -> Iterator[str]:
    """Arguments, fields and properties whose type is bool, or bool or None."""
    for node in ast.walk(tree):
        typed: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.arguments):
            given = (*node.posonlyargs, *node.args, *node.kwonlyargs)
            typed = [(argument.arg, argument.annotation) for argument in given]
        elif isinstance(node, ast.AnnAssign):
            typed = [(ast.unparse(node.target), node.annotation)]
        elif isinstance(node, ast.FunctionDef) and is_property(node):
            typed = [(node.name, node.returns)]
        for name, annotation in typed:
            if annotation is not None and ast.unparse(annotation) in ("bool", "bool | None"):
                yield name.rpartition(".")[2]


@cache
def foreign_bools() -> set[str]:
    """What is handed to something foreign, or taken from it, keeps the name that it has there."""
    return set(FOREIGN_NAMES) | {
        name for place in FOREIGN_BOOLS for name in bools(ast.parse(PYTHON[place].read_text()))
    }


@pytest.mark.parametrize("where", [where for where in PYTHON if where not in FOREIGN_BOOLS])
def test_bools_say_so(where: str) -> None:
    names = {name.lstrip("_") for name in bools(ast.parse(PYTHON[where].read_text()))}
    foreign = foreign_bools()
    assert not {name for name in names - foreign if not name.startswith(BOOL_PREFIXES)}


def test_the_exceptions_are_needed() -> None:
    everything = {where: set(python_names(ast.parse(path.read_text())))
                  for where, path in PYTHON.items()}  # fmt: skip
    everything |= {where: native_names(path.read_text()) for where, path in NATIVE.items()}
    for word, places in EXCEPT.items():
        pattern = re.compile(rf"(^|_){word}s?(_|$)")
        for place in places:
            hits = [
                name
                for where, names in everything.items()
                for name in names
                if (where == place or place[-1] == "/" and where.startswith(place) or name == place)
                and pattern.search(words(name))
            ]
            assert hits, f"EXCEPT[{word!r}][{place!r}] has no name"
    assert set(FOREIGN_BOOLS) <= set(PYTHON)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("maxModelLen", "max_model_len"), ("KVCache", "kv_cache"), ("_is_HTTPPage", "is_http_page"),
     ("kHeadDim", "k_head_dim"), ("STEP_SIZE", "step_size")],
)  # fmt: skip
def test_words_of_a_name(name: str, expected: str) -> None:
    assert words(name) == expected


def test_a_synonym_is_found() -> None:
    source = "def make_pages(kv_pool: int, sm_scale: float) -> None:\n    self.num_reqs = 1\n"
    found = list(synonyms("engine/x.py", set(python_names(ast.parse(source)))))
    assert [line.partition(": not")[0] for line in found] == [
        "engine/x.py: num_reqs", "engine/x.py: make_pages", "engine/x.py: sm_scale",
        "engine/x.py: kv_pool",
    ]  # fmt: skip
    assert not list(synonyms("api/pages/x.py", {"make_pages"}))
    assert set(bools(ast.parse("def f(a: bool, b: int): self.c: bool = a"))) == {"a", "c"}
