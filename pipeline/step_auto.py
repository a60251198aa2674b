"""The automatic lane of an offload context: learns the step, plans it, and says what to do with each tensor.

Note: [Cycle of a plan]
The first trip of a step takes the exact lane and learns. Its plan is made when the second begins; where loss
is permitted and keeps tensors from being derived, with loss and without, and the better one is taken, now and
whenever another plan is asked for. The first trips of a plan are timed, since a trip that learns computes
with pauses, and show the step again. The next ones run as any other: what they take is what the plan is
worth, since marks cost a plan the more the more it keeps. Then another plan takes over if it is predicted to
be faster by `GAIN`, a few times at most. In the end the one stays that was fastest, whatever was predicted.
From then on nothing is timed or planned, until steps take another time than they did, and each time that
happens it has to last longer.
A trip that is not the step of its script goes on as one that learns would, and the next that begins like it
learns again; a later one the more often that has happened. Steps are told apart by the first tensor they save
and by which blocks are in training mode, so that batches of other shapes, and evaluation, have plans of their
own. `_StepState` has the phases.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from math import inf
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sidelane.errors import OffloadError
from sidelane.pipeline.blocks import Blocks, fingerprint, is_plain, modes, run_again_later
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.derive import Recipe, equal_in_memory, has_lower_halves, is_distributed, is_widened
from sidelane.pipeline.entries import Visit
from sidelane.pipeline.extent import distinct_bytes
from sidelane.pipeline.lanes import undisturbed
from sidelane.pipeline.lesson import Entry, Lesson, Script
from sidelane.pipeline.moves import Moves
from sidelane.pipeline.passage import Passage, Passed
from sidelane.pipeline.policy import is_capturing, may_lose_bits, plain_kind, why_kept
from sidelane.pipeline.recorder import Trip, Uses
from sidelane.pipeline.stash import Kept, Stash, Ticket, data_key
from sidelane.pipeline.step_model import Choice, Step
from sidelane.pipeline.step_plan import StepPlan, plan_step
from sidelane.pipeline.tiers import Memory

GAIN = 0.03  # share of the step that another plan must save
TIMED = 2  # trips of each plan, and as many after these that are not
REPLANS = 2  # plans that may take over from the first
RECENT = 9  # trips whose median time is that of the step
DRIFT = 0.15  # share of the step by which that may change
EARLY_ENDS = 3  # trips in a row that end early before the step is learned again
MOST_PATIENCE = 16  # trips in a row that are another step, at most, before the step is learned again
SPARE = 1 / 128  # of budgets that plans leave alone, for what rounding and headers add
MAX_STEPS = 16  # that are remembered


class Tracked:
    """What autograd keeps in place of a tensor, which one of which trip it is, and how it was made if that
    has still to be tried. Number -1: no entry of the trip, which is on another device or has left its script.
    """

    __slots__ = ("inner", "number", "recipe", "trip")

    def __init__(self, inner: Ticket | Kept, trip: Trip, number: int, recipe: Recipe | None = None) -> None:
        self.inner = inner
        self.trip = trip
        self.number = number
        self.recipe = recipe


class Phase(Enum):
    """Where a step is on its way to a plan that stays; see `_StepState`."""

    LEARN = "learn"
    TIME = "time"
    CHECK = "check"
    SETTLED = "settled"


class _StepState:
    """What is known of a step, that is, of trips that begin alike.

    LEARN: there is no plan. The first trip that teaches one leads to TIME.
    TIME: trips of the plan are timed with events. `TIMED` of them that have shown something lead to CHECK.
    CHECK: plain trips tell what the plan takes. `TIMED` of them lead to TIME if another plan takes over, else
    to SETTLED with the fastest that was tried.
    SETTLED: nothing is timed or planned. Steps that take another time than they did lead to TIME again.
    Enough trips that are not as the script says lead from anywhere to LEARN.

    Attributes:
        phase: these four. left: trips that TIME or CHECK still needs; without meaning in the others.
        script: that trips follow; None in LEARN alone.
        pending: trips that have not been looked at.
        lessons: with loss if permitted, and without; with what timed trips showed.
        discard_old_timings: what the next timed trip shows counts alone.
        recent: seconds of the last plain trips.
        tried: plans, with the seconds of their fastest trip. replans_left: plans that may still take over.
        early_ends: trips in a row that ended early. others: trips in a row that were another step; `patience`
            of them lead to LEARN, and each time that takes twice as many, as steps may differ at random.
        baseline: seconds of the settled step; None before enough trips.
        backoff: trips, more each time, before a settled step may be timed again. backoff_left: of these.
    """

    def __init__(self) -> None:
        self.pending: deque[Trip] = deque(maxlen=4)
        self.lessons: list[Lesson] = []
        self.discard_old_timings = False
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.tried: list[tuple[float, Script]] = []
        self.replans_left = 0
        self.patience = 1
        self.backoff = self.backoff_left = RECENT
        self.enter(Phase.LEARN, None)

    def enter(self, phase: Phase, script: Script | None) -> None:
        """Begin a phase, in which trips follow this script."""
        self.phase, self.script = phase, script
        self.left, self.early_ends, self.others = TIMED, 0, 0
        self.baseline: float | None = None

    @property
    def measured(self) -> float | None:
        return median(self.recent) if self.recent else None

    def allow_replans(self, replans: int) -> None:
        """Let up to so many plans take over from the next one that is tried. Comes before that, so that an
        interrupt leaves none of an older lesson."""
        self.tried.clear()
        self.replans_left = replans

    def drifts(self) -> bool:
        """Steps take another time than they did. Asked once after each plain trip of a settled step."""
        self.backoff_left -= 1
        measured = median(self.recent)
        if self.baseline is None:
            self.baseline = measured if len(self.recent) == RECENT else None
            return False
        return self.backoff_left <= 0 and abs(measured - self.baseline) > DRIFT * self.baseline


class _Thread(threading.local):
    """What a thread that saves is at.

    Attributes:
        trip: that its next save may belong to. latest: the one that it began last.
        uses: of its trips. seen: their number at its last save.
        inside: a block.
    """

    def __init__(self) -> None:
        self.trip: Trip | None = None
        self.latest: Trip | None = None
        self.uses = Uses()
        self.seen = 0
        self.inside = False


class Auto:
    """The state of one offload context.

    Args:
        budget, host: of device and of host memory.
        take, promise: room off the device, and a claim on it.
        min_bytes: smaller tensors are kept.
        lossy: lanes that may take activations: for tensors of four dimensions, for others; None for none.
        blocks: modules that may be recomputed; None to let `wrap` find them.
        weigh: bytes that a tensor would hold.
        innermost: whether the hooks of the context are those that autograd calls in this thread.
        alive: how many tickets of the context there are.
    """

    def __init__(
        self,
        budget: Budget,
        host: Budget,
        take: Callable[[int], Memory | None],
        promise: Callable[[int], object | None],
        min_bytes: int,
        lossy: tuple[str, str] | None,
        blocks: Iterable[nn.Module] | None,
        weigh: Callable[[Tensor], int],
        innermost: Callable[[], bool],
        alive: Callable[[], int],
    ) -> None:
        self.moves = Moves(budget, take, promise)
        self.blocks_given = blocks is not None
        self._blocks = Blocks(blocks or (), self._around)
        self._budget = budget
        self._host = host
        self._min_bytes = min_bytes
        self._lossy = lossy
        self._weigh = weigh
        self._innermost = innermost
        self._alive = alive
        self._local = _Thread()
        self._lock = threading.RLock()
        self._states: OrderedDict[Hashable, _StepState] = OrderedDict()
        self._latest: _StepState | None = None

    @property
    def plan(self) -> Script | None:
        """Of the last trip; None before there is one."""
        return None if self._latest is None else self._latest.script

    @property
    def measured(self) -> float | None:
        """Seconds from the first save to the end of backward, the median of the last trips; None before."""
        return None if self._latest is None else self._latest.measured

    def use_blocks(self, modules: Iterable[nn.Module]) -> None:
        """Modules that may be recomputed from the next entering on."""
        self._blocks = Blocks(modules, self._around)

    def visit(self) -> Visit:
        """For a thread that enters the context."""
        blocks, user = self._blocks, object()

        def arrive() -> None:
            trip = self._local.trip
            if (not self._alive() and not self.moves.holding) or (trip is not None and trip.abandoned):
                self._local.trip = None
            blocks.install(user)

        def leave(failed: bool) -> None:
            blocks.remove(user)
            trip = self._local.trip
            if failed and trip is not None and trip.end is None:  # a forward pass that was left half-way
                trip.lost = trip.failed = True

        return Visit(arrive, leave)

    def save(self, tensor: Tensor, nbytes: int) -> tuple[Trip, int, Choice | None]:
        """The trip of a tensor that is saved now, its number, and what to do with it; None: nobody knows.

        Args:
            nbytes: that it would hold.
        """
        trip = self._trip(tensor.device, ("save", tensor.dtype, tensor.shape))
        if tensor.device != trip.device:
            return trip, -1, None
        return trip, *trip.save(nbytes, tensor.dtype)

    def learn(
        self, trip: Trip, stash: Stash, tensor: Tensor, nbytes: int, recipe: Recipe | None = None
    ) -> int:
        """The number of a tensor that a trip that learns saved as `stash`."""
        if not trip.learning or tensor.device != trip.device:
            return -1
        entry = self._entry(tensor, nbytes)
        entry.widened = is_widened(tensor)
        if recipe is not None:
            tracked = [source for source in recipe.sources if isinstance(source, Tracked)]
            entry.sources, entry.moved = tuple(source.number for source in tracked), recipe.moved
        return trip.learn(stash, entry)

    def try_out(self, tracked: Tracked, tensor: Tensor, open_source: Callable[[Any], Tensor]) -> None:
        """Look at a tensor that was unpacked while a trip learns: is it what its sources make, and has it the
        lower halves that the graph says it has not?"""
        recipe, tracked.recipe = tracked.recipe, None
        trip, number = tracked.trip, tracked.number
        if trip.is_widened(number) and distinct_bytes(tensor) == trip.entry(number).weight:
            trip.note_widened(number, has_lower_halves(tensor))
        if recipe is None:
            return
        try:
            made = recipe.run([open_source(source) for source in recipe.sources])
            trip.note_derived(number, ~equal_in_memory(made, tensor) | ~made.any())  # zeros tell nothing
        except (OffloadError, RuntimeError):
            pass  # it is stored, as what cannot be derived

    def expect_gradient(self, nbytes: int) -> None:
        """A weight of `nbytes` was saved: backward makes its gradient."""
        trip = self._local.trip
        if trip is not None and trip.learning:
            trip.gradients += nbytes

    def used(self, tracked: Tracked | Passed, before: Any = None, wire: int = 0) -> None:
        """A tensor was unpacked."""
        trip = tracked.trip
        trip.uses.count += 1
        trip.used(tracked.number, before, wire)
        if self.moves.waiting:
            self.moves.fetch_ahead(trip.last, *trip.growth, (tracked.number + 1) / trip.size)

    def _entry(self, tensor: Tensor, nbytes: int) -> Entry:
        lossy = None
        if self._lossy is not None and may_lose_bits(tensor, plain_kind(tensor)):
            lossy = self._lossy[0 if tensor.ndim == 4 else 1]
        return Entry(nbytes, tensor.dtype, -1, lossy=lossy)

    def _trip(self, device: torch.device, first: Hashable) -> Trip:
        """That of this thread; another one, which begins with `first`, if a backward pass ran since its last
        save."""
        local = self._local
        trip = local.trip
        if trip is None or local.seen != local.uses.count or trip.played:
            trip = local.trip = self._depart(device, (device, first, self._blocks.training))
            local.seen = local.uses.count
        trip.last = self.moves.count + 2  # this one, and a bundle that is open
        return trip

    def _depart(self, device: torch.device, key: Hashable) -> Trip:
        with self._lock:
            state = self._states.pop(key, None) or _StepState()
            self._states[key] = self._latest = state
            if len(self._states) > MAX_STEPS:
                self._states.popitem(last=False)
            with undisturbed(device):
                self._look_at_ended(state)
            underway = sum(trip.timed for trip in state.pending)
            timed = state.phase is Phase.TIME and state.left > underway
            local, before = self._local, self._local.latest
            level = before is None or before.ended()
            trip = Trip(device, state.script, timed, self.moves.count, level, local.uses)
            local.latest = trip
            state.pending.append(trip)
            return trip

    def _look_at_ended(self, state: _StepState) -> None:
        """Go through the phases with the trips that have ended."""
        while state.pending:
            trip, script = state.pending[0], state.script
            if trip.script is not script or (trip.end is None and not trip.lost):
                pass  # of an older plan, or without a backward pass
            elif script is None:
                self._learn_from(state, trip)
            elif not trip.complete:
                if trip.lost and not trip.failed:
                    state.others += 1
                else:
                    state.early_ends += 1
                if state.others >= state.patience:
                    state.patience = min(2 * state.patience, MOST_PATIENCE)
                    state.enter(Phase.LEARN, None)
                elif state.early_ends >= EARLY_ENDS:
                    state.enter(Phase.LEARN, None)
            elif trip.ended():
                self._advance(state, trip, script)
            else:
                return
            state.pending.popleft()

    def _learn_from(self, state: _StepState, trip: Trip) -> None:
        """Make the first plan, unless the trip taught nothing."""
        if not trip.complete or trip.end is None:
            return
        trip.end.synchronize()  # the one wait: there is no plan without
        lessons = [*self._lessons(trip)]
        if lessons:
            script = self._best(lessons)
            state.allow_replans(REPLANS)
            state.recent.clear()
            state.discard_old_timings = False
            state.backoff = state.backoff_left = RECENT
            state.lessons = lessons
            state.enter(Phase.TIME, script)

    def _lessons(self, trip: Trip) -> Iterator[Lesson]:
        """What a trip has learned, and that without loss, where more can be derived then."""
        lesson = trip.lesson()
        if lesson is None:
            return
        yield lesson
        if self._lossy and (other := trip.lesson(lossless=True)) is not None:
            pairs = zip(lesson.entries, other.entries, strict=True)
            if any(a.sources is None and b.sources is not None for a, b in pairs):
                yield other

    def _best(self, lessons: Iterable[Lesson]) -> Script:
        scripts = [Script.of(lesson, self._plan_for(lesson.step())) for lesson in lessons]
        return min(scripts, key=lambda script: script.plan.cost)

    def _advance(self, state: _StepState, trip: Trip, script: Script) -> None:
        """Note what a trip of the plan has shown or taken, and begin the next phase after enough of them."""
        state.early_ends = state.others = 0
        shown = trip.shown()
        if shown is not None:
            choices, discard_old = script.plan.choices, state.discard_old_timings
            state.lessons = [lesson.updated(shown, choices, discard_old) for lesson in state.lessons]
            state.discard_old_timings = False
            if state.phase is Phase.TIME:
                state.left -= 1
                if state.left <= 0:
                    state.enter(Phase.CHECK, script)
            return
        state.recent.append(trip.seconds())
        if state.phase is Phase.CHECK:
            state.left -= 1
            if state.left <= 0:
                self._replan(state, script)
        elif state.phase is Phase.SETTLED and state.drifts():
            state.allow_replans(1)
            state.discard_old_timings = True
            state.enter(Phase.TIME, script)
            state.backoff *= 4
            state.backoff_left = state.backoff

    def _replan(self, state: _StepState, script: Script) -> None:
        """Time another plan or settle with the fastest, by what trips of this one have shown and taken."""
        lessons, seconds = state.lessons, min([*state.recent][-TIMED:])
        script = script.predicted_anew(lessons)
        state.tried.append((seconds, script))
        old, others = script.plan, script.plan.others
        if state.replans_left:
            state.replans_left -= 1
            other = self._best(lessons)
            new = other.plan
            if new.forecast.seconds < (1 - GAIN) * old.forecast.seconds or (new.fits and not old.fits):
                state.recent.clear()
                state.enter(Phase.TIME, other)
                return
            others = new.others
        fastest, best = min(state.tried, key=lambda tried: (not tried[1].plan.fits, tried[0]))
        if fastest < (1 - GAIN) * seconds or (best.plan.fits and not old.fits):
            script = best.predicted_anew(lessons)
            state.recent.clear()
        state.enter(Phase.SETTLED, replace(script, plan=replace(script.plan, others=others)))

    def _plan_for(self, step: Step) -> StepPlan:
        limits = (self._budget.limit, self._host.limit)
        return plan_step(step, *(inf if limit is None else limit * (1 - SPARE) for limit in limits))

    def _around(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call of a block."""
        leaves = tree_leaves((args, kwargs))
        # Nested tensors stay in any case, and have no shape to know them by.
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_nested]
        if not tensors or not self._watches(tensors[0].device):
            return forward(*args, **kwargs)
        local, first = self._local, tensors[0]
        # Processes plan for themselves: a block that only some run again would leave the others waiting in
        # its collectives.
        repeatable = is_plain(leaves) and not is_distributed()
        trip = self._trip(first.device, ("block", first.dtype, first.shape))
        try:
            local.inside = True
            again = trip.enter(lambda: self._inputs(tensors), repeatable, modes(module))
            before = fingerprint(module, (args, kwargs)) if trip.learning else []
            if again:
                result = run_again_later(forward, args, kwargs)
            elif trip.passes:
                result = Passage(trip, self.moves, self._min_bytes, self.used).run(forward, args, kwargs)
            else:
                result = forward(*args, **kwargs)
            if trip.learning:  # a block that left hooks behind must not do so twice
                trip.leave(before == fingerprint(module, (args, kwargs)) and self._innermost())
            else:
                trip.leave(True)
            return result
        except BaseException:
            trip.lost = trip.failed = True
            raise
        finally:
            local.inside = False

    def _watches(self, device: torch.device) -> bool:
        """A block is called in a forward pass that this context packs, outside of other blocks."""
        return (
            self._budget.limit is not None
            and not self._local.inside
            and torch.is_grad_enabled()
            and torch._C._current_graph_task_id() == -1
            and self._innermost()
            and device.type in ("cpu", "cuda")
            and not (device.type == "cuda" and is_capturing(device))
        )

    def _inputs(self, tensors: list[Tensor]) -> list[tuple[Any, Entry]]:
        """Those that a block saves when it is recomputed, as far as a context packs them."""
        out = []
        for tensor in tensors:
            if why_kept(tensor, self._min_bytes, plain_kind(tensor)) is None:
                out.append((data_key(tensor), self._entry(tensor, self._weigh(tensor))))
        return out
