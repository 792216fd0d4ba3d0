"""POST /v1/embeddings: texts or token ids -> vectors, as JSON numbers or base64 of float32."""

from __future__ import annotations

import time
from base64 import b64encode
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from pyserve.api.endpoints import prompts
from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.pooling import MIN_LENGTH, pooling_job, read_truncation
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.state import STATE
from pyserve.api.wire.pooling import ENCODINGS, Embedding, EmbeddingRequest, EmbeddingResponse
from pyserve.client import PoolingInfo
from pyserve.errors import InvalidRequestError
from pyserve.params import shown

if TYPE_CHECKING:  # numpy is slow to import, and the server opens its port before that
    import numpy as np
    from numpy.typing import NDArray

WIRE = Wire(EmbeddingRequest)
# Encoded JSON without vectors contains this once. No string can contain it: quotes are escaped.
NO_DATA = b'"data":[]'
GROUP = 128  # vectors held as Python numbers at a time: 13 MB for vectors of 4,096 numbers


@dataclass(frozen=True, slots=True)
class Form:
    """The form in which a request wants its embeddings.

    dimensions     only so many numbers are kept, from the start of the vector.
    is_normalized  the kept numbers are divided by their Euclidean length.
    is_base64      the vector is the base64 of little-endian float32, else a list of numbers.
    """

    dimensions: int
    is_normalized: bool
    is_base64: bool

    def apply(self, pooled: NDArray[np.float32]) -> list[float] | str:
        """The embedding of `pooled`, float32 [width], in this form."""
        vector = pooled[: self.dimensions]
        if self.is_normalized:
            length = float(vector.astype("f8") @ vector.astype("f8")) ** 0.5
            vector = vector / max(length, MIN_LENGTH)
        if self.is_base64:
            return b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers


async def embeddings(request: web.Request) -> web.StreamResponse:
    """Answer with one vector for each text."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request, "embed")
    info = loaded.engine.info
    assert info.pooling is not None
    body, ignored = await WIRE.read(request, state, max_list_ids=info.max_model_len)
    state.check_model_name(body.model)
    if body.input is None:
        raise InvalidRequestError("input is missing", "input")
    form = _read_form(body, info.pooling)
    ignored = [*ignored]
    cut = read_truncation(body, loaded, ignored)
    read = partial(
        prompts.read_token_ids, loaded, body.input, name="input",
        add_special_tokens=body.add_special_tokens is not False, cut=cut,
    )  # fmt: skip
    token_ids = await state.run_text(request, prompts.size_of(body.input), read)
    job = pooling_job(body, loaded, token_ids, name="input", ignored=ignored)
    dialect = Dialect(id_prefix="embd-", whole=partial(_encode, form))
    return await answer(request, loaded.engine, job, dialect, arrived_s=arrived_s)


def _read_form(body: EmbeddingRequest, pooling: PoolingInfo) -> Form:
    """Read the fields that choose the form. Raises InvalidRequestError naming the field."""
    encoding = body.encoding_format or "float"
    if encoding not in ENCODINGS:
        raise InvalidRequestError(
            f"encoding_format must be float or base64, got {encoding[:40]}", "encoding_format"
        )
    dimensions = pooling.width if body.dimensions is None else body.dimensions
    allowed = {*pooling.dimensions, pooling.width}
    if pooling.dimensions and dimensions not in allowed:
        raise InvalidRequestError(
            f"dimensions must be one of {', '.join(map(str, sorted(allowed)))} for this model, "
            f"got {shown(dimensions)}",
            "dimensions",
        )
    if not 1 <= dimensions <= pooling.width:
        raise InvalidRequestError(
            f"dimensions must be in [1, {pooling.width}], got {shown(dimensions)}", "dimensions"
        )
    is_normalized = pooling.is_normalized if body.use_activation is None else body.use_activation
    return Form(dimensions, is_normalized, encoding == "base64")


def _encode(form: Form, head: Head, generation: Generation) -> bytes:
    """Encode the answer as JSON, vector by vector.

    All vectors together would take hundreds of megabytes as Python numbers, and encoding them in
    one call, up to 166 MB of text, would hold the interpreter's lock for 0.1 s.
    """
    around = EmbeddingResponse(
        id=head.id, created=head.created, model=head.model, data=[], usage=generation.usage()
    )
    before, _, after = msgspec.json.encode(around).partition(NO_DATA)
    answer = BytesIO()
    answer.write(before + NO_DATA[:-1])
    choices = generation.choices
    for start in range(0, len(choices), GROUP):
        # numpy's calls release the interpreter's lock so briefly that a waiting thread does not get
        # it, but each release restarts the 5 ms after which that thread can demand it. Encoding a
        # group afterwards holds the lock for more than 5 ms, so waiting threads do get their turn.
        group = [_embedding(form, choice) for choice in choices[start : start + GROUP]]
        for number, embedding in enumerate(group, start):
            answer.write(b"," if number else b"")
            answer.write(msgspec.json.encode(embedding))
    answer.write(NO_DATA[-1:] + after)
    return answer.getvalue()


def _embedding(form: Form, choice: Choice) -> Embedding:
    assert choice.stream.pooled is not None
    return Embedding(index=choice.index, embedding=form.apply(choice.stream.pooled))
