"""PeerMemory: memory of a card that other processes on this machine can map.

It is allocated by the CUDA driver, not from torch's pool, because the process that exports it must
keep it until the other processes have closed it. NVLink multicast is not used, here or anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

HANDLE_BYTES = 64  # size of a CUipcMemHandle
_LAZY_ENABLE_PEER_ACCESS = 1


class PeerError(Exception):
    """Why cards cannot use each other's memory; the message is one line."""


class PeerMemory(Protocol):
    """What a PeerGroup needs from a card and its driver. All methods raise PeerError on failure."""

    def card_id(self) -> str:
        """A name of this rank's card that is the same in all processes."""

    def allocate(self, num_bytes: int) -> int:
        """Allocate uninitialised memory on this card; returns its address."""

    def export(self, address: int) -> bytes:
        """A handle by which another process can open an allocation."""

    def check_access(self, card_id: str) -> None:
        """Raise PeerError unless this card can read and write the memory of the other card."""

    def open(self, handle: bytes) -> int:
        """Map an allocation that another process has exported; returns its address here."""

    def close(self, address: int) -> None:
        """Unmap memory from `open`."""

    def free(self, address: int) -> None:
        """Free memory from `allocate`."""

    def words(self, address: int, num_words: int) -> Tensor:
        """An int32 [num_words] view of memory from `allocate`."""


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


class _Words:
    """Wraps an address for torch.as_tensor, by the CUDA array interface."""

    def __init__(self, address: int, num_words: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_words,), "typestr": "<i4", "data": (address, False), "version": 3,
        }  # fmt: skip


class CudaPeerMemory:
    """Implements PeerMemory on a CUDA device that torch can use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver = ctypes.CDLL("libcuda.so.1")

    def card_id(self) -> str:
        return _card_id(self._device.index)

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_uint64()
        with self._on_device():
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def export(self, address: int) -> bytes:
        handle = _Handle()
        with self._on_device():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.bytes)

    def check_access(self, card_id: str) -> None:
        if card_id == self.card_id():
            return
        ids = [_card_id(index) for index in range(torch.cuda.device_count())]
        if card_id not in ids:
            raise PeerError(f"card {card_id} is not visible to every rank")
        peer = ids.index(card_id)
        if not torch.cuda.can_device_access_peer(self._device.index, peer):
            raise PeerError(
                f"cuda:{self._device.index} cannot reach the memory of cuda:{peer}: "
                "no NVLink, and no peer access over PCIe"
            )

    def open(self, handle: bytes) -> int:
        own, address = _Handle.from_buffer_copy(handle), ctypes.c_uint64()
        with self._on_device():
            flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), own, flags)
        return address.value

    def close(self, address: int) -> None:
        with self._on_device():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def free(self, address: int) -> None:
        with self._on_device():
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def words(self, address: int, num_words: int) -> Tensor:
        return torch.as_tensor(_Words(address, num_words), device=self._device)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Make torch's CUDA context current on this thread, and wait for the device.

        The call of the CUDA runtime is what sets the context, which driver calls need.
        """
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            yield

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._driver.cuGetErrorName(code, ctypes.byref(text))
        raise PeerError(f"{name}: {(text.value or b'?').decode()} ({code})")


def _card_id(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
