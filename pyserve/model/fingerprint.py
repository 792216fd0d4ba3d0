"""Fingerprint: tells whether the folders of two machines hold the same model, from samples of its
files, so that it takes no reading of all weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pyserve.model.weights import index_checkpoint
from pyserve.model_files import open_regular, read_bytes

# Of each file. A few samples are enough, as training changes all numbers of a tensor.
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(folder: Path, *, has_weights: bool = True) -> str:
    """Hash config.json and pieces of each file of the weights. Raises CheckpointError."""
    digest = hashlib.sha256(read_bytes(folder / "config.json") or b"")
    tensors = index_checkpoint(folder).values() if has_weights else ()
    for path in sorted({tensor.file for tensor in tensors}):
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            digest.update(f"{path.name} {size}\n".encode())
            for number in range(NUM_SAMPLES):
                digest.update(os.pread(fd, SAMPLE_BYTES, number * size // NUM_SAMPLES))
        finally:
            os.close(fd)
    return digest.hexdigest()
