"""Structured outputs: what a request asks for -> which tokens may come next.

llguidance is the engine. Compiling happens on a thread of its own with a large stack, as the engine
recurses, and everything that is known to take long in it, or too much memory, is refused before
(grammar_schema, grammar_pattern, grammar_lark). A blow-up that only shows while an answer is made
ends that answer alone.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import OrderedDict, deque
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pyserve.allocator import used_bytes
from pyserve.errors import InvalidRequestError, QueueFullError, RequestError
from pyserve.host import num_threads
from pyserve.text.grammar_constraint import FreeUntil, GrammarConstraint
from pyserve.text.grammar_json import WHITESPACE, schema_text
from pyserve.text.grammar_lark import to_lark
from pyserve.text.grammar_matcher import (
    MAX_ALL_BYTES,
    MAX_MASK_S,
    MAX_TOKEN_S,
    TOO_SLOW,
    Matcher,
    Shared,
    is_memory_full,
    measure_all,
    shortened,
)
from pyserve.text.grammar_pattern import PatternError, engine_pattern
from pyserve.text.grammar_runner import TooLongError, run_bounded
from pyserve.text.grammar_schema import engine_schema, offending_pointer
from pyserve.text.grammar_tags import tags_to_lark
from pyserve.text.grammar_vocabulary import Vocabulary
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer

MAX_SPEC_BYTES = 2**18
MAX_CHOICES = 10_000
MAX_RENEWAL_S = 0.02  # compiles that take longer are not repeated while sequences wait
MIN_SIDE_BY_SIDE_S = 5e-5  # of a mask: shorter ones take longer on two threads than on one
MAX_COPIES = 8  # of a grammar
MAX_COPY_S = 0.004  # of masks in a step, by one copy: more are worth another one
MAX_TOO_LONG = 1000  # that are remembered
MAX_CACHED = 64  # grammars
MAX_CACHED_BYTES = 2**24  # estimated, with the states that answers have added; one has half at most
MAX_BYTES = MAX_ALL_BYTES // 4  # of one grammar
MIN_BYTES = 2**17  # of a compiled grammar, and more for each character of its text
BYTES_PER_CHAR = 128
BYTES_PER_S = 1.2e9  # of work to compile one, at most: 240 to 650 MB have been measured
TRIAL_TOKENS = 8
MAX_STEP_S = 0.1  # of work in a step, of the answers to one request together
MAX_LEXER_STATES = 20_000  # a kilobyte or two each, of one sequence
MAX_GRAMMAR_SIZE = 200_000  # symbols
MAX_STEP_FUEL = 50_000  # of the lexer, for one mask: a blow-up ends within 20 ms, not 400

_SPECIAL_IN_REGEX = frozenset(r"\.+*?()|[]{}^$#&-~/ ")


class Spec(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What is asked for. Exactly one of these classes; `param` is the field that asks."""

    param: str


class JsonSchema(Spec, frozen=True, tag=True):
    """A JSON value that is valid by a schema.

    whitespace                 a pattern; "" for none, None for what models like to write.
    has_additional_properties  of objects whose schema does not say.
    """

    schema: Any
    whitespace: str | None = None
    has_additional_properties: bool = True


class Regex(Spec, frozen=True, tag=True):
    """A text that a regular expression matches in whole."""

    pattern: str


class Choice(Spec, frozen=True, tag=True):
    """One of some texts."""

    texts: list[str]


class Grammar(Spec, frozen=True, tag=True):
    """A text of a grammar, in Lark or GBNF."""

    text: str


class Tags(Spec, frozen=True, tag=True):
    """Structural tags, as grammar_tags has them."""

    tags: dict[str, Any]
    whitespace: str | None = None


class Compiled:
    """A grammar; `constraint` makes one for each sequence, and takes microseconds.

    Masks that use the same states are filled one after the other. Where those of the answers that
    run would take long, there are copies of the grammar, and new answers begin with the one that
    has the fewest.

    is_exhausted  an answer has found that what all of them share is full.

    num_bytes           of what its compile has left, estimated.
    compile_s, token_s  what it took to compile it, and takes to go on by one token.
    """

    def __init__(
        self, vocabulary: Vocabulary, text: str, matcher: LLMatcher, *, num_bytes: int,
        compile_s: float, token_s: float,
    ) -> None:  # fmt: skip
        self.vocabulary = vocabulary
        self.is_exhausted = False
        self._text = text
        self._num_bytes = num_bytes
        self._copies = [Shared(matcher, num_bytes, mask_s=token_s)]
        self._compile_s = compile_s
        self._token_s = token_s

    @property
    def num_bytes(self) -> int:
        """Of all copies, estimated, with the states that answers have added."""
        return sum([copy.num_bytes for copy in self._copies])

    @property
    def is_stale(self) -> bool:
        """The next request compiles it anew; one that is too slow would be so again."""
        is_dropped = any(copy.matcher is None for copy in self._copies)
        return self.is_exhausted or (is_dropped and not self._is_too_slow)

    @property
    def _is_too_slow(self) -> bool:
        return self._copies[0].is_too_slow

    def check_pace(self, param: str, *, n: int = 1) -> None:
        """Raise InvalidRequestError where n answers at once would keep all others waiting."""
        if self._is_too_slow:
            raise InvalidRequestError(f"{param}: {TOO_SLOW}", param)
        if n > 1 and n * self._token_s > MAX_STEP_S:
            raise InvalidRequestError(
                f"{param} is too complex for {n} answers at once: to find the tokens that may come "
                f"next takes {1e3 * self._token_s:.1f} ms for each, the limit is "
                f"{1e3 * MAX_STEP_S:.0f} ms for all",
                "n",
            )

    def wants_copy(self, n: int) -> bool:
        """Whether n more answers should find another copy, which takes as long as a compile."""
        copies = self._copies
        num_answers = n + sum([len(copy.answers) for copy in copies])
        mask_s = max(copy.mask_s for copy in copies)
        if mask_s < MIN_SIDE_BY_SIDE_S:
            return False
        if num_answers * mask_s <= len(copies) * MAX_COPY_S or self._compile_s > MAX_RENEWAL_S:
            return False
        return len(copies) < min(MAX_COPIES, num_threads())

    def add_copies(self, n: int) -> None:
        """Until n more answers want none."""
        table = self.vocabulary.table()
        while self.wants_copy(n) and not is_memory_full():
            first = self._copies[0]
            try:
                matcher = run_bounded(lambda: _matcher_of(table, self._text), "the grammar")
            except RequestError:  # those that there are serve as well, more slowly
                return
            copy = Shared(matcher, self._num_bytes, mask_s=first.mask_s, copy_of=first)
            self._copies.append(copy)

    def constraint(self, *, free_until: FreeUntil | None = None) -> GrammarConstraint:
        """For one sequence, whose thinking is free if there is any; None: there is none."""
        copy = min(self._copies, key=lambda copy: len(copy.answers))
        if copy.matcher is None:
            raise InvalidRequestError("an answer to the same grammar has failed: it is too complex")
        return GrammarConstraint(self.vocabulary, Matcher(self._renew, copy), free_until)

    def _renew(self) -> Shared | None:
        self.is_exhausted = True
        if self._compile_s > MAX_RENEWAL_S:  # a step of all sequences waits for it
            return None
        table = self.vocabulary.table()
        matcher = run_bounded(lambda: _matcher_of(table, self._text), "the grammar")
        return Shared(matcher, self._num_bytes, mask_s=self._token_s)


class GrammarCache:
    """Grammars that have been compiled, the last used kept; of one vocabulary. Thread-safe.

    too_long  keys of those that took too long: to try one again would take a core for as long.
    """

    def __init__(self) -> None:
        self.too_long: deque[bytes] = deque(maxlen=MAX_TOO_LONG)
        self._lock = threading.Lock()
        self._grammars: OrderedDict[bytes, Compiled] = OrderedDict()

    def get(self, key: bytes) -> Compiled | None:
        with self._lock:
            found = self._grammars.get(key)
            if found is None or found.is_stale:
                return None
            self._grammars.move_to_end(key)
            self._shrink()  # answers have added states since
            return found

    def put(self, key: bytes, compiled: Compiled) -> None:
        with self._lock:
            self._grammars[key] = compiled
            self._grammars.move_to_end(key)
            self._shrink()

    def _shrink(self) -> None:
        """Let go of what is too large by now, then of what was used longest ago."""
        sizes = {key: compiled.num_bytes for key, compiled in self._grammars.items()}
        for key, size in sizes.items():
            if size > MAX_CACHED_BYTES // 2:
                del self._grammars[key]
        num_bytes = sum(map(sizes.__getitem__, self._grammars))
        while len(self._grammars) > MAX_CACHED or num_bytes > MAX_CACHED_BYTES:
            num_bytes -= sizes[self._grammars.popitem(last=False)[0]]


class Grammars:
    """Those of one model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._cache = GrammarCache()

    @classmethod
    def of(cls, tokenizer: Tokenizer, defaults: GenerationDefaults, vocab_size: int) -> Grammars:
        """What ends an answer is what ends it elsewhere too."""
        named = [tokenizer.eos_token_id, *defaults.eos_token_ids]
        eos_token_ids = [token_id for token_id in named if token_id is not None]
        return cls(Vocabulary(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids))

    def get(self, spec: Spec, *, n: int = 1) -> Compiled | None:
        """What `spec` was compiled to before; takes microseconds. None where n answers should wait
        for `compile`. Raises as spec_key does.
        """
        found = self._cache.get(spec_key(spec))
        return None if found is None or found.wants_copy(n) else found

    def compile(self, spec: Spec, *, n: int = 1) -> Compiled:
        """For n answers at once. As compile_grammar has it."""
        compiled = compile_grammar(spec, self.vocabulary, cache=self._cache)
        compiled.add_copies(n)
        return compiled

    def prepare(self) -> None:
        """Build the table of tokens now, where nobody waits for the interpreter's lock."""
        if self.vocabulary.eos_token_ids:
            self.vocabulary.table()


def compile_grammar(
    spec: Spec, vocabulary: Vocabulary, *, cache: GrammarCache | None = None
) -> Compiled:
    """What a spec allows; called on a worker thread, as it may take seconds.

    Raises InvalidRequestError for spec.param where it cannot be enforced, allows nothing or takes
    too long, UnavailableError while earlier ones that took too long still run, and QueueFullError
    while those of other requests take all of the memory for them.
    """
    key = spec_key(spec)
    found = cache.get(key) if cache is not None else None
    if found is not None:
        return found
    if cache is not None and key in cache.too_long:
        raise TooLongError(spec.param)
    measure_all()
    if is_memory_full():
        raise QueueFullError(
            f"the grammars of the requests that run take more than {MAX_ALL_BYTES // 2**20} MB, "
            "try again in 1 s"
        )
    try:
        compiled = run_bounded(lambda: _compile(spec, vocabulary), spec.param)
    except TooLongError:
        if cache is not None:
            cache.too_long.append(key)
        raise
    if cache is not None:
        cache.put(key, compiled)
    return compiled


def spec_key(spec: Spec) -> bytes:
    """Equal for equal specs. Raises InvalidRequestError where one is too large."""
    # Encoding holds the interpreter's lock, so that what is far too large is seen before.
    values = [getattr(spec, name) for name in spec.__struct_fields__]
    num_bytes = _size(values)
    if num_bytes <= MAX_SPEC_BYTES:
        try:
            encoded = msgspec.json.encode(spec)
        except UnicodeEncodeError:
            raise InvalidRequestError(
                f"{spec.param} is not Unicode text: it holds a lone surrogate", spec.param
            ) from None
        num_bytes = len(encoded)
    if num_bytes > MAX_SPEC_BYTES:
        raise InvalidRequestError(
            f"{spec.param} takes {num_bytes} bytes or more, the limit is {MAX_SPEC_BYTES}",
            spec.param,
        )
    return hashlib.blake2b(encoded, digest_size=20).digest()


def _size(values: list[Any]) -> int:
    """Characters and values in what is decoded JSON, until they are too many."""
    stack, size = values, 0
    while stack and size <= MAX_SPEC_BYTES:
        value = stack.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, dict):
            size += sum(map(len, value))
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    return size


def _compile(spec: Spec, vocabulary: Vocabulary) -> Compiled:
    table = vocabulary.table()
    text = _source(spec, vocabulary)
    num_bytes_before, worked_before_s = used_bytes(), time.thread_time()
    begun_s = time.monotonic()
    matcher = _matcher_of(table, text)
    compile_s = time.monotonic() - begun_s
    if matcher.is_error():
        reason = matcher.get_error()
        where = _place_of(spec, reason, table) if isinstance(spec, JsonSchema) else ""
        raise InvalidRequestError(
            f"{spec.param}{where} cannot be enforced: {shortened(reason)}", spec.param
        )
    token_s = _try_out(matcher, vocabulary, spec.param)
    # Others allocate meanwhile, too, and not all work makes states: the lower of two upper bounds.
    most = int(BYTES_PER_S * (time.thread_time() - worked_before_s))
    num_bytes = min(used_bytes() - num_bytes_before, most)
    num_bytes = max(MIN_BYTES + BYTES_PER_CHAR * len(text), num_bytes)
    if num_bytes > MAX_BYTES:
        raise InvalidRequestError(
            f"{spec.param} is too complex: compiled, it takes {num_bytes // 2**20} MB, the limit "
            f"is {MAX_BYTES // 2**20}",
            spec.param,
        )
    return Compiled(
        vocabulary, text, matcher, num_bytes=num_bytes, compile_s=compile_s, token_s=token_s
    )


def _matcher_of(table: LLTokenizer, text: str) -> LLMatcher:
    return LLMatcher(table, text, log_level=0, limits=_LIMITS)


def _place_of(spec: JsonSchema, reason: str, table: LLTokenizer) -> str:
    def compile(schema: dict[str, Any]) -> str:
        text = LLMatcher.grammar_from_json_schema(schema_text(schema))
        return _matcher_of(table, text).get_error()

    pointer = offending_pointer(spec.schema, reason, compile)
    return f" at {pointer}" if pointer else ""


def _try_out(matcher: LLMatcher, vocabulary: Vocabulary, param: str) -> float:
    """Go a few tokens into the grammar: one that allows nothing, blows up at once, or takes so long
    for a token that all answers of a step wait for it, is refused here and not in the middle of an
    answer. Returns the seconds of work for a mask and its token, on average, once their states are
    there.
    """
    rng = random.Random(0)
    first = matcher.deep_copy()
    token_ids: list[int] = []
    for _ in range(TRIAL_TOKENS):
        if first.is_stopped() and not first.is_error():
            break
        began_s = time.thread_time()  # of work: that the machine is busy is not the grammar's doing
        mask = int.from_bytes(first.compute_bitmask(), "little")
        took_s = time.thread_time() - began_s
        if first.is_error() or not mask:  # the reason, whatever time the engine took to say it
            reason = shortened(first.get_error())
            raise InvalidRequestError(f"{param} allows nothing, or is too complex: {reason}", param)
        _check_work(took_s, MAX_MASK_S, param)
        token_ids.append(_some_bit(mask, vocabulary.vocab_size, rng))
        first.consume_token(token_ids[-1])
    second, worked_s = matcher.deep_copy(), 0.0
    for token_id in token_ids:
        began_s = time.thread_time()
        second.compute_bitmask()
        second.consume_token(token_id)
        took_s = time.thread_time() - began_s
        _check_work(took_s, MAX_TOKEN_S, param)
        worked_s += took_s
    return worked_s / max(len(token_ids), 1)


def _check_work(took_s: float, limit_s: float, param: str) -> None:
    if took_s > limit_s:
        raise InvalidRequestError(
            f"{param} is too complex: to find the tokens that may come next takes "
            f"{1e3 * took_s:.0f} ms, the limit is {1e3 * limit_s:.0f} ms",
            param,
        )


def _some_bit(mask: int, num_bits: int, rng: random.Random) -> int:
    """The first bit that is set from a random place on."""
    start = rng.randrange(num_bits)
    rest = mask >> start or mask
    return ((rest & -rest).bit_length() - 1) + (start if mask >> start else 0)


_LIMITS = LLParserLimits(
    max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SIZE,
    step_lexer_fuel=MAX_STEP_FUEL, verbose_errors=True,  # for state_cost
)  # fmt: skip


def _source(spec: Spec, vocabulary: Vocabulary) -> str:
    """The grammar as the engine takes it."""
    if isinstance(spec, JsonSchema):
        schema = engine_schema(
            spec.schema,
            param=spec.param,
            has_additional_properties=spec.has_additional_properties,
        )
        white = WHITESPACE if spec.whitespace is None else spec.whitespace
        return LLMatcher.grammar_from_json_schema(schema_text(schema, white))
    if isinstance(spec, Regex):
        try:
            return LLMatcher.grammar_from_regex(engine_pattern(spec.pattern))
        except PatternError as error:
            raise InvalidRequestError(f"{spec.param}: {error}", spec.param) from None
    if isinstance(spec, Choice):
        if not 1 <= len(spec.texts) <= MAX_CHOICES:
            raise InvalidRequestError(
                f"{spec.param} must list 1 to {MAX_CHOICES} texts, got {len(spec.texts)}",
                spec.param,
            )
        return LLMatcher.grammar_from_regex("|".join(map(_literal, spec.texts)))
    if isinstance(spec, Grammar):
        return LLMatcher.grammar_from_lark(
            to_lark(spec.text, has_token=vocabulary.has_token, param=spec.param)
        )
    assert isinstance(spec, Tags)
    return LLMatcher.grammar_from_lark(
        tags_to_lark(
            spec.tags,
            special_tokens=vocabulary.special_tokens,
            param=spec.param,
            whitespace=WHITESPACE if spec.whitespace is None else spec.whitespace,
        )
    )


def _literal(text: str) -> str:
    return "".join(["\\" + char if char in _SPECIAL_IN_REGEX else char for char in text])
