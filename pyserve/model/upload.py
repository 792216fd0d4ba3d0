"""Upload: asynchronous copies to a card through page-locked host buffers.

One buffer is filled while another is being copied. Copies run on a stream of their own, and dtypes
are converted on the card. The buffers' memory is returned to the system at the end, which torch
never does with its own page-locked memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyserve.errors import StartupError

NUM_BUFFERS = 2


class Upload:
    """Copies to `device` through NUM_BUFFERS buffers of `buffer_bytes` bytes.

    Use: get a buffer by `fill`, write to it, pass it to `send` or `hand_over`, and repeat. Call
    `wait` before the destinations are used, and `close` at the end. The constructor raises
    StartupError if the memory cannot be page-locked.
    """

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8) for _ in range(NUM_BUFFERS)]
        self._num_locked = 0
        self._sent: list[torch.cuda.Event] = [
            torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            for _ in self._buffers
        ]
        self._next = 0
        # Device memory for pieces that must be converted, cut or handed over.
        self._landing: torch.Tensor | None = torch.empty(
            buffer_bytes, dtype=torch.uint8, device=device
        )
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Work that is still running may be using the memory that the destinations now have.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        try:
            self._lock()
        except BaseException:
            self.close()
            raise

    def fill(self) -> torch.Tensor:
        """The next buffer, uint8 [buffer_bytes], once the copies out of it have ended."""
        self._next = (self._next + 1) % NUM_BUFFERS
        self._sent[self._next].synchronize()
        return self._buffers[self._next]

    def send(
        self, piece: torch.Tensor, destination: torch.Tensor,
        columns: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """Start to copy `piece`, a view of the buffer from `fill`, to `destination` on the device.

        Converts to the destination's dtype.

        columns   (first, number): copy only these columns of a matrix; None: all, and the shapes
                  are equal.
        """
        assert self._landing is not None, "closed"
        with torch.cuda.stream(self._stream):
            if columns is not None or piece.dtype != destination.dtype:
                landing = self._landing[: piece.nbytes].view(piece.dtype).view(piece.shape)
                piece = landing.copy_(piece, non_blocking=True)
            if columns is not None:
                piece = piece.narrow(1, *columns)
            destination.copy_(piece, non_blocking=True)
            self._sent[self._next].record(self._stream)

    def hand_over(self, piece: torch.Tensor, put: Callable[[torch.Tensor], None]) -> None:
        """Start to copy `piece`, a view of the buffer from `fill`, to the device, and call `put`
        with the copy. `put` may use it only in work on the current stream."""
        assert self._landing is not None, "closed"
        with torch.cuda.stream(self._stream):
            landing = self._landing[: piece.nbytes].view(piece.dtype).view(piece.shape)
            landing.copy_(piece, non_blocking=True)
            self._sent[self._next].record(self._stream)
            put(landing)

    def wait(self) -> None:
        """Wait until all copies have ended."""
        self._stream.synchronize()

    def close(self) -> None:
        """Wait, then free all memory. Harmless when called again."""
        self.wait()
        for buffer in self._buffers[: self._num_locked]:
            _cudart().cudaHostUnregister(buffer.data_ptr())
        self._num_locked = 0
        self._buffers.clear()
        self._landing = None
        torch.cuda.empty_cache()

    def _lock(self) -> None:
        for buffer in self._buffers:
            code = int(_cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
            if code != 0:
                raise StartupError(
                    f"cannot lock {buffer.nbytes // 2**20} MiB of host memory to load through "
                    f"(CUDA error {code}): this machine or container has too little free"
                )
            self._num_locked += 1


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
