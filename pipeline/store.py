"""What an offload context stores of tensors: their codes, in the homes that the budgets have room for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from weakref import ref

from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet, Sections, flatten
from sidelane.errors import BudgetError, OffloadError
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.budget import Budget, Holders
from sidelane.pipeline.bundle import Bundles
from sidelane.pipeline.checker import Truth, same_bits
from sidelane.pipeline.compress import compress
from sidelane.pipeline.copies import DeviceCopy
from sidelane.pipeline.derive import Recipe, Remade, upper_halves
from sidelane.pipeline.disk import Disk
from sidelane.pipeline.extent import KINDS, WHOLE_SHARE, View, describe, whole_storage, without_flags
from sidelane.pipeline.lanes import ExactLane, PackedLane, decode_packet, open_lane, undisturbed
from sidelane.pipeline.late import LatePacket, encode_late
from sidelane.pipeline.lesson import BOUNDED
from sidelane.pipeline.moves import Moves, Parcel
from sidelane.pipeline.octets import as_bytes
from sidelane.pipeline.packed import GroupPlan, encode_groups
from sidelane.pipeline.policy import Kind, for_heads, is_capturing, may_lose_bits, plain_kind
from sidelane.pipeline.report import Tally
from sidelane.pipeline.stash import Home, Index, Kept, Key, Resident, Stash, Ticket, data_key
from sidelane.pipeline.step_model import DERIVED, HERE, UPPER, Choice
from sidelane.pipeline.streams import current_stream
from sidelane.pipeline.tiers import PacketLayout, Spilled, Tiers
from sidelane.pipeline.wire import Wire

EXACT_BYTES = 4 << 20  # of a tensor on a GPU; smaller ones are not worth the launches of their exact code
SHARED = 8  # tensors that stay decoded for the next nodes that saved them
RAW = open_lane("raw")


class Store:
    """The stashes of one context.

    Args:
        lane: takes what it may, and all that is stored while no plan says otherwise.
        lossy: may take activations where a plan says so; None for none.
        max_rel_error: bound on the relative Frobenius error of every tensor; None for none.
        gpu_budget, host_budget: bytes on the device and off it; None for no limit.
        on_full: "keep", "spill" or "error", when the host budget is full. disk: where "spill" goes.
        checker: verify every tensor that is opened.

    Attributes:
        device, host: the budgets. tiers: room off the device. wire: of the fixed lane. tally: counts.
        tickets: how many there are. lossy_names: of lossy lanes, for tensors of four dimensions and others.
    """

    def __init__(
        self,
        lane: Lane,
        lossy: Lane | None,
        max_rel_error: float | None,
        gpu_budget: int | None,
        host_budget: int | None,
        on_full: str,
        disk: Disk | None,
        checker: bool,
    ) -> None:
        self._exact = lane if lane.exact else open_lane("exact")
        self._coarse = lossy or lane  # for activations, and those of four dimensions
        self._coarse_heads = for_heads(self._coarse)
        self._may_lose = not self._coarse.exact
        self._basis: Basis | None = getattr(self._coarse, "basis", None)
        self._max_rel_error = max_rel_error
        self._plans: dict[Kind, GroupPlan | None] = {}
        self._on_full = on_full
        self._checker = checker
        self._index = Index()
        self._shared: deque[ref[Stash]] = deque()  # those that may hold decoded elements, oldest first
        names = self._name(self._coarse_heads), self._name(self._coarse)
        self.lossy_names = None if lossy is None else names
        self.host_budget = Budget(host_budget)
        self.device_budget = Budget(gpu_budget)
        self.tickets = Holders()
        self.tally = Tally()
        self.tiers = Tiers(self.host_budget, disk, self.tally)
        self.wire = Wire(self.device_budget, self.tiers.take, self.tiers.promise)
        self._bundles = Bundles(self.wire, gpu_budget)

    def find(self, key: Key) -> Stash | None:
        """The stash of what `key` names, if there is one."""
        return self._index.find(key)

    def ticket(self, stash: Stash, view: View) -> Ticket:
        return Ticket(stash, view, self.tickets.claim())

    def weigh(self, tensor: Tensor) -> int:
        """Bytes that a plain tensor would hold."""
        kind = plain_kind(tensor) or Kind.of(tensor)
        return weight(tensor, kind, self.key(tensor, kind, kind.view_of(tensor)))

    def key(self, tensor: Tensor, kind: Kind, view: View) -> Key:
        """What a stash of `tensor` is made from."""
        data, pairs = data_key(tensor, view.geometry), view.geometry.pairs
        if self._may_lose and may_lose_bits(tensor, kind):
            # The error bound is of this tensor, so only views of the same elements may share its packet.
            return Key(data, "lossy", view.dtype, view.offset, pairs)
        if pairs is None or kind.nbytes * WHOLE_SHARE >= tensor.untyped_storage().nbytes():
            return Key(data, "whole")
        return Key(data, "elements", view.dtype, view.offset, pairs)

    def reuse(self, stash: Stash, tensor: Tensor, kind: Kind) -> None:
        """Count `tensor` as stored already."""
        if stash.truth is not None:
            with undisturbed(tensor.device):
                stash.truth.match(_elements(tensor, stash.whole), tensor)
        self.tally.add("deduplicated", kind.nbytes)

    def encode(self, tensor: Tensor, kind: Kind, key: Key) -> Stash:
        """Encode a tensor through the lane of the context, without loss where plans decide on that, and send
        it off. Raises BudgetError where no budget has room."""
        whole = key.kind == "whole"
        if key.kind == "lossy" and self.lossy_names is None:
            packet = self._encode_lossy(tensor, kind)
        elif (late := self._encode_late(tensor, kind, whole)) is None:
            packet = self._exact_lane(tensor, kind).encode(_elements(tensor, whole))
        elif (home := self._send_late(late, kind)) is None:
            packet = late.settle()
        else:
            stash = Stash(tensor, home, whole, None)
            self._index.add(key, stash)
            return stash
        truth = self._truth(tensor, packet, whole) if self._checker else None
        stash = Stash(tensor, self._place(packet, kind), whole, truth)
        self._index.add(key, stash)
        self.tally.encoded(kind, packet)
        return stash

    def derive(
        self, recipe: Recipe, sources: Iterable[Ticket | Kept], tensor: Tensor, kind: Kind, key: Key
    ) -> Stash:
        """A stash of a tensor that is made again from these sources when it is used. Raises OffloadError for
        one that `checker` finds to be another then."""
        held = [self.ticket(s.stash, s.view) if isinstance(s, Ticket) else s for s in sources]
        home, whole, truth = Remade(recipe, tuple(held)), key.kind == "whole", None
        if self._checker:
            truth = Truth(_elements(tensor, whole).clone(), home.make(self.open))
            exact = not self._may_lose or self._max_rel_error is not None
            if exact and not same_bits(truth.packed, truth.decoded):
                raise OffloadError(f"{describe(tensor)} does not follow from what it was made from")
        stash = Stash(tensor, home, whole, truth)
        stash.lossy = any(isinstance(source, Ticket) and source.stash.lossy for source in held)
        self._index.add(key, stash)
        self.tally.kept(DERIVED, kind.nbytes)
        return stash

    def send(self, moves: Moves, choice: Choice, tensor: Tensor, kind: Kind, key: Key) -> Stash:
        """Encode a tensor for its place, on the device or off it. Raises BudgetError without room there."""
        whole, source = key.kind == "whole", None
        if lossy := choice.lane in (self.lossy_names or ()):
            packet = self._encode_lossy(tensor, kind)
        elif choice.lane == "raw":
            elements = _elements(tensor, whole)
            packet = Packet.like("raw", elements).with_(sections={"data": as_bytes(elements)})
            if elements.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                source = tensor.detach()
        elif choice.lane == UPPER:
            upper = upper_halves(_elements(tensor, whole))
            data = as_bytes(upper)
            sections = Sections(("data",), (0,), (data.numel(),), data)
            packet = Packet.like("raw", upper).with_(sections=sections)
        else:
            packet = self._exact_lane(tensor, kind).encode(_elements(tensor, whole))
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
        stash = Stash(tensor, home or self._place(packet, kind), whole, truth)
        stash.widened, stash.lossy = choice.lane == UPPER, lossy
        self._index.add(key, stash)
        self.tally.encoded(kind, packet)
        return stash

    def open(self, packed: Ticket | Kept) -> Tensor:
        """The tensor, as it was saved. Raises OffloadError when it cannot be given back so."""
        if isinstance(packed, Kept):
            return packed.open()
        stash, view = packed.stash, packed.view
        self.tally.add("unpacks")
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
                self.tally.add("checked")
            return view.over(flat) if stash.whole else view.over_elements(flat)

    def _name(self, lane: Lane) -> str:
        """Of a lossy lane, in plans."""
        return f"packed:{getattr(lane, 'bits', 8)}" if self._max_rel_error is None else BOUNDED

    def _encode_lossy(self, tensor: Tensor, kind: Kind) -> Packet:
        plan = self._plans.get(kind, self)
        if plan is self:
            if len(self._plans) >= KINDS:
                self._plans.clear()
            plan = self._plans[kind] = self._plan(tensor, kind)
        if isinstance(plan, GroupPlan):
            return encode_groups(plan, tensor)
        source = without_flags(tensor)
        if self._max_rel_error is None:
            return (self._coarse_heads if tensor.ndim == 4 else self._coarse).encode(source)
        return compress(source, lane=self._coarse, max_rel_error=self._max_rel_error)

    def _plan(self, tensor: Tensor, kind: Kind) -> GroupPlan | None:
        """How all tensors of its kind are encoded; None where that depends on their elements, or they are not
        contiguous."""
        lane = self._coarse_heads if tensor.ndim == 4 else self._coarse
        if type(lane) is not PackedLane or self._max_rel_error is not None:
            return None
        contiguous = tensor.is_contiguous() and not (kind.view.conj or kind.view.neg)
        return lane.plan(tensor) if contiguous else None

    def _encode_late(self, tensor: Tensor, kind: Kind, whole: bool) -> LatePacket | None:
        """The exact packet of a tensor on a GPU, without a wait for its size; None of others."""
        if self._checker or not tensor.is_cuda or not isinstance(self._exact_lane(tensor, kind), ExactLane):
            return None
        return encode_late(_elements(tensor, whole))

    def _send_late(self, late: LatePacket, kind: Kind) -> Home | None:
        self._bundles.close()
        return self.wire.send_late(late, partial(self.tally.encoded, kind))

    def _exact_lane(self, tensor: Tensor, kind: Kind) -> Lane:
        small = tensor.is_cuda and kind.nbytes < EXACT_BYTES and self._exact.name == "exact"
        return RAW if small else self._exact

    def _decode(self, stash: Stash) -> Tensor:
        """The elements of a stash, flat, at the start of a storage of their own."""
        self.tally.add("decodes")
        home = stash.home
        if isinstance(home, Remade):
            return home.make(self.open)
        if isinstance(home, Parcel) and stash.users.held == 1 and (given := home.give()) is not None:
            return given.float() if stash.widened else given
        with stash.home.use() as packet:
            stash.wire = packet.nbytes
            if stash.widened:
                return packet.sections["data"].view(packet.dtype).float()
            flat = flatten(decode_packet(packet, self._basis))
        return flat.clone() if flat.storage_offset() else flat.detach()  # the only tensor over its storage

    def _share(self, stash: Stash, flat: Tensor) -> None:
        stash.remember(flat)
        self._shared.append(ref(stash))
        if len(self._shared) > SHARED and (oldest := self._shared.popleft()()) is not None:
            oldest.forget()

    def _place(self, packet: Packet, kind: Kind) -> Home:
        """A home for `packet` within the budgets. Raises BudgetError when there is none."""
        on_gpu = packet.device.type == "cuda"
        home = self._bundles.send(packet) if on_gpu else self._place_cpu(packet)
        if home is not None:
            return home
        if self._on_full == "error":
            raise BudgetError(
                f"host budget: {describe(kind.view)} needs {packet.nbytes} bytes, {self.host_budget.held} of "
                f"{self.host_budget.limit} are held; raise host_budget, or set on_full='keep' or 'spill'"
            )
        claim = self.device_budget.claim(packet.nbytes)
        if claim is None:
            held, limit = self.device_budget.held, self.device_budget.limit
            raise BudgetError(
                f"host and device budgets: {describe(kind.view)} needs {packet.nbytes} bytes, "
                f"{held} of {limit} are held on the device; raise gpu_budget or host_budget"
            )
        self.tally.add("over_budget", packet.nbytes)
        if on_gpu:
            return DeviceCopy(packet, current_stream(packet.device), claim)
        return Resident(packet, claim)

    def _place_cpu(self, packet: Packet) -> Home | None:
        claim = self.host_budget.claim(packet.nbytes)
        if claim is not None:
            return Resident(packet, claim)
        host = PacketLayout(packet)
        room = self.tiers.spill(host.nbytes)
        return None if room is None else Spilled(packet, host, room)

    def _truth(self, tensor: Tensor, packet: Packet, whole: bool, widened: bool = False) -> Truth:
        decoded = flatten(decode_packet(packet, self._basis))
        decoded = decoded.float() if widened else decoded
        return Truth.of(tensor, _elements(tensor, whole).clone(), decoded, packet.lane, self._max_rel_error)


def weight(tensor: Tensor, kind: Kind, key: Key) -> int:
    """Bytes that are stored for `tensor` under `key`."""
    return tensor.untyped_storage().nbytes() if key.kind == "whole" else kind.nbytes


def _elements(tensor: Tensor, whole: bool) -> Tensor:
    """Flat: the storage of `tensor`, or its own distinct elements in memory order."""
    plain = without_flags(tensor)
    return whole_storage(plain) if whole else flatten(plain)
