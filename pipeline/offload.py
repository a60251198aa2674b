"""Saved activations leave the GPU through a lane: a context of saved-tensor hooks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet, Sections, flatten
from sidelane.errors import BudgetError, LaneError, OffloadError
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.blocks import find_blocks
from sidelane.pipeline.budget import Budget, Holders
from sidelane.pipeline.bundle import Bundles
from sidelane.pipeline.checker import Truth, same_bits
from sidelane.pipeline.compress import choose_lane, compress
from sidelane.pipeline.copies import DeviceCopy
from sidelane.pipeline.derive import Recipe, Remade, is_widened, recipe_of, stays_usable, upper_halves
from sidelane.pipeline.disk import Disk
from sidelane.pipeline.entries import HookContext, Visit
from sidelane.pipeline.explain import Plan
from sidelane.pipeline.extent import WHOLE_SHARE, Kind, View, describe, whole_storage, without_flags
from sidelane.pipeline.lanes import ExactLane, decode_packet, open_lane, undisturbed
from sidelane.pipeline.late import LatePacket, encode_late
from sidelane.pipeline.lesson import BOUNDED
from sidelane.pipeline.moves import Held, Moves, Parcel
from sidelane.pipeline.packed import as_bytes
from sidelane.pipeline.policy import (
    NOT_PLAIN,
    WEIGHT,
    for_heads,
    is_capturing,
    may_lose_bits,
    plain_kind,
    why_kept,
)
from sidelane.pipeline.recorder import Trip
from sidelane.pipeline.report import Report, Tally
from sidelane.pipeline.stash import (
    Home,
    Index,
    Kept,
    Key,
    Resident,
    Stash,
    Ticket,
    data_key,
)
from sidelane.pipeline.step_auto import Auto, Tracked
from sidelane.pipeline.step_model import AWAY, DERIVED, HERE, KEEP, UPPER, Choice
from sidelane.pipeline.streams import current_stream
from sidelane.pipeline.tiers import HostCopy, Spilled, Tiers
from sidelane.pipeline.wire import Wire

MIN_BYTES = 256 << 10
GPU_BUDGET = 1 << 30
EXACT_BYTES = 4 << 20  # of a tensor on a GPU; smaller ones are not worth the launches of their exact code
SHARED = 8  # tensors that stay decoded for the next nodes that saved them
POLICIES = ("keep", "spill", "error")
RAW = open_lane("raw")


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
            Some are made again from others (see `derive`): what autograd is not told of (under no_grad,
            through `.data`) must not be done to these in some steps only; `checker` finds it.
            Lossy lanes apply to activations alone (see `policy.may_lose_bits`); everything else takes the
            exact lane. Without a bound, tensors of four dimensions take 8 bits at least (see
            `policy.for_heads`).
        max_rel_error: bound on the relative Frobenius error of every saved tensor, kept by finer lanes
            (`compress`).
        min_bytes: smaller tensors are kept.
        host_budget: bytes of packets in host memory, as allocated; None for no limit.
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
        basis, lane_options: of the lane that is named.

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
        automatic = isinstance(lane, str) and lane == "auto"
        asked = max_rel_error, basis, lane_options
        permitted = max_rel_error is not None or basis is not None or bool(lane_options)
        lossy = choose_lane("packed", *asked) if automatic and permitted else None
        self._lane = open_lane("exact") if automatic else choose_lane(lane, *asked)
        self._may_lose = lossy is not None or not self._lane.exact
        self._exact = self._lane if self._lane.exact else open_lane("exact")
        self._heads_lane = for_heads(self._lane)
        self._basis: Basis | None = getattr(lossy or self._lane, "basis", None)
        self._max_rel_error = max_rel_error
        self._min_bytes = min_bytes
        self._on_full = on_full
        self._checker = checker
        self._host = Budget(host_budget)
        self._device = Budget(gpu_budget)
        self._tickets = Holders()
        self._index = Index()
        self._shared: deque[ref[Stash]] = deque()  # those that may hold decoded elements, oldest first
        self._tally = Tally()
        self._tiers = Tiers(self._host, _open_disk(spill_dir) if on_full == "spill" else None, self._tally)
        self._wire = Wire(self._device, self._tiers.take, self._tiers.promise)
        self._bundles = Bundles(self._wire, gpu_budget)
        self._lossy: dict[str, Lane] = {}
        self._auto: Auto | None = None
        if automatic:
            self._auto = Auto(
                self._device,
                self._host,
                self._tiers.take,
                self._tiers.promise,
                min_bytes,
                None if lossy is None else self._name_lossy(lossy),
                blocks,
                lambda tensor: _weight(tensor, view := View.of(tensor), self._key(tensor, view)),
                self.hooks_apply,
                lambda: self._tickets.held,
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
        self._wire.settle()
        tally = self._tally
        return Report(
            classes=tally.classes(),
            kept=tally.reasons(),
            deduplicated=tally.count("deduplicated"),
            over_budget=tally.count("over_budget"),
            spilled=tally.count("spilled"),
            unpacks=tally.count("unpacks").count,
            decodes=tally.count("decodes").count,
            fetched=self._wire.fetched,
            prefetched=self._wire.prefetched,
            seconds_waited=self._wire.seconds_waited(),
            host_bytes=self._host.held,
            host_peak=self._host.peak,
            device_bytes=self._device.held,
            device_peak=self._device.peak,
            tickets=self._tickets.held,
            plan="" if self.plan is None else self.plan.explain(),
        )

    @property
    def plan(self) -> Plan | None:
        """What `lane="auto"` does with the present step; None for other lanes and before the second step."""
        auto = self._auto
        if auto is None or (script := auto.plan) is None:
            return None
        return Plan(script, auto.measured)

    def _visit(self) -> Visit | None:
        return None if self._auto is None else self._auto.visit()

    def find_blocks(self, module: nn.Module) -> None:
        """Let `lane="auto"` recompute the blocks of `module`, unless `blocks` were given."""
        if self._auto is not None and not self._auto.blocks_given:
            self._auto.use_blocks(find_blocks(module))

    def _pack(self, tensor: Tensor) -> Ticket | Kept | Tracked:
        kind = plain_kind(tensor)
        reason = NOT_PLAIN if kind is None else why_kept(tensor, self._min_bytes, kind)
        if kind is None or reason is not None:
            nbytes = 0 if kind is None else kind.nbytes
            self._tally.kept(reason or NOT_PLAIN, nbytes)
            if reason == WEIGHT and tensor.requires_grad:
                self._wire.expect_gradient(nbytes)
                if self._auto is not None:
                    self._auto.expect_gradient(nbytes)
            return Kept(tensor, reason == WEIGHT)
        view = View.of_kind(tensor, kind)
        key = self._key(tensor, view, kind)
        stash = self._index.find(key)
        if self._auto is not None:
            with undisturbed(tensor.device):
                return self._follow(self._auto, tensor, view, key, stash)
        if stash is None:
            with undisturbed(tensor.device):
                stash = self._encode(tensor, view, key)
        else:
            self._reuse(stash, tensor, view)
        return Ticket(stash, view, self._tickets.claim(1))

    def _follow(self, auto: Auto, tensor: Tensor, view: View, key: Key, stash: Stash | None) -> Tracked:
        """Do with `tensor` what the plan says."""
        nbytes = _weight(tensor, view, key)
        trip, number, choice = auto.save(tensor, nbytes)
        before = trip.before()
        if stash is not None and stash.lossy and number >= 0 and trip.entry(number).lossy is None:
            stash = None  # another trip has stored it
        if stash is not None and not self._in_order(stash, tensor, trip):
            stash = None
        if stash is not None:
            self._reuse(stash, tensor, view)
        found = stash or self._carry_out(auto.moves, choice, tensor, view, key, trip)
        recipe = self._recipe(tensor, trip) if trip.learning and stash is None else None
        if isinstance(found, Stash):
            if trip.learning:
                number = auto.learn(trip, found, tensor, nbytes, recipe)
            inner: Ticket | Kept = Ticket(found, view, self._tickets.claim(1))
        else:
            inner = found
        if stash is None:
            trip.saved(number, before)
        return Tracked(inner, trip, number, recipe)

    def _carry_out(
        self, moves: Moves, choice: Choice | None, tensor: Tensor, view: View, key: Key, trip: Trip
    ) -> Stash | Held:
        """Keep, or encode and move, a tensor that is not stored yet."""
        if choice is not None and choice.lane == DERIVED:
            recipe = self._recipe(tensor, trip)
            if recipe is not None:
                return self._derive(recipe, tensor, view, key)
            choice = Choice(AWAY)
        if choice is not None and choice.place == KEEP:
            held = moves.keep(tensor, key.data, _weight(tensor, view, key))
            if held is not None:
                self._tally.kept("plan", view.nbytes)
                return held
            choice = Choice(AWAY)
        if choice is not None and choice.lane == UPPER and not is_widened(tensor):
            choice = Choice(AWAY)
        if choice is None or (choice.lane == "raw" and not tensor.is_cuda):
            return self._encode(tensor, view, key)
        return self._send(moves, choice, tensor, view, key)

    @staticmethod
    def _in_order(stash: Stash, tensor: Tensor, trip: Trip) -> bool:
        """The node that saves `tensor` runs before those that the stash may be derived from: it follows them
        in the graph. A detached head does not, and its backward may come after an optimizer step."""
        derived = isinstance(stash.home, Remade)
        if not (derived or trip.learning) or recipe_of(tensor) is not None:
            return True
        trip.store(stash)
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

    def _derive(self, recipe: Recipe, tensor: Tensor, view: View, key: Key) -> Stash:
        """A stash of a tensor that is made again when it is used."""
        sources = []
        for source in recipe.sources:
            inner = source.inner if isinstance(source, Tracked) else source
            if isinstance(inner, Ticket):
                inner = Ticket(inner.stash, inner.view, self._tickets.claim(1))
            sources.append(inner)
        home, whole, truth = Remade(recipe, tuple(sources)), key.kind == "whole", None
        if self._checker:
            truth = Truth(_elements(tensor, whole).clone(), home.make(self._unpack))
            exact = not self._lossy or self._max_rel_error is not None
            if exact and not same_bits(truth.packed, truth.decoded):
                raise OffloadError(f"{describe(tensor)} does not follow from what it was made from")
        stash = Stash(tensor, home, whole, truth)
        self._index.add(key, stash)
        self._tally.kept(DERIVED, view.nbytes)
        return stash

    def _name_lossy(self, lane: Lane) -> tuple[str, str]:
        """Names of the lanes that may take activations of four dimensions, and others, for plans."""
        names = []
        for each in (for_heads(lane), lane):
            bits = getattr(each, "bits", 8)
            name = f"packed:{bits}" if self._max_rel_error is None else BOUNDED
            self._lossy[name] = each
            names.append(name)
        return names[0], names[1]

    def _send(self, moves: Moves, choice: Choice, tensor: Tensor, view: View, key: Key) -> Stash:
        """Encode a tensor for its place, on the device or off it."""
        whole = key.kind == "whole"
        elements, source = _elements(tensor, whole), None
        if choice.lane == "raw":
            packet = Packet.like("raw", elements).with_(sections={"data": as_bytes(elements)})
            if elements.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                source = tensor.detach()
        elif choice.lane == UPPER:
            upper = upper_halves(elements)
            data = as_bytes(upper)
            sections = Sections(("data",), (0,), (data.numel(),), data)
            packet = Packet.like("raw", upper).with_(sections=sections)
        elif choice.lane == "exact":
            packet = self._exact_lane(tensor, view).encode(elements)
        elif self._max_rel_error is None:
            packet = self._lossy[choice.lane].encode(without_flags(tensor))
        else:
            lossy = self._lossy[choice.lane]
            packet = compress(without_flags(tensor), lane=lossy, max_rel_error=self._max_rel_error)
        truth = self._truth(tensor, packet, whole, choice.lane == UPPER) if self._checker else None
        home: Home | None = None
        if tensor.is_cuda:
            claim = moves.room(packet.nbytes) if choice.place == HERE else None
            if claim is not None:
                home = DeviceCopy(packet, current_stream(packet.device), claim)
            else:
                home = moves.bundles.send(packet) if source is None else moves.send(packet, source)
                if home is None and source is not None:
                    packet = RAW.encode(elements)
        stash = Stash(tensor, home or self._place(packet, view), whole, truth)
        stash.widened, stash.lossy = choice.lane == UPPER, choice.lane in self._lossy
        self._index.add(key, stash)
        self._tally.encoded(view, packet)
        return stash

    def _unpack(self, packed: Ticket | Kept | Tracked) -> Tensor:
        if isinstance(packed, Kept):
            return packed.open()
        if isinstance(packed, Tracked):
            before = packed.trip.before()
            tensor = self._unpack(packed.inner)
            if self._auto is not None:
                if packed.trip.learning:
                    with undisturbed(tensor.device):
                        self._auto.try_out(packed, tensor, self._unpack_source)
                wire = packed.inner.stash.wire if isinstance(packed.inner, Ticket) else 0
                self._auto.used(packed, before, wire)
            return tensor
        stash, view = packed.stash, packed.view
        self._tally.add("unpacks")
        if stash.device.type == "cuda" and is_capturing(stash.device):
            raise OffloadError(
                "an offloaded tensor cannot be fetched while a CUDA graph is captured: capture the forward "
                "pass too, or leave the context out"
            )
        with undisturbed(stash.device):
            flat = stash.alive()
            if flat is None:
                flat = self._decode(stash)
                self._share(stash, flat)
            if stash.truth is not None:
                stash.truth.verify(flat, view)
            return view.over(flat) if stash.whole else view.over_elements(flat)

    def _unpack_source(self, source: Tracked | Kept) -> Tensor:
        return self._unpack(source.inner if isinstance(source, Tracked) else source)

    def _share(self, stash: Stash, flat: Tensor) -> None:
        stash.remember(flat)
        self._shared.append(ref(stash))
        if len(self._shared) > SHARED and (oldest := self._shared.popleft()()) is not None:
            oldest.forget()

    def _key(self, tensor: Tensor, view: View, kind: Kind | None = None) -> Key:
        """What a stash of `tensor` is made from."""
        data, pairs = data_key(tensor, view.geometry), view.geometry.pairs
        if self._may_lose and may_lose_bits(tensor, kind):
            # The error bound is of this tensor, so only views of the same elements may share its packet.
            return Key(data, "lossy", view.dtype, view.offset, pairs)
        if pairs is None or view.nbytes * WHOLE_SHARE >= tensor.untyped_storage().nbytes():
            return Key(data, "whole")
        return Key(data, "elements", view.dtype, view.offset, pairs)

    def _reuse(self, stash: Stash, tensor: Tensor, view: View) -> None:
        """Count `tensor` as stored already."""
        if stash.truth is not None:
            with undisturbed(tensor.device):
                stash.truth.match(_elements(tensor, stash.whole), tensor)
        self._tally.add("deduplicated", view.nbytes)

    def _encode(self, tensor: Tensor, view: View, key: Key) -> Stash:
        whole = key.kind == "whole"
        if key.kind == "lossy":
            packet = self._encode_lossy(tensor, view)
        elif (late := self._encode_late(tensor, view, whole)) is None:
            packet = self._exact_lane(tensor, view).encode(_elements(tensor, whole))
        elif (home := self._send_late(late, view)) is None:
            packet = late.settle()
        else:
            stash = Stash(tensor, home, whole, None)
            self._index.add(key, stash)
            return stash
        truth = self._truth(tensor, packet, whole) if self._checker else None
        stash = Stash(tensor, self._place(packet, view), whole, truth)
        self._index.add(key, stash)
        self._tally.encoded(view, packet)
        return stash

    def _encode_lossy(self, tensor: Tensor, view: View) -> Packet:
        source = without_flags(tensor) if view.conj or view.neg else tensor
        if self._max_rel_error is None:
            return (self._heads_lane if tensor.ndim == 4 else self._lane).encode(source)
        return compress(source, lane=self._lane, max_rel_error=self._max_rel_error)

    def _encode_late(self, tensor: Tensor, view: View, whole: bool) -> LatePacket | None:
        """The exact packet of a tensor on a GPU, without a wait for its size; None of others."""
        if self._checker or not tensor.is_cuda or not isinstance(self._exact_lane(tensor, view), ExactLane):
            return None
        return encode_late(_elements(tensor, whole))

    def _send_late(self, late: LatePacket, view: View) -> Home | None:
        self._bundles.close()
        return self._wire.send_late(late, partial(self._tally.encoded, view))

    def _exact_lane(self, tensor: Tensor, view: View) -> Lane:
        small = tensor.is_cuda and view.nbytes < EXACT_BYTES and self._exact.name == "exact"
        return RAW if small else self._exact

    def _decode(self, stash: Stash) -> Tensor:
        """The elements of a stash, flat, at the start of a storage of their own."""
        self._tally.add("decodes")
        home = stash.home
        if isinstance(home, Remade):
            return home.make(self._unpack)
        if isinstance(home, Parcel) and stash.users.held == 1 and (given := home.give()) is not None:
            return given.float() if stash.widened else given
        with stash.home.use() as packet:
            stash.wire = packet.nbytes
            if stash.widened:
                return packet.sections["data"].view(packet.dtype).float()
            flat = flatten(decode_packet(packet, self._basis))
        return flat.clone() if flat.storage_offset() else flat.detach()  # the only tensor over its storage

    def _place(self, packet: Packet, view: View) -> Home:
        """A home for `packet` within the budgets. Raises BudgetError when there is none."""
        on_gpu = packet.device.type == "cuda"
        home = self._bundles.send(packet) if on_gpu else self._place_cpu(packet)
        if home is not None:
            return home
        if self._on_full == "error":
            raise BudgetError(
                f"host budget: {describe(view)} needs {packet.nbytes} bytes, {self._host.held} of "
                f"{self._host.limit} are held; raise host_budget, or set on_full='keep' or 'spill'"
            )
        claim = self._device.claim(packet.nbytes)
        if claim is None:
            raise BudgetError(
                f"host and device budgets: {describe(view)} needs {packet.nbytes} bytes, {self._device.held} "
                f"of {self._device.limit} are held on the device; raise gpu_budget or host_budget"
            )
        self._tally.add("over_budget", packet.nbytes)
        if on_gpu:
            return DeviceCopy(packet, current_stream(packet.device), claim)
        return Resident(packet, claim)

    def _place_cpu(self, packet: Packet) -> Home | None:
        claim = self._host.claim(packet.nbytes)
        if claim is not None:
            return Resident(packet, claim)
        host = HostCopy(packet)
        room = self._tiers.spill(host.nbytes)
        return None if room is None else Spilled(packet, host, room)

    def _truth(self, tensor: Tensor, packet: Packet, whole: bool, widened: bool = False) -> Truth:
        decoded = flatten(decode_packet(packet, self._basis))
        decoded = decoded.float() if widened else decoded
        return Truth.of(tensor, _elements(tensor, whole).clone(), decoded, packet.lane, self._max_rel_error)


def _open_disk(spill_dir: str | None) -> Disk:
    try:
        return Disk(spill_dir)
    except LaneError as error:
        raise LaneError(f"spill_dir: {error}") from error


def _weight(tensor: Tensor, view: View, key: Key) -> int:
    """Bytes that are stored for `tensor` under `key`."""
    return tensor.untyped_storage().nbytes() if key.kind == "whole" else view.nbytes


def _elements(tensor: Tensor, whole: bool) -> Tensor:
    """Flat: the storage of `tensor`, or its own distinct elements in memory order."""
    plain = without_flags(tensor)
    return whole_storage(plain) if whole else flatten(plain)


def _check_size(name: str, value: object, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LaneError(f"{name}={value!r} is not a whole number from 0 up{' or None' if optional else ''}")
