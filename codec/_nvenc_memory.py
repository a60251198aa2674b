"""Memory that NVENC reads and writes, and the copies that fetch bitstreams."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._driver import CUDA_DEINITIALIZED, Stream, cuda
from sidelane.errors import DriverError


class Memory:
    """Device memory from cuMemAlloc, which every driver registers; lives as long as its views."""

    def __init__(self, index: int, nbytes: int) -> None:
        self.index, self.nbytes = index, nbytes
        address = ctypes.c_uint64()
        with _driver.bound(index):
            cuda().call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        self.address = address.value
        weakref.finalize(self, _free, index, self.address)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _free(index: int, address: int) -> None:
    with driver_may_be_gone(), _driver.bound(index):
        cuda().call("cuMemFree_v2", address)


@contextmanager
def driver_may_be_gone() -> Iterator[None]:
    """Forgives CUDA that was shut down, which at interpreter exit may happen first and frees everything."""
    try:
        yield
    except DriverError as error:
        if error.status != CUDA_DEINITIALIZED or not error.call.startswith("cu"):
            raise


def view(memory: Memory) -> Tensor:
    """The bytes of `memory`, uint8 [nbytes]."""
    return torch.as_tensor(memory, device=_driver.torch_device(memory.index))


class Place(Protocol):
    """Memory of the kind a session leaves bitstreams in: of the host or of its device. Addresses are of it.

    What is copied is there after `flush`.
    """

    @property
    def device(self) -> torch.device: ...

    def new(self, nbytes: int) -> Tensor:
        """Fresh memory, uint8 [nbytes]."""

    def upload(self, target: int, data: bytes) -> None:
        """Copy `data` of the host to an address."""

    def copy(self, target: int, source: int, nbytes: int) -> None: ...

    def flush(self) -> None: ...


class HostPlace:
    """`Place` in host memory."""

    device = torch.device("cpu")

    def new(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def upload(self, target: int, data: bytes) -> None:
        ctypes.memmove(target, data, len(data))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def flush(self) -> None:
        pass


class DevicePlace:
    """`Place` on device `index`; copies run on `stream`."""

    def __init__(self, index: int, stream: Stream) -> None:
        self._index, self._stream = index, stream

    @property
    def device(self) -> torch.device:
        return _driver.torch_device(self._index)

    def new(self, nbytes: int) -> Tensor:
        fresh = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        ready = _driver.Event(self._index)  # torch may hand out memory that its stream still works on
        try:
            with _driver.bound(self._index):
                self._stream.wait(ready)
        finally:
            ready.close()
        return fresh

    def upload(self, target: int, data: bytes) -> None:
        if data:
            self._copy("cuMemcpyHtoDAsync_v2", target, data, len(data))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._copy("cuMemcpyDtoDAsync_v2", target, source, nbytes)

    def download(self, target: Any, source: int) -> None:
        """Copy an address to `target`, a ctypes object, and wait for it."""
        self._copy("cuMemcpyDtoHAsync_v2", ctypes.byref(target), source, ctypes.sizeof(target))
        self.flush()

    def flush(self) -> None:
        with _driver.bound(self._index):
            self._stream.synchronize()

    def _copy(self, call: str, target: Any, source: Any, nbytes: int) -> None:
        with _driver.bound(self._index):
            cuda().call(call, target, source, nbytes, self._stream.handle)
