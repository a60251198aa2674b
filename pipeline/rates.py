"""How fast lanes and wires are: from the profile of the machine, or measured and estimated where none is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from statistics import median

import torch

from sidelane.errors import ProfileError
from sidelane.pipeline.arena import shared
from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.machine import Curve, LaneSpeed, Machine
from sidelane.pipeline.streams import current_stream, timed_event

# Bytes/s of raw data, where nothing was measured.
_GUESS = {"exact": (200e9, 400e9), "packed": (500e9, 500e9), "bounded": (20e9, 500e9)}
_CPU_GUESS = {"exact": (0.1e9, 0.2e9), "packed": (0.1e9, 0.2e9), "bounded": (0.02e9, 0.2e9)}
_LAUNCH = 5e-6  # seconds that a GPU takes for a code besides, with others queued behind it
_LATENCY = 20e-6
_WIRE_GUESS = 10e9
_MANY = 1 << 30  # bytes, where a curve has come to its rate
_TRIAL = 32 << 20
_TRIALS = 5


def profiled_speed(lane: str, dtype: torch.dtype, device: torch.device) -> LaneSpeed | None:
    """Of a lane by the name that profiles give it ("exact", "packed:4"), for a dtype, among other work of one
    stream: profiles time single calls, whose latency is hidden there. None without a profile."""
    machine = _machine() if device.type == "cuda" else None
    name = str(dtype).removeprefix("torch.")
    for kind in (name, "float32" if dtype.itemsize == 4 else "bfloat16"):
        if machine is not None and (speed := machine.lanes.get(f"{lane}|{kind}|idle")) is not None:
            return _queued(speed.encode.rate(_MANY), speed.decode.rate(_MANY))
    return None


def tried_speed(lane: str, device: torch.device) -> LaneSpeed:
    """Of a group code, tried once for a few milliseconds, in which the host waits; of others a low guess."""
    name, _, bits = lane.partition(":")
    tried = _tried(int(bits), device) if name == "packed" else None
    return tried or _queued(*(_GUESS if device.type == "cuda" else _CPU_GUESS)[name])


def _queued(encode: float, decode: float) -> LaneSpeed:
    return LaneSpeed(Curve.line(_LAUNCH, encode), Curve.line(_LAUNCH, decode))


@cache
def _tried(bits: int, device: torch.device) -> LaneSpeed | None:
    """None where there is no memory for it."""
    lane = open_lane("packed", bits=bits)
    # On a GPU so much that the host is ahead. No random numbers: the program would draw others.
    numel = 1 << (27 if device.type == "cuda" else 16)
    try:
        tensor = torch.arange(256, device=device).to(torch.bfloat16).repeat(numel // 256)
        packet = lane.encode(tensor)
        encode = _seconds(lambda: lane.encode(tensor), device)
        decode = _seconds(lambda: lane.decode(packet), device)
    except torch.OutOfMemoryError:
        return None
    return _queued(tensor.nbytes / encode, tensor.nbytes / decode)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call among several that are queued; the median of those after the first."""
    stream = current_stream(device)
    stamps = [stream.record_event(timed_event() if device.type == "cuda" else None)]
    for _ in range(_TRIALS + 1):
        work()
        stamps.append(stream.record_event(timed_event() if device.type == "cuda" else None))
    stamps[-1].synchronize()
    return max(median(float(a.elapsed_time(b)) / 1e3 for a, b in pairwise(stamps[1:])), 1e-9)


def wires(device: torch.device) -> tuple[Callable[[float], float], Callable[[float], float]] | None:
    """Seconds over bytes from `device` to pinned memory and back; None for the CPU. Measured once, in a few
    milliseconds in which the host waits, where no profile has it."""
    if device.type != "cuda":
        return None
    machine = _machine()
    if machine is not None and {"d2h", "h2d"} <= machine.wires.keys():
        return machine.wires["d2h"], machine.wires["h2d"]
    return _measured(device)


def source(device: torch.device) -> str:
    """Where the rates for `device` come from, and why not from a profile."""
    if device.type != "cuda":
        return "tried and guessed, as for every CPU"
    found = _cached()
    if isinstance(found, Machine):
        return "the profile of this machine; tried where it lacks a lane or a wire"
    reason = "there is no profile: run sidelane profile" if found is None else str(found)
    return f"measured in passing; {reason}"


def _machine() -> Machine | None:
    found = _cached()
    return found if isinstance(found, Machine) else None


@cache
def _cached() -> Machine | ProfileError | None:
    """The profile, or why it is refused."""
    try:
        return Machine.cached()
    except ProfileError as error:
        return error.with_traceback(None)


@cache
def _measured(device: torch.device) -> tuple[Curve, Curve]:
    slot = shared().take(_TRIAL)
    if slot is None:
        return Curve.line(_LATENCY, _WIRE_GUESS), Curve.line(_LATENCY, _WIRE_GUESS)
    stream = current_stream(device)
    slot.wait(stream)
    there = torch.empty(_TRIAL, dtype=torch.uint8, device=device)

    out = _seconds(lambda: slot.tensor.copy_(there, non_blocking=True), device)
    back = _seconds(lambda: there.copy_(slot.tensor, non_blocking=True), device)
    slot.released = stream.record_event()
    return Curve.line(_LATENCY, _TRIAL / out), Curve.line(_LATENCY, _TRIAL / back)
