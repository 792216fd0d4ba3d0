"""How a checkpoint's files are called, and how large what describes them may be. Without torch."""

from __future__ import annotations

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

LENGTH_BYTES = 8  # of the header's length, a little-endian u64
MAX_HEADER_BYTES = 32 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
