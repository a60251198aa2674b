"""Saved activations leave the GPU through a lane: a context of saved-tensor hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from sidelane.codec.lane import Lane
from sidelane.errors import LaneError
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.blocks import find_blocks
from sidelane.pipeline.compress import choose_lane
from sidelane.pipeline.derive import Recipe, Remade, is_widened, recipe_of, stays_usable
from sidelane.pipeline.disk import Disk
from sidelane.pipeline.entries import HookContext, Visit
from sidelane.pipeline.explain import Plan
from sidelane.pipeline.extent import View
from sidelane.pipeline.lanes import PackedLane, open_lane, undisturbed
from sidelane.pipeline.moves import Held, Moves
from sidelane.pipeline.policy import NOT_PLAIN, WEIGHT, Kind, plain_kind, why_kept
from sidelane.pipeline.recorder import Trip
from sidelane.pipeline.report import Report
from sidelane.pipeline.stash import Kept, Key, Stash, Ticket
from sidelane.pipeline.step_auto import Auto, Tracked
from sidelane.pipeline.step_model import AWAY, DERIVE, KEEP, UPPER, Choice
from sidelane.pipeline.store import Store, weight

MIN_BYTES = 256 << 10
GPU_BUDGET = 1 << 30
POLICIES = ("keep", "spill", "error")


class offload(HookContext):
    """Context manager: what autograd saves inside it is encoded and moved to host memory until backward asks
    for it.

    Encoding runs on the current stream when a tensor is saved, so a later change of the tensor does not reach
    the gradients. CUDA packets then cross to pinned memory on a side stream and are fetched back ahead of
    their use; CPU packets stay where they are. Backward may run inside or outside the context, several times,
    on any thread. A context can be entered again, nested (the innermost applies) and shared by threads.

    Left alone: parameters, their views and autocast casts, other leaves, tensors below `min_bytes`, what
    backward itself saves, tensor subclasses, other devices than CPU and CUDA. Data is stored once however
    many views of it are saved. Views of the same data that one node of the backward pass unpacks share their
    memory, as they did when they were saved, and so may nodes that follow each other. Writes to a saved
    tensor that its version counter does not show (through `.data`, by kernels of your own, to the running
    statistics of a norm) between two saves of it are found with `checker` only. Hooks are of the thread that
    entered: forward passes in other threads enter the context themselves.

    Args:
        lane: name of a lane, or a lane. Default: "exact", or "packed" when `max_rel_error` is given.
            "auto" learns the step in its first pass, through the exact lane, and plans it from the second on
            (see DESIGN.md): tensors are kept, made again from others, encoded in place or sent off the
            device, and `blocks` are recomputed, so that the step is short within the budgets. Gradients stay
            exact unless `max_rel_error` or options of the packed lane (`bits`) permit lossy codes. As without
            offload, a tensor must not be changed in place after it was saved.
            Some tensors are made again from other saved ones (see `derive`). A program that changes those
            behind autograd's back (under no_grad, through `.data`) has to do so in every step or in none;
            `checker` finds violations.
            Lossy lanes apply to activations alone (see `policy.may_lose_bits`); everything else takes the
            exact lane. Without a bound, tensors of four dimensions take 8 bits at least (see
            `policy.for_heads`).
        max_rel_error: bound on the relative Frobenius error of every saved tensor, kept by finer lanes
            (`compress`).
        min_bytes: smaller tensors are kept.
        host_budget: bytes of packets in host memory, as allocated; None for no limit. With "auto" the first
            step needs room for the exact codes of all that it saves, here or in `gpu_budget`.
        gpu_budget: bytes of packets on the device of the tensors, default 1 GiB; with "auto", of all tensors
            of `min_bytes` or more that are saved there, but for those of one block that runs again. The
            newest stay there, since backward starts with them; the others are on their way, fetched ahead, or
            there because the host budget is full. At the limit the compute stream waits for the wire. With
            None nothing leaves the device. One packet in the middle of being encoded or decoded is not
            counted.
        on_full: when the host budget is full: "keep" the packet on its device, "spill" it to a disk, which
            takes up to 512 MiB of pinned memory in addition and falls back to "keep" when the disk is full
            or fails, or raise an "error".
        checker: keep a copy of all that is packed, verify every unpack, and find changes that the version
            counters of tensors do not show. Costs the memory that offloading saves, and waits for the device.
        spill_dir: where "spill" makes its file, which has no name and vanishes with the context; default:
            the system's folder for temporary files.
        blocks: modules that "auto" may recompute: functions of their arguments, parameters and buffers that
            change none of these, whose tensor arguments stay as they are until backward. Those that autograd,
            buffers or arguments show to do otherwise are not recomputed, nor are any where several processes
            train together. Default: none; `wrap` finds them in a model.
        basis: principal components for a lane that takes them, a `Basis`.
        lane_options: others of the lane that is named, such as `bits` of "packed" (2, 4 or 8) and `group`.

    Raises LaneError for a bad argument. Inside, packing raises BudgetError when the budgets are full and the
    policy knows no way around; unpacking raises OffloadError when a tensor cannot be given back as it was
    packed.
    """

    def __init__(
        self,
        lane: str | Lane | None = None,
        *,
        max_rel_error: float | None = None,
        min_bytes: int = MIN_BYTES,
        gpu_budget: int | None = GPU_BUDGET,
        host_budget: int | None = None,
        on_full: str = "keep",
        checker: bool = False,
        spill_dir: str | None = None,
        basis: Basis | None = None,
        blocks: Iterable[nn.Module] | None = None,
        **lane_options: Any,
    ) -> None:
        for name, value in (("gpu_budget", gpu_budget), ("host_budget", host_budget)):
            _check_size(name, value, optional=True)
        _check_size("min_bytes", min_bytes)
        if on_full not in POLICIES:
            raise LaneError(f"on_full={on_full!r} is not one of {', '.join(POLICIES)}")
        if not isinstance(checker, bool):
            raise LaneError(f"checker={checker!r} is neither True nor False")
        _check_names(lane_options)
        automatic = isinstance(lane, str) and lane == "auto"
        asked = max_rel_error, basis, lane_options
        permitted = max_rel_error is not None or basis is not None or bool(lane_options)
        if automatic:
            _check_lossy_options(lane_options)
        lossy = choose_lane("packed", *asked) if automatic and permitted else None
        self._min_bytes = min_bytes
        self._store = store = Store(
            open_lane("exact") if automatic else choose_lane(lane, *asked),
            lossy,
            max_rel_error,
            gpu_budget,
            host_budget,
            on_full,
            _open_disk(spill_dir) if on_full == "spill" else None,
            checker,
        )
        self._auto: Auto | None = None
        if automatic:
            self._auto = Auto(
                store.device_budget,
                store.host_budget,
                store.tiers.take,
                store.tiers.promise,
                min_bytes,
                store.lossy_names,
                blocks,
                store.weigh,
                self.hooks_apply,
                lambda: store.tickets.held,
            )
        elif blocks is not None:
            raise LaneError("blocks= is for lane='auto': leave it out, or use sidelane.checkpoint")

    @staticmethod
    def current() -> offload | None:
        """The innermost context that this thread is inside of."""
        context = HookContext.innermost()
        return context if isinstance(context, offload) else None

    def report(self) -> Report:
        """What was packed, kept and moved so far. On CUDA it waits for the transfers."""
        store, wire, tally = self._store, self._store.wire, self._store.tally
        wire.settle()
        moves = None if self._auto is None else self._auto.moves
        return Report(
            classes=tally.classes(),
            kept=tally.reasons(),
            deduplicated=tally.count("deduplicated"),
            over_budget=tally.count("over_budget"),
            spilled=tally.count("spilled"),
            unpacks=tally.count("unpacks").count,
            decodes=tally.count("decodes").count,
            fetched=wire.fetched + (moves.fetched if moves else 0),
            prefetched=wire.prefetched + (moves.prefetched if moves else 0),
            seconds_waited=wire.waits.seconds() + (moves.waits.seconds() if moves else 0.0),
            host_bytes=store.host_budget.held,
            host_peak=store.host_budget.peak,
            device_bytes=store.device_budget.held,
            device_peak=store.device_budget.peak,
            tickets=store.tickets.held,
            checked=tally.count("checked").count,
            plan=self._told(),
        )

    @property
    def automatic(self) -> bool:
        """It was made with `lane="auto"`."""
        return self._auto is not None

    @property
    def plan(self) -> Plan | None:
        """What `lane="auto"` does with the present step; None for other lanes and before the second step."""
        auto = self._auto
        if auto is None or (script := auto.plan) is None:
            return None
        return Plan(script, auto.measured)

    def _told(self) -> str:
        if self._auto is None:
            return ""
        plan = self.plan
        return "no plan yet: the step is being learned" if plan is None else plan.explain()

    def _visit(self) -> Visit | None:
        return None if self._auto is None else self._auto.visit()

    def find_blocks(self, module: nn.Module) -> None:
        """Let `lane="auto"` recompute the blocks of `module`, unless `blocks` were given."""
        if self._auto is not None and not self._auto.blocks_given:
            self._auto.use_blocks(find_blocks(module))

    def _pack(self, tensor: Tensor) -> Ticket | Kept | Tracked:
        kind = plain_kind(tensor)
        reason = why_kept(tensor, self._min_bytes, kind)
        if kind is None or reason is not None:
            nbytes = 0 if kind is None else kind.nbytes
            self._store.tally.kept(reason or NOT_PLAIN, nbytes)
            if reason == WEIGHT and tensor.requires_grad:
                self._store.wire.expect_gradient(nbytes)
                if self._auto is not None:
                    self._auto.expect_gradient(nbytes)
            return Kept(tensor, reason == WEIGHT)
        view = kind.view_of(tensor)
        key = self._store.key(tensor, kind, view)
        stash = self._store.find(key)
        if self._auto is not None:
            with undisturbed(tensor.device):
                return self._follow(self._auto, tensor, kind, view, key, stash)
        if stash is None:
            with undisturbed(tensor.device):
                stash = self._store.encode(tensor, kind, key)
        else:
            self._store.reuse(stash, tensor, kind)
        return self._store.ticket(stash, view)

    def _follow(
        self, auto: Auto, tensor: Tensor, kind: Kind, view: View, key: Key, stash: Stash | None
    ) -> Tracked:
        """Do with `tensor` what the plan says."""
        nbytes = weight(tensor, kind, key)
        trip, number, choice = auto.save(tensor, nbytes)
        before = trip.before()  # ahead of all that is done for this tensor
        if stash is not None and self._misleads(stash, trip, number):
            stash = None
        if stash is not None and not self._in_order(stash, tensor, trip):
            stash = None
        if stash is not None:
            self._store.reuse(stash, tensor, kind)
        found = stash or self._carry_out(auto.moves, choice, tensor, kind, key, trip)
        recipe = self._recipe(tensor, trip) if trip.learning and stash is None else None
        if isinstance(found, Stash):
            if trip.learning:
                number = auto.learn(trip, found, tensor, nbytes, recipe)
            inner: Ticket | Kept = self._store.ticket(found, view)
        else:
            inner = found
        if stash is None:
            trip.saved(number, before)
        return Tracked(inner, trip, number, recipe)

    def _carry_out(
        self, moves: Moves, choice: Choice | None, tensor: Tensor, kind: Kind, key: Key, trip: Trip
    ) -> Stash | Held:
        """Keep, or encode and move, a tensor that is not stored yet."""
        if choice is not None and choice == DERIVE:
            recipe = self._recipe(tensor, trip)
            if recipe is not None:
                sources = (s.inner if isinstance(s, Tracked) else s for s in recipe.sources)
                return self._store.derive(recipe, sources, tensor, kind, key)
            choice = Choice(AWAY)
        if choice is not None and choice.place == KEEP:
            held = moves.keep(tensor, key.data, weight(tensor, kind, key))
            if held is not None:
                self._store.tally.kept("plan", kind.nbytes)
                return held
            choice = Choice(AWAY)
        if choice is not None and choice.lane == UPPER and not is_widened(tensor):
            choice = Choice(AWAY)
        if choice is None or (choice.lane == "raw" and not tensor.is_cuda):
            return self._store.encode(tensor, kind, key)
        return self._store.send(moves, choice, tensor, kind, key)

    @staticmethod
    def _misleads(stash: Stash, trip: Trip, number: int) -> bool:
        """Another trip has stored it, in a code that a trip that learns would take for the exact one, or with
        loss where this one must not lose anything."""
        if trip.learning:
            return stash.lossy or stash.widened
        return stash.lossy and number >= 0 and trip.entry(number).lossy is None

    @staticmethod
    def _in_order(stash: Stash, tensor: Tensor, trip: Trip) -> bool:
        """The node that saves `tensor` runs before those that the stash may be derived from: it follows them
        in the graph. A detached head does not, and its backward may come after an optimizer step."""
        derived = isinstance(stash.home, Remade)
        if not (derived or trip.learning) or recipe_of(tensor) is not None:
            return True
        trip.forbid_deriving(stash)
        return not derived

    def _recipe(self, tensor: Tensor, trip: Trip) -> Recipe | None:
        """How it was made from others of the trip, or from what stays in any case; None where it was not."""
        recipe = recipe_of(tensor) if tensor.device == trip.device else None
        if recipe is None:
            return None
        for source in recipe.sources:
            if isinstance(source, Tracked):
                usable = source.trip is trip and (not trip.learning or source.number >= 0)
            else:
                usable = isinstance(source, Kept) and stays_usable(source, tensor.device)
            if not usable:
                return None
        return recipe

    def _unpack(self, packed: Ticket | Kept | Tracked) -> Tensor:
        if isinstance(packed, Tracked):
            before = packed.trip.before()
            tensor = self._store.open(packed.inner)
            if self._auto is not None:
                if packed.trip.learning:
                    with undisturbed(tensor.device):
                        self._auto.try_out(packed, tensor, self._unpack_source)
                wire = packed.inner.stash.wire if isinstance(packed.inner, Ticket) else 0
                self._auto.used(packed, before, wire)
            return tensor
        return self._store.open(packed)

    def _unpack_source(self, source: Tracked | Kept) -> Tensor:
        return self._store.open(source.inner if isinstance(source, Tracked) else source)


def _open_disk(spill_dir: str | None) -> Disk:
    try:
        return Disk(spill_dir)
    except LaneError as error:
        raise LaneError(f"spill_dir: {error}") from error


def _check_names(options: Iterable[str]) -> None:
    """Tell what was meant by an argument that is none."""
    parameters = inspect.signature(offload).parameters.values()
    known = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    for option in options:
        for name in get_close_matches(option, known, 1, 0.8):
            raise LaneError(f"offload has no argument '{option}': {name}= is meant?")


def _check_lossy_options(options: Iterable[str]) -> None:
    """Those that the automatic lane hands on to its packed lane."""
    known = list(inspect.signature(PackedLane).parameters)
    for option in options:
        if option not in known:
            raise LaneError(
                f"lane 'auto' has no option '{option}': it has those of 'packed', {', '.join(known)}"
            )


def _check_size(name: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LaneError(f"{name}={value!r} is not a whole number from 0 up{' or None' if optional else ''}")
