"""`sidelane plan`: which lane a tensor should take over which wire, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sidelane.archive import entries_of, read_tensors
from sidelane.errors import LaneError, ProfileError
from sidelane.pipeline.choice import MAX_RATE, MIN_RATE, NO_PROFILE, Wire, check_load, choose, present
from sidelane.pipeline.compress import check_bound
from sidelane.pipeline.machine import HOST_TIMES, MAX_SIZE, Machine
from sidelane.pipeline.prediction import Described, speed_of
from sidelane.pipeline.samples import LANES, probe

MIB = 1 << 20
HIDDEN = {"d2h both", "h2d both", *HOST_TIMES}  # shown only where they are asked for, if at all
RANDOM_BYTES = 4 * MIB  # of the tensor that is probed when no file is given
NOT_CHECKED = "Without a GPU here the time that keeping the bound takes is left out."


def plans(
    source: Path | None,
    wires: Sequence[str],
    sizes: Sequence[float] | None,
    dtype: str | None,
    load: str,
    max_rel_error: float | None,
    together: int,
    profile: Path | None,
) -> Iterator[str]:
    """One table for each tensor and wire.

    Args:
        source: safetensors file; without, tensors of `sizes` MiB (1 and 64) of `dtype` (bfloat16) that are
            normal random numbers.
        wires: see `parse_wire`; without any, those of the profile in one direction at a time.
        profile: of this or another machine; default: the one in the cache.

    Raises ProfileError without a profile, LaneError for a file, a wire or a dtype that is none.
    """
    check_bound(max_rel_error)
    check_load(load)
    routes = [parse_wire(wire) for wire in wires]
    tensors: Iterable[tuple[str, int, Tensor]]
    if source is None:
        tensors = _random(dtype or "bfloat16", sizes or (1.0, 64.0))
    elif sizes or dtype is not None:
        raise LaneError("--mib and --dtype are of random numbers: leave them out beside a file")
    else:
        tensors = _read(source)
    machine = present() if profile is None else Machine.load(profile, foreign=True)
    if machine is None:
        raise ProfileError(NO_PROFILE)
    routes = routes or [(name,) for name in machine.wires if name not in HIDDEN]
    if not routes:
        raise LaneError("the profile has no wires: give --wire with a rate in GB/s")
    for name, nbytes, tensor in tensors:
        name = name if name.isprintable() else ascii(name)
        if not nbytes:
            yield f"{name}: no elements, nothing to send"
            continue
        what = _described(tensor, nbytes, machine)
        for route in routes:
            decision = choose(what, route, machine, load, max_rel_error, together=together, name=name)
            yield f"{name}: {decision.explain()}"
        if max_rel_error is not None and not isinstance(what[2], Tensor):
            yield NOT_CHECKED


def parse_wire(text: str) -> tuple[Wire, ...]:
    """Wires that are crossed one after the other, separated by commas: names of the profile, or GB/s."""
    return tuple(_wire(part.strip()) for part in text.split(","))


def _wire(part: str) -> Wire:
    try:
        rate = float(part) * 1e9
    except ValueError:
        return part
    if not MIN_RATE <= rate <= MAX_RATE:
        raise LaneError(f"wire '{part}' is no rate: give GB/s, as 1.25, or a name in the profile")
    return rate


def _random(dtype: str, sizes: Sequence[float]) -> list[tuple[str, int, Tensor]]:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise LaneError(f"dtype '{dtype}' is no floating dtype of torch: use bfloat16, float16 or float32")
    random = torch.Generator().manual_seed(0)
    try:
        tensor = torch.randn(RANDOM_BYTES // 1024 // kind.itemsize, 1024, generator=random).to(kind)
    except RuntimeError as error:
        raise LaneError(
            f"dtype '{dtype}' holds no random numbers: use bfloat16, float16 or float32"
        ) from error
    for size in sizes:
        if size * MIB > MAX_SIZE:
            raise LaneError(f"{size:g} MiB are more than the {MAX_SIZE // MIB} MiB that can be planned for")
    return [("normal random numbers", int(size * MIB), tensor) for size in sizes]


def _read(source: Path) -> Iterator[tuple[str, int, Tensor]]:
    """The tensors of a file, one after the other; what is wrong with its header is said at once."""
    if not source.is_file():
        raise LaneError(f"{source} is no file: name a safetensors file, or none for random numbers")
    if not any(entry.nbytes for entry in entries_of(source)):
        raise LaneError(f"{source} has no tensor with elements: there is nothing to plan for")
    return ((name, tensor.nbytes, tensor) for name, tensor in read_tensors(source))


def _described(tensor: Tensor, nbytes: int, machine: Machine) -> Described:
    """With the tensor where the lanes run on the device of the tables, else with what they make of it."""
    if torch.cuda.is_available():
        return tensor.dtype, nbytes, tensor.cuda()
    if machine.key.get("gpu", "none") == "none":
        return tensor.dtype, nbytes, tensor
    known = {
        lane: probe(lane, tensor)
        for lane in LANES
        if lane != "video" and speed_of(machine, lane, tensor.dtype, "idle") is not None
    }
    return tensor.dtype, nbytes, {lane: (1 / each.share, each.rel_error) for lane, each in known.items()}
