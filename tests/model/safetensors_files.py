"""Writes safetensors files byte by byte, also ones that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_raw(path: Path, header: bytes, data: bytes, *, header_len: int | None = None) -> Path:
    length = len(header) if header_len is None else header_len
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def write(path: Path, header: dict[str, Any], data: bytes) -> Path:
    return write_raw(path, json.dumps(header).encode(), data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
