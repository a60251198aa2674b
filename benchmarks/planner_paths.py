"""What tensors cross in the benchmark of the planner, and how that is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter, sleep
from typing import Any, TypeVar

import torch
from common import Quiet
from torch import Tensor

from sidelane.codec.packet import Packet
from sidelane.pipeline.choice import Wire
from sidelane.pipeline.disk import Disk
from sidelane.pipeline.lanes import decode_packet
from sidelane.pipeline.machine import Curve, Machine
from sidelane.pipeline.samples import lane_named
from sidelane.pipeline.sampling import Load
from sidelane.pipeline.tensor_auto import AutoLane
from sidelane.pipeline.throttle import TokenBucket
from sidelane.pipeline.tiers import PacketLayout

MIB = 1 << 20
CALIBRATE = 9  # copies of each size
T = TypeVar("T")


@dataclass
class Setting:
    """What everything runs on. `scale`: sizes of tensors are divided by it. `stream`: None without a GPU.
    `quiet`: of the process."""

    device: torch.device
    machine: Machine
    scale: int
    stream: Any = None
    loads: dict[str, Load | None] = field(default_factory=lambda: {"idle": None})
    quiet: Quiet = field(default_factory=lambda: Quiet(lambda: None))

    def apart(self, work: Callable[[], T]) -> T:
        """What `work` returns, on the stream of the tensors."""
        if self.stream is None:
            return work()
        with torch.cuda.stream(self.stream):
            value = work()
        self.stream.synchronize()
        return value

    def timed(self, work: Callable[[], object], load: str = "idle", guess: float = 0.0) -> float:
        """Seconds of work until the stream that it runs on is done. `guess`: the same, alone."""

        def once() -> float:
            self.join()
            begin = perf_counter()
            self.apart(work)
            return perf_counter() - begin

        beside = self.loads[load]
        return once() if beside is None else beside.beside(once, guess)

    def join(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.stream is not None)


class Path:
    """Encoded tensors out and back.

    Attributes:
        wires, together: for `choose`; `carry` takes so many tensors.
        group: of the rows of the summary.
        mib: of a tensor.
    """

    together = 1
    simulated = False

    def __init__(self, setting: Setting, name: str, group: str, wires: Sequence[Wire], mib: float) -> None:
        self.setting, self.name, self.group = setting, name, group
        self.wires, self.mib = tuple(wires), mib

    def carry(self, packets: list[Packet]) -> list[Packet]:
        raise NotImplementedError


class Host(Path):
    """Pinned memory."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, "host", "d2h and h2d", ("d2h", "h2d"), 32)
        self._memory = setting.pinned(33 * MIB)

    def carry(self, packets: list[Packet]) -> list[Packet]:
        back = []
        for packet in packets:
            layout = PacketLayout(packet)
            layout.write(packet, self._memory[: layout.nbytes])
            back.append(layout.read(self._memory[: layout.nbytes], self.setting.device))
        return back


class Simulated(Path):
    """One way between the GPU and pinned memory throttled by a token bucket, the other as it is.

    Args:
        way: "d2h" or "h2d".
        rate: bytes per second.
    """

    simulated = True

    def __init__(self, setting: Setting, way: str, rate: float, mib: float) -> None:
        self.other = "h2d" if way == "d2h" else "d2h"
        super().__init__(setting, f"{way} {rate / 1e9:g} GB/s", f"simulated {way}", (rate, self.other), mib)
        self.way = way
        self.pace(rate)
        self._memory = setting.pinned(int(mib * MIB) // setting.scale + MIB)

    def pace(self, rate: float) -> None:
        """Be of so many bytes per second from now on."""
        self.rate, self._bucket = rate, TokenBucket(rate, burst=0)

    def carry(self, packets: list[Packet]) -> list[Packet]:
        back = []
        for packet in packets:
            layout = PacketLayout(packet)
            memory = self._memory[: layout.nbytes]
            if self.way == "d2h":
                self._cross(layout.nbytes, partial(layout.write, packet, memory))
                back.append(layout.read(memory, self.setting.device))
            else:
                layout.write(packet, memory)
                buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.setting.device)
                self._cross(layout.nbytes, partial(buffer.copy_, memory, non_blocking=True))
                back.append(layout.over(buffer))
        return back

    def _cross(self, nbytes: int, copy: Callable[[], object]) -> None:
        """Copy at once, and let nobody go on before the wire would have done so. The host stays awake, as it
        does for a wire that it waits for."""
        self.setting.join()  # the bytes are there only from here on
        end = self._bucket.grant(nbytes)
        copy()
        while perf_counter() < end:
            pass
        self.setting.join()  # a wire that is faster than the copy stays out of reach

    def calibrate(self) -> None:
        """Take the throttled way as a wire that is measured, once, since a profile measures its wires too:
        what the path takes beyond the other way."""
        if any(isinstance(wire, Curve) for wire in self.wires):
            return
        nbytes = int(self.mib * MIB) // self.setting.scale
        sizes = sorted({max(nbytes // part, 4096) for part in (16, 4, 2, 1)})
        times, other = [], self.setting.machine.wires[self.other]
        for size in sizes:
            packet = self.setting.apart(partial(_zeros, self.setting, size))
            found = sorted(self.setting.timed(partial(self.carry, [packet])) for _ in range(CALIBRATE))
            times.append(max(found[CALIBRATE // 2] - other(size), 1e-9))
        paced = Curve.fit(sizes, times)
        self.wires = (paced, self.other) if self.way == "d2h" else (self.other, paced)


class OnDisk(Path):
    """Pinned memory, the file of a disk tier, and back. Tensors cross together, as the tier works."""

    together = 4

    def __init__(self, setting: Setting, folder: str) -> None:
        super().__init__(setting, "disk", "disk", ("d2h", "disk write", "disk read", "h2d"), 8)
        self._tier = Disk(folder, limit=1 << 30, in_flight=256 * MIB)

    def carry(self, packets: list[Packet]) -> list[Packet]:
        layouts = [PacketLayout(packet) for packet in packets]
        spills = []
        for layout, packet in zip(layouts, packets, strict=True):
            spill = self._tier.place(layout.nbytes)
            if spill is None or spill.slot is None:
                raise RuntimeError(f"the disk took no tensor: {self._tier.error}")
            layout.write(packet, spill.slot.tensor[: layout.nbytes])
            spills.append(spill)
        self.setting.join()
        for spill in spills:
            spill.write()
        while any(spill.slot is not None and spill.error is None for spill in spills):
            sleep(20e-6)
        for spill in spills:
            spill.fetch()
        slots = [spill.load() for spill in spills]
        back = [
            layout.read(slot.tensor[: layout.nbytes], self.setting.device)
            for layout, slot in zip(layouts, slots, strict=True)
        ]
        self.setting.join()
        return back


def round_trip(path: Path, lane: str | AutoLane, x: Tensor) -> list[Tensor]:
    """`path.together` times `x`, encoded, carried and decoded one stage after the other."""
    chosen = lane_named(lane) if isinstance(lane, str) else lane
    packets = [chosen.encode(x) for _ in range(path.together)]
    return [decode_packet(packet) for packet in path.carry(packets)]


def _zeros(setting: Setting, nbytes: int) -> Packet:
    return lane_named("raw").encode(torch.zeros(nbytes, dtype=torch.uint8, device=setting.device))
