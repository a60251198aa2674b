"""The automatic lane of an offload context: learns the step, plans it, and says what to do with each tensor.

Note: [Cycle of a plan]
The first trip of a kind takes the exact lane and learns. Its plan is made when the second begins; where loss
is permitted and keeps tensors from being derived, with loss and without, and the better one is taken, now and
whenever another plan is asked for. The first trips of a plan are timed, since a trip that learns computes
with pauses, and show the step again. The next ones run as any other: what they take is what the plan is
worth, since marks cost a plan the more the more it keeps. Then another plan takes over if it is predicted to
be faster by `GAIN`, a few times at most. In the end the one stays that was fastest, whatever was predicted.
From then on nothing is timed or planned, until steps take another time than they did, and each time that
happens it has to last longer.
A trip that is not the step of its script goes on as one that learns would, and the next of its kind learns
again. Kinds are told apart by the first tensor they save and by which blocks are in training mode, so that
batches of other shapes, and evaluation, have plans of their own.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from math import inf
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sidelane.errors import OffloadError
from sidelane.pipeline.blocks import Blocks, fingerprint, is_plain, modes, run_again_later
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.derive import Recipe, has_lower_halves, is_distributed, is_widened, same_bits
from sidelane.pipeline.entries import Visit
from sidelane.pipeline.extent import distinct_bytes
from sidelane.pipeline.lanes import undisturbed
from sidelane.pipeline.lesson import Entry, Lesson, Script
from sidelane.pipeline.moves import Moves
from sidelane.pipeline.passage import Passage, Passed
from sidelane.pipeline.policy import is_capturing, may_lose_bits, why_kept
from sidelane.pipeline.recorder import Trip
from sidelane.pipeline.stash import Kept, Stash, Ticket, data_key
from sidelane.pipeline.step_model import Choice, Step
from sidelane.pipeline.step_plan import StepPlan, plan_step
from sidelane.pipeline.tiers import Memory

GAIN = 0.03  # share of the step that another plan must save
TIMED = 2  # trips of each plan, and as many after these that are not
ROUNDS = 2  # plans that may take over from the first
RECENT = 9  # trips whose median time is that of the step
DRIFT = 0.15  # share of the step by which that may change
PATIENCE = 3  # trips in a row that end early before the step is learned again
SPARE = 1 / 128  # of budgets that plans leave alone, for what rounding and headers add
KINDS = 16  # of trips that are remembered


class Tracked:
    """What autograd keeps in place of a tensor, which one of which trip it is, and how it was made if that
    has still to be tried."""

    __slots__ = ("inner", "number", "recipe", "trip")

    def __init__(self, inner: Ticket | Kept, trip: Trip, number: int, recipe: Recipe | None = None) -> None:
        self.inner = inner
        self.trip = trip
        self.number = number
        self.recipe = recipe


class _Kind:
    """What is known of trips that begin alike."""

    def __init__(self) -> None:
        self.pending: deque[Trip] = deque(maxlen=4)
        self.script: Script | None = None
        self.lessons: list[Lesson] = []  # with loss if permitted, and without; with what timed trips showed
        self.timed = 0  # trips of this plan to time; 0 when it has settled
        self.seen = 0  # those that have shown something
        self.alone = 0  # trips since then
        self.rounds = 0  # plans that may take over
        self.tried: list[tuple[float, Script]] = []  # with the seconds of the fastest trip
        self.fresh = False  # the next timed trip counts alone
        self.short = 0  # trips in a row that ended early
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of trips that are not timed
        self.settled: float | None = None  # seconds of the step since it was timed last
        self.pause = RECENT  # trips, longer each time, before the step may be timed again
        self.patience = self.pause  # those that are left

    @property
    def measured(self) -> float | None:
        return median(self.recent) if self.recent else None

    @property
    def underway(self) -> int:
        """Timed trips of this plan that may still show something."""
        return sum(trip.timed and trip.script is self.script for trip in self.pending)

    def plan_anew(self, rounds: int) -> None:
        """Let up to so many plans take over from the next one that is tried. Comes before that, so that an
        interrupt leaves none of an older lesson."""
        self.tried.clear()
        self.rounds = rounds

    def begin(self, script: Script, timed: int, lessons: list[Lesson]) -> None:
        """Follow a plan of one of these lessons; `timed`: trips to time, 0 for a plan with choices that were
        followed before."""
        if timed:
            self.recent.clear()
        self.script, self.lessons = script, lessons
        self.time(timed)

    def time(self, trips: int) -> None:
        """Time so many trips from here on."""
        self.timed, self.seen, self.alone, self.settled = trips, 0, 0, None

    def drifts(self) -> bool:
        """Steps take another time than they did. Asked once in each trip."""
        self.patience -= 1
        if self.settled is None and len(self.recent) == RECENT:
            self.settled = self.measured
        settled, measured = self.settled, self.measured
        if self.patience > 0 or settled is None or measured is None:
            return False
        return abs(measured - settled) > DRIFT * settled


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
        self._local = threading.local()
        self._lock = threading.RLock()
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._uses = 0
        self._latest: _Kind | None = None

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
            if not self._alive() and not self.moves.holding:
                self._local.trip = None
            blocks.install(user)

        def leave(failed: bool) -> None:
            blocks.remove(user)
            trip: Trip | None = getattr(self._local, "trip", None)
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
            trip.widened(number, has_lower_halves(tensor))
        if recipe is None:
            return
        try:
            made = recipe.run([open_source(source) for source in recipe.sources])
            trip.derived(number, ~same_bits(made, tensor) | ~made.any())  # zeros tell nothing
        except (OffloadError, RuntimeError):
            pass  # it is stored, as what cannot be derived

    def expect_gradient(self, nbytes: int) -> None:
        """A weight of `nbytes` was saved: backward makes its gradient."""
        trip: Trip | None = getattr(self._local, "trip", None)
        if trip is not None and trip.learning:
            trip.gradients += nbytes

    def used(self, tracked: Tracked | Passed, before: Any = None, wire: int = 0) -> None:
        """A tensor was unpacked."""
        self._uses += 1
        trip = tracked.trip
        trip.used(tracked.number, before, wire)
        if self.moves.waiting:
            self.moves.fetch_ahead(trip.last, *trip.growth, (tracked.number + 1) / trip.size)

    def _entry(self, tensor: Tensor, nbytes: int) -> Entry:
        lossy = None
        if self._lossy is not None and may_lose_bits(tensor):
            lossy = self._lossy[0 if tensor.ndim == 4 else 1]
        return Entry(nbytes, tensor.dtype, -1, lossy=lossy)

    def _trip(self, device: torch.device, kind: Hashable) -> Trip:
        """That of this thread; another one if a backward pass ran since its last save."""
        local = self._local
        trip: Trip | None = getattr(local, "trip", None)
        if trip is None or local.uses != self._uses or trip.played:
            trip = local.trip = self._depart(device, (device, kind, self._blocks.training))
            local.uses = self._uses
        trip.last = self.moves.count + 2  # this one, and a bundle that is open
        return trip

    def _depart(self, device: torch.device, key: Hashable) -> Trip:
        with self._lock:
            kind = self._kinds.pop(key, None) or _Kind()
            self._kinds[key] = self._latest = kind
            if len(self._kinds) > KINDS:
                self._kinds.popitem(last=False)
            with undisturbed(device):
                self._learn_from(kind)
            timed = kind.timed > kind.seen + kind.underway
            before: Trip | None = getattr(self._local, "latest", None)
            level = before is None or before.ended()
            trip = self._local.latest = Trip(device, kind.script, timed, self.moves.count, level)
            kind.pending.append(trip)
            return trip

    def _learn_from(self, kind: _Kind) -> None:
        """Read the trips that have ended; make a plan, or a better one."""
        while kind.pending:
            trip = kind.pending[0]
            if trip.script is not kind.script or (trip.end is None and not trip.lost):
                pass  # of an older plan, or without a backward pass
            elif trip.learning:
                lessons = []
                if trip.complete and trip.end is not None:
                    trip.end.synchronize()  # the one wait: there is no plan without
                    lessons = [*self._lessons(trip)]
                if lessons:
                    script = self._best(lessons)
                    kind.plan_anew(ROUNDS)
                    kind.begin(script, TIMED, lessons)
            elif not trip.complete:
                self._note_short(kind, trip)
            elif trip.ended():
                self._compare(kind, trip, kind.script)
            else:
                return
            kind.pending.popleft()

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

    def _note_short(self, kind: _Kind, trip: Trip) -> None:
        """A trip was not as its script says: forget that, at once if something else came."""
        kind.short += 1
        if (trip.lost and not trip.failed) or kind.short >= PATIENCE:
            kind.script, kind.short = None, 0

    def _compare(self, kind: _Kind, trip: Trip, script: Script | None) -> None:
        if script is None:
            return
        kind.short = 0
        shown = trip.shown()
        if shown is not None:
            choices = script.plan.choices
            kind.lessons = [lesson.seen_again(shown, choices, kind.fresh) for lesson in kind.lessons]
            kind.fresh = False
            kind.seen += 1
            return
        kind.recent.append(trip.seconds())
        if kind.timed and kind.seen >= TIMED:
            kind.alone += 1
            if kind.alone >= TIMED:
                self._plan_again(kind, script)
        elif not kind.timed and kind.drifts():
            kind.plan_anew(1)
            kind.fresh = True
            kind.time(TIMED)
            kind.pause *= 4
            kind.patience = kind.pause

    def _plan_again(self, kind: _Kind, script: Script) -> None:
        """After what trips of a plan have shown and taken."""
        lessons, seconds = kind.lessons, min([*kind.recent][-TIMED:])
        script = script.seen_again(lessons)
        kind.tried.append((seconds, script))
        old, others = script.plan, script.plan.others
        if kind.rounds:
            kind.rounds -= 1
            other = self._best(lessons)
            new = other.plan
            if new.forecast.seconds < (1 - GAIN) * old.forecast.seconds or (new.fits and not old.fits):
                kind.begin(other, TIMED, lessons)
                return
            others = new.others
        fastest, best = min(kind.tried, key=lambda tried: (not tried[1].plan.fits, tried[0]))
        if fastest < (1 - GAIN) * seconds or (best.plan.fits and not old.fits):
            script = best.seen_again(lessons)
            kind.recent.clear()
        kind.begin(replace(script, plan=replace(script.plan, others=others)), 0, lessons)

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
            and not getattr(self._local, "inside", False)
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
            if why_kept(tensor, self._min_bytes) is None:
                out.append((data_key(tensor), self._entry(tensor, self._weigh(tensor))))
        return out
