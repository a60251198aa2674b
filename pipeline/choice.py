"""Which lane a tensor should take over a wire: the cost model on the tables of a machine, and why.

What a machine does per byte comes from its profile (`Machine`); how small and how far off a lane makes a
tensor comes from a probe: a sample of the tensor is encoded once, and remembered for tensors of its kind.

Note: [Doubt]
A lane that is slower than raw costs more than one that is not taken, so a lane has to beat raw even if what
speaks for it is off by as much as predictions are known to be: its kernels and what it costs the host slower,
and the wires faster, which favours raw. How far that is was measured for the tables (`KERNEL_ERRORS`,
`WIRE_ERROR`; benchmarks/planner.py), and is less for stages whose times were observed (`Residuals.error`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import ceil, inf, isfinite, nan

import torch
from torch import Tensor

from sidelane.errors import LaneError, LaneUnavailable, ProfileError
from sidelane.pipeline.compress import CHUNK, check_bound
from sidelane.pipeline.extent import distinct_bytes
from sidelane.pipeline.machine import HOST_TIMES, WIRES, Curve, LaneSpeed, Machine
from sidelane.pipeline.planner import (
    MIN_GAIN,
    RAW,
    Residuals,
    Stage,
    best_lane,
    busiest,
    least_gain,
    serial_time,
)
from sidelane.pipeline.samples import (
    EXACT,
    LANES,
    SHARED,
    Kind,
    Probes,
    Sample,
    kind_of,
)

WAITING = ("exact", "video")  # the host waits in their encoders, so that the next one starts later
ENQUEUED = ("d2h", "h2d", "d2h both", "h2d both", "peer")  # while these copy, decode is started already
KERNEL = 1e-5  # seconds that a kernel takes at least, without the time to start it
LOADS = ("idle", "busy")
TABLES = {  # the table of a dtype; every lane stores the other dtypes raw, lossy ones complex dtypes too
    torch.bfloat16: "bfloat16",
    torch.float16: "bfloat16",
    torch.complex32: "bfloat16",
    torch.float32: "float32",
    torch.complex64: "float32",
}
MARGIN = 0.9  # of the bound that the error of a sample may reach
KERNEL_ERRORS = {"idle": 0.1, "busy": 0.3}  # of predictions from tables, see Note: [Doubt]
WIRE_ERROR = 0.05
MAX_RATE = 1e100  # bytes per second of a wire
NO_PROFILE = "no profile of this machine: run sidelane profile"

Wire = str | float | Curve
Described = tuple[torch.dtype, int, Tensor | Mapping[str, tuple[float, float]]]


@dataclass(frozen=True)
class Candidate:
    """One lane beside the others.

    Attributes:
        seconds: predicted, with what earlier transfers taught; infinite for a lane that is out.
        sample: None where it was not needed to leave the lane out.
        learned: `seconds` once each of the stages was timed; else None.
        stages: seconds of each. A kernel beside the program's own begins when one of those ends.
        why: it is out; "" for a lane that is not.
        doubt: by how much of the time of raw the time that it saves may be off. See Note: [Doubt].
    """

    lane: str
    seconds: float
    sample: Sample | None = None
    learned: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    why: str = ""
    doubt: float = 0.0

    @property
    def binds(self) -> str:
        """The stage that takes longest."""
        return max(self.stages, key=self.stages.__getitem__, default="")


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
            f"{_short(self.dtype)}, {self.nbytes / 1e6:.3g} MB over "
            f"{', '.join(self.wires)}, {self.load}, {how}: {self.lane}",
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
        return "\n".join(lines + [self.note] * bool(self.note))

    def _why_not(self, each: Candidate) -> str:
        if each.why or each.lane == self.lane:
            return each.why
        times = each.seconds / self.seconds
        if times >= 1:
            return f"{times:.2f} x the time of {self.lane}"
        doubts = {each.lane: each.doubt}
        need = (
            f"{least_gain(each.lane, doubts):.0%} beside raw" if self.lane == RAW else "what a change needs"
        )
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
    """The lane for a tensor: raw unless another one is predicted to save at least 5 % of the time, and more
    where predictions are known to be less exact (Note: [Doubt]).

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
    task = _Task.of(what, name)
    wires = tuple(named_wire(each, machine) for each in listed(wire))
    if exact is None:
        exact = max_rel_error is None
    begun = probes.seconds
    prediction = _Prediction(
        task, wires, machine, load, max_rel_error, together, residuals or Residuals(), probes
    )
    candidates = {RAW: prediction.candidate(RAW, inf)}
    for lane in LANES[1:]:
        if exact and lane not in EXACT:
            candidates[lane] = Candidate(lane, inf, why="not exact: give max_rel_error")
        else:
            candidates[lane] = prediction.candidate(lane, candidates[RAW].seconds)
    beside = f"{RAW}|{TABLES.get(task.dtype, TABLES[torch.bfloat16])}|{load}"
    return Decision(
        best_lane(*compared(candidates)),
        task.dtype,
        task.nbytes,
        tuple(label for label, _ in wires),
        load,
        together,
        candidates,
        probes.seconds - begun,
        "" if load == "idle" or beside in machine.lanes else f"no tables for load '{load}': those of idle",
    )


def compared(candidates: Mapping[str, Candidate]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and doubts by lane, for `best_lane`."""
    seconds = {lane: each.seconds for lane, each in candidates.items() if each.seconds < inf}
    return seconds, {lane: each.doubt for lane, each in candidates.items()}


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


def speed_of(machine: Machine, lane: str, dtype: torch.dtype, load: str) -> LaneSpeed | None:
    """The table of a lane, that of an idle machine where there is none for `load`; None without both."""
    table = _table(lane, dtype) or (TABLES[torch.bfloat16] if lane == RAW else None)
    found = machine.lanes.get(f"{lane}|{table}|{load}")
    return found or machine.lanes.get(f"{lane}|{table}|idle")


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


def missing_wire(wires: Sequence[Wire], machine: Machine | None) -> str:
    """The first wire that a profile may have but that of `machine` lacks; "" if there is none.

    Raises LaneError for a name that no profile has.
    """
    known = {} if machine is None else machine.wires
    names = [wire for wire in wires if isinstance(wire, str) and wire not in known]
    for name in names:
        if name not in WIRES:
            raise LaneError(f"unknown wire {name!r}: profiles have {', '.join(WIRES)}; or give a rate")
    return names[0] if names else ""


def listed(wire: Wire | Sequence[Wire]) -> tuple[Wire, ...]:
    """One wire or a list or tuple of them, as a tuple. Raises LaneError for none, for what is no wire and for
    a rate not above 0."""
    wires = tuple(wire) if isinstance(wire, (list, tuple)) else (wire,)
    if not wires:
        raise LaneError("there is no wire: name one, or give bytes per second")
    for each in wires:
        rate = isinstance(each, (int, float)) and not isinstance(each, bool) and 0 < each < MAX_RATE
        if not (rate or isinstance(each, (str, Curve))):
            what = f"{each!r:.60}".replace("\n", " ")
            raise LaneError(f"wire={what} is neither a name, bytes per second above 0 nor a Curve")
    return wires


@dataclass(frozen=True)
class _Task:
    """What is to be sent: a kind with a tensor to probe, or samples that are known."""

    dtype: torch.dtype
    nbytes: int
    kind: Kind
    tensor: Tensor | None
    known: Mapping[str, Sample]

    @classmethod
    def of(cls, what: Tensor | Described, name: str) -> _Task:
        if isinstance(what, Tensor):
            return cls(what.dtype, distinct_bytes(what), kind_of(what, name), what, {})
        dtype, nbytes, like = what
        if isinstance(like, Tensor):
            return cls(dtype, nbytes, kind_of(like, name), like, {})
        known = {lane: Sample(1 / ratio, 0, error) for lane, (ratio, error) in like.items()}
        return cls(dtype, nbytes, (), None, {RAW: Sample(1.0)} | known)


@dataclass
class _Prediction:
    """What all candidates of a decision share."""

    task: _Task
    wires: tuple[tuple[str, Curve], ...]
    machine: Machine
    load: str
    max_rel_error: float | None
    together: int
    residuals: Residuals
    probes: Probes

    def candidate(self, lane: str, raw_seconds: float) -> Candidate:
        if lane != RAW:
            if self._speed(lane, self.load) is None:
                return Candidate(lane, inf, why=self._why_no_table(lane))
            kernels = self._seconds(self._phases(lane, 0.0))
            if kernels >= (1 - MIN_GAIN) * raw_seconds:
                return Candidate(lane, inf, why=f"kernels alone take {kernels / raw_seconds:.2g} x raw")
        try:
            sample = self._sample(lane)
        except LaneUnavailable as error:
            return Candidate(lane, inf, why=str(error))
        if sample is None:
            return Candidate(lane, inf, why="nothing is known of its ratio")
        bound = self.max_rel_error
        if bound is not None and sample.rel_error > MARGIN * bound:
            why = f"a sample has error {sample.rel_error:.2g}, above {MARGIN:g} of {bound:g}"
            return Candidate(lane, inf, sample, why=why)
        return self._priced(lane, sample)

    def _priced(self, lane: str, sample: Sample) -> Candidate:
        n = self.task.nbytes
        share = sample.share + sample.header / max(n, 1)
        phases = self._phases(lane, share)
        times = {stage.name: stage(n) for phase in phases for stage in phase}
        seconds = self._seconds(phases)
        sizes = {f"encode {lane}": n, f"decode {lane}": n} | {label: n * share for label, _ in self.wires}
        known = all(self.residuals.known(name, size) for name, size in sizes.items() if name in times)
        doubt = 0.0
        if lane != RAW and seconds < self._raw:
            doubted = self._seconds(self._phases(lane, share, doubted=True)) / self._doubted_raw
            doubt = max(doubted - seconds / self._raw, 0.0)
        return Candidate(lane, seconds, sample, seconds if known else None, times, doubt=doubt)

    @cached_property
    def _raw(self) -> float:
        return self._seconds(self._phases(RAW, 1.0))

    @cached_property
    def _doubted_raw(self) -> float:
        """Seconds of raw if its wires are as fast as they may be."""
        return self._seconds(self._phases(RAW, 1.0, doubted=True))

    def _why_no_table(self, lane: str) -> str:
        table = _table(lane, self.task.dtype)
        if table is None or not self.task.nbytes:
            return f"stores {_short(self.task.dtype) if self.task.nbytes else 'empty tensors'} raw"
        return self.machine.left_out.get(f"{lane} {table}", "not in the profile")

    def _sample(self, lane: str) -> Sample | None:
        if self.task.tensor is None:
            return self.task.known.get(lane)
        return self.probes.sample(self.task.kind, lane, self.task.tensor)

    def _phases(self, lane: str, share: float, doubted: bool = False) -> list[list[Stage]]:
        """Stages on the way over each wire, kernels at both ends; without wires where `share` is 0.

        Under a bound a lossy packet is decoded and measured before it leaves. `doubted`: as slow beside raw
        as they may be, see Note: [Doubt].
        """
        n = self.task.nbytes
        wires = []
        for label, curve in self.wires:
            error = -self.residuals.error(label, n * share, WIRE_ERROR) if doubted else 0.0
            wires.append((label, self._learned(label, curve, n * share) * (1 + error)))
        phases = [[_stage(label, seconds)] if share else [] for label, seconds in wires]
        speed = self._speed(lane, self.load)
        if speed is None:
            return phases
        encode = self._learned(f"encode {lane}", speed.encode, n)
        decode = self._learned(f"decode {lane}", speed.decode, n)
        idle = self._speed(lane, "idle") or speed
        waits = max(speed.encode(n) - idle.encode(n), 0.0), max(speed.decode(n) - idle.decode(n), 0.0)
        kernel = idle.encode(n) - idle.encode(1)  # without the time to start it
        if self.together > 1:
            encode -= 0.0 if lane in WAITING else waits[0] * (1 - 1 / self.together)
            decode -= waits[1] * (1 - 1 / self.together)
        else:
            product, crossing = self.machine.product, sum(seconds for _, seconds in wires)
            if lane not in WAITING:
                encode -= max(waits[0] - product / 2, 0.0)
            decode -= waits[1]
            if share and waits[1]:
                decode += _until_boundary(kernel + crossing, product)
            if share and wires[-1][0] in ENQUEUED:
                decode -= min(max(idle.decode(1) - KERNEL, 0.0), wires[-1][1])
        if self.max_rel_error is not None and lane not in EXACT and self.task.tensor is not None:
            chunks = ceil(n / self.task.dtype.itemsize / CHUNK)
            encode += speed.decode(n) + chunks * self.probes.check_seconds(self.task.tensor)
        host = 1.0
        if doubted and lane != RAW:
            unknown = host_error = KERNEL_ERRORS[self.load]
            encode *= 1 + self.residuals.error(f"encode {lane}", n, unknown)
            decode *= 1 + self.residuals.error(f"decode {lane}", n, unknown)
            host += host_error
        if self.together > 1:
            waited = kernel + waits[0] if lane in WAITING else 0.0
            out = self._host("chain out", lane, idle.encode, lambda speed: speed.encode) + waited
            phases[0].append(_stage("chain out", host * out))
            back = self._host("chain back", lane, idle.decode, lambda speed: speed.decode)
            phases[-1].append(_stage("chain back", host * back))
        phases[0].insert(0, _stage(f"encode {lane}", encode))
        phases[-1].append(_stage(f"decode {lane}", decode))
        return [phase for phase in phases if phase]

    def _speed(self, lane: str, load: str) -> LaneSpeed | None:
        return speed_of(self.machine, lane, self.task.dtype, load) if self.task.nbytes else None

    def _learned(self, name: str, curve: Curve, nbytes: float) -> float:
        return curve(nbytes) * self.residuals.factor(name, nbytes)

    def _host(self, name: str, lane: str, kernel: Curve, of: Callable[[LaneSpeed], Curve]) -> float:
        """Seconds of the host for a tensor: those of a chain with the lane for bf16, else with raw, and what
        starting `kernel` takes more. A table at one byte is the time that it takes to start."""
        known = self.machine.wires.get(f"{name} {lane}")
        chain = known or self.machine.wires.get(name)
        beside = speed_of(self.machine, lane if known else RAW, torch.bfloat16, "idle")
        more = kernel(1) - of(beside)(1) if beside is not None else 0.0
        return (chain(self.task.nbytes) if chain else 0.0) + max(more, 0.0)

    def _seconds(self, phases: list[list[Stage]]) -> float:
        n = self.task.nbytes
        if self.together > 1:
            return sum(busiest(phase, n)[1] for phase in phases)
        return sum(serial_time(phase, n) for phase in phases)


def _table(lane: str, dtype: torch.dtype) -> str | None:
    """The dtype whose table of `lane` holds for `dtype`; None where the lane stores it raw."""
    return None if dtype.is_complex and lane not in EXACT else TABLES.get(dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stage(name: str, seconds: float) -> Stage:
    return Stage(name, lambda nbytes: seconds)


def _until_boundary(seconds: float, product: float) -> float:
    """How long a kernel waits that is ready `seconds` after the one before began, where products of the
    program let others in only between them. The mean over half a product: they do not keep time exactly."""
    moments = [max(seconds + product * i / 8, 0.0) for i in range(-2, 3)]
    return sum(ceil(moment / product) * product - moment for moment in moments) / len(moments)


def _label(wire: Wire) -> str:
    return "a wire given as a curve" if isinstance(wire, Curve) else f"{float(wire) / 1e9:g} GB/s"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None or not isfinite(seconds) else f"{seconds * 1e3:.4g}"
