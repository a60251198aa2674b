"""What comes out of an encoder: the buffers pictures are written to, and where their bytes are taken."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sidelane.codec._nvenc import Session
from sidelane.codec._nvenc_memory import DevicePlace, Memory, Place
from sidelane.codec.hevc import END_OF_BITSTREAM
from sidelane.errors import DriverError, SpaceError

Result = TypeVar("Result", covariant=True)


class EncodedSurface(NamedTuple):
    """The pictures of one surface. `headers`: the parameter sets of each; b"" if the driver put them in."""

    headers: bytes
    pictures: tuple[bytes, ...]

    def stream(self) -> bytes:
        """Plain HEVC (Annex B) as `encode_hevc` writes it: parameter sets before every picture."""
        return b"".join(self.headers + picture for picture in self.pictures) + END_OF_BITSTREAM


class Output(Protocol):
    """A buffer for one picture at a time."""

    def begin(self) -> int:
        """What the next picture is to be written to."""

    def collect(self, stamp: int, take: Callable[[int, int], None]) -> None:
        """Wait for the picture; `take` copies its bytes, given address and size."""


class HostOutput:
    """A bitstream buffer of the driver, read in host memory."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._buffer = session.create_output()

    def begin(self) -> int:
        return self._buffer

    def collect(self, stamp: int, take: Callable[[int, int], None]) -> None:
        self._session.collect(self._buffer, stamp, take)


class DeviceOutput:
    """Device memory for NV_ENC_ENCODE_OUT_PARAMS and the bytes of a picture after it.

    The encoder owns it from `begin` on; unmapping it waits for the picture, as locking does with a buffer in
    host memory. A picture that finds too little room is cut without an error; its size gives that away.
    """

    def __init__(self, session: Session, place: DevicePlace, room: int) -> None:
        """`room`: bytes for a picture."""
        self._session, self._place, self._room = session, place, room
        self._head = session.abi.struct("NV_ENC_ENCODE_OUT_PARAMS")
        self._memory = Memory(session.index, ctypes.sizeof(self._head) + room)
        self._registered = session.register_output(self._memory)

    def begin(self) -> int:
        return self._session.map(self._registered)

    def collect(self, stamp: int, take: Callable[[int, int], None]) -> None:
        self._session.unmap(self._registered)
        head = self._head()
        self._place.download(head, self._memory.address)
        size = head.bitstreamSizeInBytes
        if not 0 < size < self._room:
            problem = (
                f"picture {stamp} has {size} bytes in a buffer of {self._room}: it is cut or was not written"
            )
            raise DriverError("nvEncEncodePicture", 0, "NV_ENC_SUCCESS", problem)
        take(self._memory.address + ctypes.sizeof(head), size)
        self._place.flush()


class Taker(Protocol[Result]):
    """Takes the pictures of one surface."""

    def take(self, address: int, size: int) -> None: ...

    def result(self) -> Result: ...


class PictureTaker:
    """Takes pictures from host memory as they are."""

    def __init__(self, headers: bytes) -> None:
        self._headers = headers
        self._pictures: list[bytes] = []

    def take(self, address: int, size: int) -> None:
        self._pictures.append(ctypes.string_at(address, size))

    def result(self) -> EncodedSurface:
        return EncodedSurface(self._headers, tuple(self._pictures))


class StreamTaker:
    """Writes the stream of a surface, as `EncodedSurface.stream`, into one tensor, picture by picture."""

    def __init__(self, place: Place, headers: bytes, out: Tensor | None) -> None:
        """`out`: uint8 [bytes] in `place`, None for memory of the stream's own."""
        self._place, self._headers, self._out = place, headers, out
        self._used = 0  # bytes of `out`
        self._apart: list[Tensor] = []  # what follows them and does not fit

    def take(self, address: int, size: int) -> None:
        target = self._reserve(len(self._headers) + size)
        self._place.upload(target, self._headers)
        self._place.copy(target + len(self._headers), address, size)

    def result(self) -> Tensor:
        """The stream. Raises SpaceError, with the stream, when `out` is too small."""
        self._place.upload(self._reserve(len(END_OF_BITSTREAM)), END_OF_BITSTREAM)
        self._place.flush()
        written = (
            torch.empty(0, dtype=torch.uint8, device="cpu") if self._out is None else self._out[: self._used]
        )
        if not self._apart:
            return written
        whole = self._place.new(self._used + sum(part.numel() for part in self._apart))
        at = whole.data_ptr()
        for part in (written, *self._apart):
            self._place.copy(at, part.data_ptr(), part.numel())
            at += part.numel()
        self._place.flush()
        if self._out is not None:
            raise SpaceError(whole, self._out.numel())
        return whole

    def _reserve(self, size: int) -> int:
        """Address of the next `size` bytes."""
        if self._out is not None and not self._apart and self._used + size <= self._out.numel():
            target = self._out.data_ptr() + self._used
            self._used += size
            return target
        self._apart.append(self._place.new(size))
        return self._apart[-1].data_ptr()
