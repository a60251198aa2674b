"""Which lane a tensor should take over a wire, what speaks for it, and why not another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite, nan

import torch
from torch import Tensor

from sidelane.errors import LaneError, ProfileError
from sidelane.pipeline.compress import check_bound
from sidelane.pipeline.decision import MIN_GAIN, RAW, Residuals, best_lane
from sidelane.pipeline.extent import distinct_bytes
from sidelane.pipeline.machine import CHAIN_TIMES, HOST_TIMES, WIRES, Curve, Machine
from sidelane.pipeline.prediction import DISKS, Candidate, Described, Prediction, Task, idle_figures, short
from sidelane.pipeline.samples import EXACT, LANES, SHARED, Probes, Sample

LOADS = ("idle", "busy")
MIN_RATE, MAX_RATE = 1e3, 1e15  # bytes per second of a wire; others are of another unit
NO_CHAINS = "the profile has no times of chains: run sidelane profile again, on a GPU"
NO_PROFILE = "no profile of this machine: run sidelane profile"

Wire = str | float | Curve


@dataclass(frozen=True)
class Decision:
    """The lane for a tensor, and what was known when it was chosen.

    Attributes:
        lane: one of `LANES`, for `lane_named`.
        nbytes: of the tensor.
        wires: what it crosses.
        candidates: by lane, in the order of `LANES`.
        probe_seconds: that encoding samples took for this decision; 0 when they were remembered.
        note: what it could not take into account; "" if there is nothing.
    """

    lane: str
    dtype: torch.dtype
    nbytes: int
    wires: tuple[str, ...]
    load: str
    together: int
    candidates: dict[str, Candidate]
    probe_seconds: float = 0.0
    note: str = ""

    @property
    def seconds(self) -> float:
        """Predicted for the chosen lane; NaN when nothing is known of this machine."""
        return self.candidates[self.lane].seconds

    def explain(self, measured: Mapping[str, float] | None = None) -> str:
        """A table of all lanes: ratio, error, predicted and measured milliseconds, its slowest
        stage, why not.

        Args:
            measured: seconds by lane; default: what the timed stages of earlier tensors add up to.
        """
        how = f"{self.together} at once" if self.together > 1 else "one at a time"
        lines = [
            f"{short(self.dtype)}, {self.nbytes / 1e6:.3g} MB over "
            f"{', '.join(self.wires)}, {self.load}, {how}: {self.lane}",
            *[self.note] * bool(self.note),
            f"{'lane':9} {'ratio':>6} {'error':>8} {'predicted ms':>12} {'measured ms':>12}  "
            "slowest stage; why not",
        ]
        for lane, each in self.candidates.items():
            some, ratio, error = each.sample, "-", "-"
            if some is not None and self.nbytes:
                ratio, error = f"{1 / (some.share + some.header / self.nbytes):.2f}", f"{some.rel_error:.2g}"
            known = each.learned if measured is None else measured.get(lane)
            words = "; ".join(part for part in (each.binds, self._why_not(each)) if part)
            times = f"{_milliseconds(each.seconds):>12} {_milliseconds(known):>12}"
            lines.append(f"{lane:9} {ratio:>6} {error:>8} {times}  {words}".rstrip())
        return "\n".join(lines)

    def _why_not(self, each: Candidate) -> str:
        if each.why or each.lane == self.lane:
            return each.why
        times = each.seconds / self.seconds
        if times >= 1:
            return f"{times:.2f} x the time of {self.lane}"
        need = f"{MIN_GAIN:.0%} beside raw" if self.lane == RAW else "what a change needs"
        return f"saves {1 - times:.1%} of {self.lane}, less than {need}"


def choose(
    what: Tensor | Described,
    wire: Wire | Sequence[Wire] = "d2h",
    machine: Machine | None = None,
    load: str = "idle",
    max_rel_error: float | None = None,
    exact: bool | None = None,
    *,
    together: int = 1,
    name: str = "",
    residuals: Residuals | None = None,
    probes: Probes = SHARED,
) -> Decision:
    """The lane for a tensor: raw unless another one is predicted to save at least 5 % of the time.

    Args:
        what: the tensor; or its dtype, its bytes and a tensor like it, or for each lane (ratio, error).
        wire: a wire of the machine ("d2h", "tcp", ...), bytes per second, or a Curve of seconds over bytes on
            the wire. Several are crossed one after the other, as out to host memory and back.
        machine: default: the profile of this machine.
        load: "idle", or "busy" beside matrix products.
        max_rel_error: bound on the relative Frobenius error. Lossy lanes then also pay for the promise of
            `compress`: each packet is decoded and measured.
        exact: leave lossy lanes out; default: when there is no bound.
        together: tensors under way at once. The stages of one add up; with more they overlap, so that the
            busiest stage counts on the way over each wire.
        name: tensors of other names are of another kind.
        residuals: what earlier transfers taught.
        probes: where samples are remembered.

    Raises ProfileError without a profile of this machine, LaneError for an unknown wire or load and a bound
    below 0.
    """
    check_bound(max_rel_error)
    check_load(load)
    check_together(together)
    machine = given_or_present(machine)
    if machine is None:
        raise ProfileError(NO_PROFILE)
    task = Task.of(what, name)
    wires = tuple(named_wire(each, machine) for each in listed(wire))
    if exact is None:
        exact = max_rel_error is None
    begun = probes.seconds
    prediction = Prediction(
        task, wires, machine, load, max_rel_error, together, residuals or Residuals(), probes
    )
    candidates = {RAW: prediction.candidate(RAW, inf)}
    chains_known = (
        together == 1
        or DISKS.intersection(label for label, _ in wires)
        or machine.wires.keys() >= {*CHAIN_TIMES}
    )
    for lane in LANES[1:]:
        if not chains_known:
            candidates[lane] = Candidate(lane, inf, why=NO_CHAINS)
        elif exact and lane not in EXACT:
            candidates[lane] = Candidate(lane, inf, why="not exact: give max_rel_error")
        else:
            candidates[lane] = prediction.candidate(lane, candidates[RAW].seconds)
    permitted = [lane for lane in LANES if lane in EXACT or not exact]
    return Decision(
        best_lane(seconds_of(candidates)),
        task.dtype,
        task.nbytes,
        tuple(label for label, _ in wires),
        load,
        together,
        candidates,
        probes.seconds - begun,
        idle_figures(machine, permitted, task.dtype, load),
    )


def seconds_of(candidates: Mapping[str, Candidate]) -> dict[str, float]:
    """Seconds by lane, of those that are not out."""
    return {lane: each.seconds for lane, each in candidates.items() if each.seconds < inf}


def raw_decision(
    tensor: Tensor, wire: Wire | Sequence[Wire], load: str, together: int, reason: str = NO_PROFILE
) -> Decision:
    """Raw, where nothing is known of the machine or of a wire."""
    labels = tuple(each if isinstance(each, str) else _label(each) for each in listed(wire))
    raw = Candidate(RAW, nan, Sample(1.0))
    note = f"{reason}; until then everything goes raw"
    return Decision(RAW, tensor.dtype, distinct_bytes(tensor), labels, load, together, {RAW: raw}, note=note)


@lru_cache(1)
def present() -> Machine | None:
    """The profile of this machine, read once; None where there is none. Raises ProfileError for one that is
    damaged, old or of another machine."""
    return Machine.cached()


def given_or_present(machine: Machine | None) -> Machine | None:
    """`machine`, or without one what `present` returns. Raises LaneError for what is no `Machine`."""
    if machine is None:
        return present()
    if not isinstance(machine, Machine):
        raise LaneError(f"machine={machine!r} is no Machine: pass what Machine.load returns")
    return machine


def check_load(load: str) -> None:
    """Raise LaneError unless `load` is one that machines have tables for."""
    if load not in LOADS:
        raise LaneError(f"load={load!r} is not one of {', '.join(LOADS)}")


def check_together(together: int) -> None:
    """Raise LaneError unless `together` is a number of tensors."""
    if type(together) is not int or together < 1:
        raise LaneError(f"together={together!r} is not a whole number from 1 up")


def named_wire(wire: Wire, machine: Machine) -> tuple[str, Curve]:
    """Name and curve of a wire of `listed`. Raises LaneError for a name that the machine lacks."""
    if isinstance(wire, Curve):
        return _label(wire), wire
    if isinstance(wire, str):
        if wire not in machine.wires or wire in HOST_TIMES:
            known = ", ".join(name for name in machine.wires if name not in HOST_TIMES) or "none"
            raise LaneError(f"the profile has no wire {wire!r}: it has {known}; or give a rate")
        return wire, machine.wires[wire]
    return _label(wire), Curve.line(0.0, float(wire))


def all_raw(wires: Sequence[Wire], machine: Machine | None) -> str:
    """Why every tensor goes raw over these: nothing is known of the machine, or of a wire that profiles may
    have; "" where that is not so.

    Raises LaneError for a name that no profile has.
    """
    known = {} if machine is None else machine.wires
    names = [wire for wire in wires if isinstance(wire, str) and wire not in known]
    for name in names:
        if name not in WIRES:
            raise LaneError(f"unknown wire {name!r}: profiles have {', '.join(WIRES)}; or give a rate")
    if machine is None:
        return NO_PROFILE
    return f"the profile has no wire '{names[0]}': see sidelane profile" if names else ""


def listed(wire: Wire | Sequence[Wire]) -> tuple[Wire, ...]:
    """One wire or a list or tuple of them, as a tuple. Raises LaneError for none, for what is no wire and for
    a rate that none has."""
    wires = tuple(wire) if isinstance(wire, (list, tuple)) else (wire,)
    if not wires:
        raise LaneError("there is no wire: name one, or give bytes per second")
    for each in wires:
        number = isinstance(each, (int, float)) and not isinstance(each, bool)
        what = f"{each!r:.60}".replace("\n", " ")
        if not (number or isinstance(each, (str, Curve))):
            raise LaneError(f"wire={what} is neither a name, bytes per second nor a Curve")
        if isinstance(each, (int, float)) and not MIN_RATE <= each <= MAX_RATE:
            raise LaneError(f"wire={what} is no rate: give bytes per second, as 1.25e9 for 1.25 GB/s")
    return wires


def _label(wire: Wire) -> str:
    return "a wire given as a curve" if isinstance(wire, Curve) else f"{float(wire) / 1e9:g} GB/s"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None or not isfinite(seconds) else f"{seconds * 1e3:.4g}"
