"""`sidelane plan`: which lane a tensor should take over which wire, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
    sizes: Sequence[float],
    dtype: str,
    load: str,
    max_rel_error: float | None,
    together: int,
    profile: Path | None,
) -> Iterator[str]:
    """One table for each tensor and wire.

    Args:
        source: safetensors file; without, tensors of `sizes` MiB of `dtype` that are normal random numbers.
        wires: see `parse_wire`; without any, those of the profile in one direction at a time.
        profile: of this or another machine; default: the one in the cache.

    Raises ProfileError without a profile, LaneError for a file, a wire or a dtype that is none.
    """
    check_bound(max_rel_error)
    check_load(load)
    routes = [parse_wire(wire) for wire in wires]
    tensors = _random(dtype, sizes) if source is None else _read(source)
    machine = present() if profile is None else Machine.load(profile, foreign=True)
    if machine is None:
        raise ProfileError(NO_PROFILE)
    routes = routes or [(name,) for name in machine.wires if name not in HIDDEN]
    if not routes:
        raise LaneError("the profile has no wires: give --wire with a rate in GB/s")
    for name, nbytes, tensor in tensors:
        what = _described(tensor, nbytes, machine)
        for route in routes:
            decision = choose(what, route, machine, load, max_rel_error, together=together, name=name)
            yield f"{name if name.isprintable() else ascii(name)}: {decision.explain()}"
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
    """The tensors of a file, one after the other; what is wrong with the file is said at once."""
    if not source.is_file():
        raise LaneError(f"{source} is no file: name a safetensors file, or none for random numbers")
    try:
        file: Any = safe_open(source, framework="pt")
        names = [name for name in file.keys() if 0 not in file.get_slice(name).get_shape()]  # noqa: SIM118
    except SafetensorError as error:
        raise LaneError(f"{source} is no safetensors file: {error}") from error
    if not names:
        raise LaneError(f"{source} has no tensor with elements: there is nothing to plan for")
    return (_of(source, file, name) for name in names)


def _of(source: Path, file: Any, name: str) -> tuple[str, int, Tensor]:
    try:
        tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise LaneError(f"{source}: {name} cannot be read: {error}") from error
    return name, tensor.nbytes, tensor


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
