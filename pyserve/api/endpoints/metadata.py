"""The `metadata` that clients attach to stored responses and batches."""

from __future__ import annotations

from pyserve.api.wire.responses import MAX_KEY_CHARS, MAX_PAIRS, MAX_VALUE_CHARS
from pyserve.errors import InvalidRequestError


def check_metadata(metadata: dict[str, str]) -> None:
    """Raise InvalidRequestError if OpenAI's limits on entries and their lengths are exceeded."""
    if len(metadata) > MAX_PAIRS:
        raise InvalidRequestError(
            f"metadata has {len(metadata)} entries, the limit is {MAX_PAIRS}", "metadata"
        )
    for key, value in metadata.items():
        if len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
            raise InvalidRequestError(
                f"metadata: a key has {MAX_KEY_CHARS} characters at most and a value "
                f"{MAX_VALUE_CHARS}, got {len(key)} and {len(value)}",
                "metadata",
            )
