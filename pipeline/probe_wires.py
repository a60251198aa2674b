"""Wires of a machine, timed as the rest of sidelane uses them: seconds for one transfer of n bytes.

Small transfers are timed several in a row, since they come in rows; each counts for its share.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Thread
from time import perf_counter, sleep

import torch
from torch import Tensor

from sidelane.errors import ProfileError
from sidelane.pipeline.arena import Arena, Slot, available_memory
from sidelane.pipeline.disk import RESERVE, THREADS, Disk
from sidelane.pipeline.machine import Curve
from sidelane.pipeline.sampling import Load, host_seconds, sample, sample_both, stream_seconds
from sidelane.pipeline.streams import side_stream

STREAM = "copies of a profile"
ROW = 4 << 20  # bytes of transfers in a row
MOST = 32  # of them
CHUNK = 64 << 20  # bytes of the copies that fill the other direction
PATIENCE = 5.0  # seconds that a connection may be silent
POLL = 20e-6  # seconds


def pcie(device: torch.device, sizes: Sequence[int], limit: float) -> dict[str, Curve]:
    """Wires "d2h" and "h2d" between the GPU and pinned memory of an arena, and each "both": beside copies of
    64 MiB in the other direction. Raises ProfileError without memory for the smallest."""
    free = min(available_memory() - (1 << 30), torch.cuda.mem_get_info(device)[0] // 4)
    sizes = _fitting(sizes, free // 4, "memory")
    top = max(sizes)
    arena = Arena(2 * top, step=top)
    slots: list[Slot] = []
    copies: dict[str, Callable[[int], object]] = {}
    for name in ("d2h", "h2d"):
        slot = arena.take(top)
        if slot is None:
            raise ProfileError(f"2 x {top} bytes of host memory cannot be pinned")
        slots.append(slot)  # its memory is lent again without it
        on_gpu = torch.zeros(top, dtype=torch.uint8, device=device)
        pair = (slot.tensor, on_gpu) if name == "d2h" else (on_gpu, slot.tensor)
        copies[name] = partial(_copy, *pair)
    torch.cuda.synchronize(device)
    stream = side_stream(device, STREAM)
    curves = {}
    for name, copy in copies.items():
        curves[name] = sample(sizes, partial(_copies, stream, copy), limit / 4, _in_a_row)
    for name, other in (("d2h", "h2d"), ("h2d", "d2h")):
        chunk = min(CHUNK, top)
        load = Load(device, partial(copies[other], chunk), curves[other](chunk))

        def once(size: int, name: str = name, load: Load = load) -> float:
            guess = curves[name](size) * _row(size)
            return load.beside(partial(_copies, stream, copies[name], size), guess)

        curves[f"{name} both"] = sample(sizes, once, limit / 4, _in_a_row)
    return curves


def peer(device: torch.device, sizes: Sequence[int], limit: float) -> dict[str, Curve]:
    """Wire "peer" from `device` to the next GPU: NVLink, PCIe, or through the host where there is neither."""
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    free = min(torch.cuda.mem_get_info(each)[0] for each in (device, other))
    sizes = _fitting(sizes, free // 4, "GPU memory")
    source = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    target = torch.zeros(max(sizes), dtype=torch.uint8, device=other)
    for each in (device, other):
        torch.cuda.synchronize(each)
    copy = partial(_copy, target, source)
    return {"peer": sample(sizes, partial(_copies, side_stream(device, STREAM), copy), limit)}


def disk(
    folder: str, sizes: Sequence[int], limit: float, device: torch.device | None = None
) -> dict[str, Curve]:
    """Wires "disk write" and "disk read" through the disk tier, checksums included, `THREADS` transfers at
    once, of bytes that come from `device` if there is one: those that a CPU wrote last take longer.

    Raises LaneError when `folder` takes no file, ProfileError without room, OSError as the file system says.
    """
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize - 2 * RESERVE
    memory = available_memory() - (1 << 30)
    sizes = _fitting(sizes, min(free // 2, memory // 4) // THREADS, "room on the disk or in memory")
    staging = max(sizes) * THREADS
    tier = Disk(folder, limit=2 * staging, in_flight=staging)
    noise = torch.randint(256, (max(sizes),), dtype=torch.uint8, device=device)  # a disk may not write zeros
    for size in (min(sizes), max(sizes)):
        _on_disk(tier, noise, size)  # memory is pinned, and the file as long as it will be
    write, read = sample_both(sizes, partial(_on_disk, tier, noise), limit)
    tier.close()  # not in a finally: it would wait for a disk that has stalled
    return {"disk write": write, "disk read": read}


def tcp(sizes: Sequence[int], limit: float) -> dict[str, Curve]:
    """Wire "tcp": over loopback until the receiver, a thread of this process, says that it has everything.

    Raises OSError, which is TimeoutError after 5 s of silence.
    """
    sizes = _fitting(sizes, (available_memory() - (1 << 30)) // 4, "memory")
    with ExitStack() as open_sockets:
        server = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(PATIENCE)
        client = open_sockets.enter_context(socket.create_connection(server.getsockname(), PATIENCE))
        accepted, _ = server.accept()
        receiver = open_sockets.enter_context(accepted)
        for each in (client, receiver):
            each.settimeout(PATIENCE)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Thread(target=_receive, args=(receiver, max(sizes)), daemon=True, name="sidelane-tcp").start()
        data = memoryview(bytearray(max(sizes)))
        curve = sample(sizes, lambda n: host_seconds(partial(_send, client, data[:n])), limit)
        client.shutdown(socket.SHUT_WR)
    return {"tcp": curve}


def _fitting(sizes: Sequence[int], nbytes: int, what: str) -> tuple[int, ...]:
    fitting = tuple(size for size in sizes if size <= nbytes)
    if not fitting:
        raise ProfileError(f"too little {what}: {max(nbytes, 0) >> 20} MiB")
    return fitting


def _row(size: int) -> int:
    """How many transfers of `size` are timed in a row."""
    return min(max(ROW // size, 1), MOST)


def _in_a_row(size: int) -> int:
    """Bytes of them."""
    return size * _row(size)


def _copy(target: Tensor, source: Tensor, size: int) -> None:
    target[:size].copy_(source[:size], non_blocking=True)


def _copies(stream: torch.cuda.Stream, copy: Callable[[int], object], size: int) -> float:
    count = _row(size)

    def row() -> None:
        for _ in range(count):
            copy(size)

    return stream_seconds(stream, row) / count


def _on_disk(tier: Disk, noise: Tensor, size: int) -> tuple[float, float]:
    """Seconds of writing, and of reading, one of several transfers of `size` at once."""
    spills = []
    for _ in range(THREADS):
        spill = tier.place(size)
        if spill is None or spill.slot is None:
            raise tier.error or ProfileError(f"the disk has no room for {THREADS} x {size} bytes")
        spill.slot.synchronize()
        spill.slot.tensor[:size].copy_(noise[:size])
        spills.append(spill)
    begin = perf_counter()
    for spill in spills:
        spill.write()
    while any(spill.slot is not None for spill in spills):
        for spill in spills:
            if spill.error is not None:
                raise spill.error
        sleep(POLL)
    written = perf_counter()
    for spill in spills:
        spill.fetch()
    slots: list[Slot] = [spill.load() for spill in spills]
    read = perf_counter()
    del slots
    return (written - begin) / THREADS, (read - written) / THREADS


def _send(client: socket.socket, data: memoryview) -> None:
    client.sendall(len(data).to_bytes(8, "little"))
    client.sendall(data)
    if not client.recv(1):
        raise ConnectionError("the receiver hung up")


def _receive(connection: socket.socket, largest: int) -> None:
    """Answer each message with one byte, until the sender ends or is silent."""
    buffer = memoryview(bytearray(largest))
    try:
        while head := connection.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(head, "little")
            while left:
                if not (received := connection.recv_into(buffer[:left])):
                    return
                left -= received
            connection.sendall(b"\1")
    except OSError:
        return  # the sender sees silence and says so
