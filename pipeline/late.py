"""Packets of the exact lane that the device is told to write before the host knows how long they get.

Note: [Late sizes]
How much an exact code saves is known when it is made. A host that waits for it at every tensor lets the
device run dry, so the code is written into as much memory as the tensor has, the number of escapes into a
notice in pinned memory, and an event tells when it is there. Until then the packet cannot be copied out, and
nobody but `settle` may look at its memory. `settle` cuts it to its size with copies on the stream of the
encoder, so the memory that it frees goes back in the order of that stream, and the packet is complete after
these copies. A packet that does not stay on the device is not cut: `uncut` is it in the memory that it was
encoded to. A packet that dies before its size is known leaves a notice that the device may still write: the
notice is used again only when its event is reached.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from sidelane.codec.packet import Packet, flatten
from sidelane.kernels.exact import LateCodes, exact_encode_late
from sidelane.kernels.reference import EXACT_FIELDS, ExactCodes
from sidelane.pipeline.lanes import ExactLane, plain, undisturbed
from sidelane.pipeline.streams import HOST, current_stream, on

NOTICES = 256  # in an allocation

_Seat = tuple[Tensor, Any]  # a notice, and the event of its last writer or None


_free: deque[_Seat] = deque()
_allocations: list[Tensor] = []  # never freed: a kernel may write what nobody holds any longer


def _grow() -> Tensor:
    """A notice that nobody has; the others of its allocation are the next that are lent."""
    block = torch.empty((NOTICES, 4), dtype=torch.int32, device="cpu", pin_memory=torch.cuda.is_available())
    _allocations.append(block)
    first, *others = block[:, :2].unbind()  # each at a multiple of 16 bytes, as `launch` wants it
    _free.extendleft((notice, None) for notice in others)
    return first


class Notice:
    """int32 [2] for a kernel to write and the host to read, in pinned memory where there is CUDA."""

    __slots__ = ("_reached", "numbers")

    def __init__(self) -> None:
        self._reached: Any = None
        try:
            seat = _free.popleft()
        except IndexError:
            seat = (_grow(), None)
        if seat[1] is not None and not seat[1].query():
            _free.append(seat)
            seat = (_grow(), None)
        self.numbers = seat[0]

    def written(self, event: Any) -> None:
        """The kernel has written when `event` is reached."""
        self._reached = event

    def __del__(self) -> None:
        if self._reached is not None:  # else whether a kernel will write is not known: it is not used again
            _free.append((self.numbers, self._reached))


class LatePacket:
    """A packet that the current stream encodes. See Note: [Late sizes].

    Attributes:
        device, owner: where, and on which stream.
        nbytes: that it takes until it is settled.
        ready: reached when it is encoded.
    """

    def __init__(self, packet: Packet, codes: LateCodes, notice: Notice, owner: Any) -> None:
        self.owner = owner
        self.device = owner.device
        self.nbytes = codes.nbytes
        self.ready = owner.record_event()
        notice.written(self.ready)
        self._notice = notice
        self._codes: LateCodes | None = codes
        self._packet = packet

    def settle(self) -> Packet:
        """The packet, cut to its size, for work on `owner` from here on. The host waits for its encoding."""
        if self._codes is not None:
            self.ready.synchronize()
            with undisturbed(self.device), on(self.owner):
                codes = self._codes.settle()
            if isinstance(codes, ExactCodes):
                sections, params = codes.sections, (codes.zero_planes,)
                self._packet = self._packet.with_(sections=sections, params=params)
            else:
                self._packet = self._packet.with_(lane="raw", sections={"data": codes})
            self._codes = None
        return self._packet

    def uncut(self) -> Packet | None:
        """The packet in the memory that this holds, for work behind `ready`. The host waits for its encoding.
        None where only `settle` gives it: of a float32 tensor with zero planes, and raw."""
        codes = self._codes
        if codes is None:
            return None
        self.ready.synchronize()
        escapes, planes = codes.notice.tolist()
        droppable = (1 << EXACT_FIELDS[codes.dtype].droppable) - 1
        *parts, back = codes.parts
        if 2 * escapes > back.numel() or planes & droppable != droppable:
            return None
        sections = ExactCodes.of((*parts, back[: 2 * escapes]), 0, codes.numel).sections
        return self._packet.with_(sections=sections, params=(0,))


def encode_exact(tensor: Tensor) -> Packet | LatePacket:
    """`ExactLane.encode`, without a wait where `encode_late` has one."""
    late = encode_late(tensor)
    return ExactLane().encode(tensor) if late is None else late


def encode_late(tensor: Tensor) -> LatePacket | None:
    """`ExactLane.encode` of a tensor on a GPU without a wait; None for tensors that have no such code."""
    tensor = plain(tensor)
    if tensor.dtype not in EXACT_FIELDS or not tensor.numel():
        return None
    notice = Notice()
    codes = exact_encode_late(flatten(tensor), notice.numbers)
    if codes is None:
        notice.written(HOST.record_event())  # by nobody
        return None
    return LatePacket(Packet.like("exact", tensor), codes, notice, current_stream(tensor.device))
