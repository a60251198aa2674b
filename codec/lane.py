"""What a lane is. The lanes themselves are in sidelane.pipeline.lanes, where kernels and codecs meet."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sidelane.codec.packet import Packet


class Lane(Protocol):
    """Encodes a tensor into a packet and back, on the device of its input. Calls do not depend on each other,
    but for those of lane "auto", which learns which lane to take.

    `encode` takes any strided tensor and never modifies it. `decode` raises PacketError for a packet that
    another lane wrote or whose parts do not fit each other. `finer` is the lane to try when the error is too
    large; every chain of them ends with an exact lane, and that one has None.
    """

    name: str
    exact: bool  # every round trip restores every bit

    def encode(self, tensor: Tensor) -> Packet: ...

    def decode(self, packet: Packet) -> Tensor: ...

    def finer(self) -> Lane | None: ...
