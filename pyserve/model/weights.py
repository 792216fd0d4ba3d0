"""Reads safetensors files: checks headers against the file, and reads tensors through a buffer.

A checkpoint is an untrusted file, so every number in a header is checked before it is used as a
size. Files are read by pread, not mapped: mapped pages would count as resident memory, and a file
that is truncated while mapped would kill the process. The pages that have been read stay in the
page cache, which makes the next start faster and which the system reclaims when it needs memory.
All errors are CheckpointErrors that name the file.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from pyserve.checkpoint_files import (
    INDEX_FILE,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_SHOWN_CHARS,
    SINGLE_FILE,
    read_weight_map,
)
from pyserve.errors import CheckpointError
from pyserve.model.destination import Part, Sink
from pyserve.model.upload import Upload
from pyserve.model_files import decode_object, guarded, open_regular

MAX_DIMS = 8
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
BUFFER_BYTES = 64 * 2**20
# Threads that read for a card: one copies 3 to 8 GB/s from the page cache, a card takes 25 to 50.
NUM_READERS = 8
SLICE_BYTES = 8 * 2**20  # what one thread reads at a time
SINK_BYTES = 16 * 2**20  # rows that a sink gets at once; limited because sinks make copies

CPU = torch.device("cpu")
TORCH_DTYPES = {  # dtype name in a header -> dtype
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class StoredTensor:
    """Where one tensor of the checkpoint is. `offset` counts bytes from the start of the file."""

    name: str
    dtype: str  # a key of TORCH_DTYPES
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


def index_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files in a folder, by name. Reads headers only.

    Raises CheckpointError.
    """
    single = folder / SINGLE_FILE
    if os.path.lexists(single):  # what is no file is refused as that, not passed over
        return {tensor.name: tensor for tensor in read_header(single)}
    index = folder / INDEX_FILE
    if not os.path.lexists(index):
        others = [path.name for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
        instead = f", only {name_some(others)}" if others else ""
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{instead}; "
            "only safetensors checkpoints with these names are loaded"
        )
    weight_map = read_weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        if not os.path.lexists(path):
            raise CheckpointError(f"{path} is missing, but {INDEX_FILE} lists it")
        for tensor in read_header(path):
            # The index may list another file for this tensor; then that file's counts.
            if weight_map.get(tensor.name, file_name) == file_name:
                tensors[tensor.name] = tensor
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise CheckpointError(f"{INDEX_FILE} lists tensors its files lack: {name_some(missing)}")
    return tensors


def read_header(path: Path) -> list[StoredTensor]:
    """Parse and check the header of one file. Its tensors must fill the rest of it without gaps.

    Raises CheckpointError.
    """
    with guarded(str(path)), closing(_open(path)) as file:
        file_bytes = os.fstat(file.fd).st_size
        if file_bytes < LENGTH_BYTES:
            raise CheckpointError(f"{path} is truncated: it has {file_bytes} bytes")
        header_bytes = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
        limit = min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES)
        if header_bytes > limit:
            raise CheckpointError(
                f"{path} is no safetensors file or truncated: "
                f"a header of {header_bytes} bytes, the limit is {limit}"
            )
        header = decode_object(file.read(LENGTH_BYTES, header_bytes), f"the header of {path}")
        header.pop("__metadata__", None)
        data_offset = LENGTH_BYTES + header_bytes
        tensors = [_parse_entry(path, name, entry, data_offset) for name, entry in header.items()]
        _check_layout(path, tensors, data_offset, file_bytes)
        return tensors


class CheckpointReader:
    """Reads stored tensors to `device` in pieces of at most `buffer_bytes` bytes.

    A context manager: it holds an open file, and for a card also threads and page-locked memory.
    It takes buffer_bytes of host memory, or twice that for a card.
    """

    def __init__(self, buffer_bytes: int = BUFFER_BYTES, *, device: torch.device = CPU) -> None:
        assert buffer_bytes % 8 == 0, "pieces must not cut an element"
        self._buffer_bytes = buffer_bytes
        self._file: _File | None = None
        self._buffer: torch.Tensor | None = None
        self._upload: Upload | None = None
        self._readers: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            self._buffer = torch.empty(buffer_bytes, dtype=torch.uint8)
        else:
            self._upload = Upload(device, buffer_bytes)
            self._readers = ThreadPoolExecutor(NUM_READERS, "pyserve-read")

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._readers is not None:
            self._readers.shutdown()
        if self._upload is not None:
            self._upload.close()
        self._close()

    def copy(self, tensor: StoredTensor, part: Part) -> Iterator[int]:
        """Copy the slice `part` of a tensor to part.view, converting the dtype.

        Yields the number of bytes read for each piece, once it is copied or queued for a card: call
        `wait` before using the view. A slice along dim 1 reads all columns. Tensors are read
        fastest in the order in which they are stored. Raises CheckpointError.
        """
        view, dtype = part.view, TORCH_DTYPES[tensor.dtype]
        if part.dim == 1 or not view.is_contiguous():
            yield from self._copy_rows(tensor, part)
            return
        flat = view.view(-1)
        begin = part.start * prod(tensor.shape[1:]) * dtype.itemsize
        cuts = self._cut(begin, begin + flat.numel() * dtype.itemsize)
        if flat.is_cpu and flat.dtype == dtype:
            # No conversion is needed, so the file is read directly into the parameter.
            memory = flat.view(torch.uint8).numpy().data
            for start, end in cuts:
                self._read(tensor, start, memory[start - begin : end - begin])
                yield end - start
            return
        for start, piece in self._pieces(tensor, cuts):
            first = start - begin // dtype.itemsize
            self._put(piece, flat[first : first + piece.numel()])
            yield piece.nbytes

    def _copy_rows(self, tensor: StoredTensor, part: Part) -> Iterator[int]:
        """`copy` for views that are not contiguous: reads whole rows of a matrix into the buffer
        and copies the wanted columns."""
        assert len(tensor.shape) == 2, f"{tensor.name} is no matrix"
        num_rows, num_columns = tensor.shape
        row_bytes = tensor.num_bytes // max(1, num_rows)
        first_row, num_wanted = (part.start, part.view.shape[0]) if part.dim == 0 else (0, num_rows)
        rows_at_once = self._buffer_bytes // max(1, row_bytes)
        assert rows_at_once, f"a row of {tensor.name} is larger than the buffer"
        cuts = self._cut(
            first_row * row_bytes, (first_row + num_wanted) * row_bytes, rows_at_once * row_bytes
        )
        columns = (part.start if part.dim == 1 else 0), part.view.shape[1]
        for start, piece in self._pieces(tensor, cuts):
            rows = piece.view(-1, num_columns)
            row = start // max(1, num_columns) - first_row
            self._put(rows, part.view[row : row + len(rows)], columns)
            yield piece.nbytes

    def feed(self, tensor: StoredTensor, sink: Sink) -> Iterator[int]:
        """Pass all rows of the tensor, on the device, to the sink. Yields and raises as `copy`."""
        num_rows = tensor.shape[0] if tensor.shape else 1
        row_bytes = tensor.num_bytes // max(1, num_rows)
        limit = min(self._buffer_bytes, SINK_BYTES)
        num_steps = max(1, limit // max(1, row_bytes * sink.row_step))
        rows_at_once = num_steps * sink.row_step
        if rows_at_once * row_bytes > self._buffer_bytes:
            raise CheckpointError(f"{tensor.file}: the rows of {tensor.name} are too long")
        cuts = self._cut(0, tensor.num_bytes, rows_at_once * row_bytes)
        for first_row, (_, piece) in zip(
            range(0, num_rows, rows_at_once), self._pieces(tensor, cuts), strict=True
        ):
            rows = piece.view(-1, *tensor.shape[1:])
            put = partial(sink.put, first_row)
            try:
                if self._upload is not None:
                    self._upload.hand_over(rows, put)
                else:
                    put(rows)
            except CheckpointError as error:
                raise CheckpointError(f"{tensor.file}: {tensor.name} {error}") from error
            yield piece.nbytes

    def _put(
        self, piece: torch.Tensor, view: torch.Tensor, columns: tuple[int, int] | None = None
    ) -> None:
        if self._upload is not None:
            self._upload.send(piece, view, columns)
        else:
            view.copy_(piece if columns is None else piece.narrow(1, *columns))

    def wait(self) -> None:
        """Wait until everything that was copied has arrived on the device."""
        if self._upload is not None:
            self._upload.wait()

    def pieces(self, tensor: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index of the first element, elements [n]) for the pieces of a whole tensor.

        The elements are in the stored dtype, on the host, and valid until the next piece.
        """
        yield from self._pieces(tensor, self._cut(0, tensor.num_bytes))

    def _pieces(
        self, tensor: StoredTensor, cuts: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        dtype = TORCH_DTYPES[tensor.dtype]
        for start, end in cuts:
            buffer = self._buffer if self._upload is None else self._upload.fill()
            assert buffer is not None
            piece = buffer[: end - start]
            self._read(tensor, start, piece.numpy().data)
            yield start // dtype.itemsize, piece.view(dtype)

    def _cut(self, begin: int, end: int, step: int | None = None) -> Iterator[tuple[int, int]]:
        step = step or self._buffer_bytes
        for start in range(begin, end, step):
            yield start, min(start + step, end)

    def _read(self, tensor: StoredTensor, start: int, memory: memoryview) -> None:
        """Fill `memory` with the tensor's bytes from `start` on."""
        file, offset = self._open(tensor), tensor.offset + start
        if self._readers is None or len(memory) <= SLICE_BYTES:
            file.read_into(offset, memory)
            return
        reads = [
            self._readers.submit(file.read_into, offset + at, memory[at : at + SLICE_BYTES])
            for at in range(0, len(memory), SLICE_BYTES)
        ]
        wait(reads)  # even if one failed, all others must stop writing to the buffer first
        for read in reads:
            read.result()

    def _open(self, tensor: StoredTensor) -> _File:
        if self._file is None or self._file.path != tensor.file:
            self._close()
            self._file = _open(tensor.file)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def bytes_to_read(tensor: StoredTensor, part: Part | Sink) -> int:
    """The number of bytes that `copy` or `feed` reads from the file."""
    if isinstance(part, Sink) or part.dim == 1 or not tensor.num_bytes:
        return tensor.num_bytes
    num_rows = tensor.shape[0] if tensor.shape else 1
    return tensor.num_bytes // num_rows * (part.view.shape[0] if tensor.shape else 1)


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names in sorted order, and how many more there are; for messages."""
    ordered = sorted(names)
    text = ", ".join(name[:MAX_SHOWN_CHARS] for name in ordered[:limit])
    return text if len(ordered) <= limit else f"{text} and {len(ordered) - limit} more"


class _File:
    """A regular file opened for pread; system errors are raised as CheckpointError."""

    __slots__ = ("path", "fd")

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)

    def read(self, offset: int, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, destination: memoryview) -> None:
        done = 0
        while done < len(destination):
            try:
                count = os.preadv(self.fd, [destination[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            done += count


def _open(path: Path) -> _File:
    try:
        return _File(path, open_regular(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: No such file or directory") from error


def _parse_entry(path: Path, name: str, entry: Any, data_offset: int) -> StoredTensor:
    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name[:MAX_SHOWN_CHARS]}: {what}")

    if not name.isprintable():  # no tensor of a model, and a message would have several lines
        raise CheckpointError(
            f"{path}: the tensor name {name[:MAX_SHOWN_CHARS]!r} is not printable"
        )
    if not isinstance(entry, dict):
        raise broken(f"its header entry must be an object, got {entry!r:.80}")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise broken(f"unknown dtype {dtype!r:.80}")
    shape = entry.get("shape")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise broken(f"shape must be at most {MAX_DIMS} sizes of 0 or more, got {shape!r:.80}")
    offsets = entry.get("data_offsets")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(f"data_offsets must be [begin, end], got {offsets!r:.80}")
    num_bytes = prod(shape) * TORCH_DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise broken(
            f"shape and dtype need {num_bytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, data_offset + offsets[0], num_bytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in value
    )


def _check_layout(
    path: Path, tensors: list[StoredTensor], data_offset: int, file_bytes: int
) -> None:
    end = data_offset
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            what = "overlaps another one" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {tensor.name[:MAX_SHOWN_CHARS]} {what}")
        end += tensor.num_bytes
    if end != file_bytes:
        what = "is truncated" if end > file_bytes else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path} {what}: {file_bytes} bytes, the header needs {end}")
