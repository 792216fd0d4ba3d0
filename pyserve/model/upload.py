"""Upload: host buffers that the card reads by itself, filled in turn while another one is read.

Copies run on a stream of their own, dtypes are converted on the card. The buffers are locked in
memory, and given back to the system at the end, which torch's own page-locked memory never is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyserve.errors import StartupError

NUM_BUFFERS = 2


class Upload:
    """Copies to `device` out of NUM_BUFFERS buffers of `buffer_bytes`.

    Use: `fill`, then `send` what was filled in, again and again; `wait` before the destinations
    are used, `close` at the end. Raises StartupError where the memory cannot be locked.
    """

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8) for _ in range(NUM_BUFFERS)]
        self._num_locked = 0
        self._sent: list[torch.cuda.Event] = [
            torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            for _ in self._buffers
        ]
        self._next = 0
        # What is to be converted goes through here.
        self._landing: torch.Tensor | None = torch.empty(
            buffer_bytes, dtype=torch.uint8, device=device
        )
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The memory of the destinations may have been in use by work that still runs.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        try:
            self._lock()
        except BaseException:
            self.close()
            raise

    def fill(self) -> torch.Tensor:
        """uint8 [buffer_bytes] to be filled; what it held before has left it."""
        self._next = (self._next + 1) % NUM_BUFFERS
        self._sent[self._next].synchronize()
        return self._buffers[self._next]

    def send(
        self, piece: torch.Tensor, destination: torch.Tensor,
        columns: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """Begin to copy `piece`, part of what `fill` gave, to `destination`; converts.

        columns   (first, number) of those that are wanted of a matrix; None: all there is, and the
                  shapes are the same.
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
        """Begin to copy `piece`, part of what `fill` gave, and call put with what will be there: it
        must be used on the current stream only."""
        assert self._landing is not None, "closed"
        with torch.cuda.stream(self._stream):
            landing = self._landing[: piece.nbytes].view(piece.dtype).view(piece.shape)
            landing.copy_(piece, non_blocking=True)
            self._sent[self._next].record(self._stream)
            put(landing)

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        self._stream.synchronize()

    def close(self) -> None:
        """Wait, then give all memory back. Harmless when called again."""
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
