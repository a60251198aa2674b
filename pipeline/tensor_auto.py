"""A lane that takes another lane for each tensor, and learns from how long its choices took."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from threading import Lock, RLock, local
from typing import Any

import torch
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet
from sidelane.errors import LaneError
from sidelane.pipeline.choice import (
    Decision,
    Wire,
    all_raw,
    check_load,
    check_together,
    choose,
    given_or_present,
    listed,
    named_wire,
    raw_decision,
    seconds_of,
)
from sidelane.pipeline.compress import check_bound, compress
from sidelane.pipeline.decision import RAW, Hysteresis, Residuals
from sidelane.pipeline.lanes import decode_packet
from sidelane.pipeline.machine import Curve, LaneSpeed, Machine
from sidelane.pipeline.prediction import Candidate, speed_of
from sidelane.pipeline.samples import EXACT, SHARED, Kind, Probes, kind_of, lane_named, name_of
from sidelane.pipeline.streams import Stream
from sidelane.pipeline.trace import Recorder

REPLAN = 8  # like tensors after which what was learned meanwhile counts, ever more of them up to
SELDOM_REPLAN = 256  # while the same lane stays best
LEARN = 5  # spans of a thread of which one is timed; no multiple of the stages that a thread runs in turn
SELDOM = 35  # the same once `CURIOUS` times were learned since a lane was taken: events cost time
CURIOUS = 64
WARM = 2  # times of a stage that are not learned from
MAX_PLANS = 1024
MAX_SHARED = 64
BREAKS = 2  # of the bound by packets of a lane that its samples speak for, after which it is left out
FORGIVE = 0.1  # of a break, by a packet that keeps the bound
MAX_WAITING = 256  # spans whose end is awaited; older ones teach nothing


class AutoLane:
    """Encodes each tensor in the lane that `choose` says. Thread-safe.

    A lane is kept for tensors of a dtype, shape and device until another is better by 8 % three times, so
    that noise does not change it. Without a profile of this machine, and over a wire that its profile lacks,
    every tensor goes raw, and `explain` says so.

    Args:
        wire, machine, load, together: as for `choose`.
        max_rel_error: as for `choose`; `encode` keeps it as `compress` does.
        probes: where samples are remembered.

    Raises LaneError for a bad wire, load or bound; ProfileError for a profile that is damaged, old or of
    another machine.
    """

    name = "auto"
    keeps_bound = True  # `encode` measures what it returns

    def __init__(
        self,
        wire: Wire | Sequence[Wire] = "d2h",
        machine: Machine | None = None,
        load: str = "idle",
        max_rel_error: float | None = None,
        together: int = 1,
        probes: Probes = SHARED,
    ) -> None:
        check_bound(max_rel_error)
        check_load(load)
        check_together(together)
        self._machine = given_or_present(machine)
        self._wires = listed(wire)
        self._reason = all_raw(self._wires, self._machine)
        if self._reason:
            self._machine = None
        self._curves: dict[str, Curve] = {}
        if self._machine is not None:
            self._curves = dict(named_wire(each, self._machine) for each in self._wires)
        self._load, self._together = load, together
        self.max_rel_error = max_rel_error
        self.exact = max_rel_error is None
        self._probes = probes
        self._residuals = Residuals()
        self._observed = 0
        self._curious = CURIOUS
        self._seen: dict[str, int] = {}
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        self._breaks: dict[tuple[Kind, str], float] = {}
        self._work = _Work()
        self._watched = False
        self._lock = RLock()

    def decide(self, tensor: Tensor) -> Decision:
        """What `tensor` takes, remembered for tensors like it."""
        return self._plan(tensor).decision

    def for_tensor(self, tensor: Tensor) -> Lane:
        """The lane that `tensor` takes."""
        return self._plan(tensor).lane

    def encode(self, tensor: Tensor) -> Packet:
        """Within the bound. When the chosen lane breaks it, tensors of that kind are probed anew; a lane that
        keeps breaking it is left out for them."""
        plan = self._plan(tensor)
        if self.max_rel_error is None:
            packet = plan.lane.encode(tensor)
        else:
            packet = compress(tensor, lane=plan.lane, max_rel_error=self.max_rel_error)
            self._count(kind_of(tensor), plan, broken=name_of(packet) not in (plan.decision.lane, RAW))
        if self._watched:
            self._work.set(*plan.encode)
        return packet

    def decode(self, packet: Packet) -> Tensor:
        tensor = decode_packet(packet)
        if self._watched:
            lane = name_of(packet)
            speed = self._speed(lane, packet.dtype)
            self._work.set(f"decode {lane}", speed.decode(packet.raw_nbytes) if speed else None)
        return tensor

    def finer(self) -> Lane | None:
        return None

    def observe(self, stage: str, nbytes: float, predicted: float, seconds: float) -> None:
        """Learn that a stage took so long for so many bytes. The first `WARM` times of a stage do not count:
        kernels are compiled and memory is pinned then.

        Args:
            stage: "encode exact", "decode packed:4", ..., or the name of a wire.
            nbytes: raw ones of a kernel, those of the packet on a wire.
            predicted: seconds by the tables of the machine.
        """
        with self._lock:
            seen = self._seen[stage] = self._seen.get(stage, 0) + 1
            if seen > WARM:
                self._residuals.observe(stage, nbytes, predicted, seconds)
                self._observed += 1
                self._curious -= 1

    @property
    def every(self) -> int:
        """Of how many spans one is to be timed."""
        return LEARN if self._curious > 0 else SELDOM

    def watch(self, trace: Recorder | None) -> Recorder:
        """A recorder of the stages of a chain that teaches this lane, and passes spans on to `trace`."""
        self._watched = True
        return _Watch(self, trace)

    def explain(self) -> str:
        """The tables of all decisions that hold now."""
        with self._lock:
            return "\n\n".join(plan.decision.explain() for plan in self._plans.values())

    def predicted(self, stage: str, nbytes: int) -> tuple[str, float] | None:
        """Name and seconds by the tables of what a stage of a chain does: the wire of "store" and "load",
        else what this thread has just encoded or decoded. None where the tables say nothing."""
        if stage in ("store", "load"):
            if not self._curves:
                return None
            name = list(self._curves)[0 if stage == "store" else -1]
            return name, self._curves[name](nbytes)
        name, seconds = self._work.stage, self._work.predicted
        return None if seconds is None or name.split()[0] != stage else (name, seconds)

    def _count(self, kind: Kind, plan: _Plan, broken: bool) -> None:
        """Whether a packet of the lane of `plan` broke the bound."""
        key = kind, plan.decision.lane
        with self._lock:
            if broken:
                if len(self._breaks) >= MAX_PLANS:
                    self._breaks.clear()
                self._breaks[key] = self._breaks.get(key, 0.0) + 1
                self._probes.forget(kind)
                plan.stale = True
            elif BREAKS > self._breaks.get(key, 0.0) > 0:
                self._breaks[key] -= FORGIVE

    def _plan(self, tensor: Tensor) -> _Plan:
        key = tensor.dtype, tensor.shape, tensor.stride(), tensor.device
        plan = self._plans.get(key)
        if plan is None or plan.stale or (plan.uses >= plan.patience and plan.observed != self._observed):
            with self._lock:
                before, plan = plan, self._decide(tensor, Hysteresis() if plan is None else plan.choice)
                if before is None or before.decision.lane != plan.decision.lane:
                    self._curious = CURIOUS
                elif self._curious <= 0 and plan.choice.settled:
                    plan.patience = min(2 * before.patience, SELDOM_REPLAN)
                if len(self._plans) >= MAX_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        plan.uses += 1
        return plan

    def _decide(self, tensor: Tensor, choice: Hysteresis) -> _Plan:
        self._residuals.fade()
        if self._machine is None:
            decision = raw_decision(tensor, self._wires, self._load, self._together, self._reason)
        else:
            decision = choose(
                tensor,
                self._wires,
                self._machine,
                self._load,
                self.max_rel_error,
                together=self._together,
                residuals=self._residuals,
                probes=self._probes,
            )
            kind, candidates = kind_of(tensor), dict(decision.candidates)
            for lane, each in candidates.items():
                if self._breaks.get((kind, lane), 0.0) >= BREAKS:
                    candidates[lane] = Candidate(lane, inf, each.sample, why="kept breaking the bound")
            decision = replace(decision, candidates=candidates)
            decision = replace(decision, lane=choice.update(seconds_of(decision.candidates)))
        return _Plan(decision, lane_named(decision.lane), choice, self._encode_work(decision), self._observed)

    def _encode_work(self, decision: Decision) -> tuple[str, float | None]:
        """The encode stage, and its seconds by the tables unless checking the bound is a part of it."""
        speed = self._speed(decision.lane, decision.dtype)
        checked = self.max_rel_error is not None and decision.lane not in EXACT
        seconds = speed.encode(decision.nbytes) if speed is not None and not checked else None
        return f"encode {decision.lane}", seconds

    def _speed(self, lane: str, dtype: torch.dtype) -> LaneSpeed | None:
        return None if self._machine is None else speed_of(self._machine, lane, dtype, self._load)


@dataclass
class _Plan:
    """What tensors of a dtype, shape and device take.

    Attributes:
        encode: name of the stage, and its seconds by the tables where they say.
        observed: times that were known when it was made.
        uses: since then; `patience`: so many until what was learned counts.
        stale: it has to be made anew.
    """

    decision: Decision
    lane: Lane
    choice: Hysteresis
    encode: tuple[str, float | None]
    observed: int
    uses: int = 0
    patience: int = REPLAN
    stale: bool = False


class _Work(local):
    """The stage that this thread enqueued last, and the seconds that its tables say."""

    stage = ""
    predicted: float | None = None

    def set(self, stage: str, predicted: float | None) -> None:
        self.stage, self.predicted = stage, predicted


class _Watch(Recorder):
    """Hands the time of each stage of a chain to the lane once it is over. See `AutoLane.watch`."""

    def __init__(self, lane: AutoLane, trace: Recorder | None) -> None:
        super().__init__()
        self._lane, self._trace = lane, trace
        self._turn = _Turn()
        self._waiting: deque[tuple[str, float, int, Any, Any]] = deque(maxlen=MAX_WAITING)

    def mark(self, stream: Stream) -> Any:
        """Two marks make a span. Events cost time, so without a trace most spans have none."""
        if self._trace is not None:
            return self._trace.mark(stream)
        turn = self._turn
        if turn.inside:
            turn.inside = False
            return None if turn.skipped else super().mark(stream)
        turn.inside = True
        turn.count += 1
        turn.skipped = turn.count % self._lane.every != 1
        return None if turn.skipped else super().mark(stream)

    def add(self, stage: str, device: torch.device, item: int, begin: Any, end: Any, nbytes: int) -> None:
        if self._trace is not None:
            self._trace.add(stage, device, item, begin, end, nbytes)
        self._turn.inside = False  # also after work that raised, whose second mark was never made
        if begin is None or end is None:
            return
        known = self._lane.predicted(stage.split()[0], nbytes)
        with self._lock:
            if known is not None:
                self._waiting.append((*known, nbytes, begin, end))
            while self._waiting and self._waiting[0][4].query():
                name, predicted, size, first, last = self._waiting.popleft()
                self._lane.observe(name, size, predicted, first.elapsed_time(last) / 1e3)


class _Turn(local):
    """Which spans of a thread are timed."""

    count = 0
    inside = False
    skipped = False


def auto_lane(**options: Any) -> AutoLane:
    """A new `AutoLane`. Raises LaneError for an option that it has not."""
    for option in options:
        if option not in OPTIONS:
            raise LaneError(f"lane 'auto' has no option '{option}': it has {', '.join(OPTIONS)}")
    return AutoLane(**options)


def shared_auto_lane(**options: Any) -> AutoLane:
    """The `auto_lane` of these options that every call gets, with what it learned. Raises as that does."""
    if "wire" in options:
        options = options | {"wire": listed(options["wire"])}
    key = tuple((name, id(value) if isinstance(value, Machine) else value) for name, value in options.items())
    try:
        hash(key)
    except TypeError:  # no option that is valid
        return auto_lane(**options)
    with _shared_lock:
        if key not in _shared:
            if len(_shared) >= MAX_SHARED:
                _shared.clear()
            _shared[key] = auto_lane(**options)  # keeps the machine, so that its id stays taken
        return _shared[key]


OPTIONS = tuple(inspect.signature(AutoLane).parameters)
_shared: dict[tuple[Any, ...], AutoLane] = {}
_shared_lock = Lock()
