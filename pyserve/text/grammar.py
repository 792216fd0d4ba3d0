"""Structured outputs: compile what a request asks for into a grammar that masks tokens.

The grammar engine is llguidance. It recurses deeply, so it compiles on a thread of its own with a
large stack. Whatever is known to take it too long or too much memory is refused before compiling
(grammar_schema, grammar_pattern, grammar_lark). If the states of a grammar multiply beyond the
limits only while an answer is generated, that answer alone fails.
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
from pyserve.model_files import guarded
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
MAX_RENEWAL_S = 0.02  # a grammar that takes longer to compile is neither copied nor renewed
MIN_SIDE_BY_SIDE_S = 5e-5  # faster masks take longer on two threads than on one
MAX_COPIES = 8  # of one grammar, so that several threads can fill its masks
MAX_COPY_S = 0.004  # of mask work in a step for one copy; above it, another copy pays
MAX_TOO_LONG = 1000  # keys of grammars that took too long to compile
MAX_CACHED = 64  # grammars in the cache
MAX_CACHED_BYTES = 2**24  # estimated, with states added by answers; one grammar may take half
MAX_BYTES = MAX_ALL_BYTES // 4  # limit for one compiled grammar
MIN_BYTES = 2**17  # lowest estimate for a compiled grammar, without its text
BYTES_PER_CHAR = 128  # of that text, added to MIN_BYTES
# Upper bound of the bytes that a second of compiling allocates; 240 to 650 MB were measured.
BYTES_PER_S = 1.2e9
TRIAL_TOKENS = 8
MAX_STEP_S = 0.1  # CPU time for the masks of one request's answers in one step
MAX_LEXER_STATES = 20_000  # of one sequence; each takes 1 to 2 kB
MAX_GRAMMAR_SIZE = 200_000  # symbols of the compiled grammar
MAX_STEP_FUEL = 50_000  # lexer work for one mask: a grammar that blows up fails in 20 ms, not 400

_SPECIAL_IN_REGEX = frozenset(r"\.+*?()|[]{}^$#&-~/ ")


class Spec(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What a request asks for: one of the subclasses below. `param` is the request
    field with it.
    """

    param: str


class JsonSchema(Spec, frozen=True, tag=True):
    """A JSON value that is valid by a JSON Schema.

    whitespace                 a pattern for the white space between JSON tokens; "" allows none,
                               and None stands for WHITESPACE, which covers what models like to
                               write.
    has_additional_properties  whether objects may have properties that their schema does not name,
                               where the schema itself does not say.
    """

    schema: Any
    whitespace: str | None = None
    has_additional_properties: bool = True


class Regex(Spec, frozen=True, tag=True):
    """A text that matches a regular expression from its first to its last character."""

    pattern: str


class Choice(Spec, frozen=True, tag=True):
    """One of the given texts."""

    texts: list[str]


class Grammar(Spec, frozen=True, tag=True):
    """A text that follows a grammar, which is written in Lark or GBNF."""

    text: str


class Tags(Spec, frozen=True, tag=True):
    """Structural tags, in the form that grammar_tags.py describes."""

    tags: dict[str, Any]
    whitespace: str | None = None


class Compiled:
    """A compiled grammar. `constraint` makes the constraint of one sequence in microseconds.

    Masks that use the same engine states can only be filled one after the other. If that would take
    too long for the answers that are running, copies of the grammar are made, and each new answer
    uses the copy with the fewest answers.

    is_exhausted        an answer has found the states that all answers share to be full or broken.
    num_bytes           estimated memory that compiling has left allocated.
    compile_s, token_s  seconds that compiling took, and seconds of CPU time for one mask and its
                        token.
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
        """Estimated memory of all copies, including the states that answers have added."""
        return sum([copy.num_bytes for copy in self._copies])

    @property
    def is_stale(self) -> bool:
        """Whether the next request must compile the grammar anew. A grammar that is too slow is
        kept, because compiling it again would not make it faster.
        """
        is_dropped = any(copy.matcher is None for copy in self._copies)
        return self.is_exhausted or (is_dropped and not self._is_too_slow)

    @property
    def _is_too_slow(self) -> bool:
        return self._copies[0].is_too_slow

    def check_pace(self, param: str, *, n: int = 1) -> None:
        """Raise InvalidRequestError if n answers at once would make all other sequences wait too
        long.
        """
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
        """Whether n more answers justify another copy, which takes as long to make as a compile."""
        copies = self._copies
        num_answers = n + sum([len(copy.answers) for copy in copies])
        mask_s = max(copy.mask_s for copy in copies)
        if mask_s < MIN_SIDE_BY_SIDE_S:
            return False
        if num_answers * mask_s <= len(copies) * MAX_COPY_S or self._compile_s > MAX_RENEWAL_S:
            return False
        return len(copies) < min(MAX_COPIES, num_threads())

    def add_copies(self, n: int) -> None:
        """Add copies until n more answers need no further one."""
        table = self.vocabulary.table()
        while self.wants_copy(n) and not is_memory_full():
            first = self._copies[0]
            try:
                matcher = run_bounded(lambda: _matcher_of(table, self._text), "the grammar")
            except RequestError:  # the existing copies still work, only more slowly
                return
            copy = Shared(matcher, self._num_bytes, mask_s=first.mask_s, copy_of=first)
            self._copies.append(copy)

    def constraint(self, *, free_until: FreeUntil | None = None) -> GrammarConstraint:
        """The constraint for one sequence. free_until describes its thinking, during which every
        token is allowed; None if the sequence has no such part. Raises InvalidRequestError.
        """
        copy = min(self._copies, key=lambda copy: len(copy.answers))
        if copy.matcher is None:
            raise InvalidRequestError("an answer to the same grammar has failed: it is too complex")
        return GrammarConstraint(self.vocabulary, Matcher(self._renew, copy), free_until)

    def _renew(self) -> Shared | None:
        self.is_exhausted = True
        if self._compile_s > MAX_RENEWAL_S:  # the whole step would wait for the compile
            return None
        table = self.vocabulary.table()
        matcher = run_bounded(lambda: _matcher_of(table, self._text), "the grammar")
        return Shared(matcher, self._num_bytes, mask_s=self._token_s)


class GrammarCache:
    """The compiled grammars of one vocabulary, least recently used evicted first. Thread-safe.

    too_long  keys of specs that took too long to compile. They are refused at once, because another
              attempt would occupy a core for just as long.
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
            self._shrink()  # running answers may have added states since the last call
            return found

    def put(self, key: bytes, compiled: Compiled) -> None:
        with self._lock:
            self._grammars[key] = compiled
            self._grammars.move_to_end(key)
            self._shrink()

    def _shrink(self) -> None:
        """Evict grammars that have grown too large, then least recently used ones until the rest
        fits.
        """
        sizes = {key: compiled.num_bytes for key, compiled in self._grammars.items()}
        for key, size in sizes.items():
            if size > MAX_CACHED_BYTES // 2:
                del self._grammars[key]
        num_bytes = sum(map(sizes.__getitem__, self._grammars))
        while len(self._grammars) > MAX_CACHED or num_bytes > MAX_CACHED_BYTES:
            num_bytes -= sizes[self._grammars.popitem(last=False)[0]]


class Grammars:
    """Compiles grammars for one model, and caches them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._cache = GrammarCache()

    @classmethod
    def of(cls, tokenizer: Tokenizer, defaults: GenerationDefaults, vocab_size: int) -> Grammars:
        """For a model's tokenizer. The EOS tokens are the same ones that end any other answer."""
        named = [tokenizer.eos_token_id, *defaults.eos_token_ids]
        eos_token_ids = [token_id for token_id in named if token_id is not None]
        return cls(Vocabulary(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids))

    def get(self, spec: Spec, *, n: int = 1) -> Compiled | None:
        """The cached grammar of `spec`, in microseconds. None if it is not cached, or if n answers
        should call `compile` to get another copy first. Raises as spec_key does.
        """
        found = self._cache.get(spec_key(spec))
        return None if found is None or found.wants_copy(n) else found

    def compile(self, spec: Spec, *, n: int = 1) -> Compiled:
        """The grammar of `spec` with enough copies for n answers. Raises as compile_grammar."""
        compiled = compile_grammar(spec, self.vocabulary, cache=self._cache)
        compiled.add_copies(n)
        return compiled

    def prepare(self) -> None:
        """Build the engine's token table at startup, when no request waits for the interpreter's
        lock.
        """
        if self.vocabulary.eos_token_ids:
            with guarded(f"{self.vocabulary.tokenizer.folder}: the tokens"):  # it may panic at them
                self.vocabulary.table()


def compile_grammar(
    spec: Spec, vocabulary: Vocabulary, *, cache: GrammarCache | None = None
) -> Compiled:
    """Compile a spec, or take it from the cache. It may take seconds: call it on a worker thread.

    Raises InvalidRequestError for spec.param if the spec cannot be enforced, allows nothing or
    takes too long; UnavailableError while earlier compiles that took too long are still running;
    and QueueFullError while the grammars of other requests take all memory that grammars may have.
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
    """A hash that is equal for equal specs. Raises InvalidRequestError if the spec is too large."""
    # Encoding holds the interpreter's lock, so a spec that is far too large is refused before it.
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
    """Number of characters and values in decoded JSON; counting stops above MAX_SPEC_BYTES."""
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
    # Both numbers are upper bounds, so the lower one counts: other threads allocate meanwhile, and
    # not all work of compiling makes states.
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
    """Follow the grammar for a few random tokens, and return the average CPU seconds of a mask and
    its token once their states exist.

    This refuses a grammar that allows nothing, blows up at once, or is so slow that all answers of
    a step would wait for it, now and not in the middle of an answer. Raises InvalidRequestError.
    """
    rng = random.Random(0)
    first = matcher.deep_copy()
    token_ids: list[int] = []
    for _ in range(TRIAL_TOKENS):
        if first.is_stopped() and not first.is_error():
            break
        began_s = time.thread_time()  # CPU time: a busy machine is not the grammar's fault
        mask = int.from_bytes(first.compute_bitmask(), "little")
        took_s = time.thread_time() - began_s
        if first.is_error() or not mask:  # an error outranks the time that it took
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
    """Index of a set bit: the first one at or after a random position, else the first of all."""
    start = rng.randrange(num_bits)
    rest = mask >> start or mask
    return ((rest & -rest).bit_length() - 1) + (start if mask >> start else 0)


_LIMITS = LLParserLimits(
    max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SIZE,
    step_lexer_fuel=MAX_STEP_FUEL, verbose_errors=True,  # for state_cost
)  # fmt: skip


def _source(spec: Spec, vocabulary: Vocabulary) -> str:
    """The grammar in the form that the engine takes. Raises InvalidRequestError."""
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
