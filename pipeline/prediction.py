"""What a tensor is predicted to take in a lane: the cost model on the tables of a machine.

What a machine does per byte comes from its profile (`Machine`); how small and how far off a lane makes a
tensor comes from a probe: a sample of the tensor is encoded, and remembered for tensors of its kind.

Note: [Launches]
Kernels of small tensors take less time than starting them, and how long that takes the host changes by a
factor of up to two within seconds. So a sample is also timed, in the stages that tables hold, and half of
what that differs from them at its size is added to predictions for tensors of its kind, until times of their
own are known. Beside other work a sample waits for it, which says nothing: then tables alone count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

import torch
from torch import Tensor

from sidelane.errors import LaneUnavailable
from sidelane.pipeline.compress import CHUNK
from sidelane.pipeline.decision import MIN_GAIN, RAW, Residuals
from sidelane.pipeline.extent import distinct_bytes
from sidelane.pipeline.machine import Curve, LaneSpeed, Machine
from sidelane.pipeline.planner import Stage, overlapped_time, serial_time
from sidelane.pipeline.samples import EXACT, Kind, Probes, Sample, kind_of

WAITING = ("exact", "video")  # the host waits in their encoders, so that the next one starts later
ENQUEUED = ("d2h", "h2d", "d2h both", "h2d both", "peer")  # while these copy, decode is started already
KERNEL = 1e-5  # seconds that a kernel takes at least, without the time to start it
TABLES = {  # the table of a dtype; every lane stores the other dtypes raw, lossy ones complex dtypes too
    torch.bfloat16: "bfloat16",
    torch.float16: "bfloat16",
    torch.complex32: "bfloat16",
    torch.float32: "float32",
    torch.complex64: "float32",
}
DISKS = {"disk write", "disk read"}  # no chain leads there
NOT_TIMED = Sample(1.0)
MARGIN = 0.9  # of the bound that the error of a sample may reach
BELIEF = 0.5  # in what a sample differs from its table: both are of moments
LAUNCHES = 0.5, 2.0  # of the times in tables that those of samples may be, see Note: [Launches]

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
    """

    lane: str
    seconds: float
    sample: Sample | None = None
    learned: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def binds(self) -> str:
        """The stage that takes longest."""
        return max(self.stages, key=self.stages.__getitem__, default="")


def speed_of(machine: Machine, lane: str, dtype: torch.dtype, load: str) -> LaneSpeed | None:
    """The table of a lane, that of an idle machine where there is none for `load`; None without both."""
    return _measured(machine, lane, dtype, load) or _measured(machine, lane, dtype, "idle")


def idle_figures(machine: Machine, lanes: Sequence[str], dtype: torch.dtype, load: str) -> str:
    """Which of `lanes` `speed_of` knows only from an idle machine, in words; "" if there is none."""
    known = [lane for lane in lanes if speed_of(machine, lane, dtype, load) is not None]
    idle = [lane for lane in known if _measured(machine, lane, dtype, load) is None]
    which = "" if idle == known else f" for {', '.join(idle)}"
    return f"{load} was not measured{which}: idle figures" if idle else ""


@dataclass(frozen=True)
class Task:
    """What is to be sent: a kind with a tensor to probe, or samples that are known."""

    dtype: torch.dtype
    nbytes: int
    kind: Kind
    tensor: Tensor | None
    known: Mapping[str, Sample]

    @classmethod
    def of(cls, what: Tensor | Described, name: str) -> Task:
        if isinstance(what, Tensor):
            return cls(what.dtype, distinct_bytes(what), kind_of(what, name), what, {})
        dtype, nbytes, like = what
        if isinstance(like, Tensor):
            return cls(dtype, nbytes, kind_of(like, name), like, {})
        known = {lane: Sample(1 / ratio, 0, error) for lane, (ratio, error) in like.items()}
        return cls(dtype, nbytes, (), None, {RAW: Sample(1.0)} | known)


@dataclass
class Prediction:
    """What all candidates of a decision share."""

    task: Task
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
            kernels = self._seconds(self._phases(lane, 0.0, NOT_TIMED))
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
        phases = self._phases(lane, share, sample)
        times = {stage.name: stage(n) for phase in phases for stage in phase}
        seconds = self._seconds(phases)
        sizes = {f"encode {lane}": n, f"decode {lane}": n} | {label: n * share for label, _ in self.wires}
        known = all(self.residuals.known(name, size) for name, size in sizes.items() if name in times)
        return Candidate(lane, seconds, sample, seconds if known else None, times)

    def _why_no_table(self, lane: str) -> str:
        table = _table(lane, self.task.dtype)
        if table is None or not self.task.nbytes:
            return f"stores {short(self.task.dtype) if self.task.nbytes else 'empty tensors'} raw"
        reason = self.machine.left_out.get(f"{lane} {table}")
        return f"when profiled: {reason}" if reason else "not in the profile"

    def _sample(self, lane: str) -> Sample | None:
        if self.task.tensor is None:
            return self.task.known.get(lane)
        return self.probes.sample(self.task.kind, lane, self.task.tensor)

    def _phases(self, lane: str, share: float, sample: Sample) -> list[list[Stage]]:
        """Stages on the way over each wire, kernels at both ends; without wires where `share` is 0.

        Under a bound a lossy packet is decoded and measured before it leaves. Beside products (Note: [Busy]
        in `probe_lanes`) a kernel of one tensor waits for half of one in the mean, whatever tables have of
        calls that came late; several tensors share a wait. A table at one byte is the time to start a kernel.
        """
        n = self.task.nbytes
        wires = [(label, self._learned(label, curve, n * share)) for label, curve in self.wires]
        phases = [[_stage(label, seconds)] if share else [] for label, seconds in wires]
        speed = self._speed(lane, self.load)
        if speed is None:
            return phases
        encode = self._learned(f"encode {lane}", speed.encode, n, sample.nbytes, sample.encode)
        decode = self._learned(f"decode {lane}", speed.decode, n, sample.nbytes, sample.decode)
        idle = self._speed(lane, "idle") or speed
        learned = encode / speed.encode(n), decode / speed.decode(n)
        waits = (
            learned[0] * max(speed.encode(n) - idle.encode(n), 0.0),
            learned[1] * max(speed.decode(n) - idle.decode(n), 0.0),
        )
        kernel = idle.encode(n) - idle.encode(1)  # without the time to start it
        launch = learned[1] * idle.decode(1)
        if self.together > 1:
            encode -= 0.0 if lane in WAITING else waits[0] * (1 - 1 / self.together)
            decode -= waits[1] * (1 - 1 / self.together)
        else:
            half = self.machine.product / 2
            if lane not in WAITING:
                encode -= max(waits[0] - half, 0.0)
            decode -= max(waits[1] - half, 0.0)
            if share and wires[-1][0] in ENQUEUED:
                decode -= min(max(launch - KERNEL, 0.0), wires[-1][1])
        if self.max_rel_error is not None and lane not in EXACT and self.task.tensor is not None:
            chunks = ceil(n / self.task.dtype.itemsize / CHUNK)
            encode += speed.decode(n) + chunks * self.probes.check_seconds(self.task.tensor)
        if self.together > 1 and not DISKS.intersection(label for label, _ in wires):
            waited = kernel + waits[0] if lane in WAITING else 0.0
            out = self._host("chain out", lane, idle.encode, lambda speed: speed.encode) + waited
            phases[0].append(_stage("chain out", out))
            back = self._host("chain back", lane, idle.decode, lambda speed: speed.decode)
            phases[-1].append(_stage("chain back", back))
        phases[0].insert(0, _stage(f"encode {lane}", encode))
        phases[-1].append(_stage(f"decode {lane}", decode))
        return [phase for phase in phases if phase]

    def _speed(self, lane: str, load: str) -> LaneSpeed | None:
        return speed_of(self.machine, lane, self.task.dtype, load) if self.task.nbytes else None

    def _learned(self, name: str, curve: Curve, nbytes: float, timed: int = 0, seconds: float = 0.0) -> float:
        """By the table and by what was observed, or until then by what a sample of `timed` bytes took. See
        Note: [Launches]."""
        known, begin = curve(nbytes), 1.0
        if timed and self.load == "idle":
            here = curve(timed)
            off = min(max(seconds - here, (LAUNCHES[0] - 1) * here), (LAUNCHES[1] - 1) * here)
            begin = max(known + BELIEF * off, LAUNCHES[0] * known) / known
        return known * self.residuals.factor(name, nbytes, begin)

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
            return sum(overlapped_time(phase, n) for phase in phases)
        return sum(serial_time(phase, n) for phase in phases)


def _measured(machine: Machine, lane: str, dtype: torch.dtype, load: str) -> LaneSpeed | None:
    table = _table(lane, dtype) or (TABLES[torch.bfloat16] if lane == RAW else None)
    return machine.lanes.get(f"{lane}|{table}|{load}")


def _table(lane: str, dtype: torch.dtype) -> str | None:
    """The dtype whose table of `lane` holds for `dtype`; None where the lane stores it raw."""
    return None if dtype.is_complex and lane not in EXACT else TABLES.get(dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stage(name: str, seconds: float) -> Stage:
    """One that takes so long for the tensor that is priced."""
    return Stage(name, lambda nbytes: seconds)
