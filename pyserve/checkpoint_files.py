"""Names of a checkpoint's files, limits on headers and indices, and the reader of the index.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from pyserve.errors import CheckpointError
from pyserve.model_files import read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

LENGTH_BYTES = 8  # a safetensors file begins with its header's length, a little-endian u64
MAX_HEADER_BYTES = 32 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_NAME_BYTES = 255  # of a file name, as in most file systems
MAX_SHOWN_CHARS = 200  # a longer name of a tensor is cut in messages


def read_weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor name -> name of the file, in the index's folder, that holds it.

    Raises CheckpointError naming the index and the entry at fault.
    """
    raw = read_object(index, MAX_INDEX_BYTES)
    if raw is None:
        raise CheckpointError(f"{index}: No such file or directory")
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that names tensors")
    for name, file_name in weight_map.items():
        if not name.isprintable():
            raise CheckpointError(
                f"{index}: the tensor name {name[:MAX_SHOWN_CHARS]!r} is not printable"
            )
        if not isinstance(file_name, str) or not _is_weights_file(file_name):
            raise CheckpointError(
                f"{index}: weight_map[{name[:MAX_SHOWN_CHARS]}] must be a safetensors file "
                f"of the same folder, got {file_name!r:.300}"
            )
    return weight_map


def _is_weights_file(name: str) -> bool:
    is_plain = (
        name.isprintable() and not set(name) & {"/", "\\"} and len(name.encode()) <= MAX_NAME_BYTES
    )
    return is_plain and name.endswith(".safetensors")
