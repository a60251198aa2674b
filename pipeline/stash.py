"""Bookkeeping of an offload context: stashes, the index that finds them, and the tickets that own them. Needs
no GPU.

Note: [Ownership]
Autograd holds tickets, a ticket holds its stash, a stash holds memory and the claims on it. Nothing else
holds any of them, so bytes return when the last ticket dies: after backward, or when a graph is dropped, or
when a step fails. Every other reference (the index, the prefetch order) is weak.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sidelane.codec.packet import Packet
from sidelane.errors import OffloadError
from sidelane.pipeline.budget import Claim, Holders
from sidelane.pipeline.checker import Truth
from sidelane.pipeline.extent import Geometry, Pairs, View, describe, geometry
from sidelane.pipeline.streams import current_stream


class Home(Protocol):
    """Where the packet of a stash lives."""

    def use(self) -> AbstractContextManager[Packet]:
        """The packet on its tensor's device; valid inside, for work on the current stream."""
        ...


class Resident:
    """A packet in host memory."""

    def __init__(self, packet: Packet, claim: Claim) -> None:
        self._packet = packet
        self._claim = claim

    @contextmanager
    def use(self) -> Iterator[Packet]:
        yield self._packet


class Stash:
    """One encoded range of one storage version.

    Attributes:
        home: where the packet is.
        device: of the tensors.
        whole: the packet is of the whole storage; otherwise of the elements of one view.
        truth: what a decode must give, flat (checker mode), or None.
    """

    def __init__(self, source: Tensor, home: Home, whole: bool, truth: Truth | None) -> None:
        self.home = home
        self.whole = whole
        self.truth = truth
        self.device = source.device
        # Its address is not reused while this lives.
        self._source = StorageWeakRef(source.untyped_storage())  # type: ignore[no-untyped-call]
        self.widened = False  # its packet has the upper halves of float32
        self.lossy = False  # its packet may have lost bits, or those that it is derived from
        self.users = Holders()  # tickets
        self.wire = 0  # bytes of the packet, once it was decoded
        self._decoded: _Decoded | None = None

    def alive(self) -> Tensor | None:
        """What `remember` got, if it is as it was and the node that runs now may share it.

        Views that one node unpacks share their memory. Nodes that follow each other share it too, when nobody
        else holds it by then and no version counter moved: a node may hand its memory out as a gradient,
        which the program then overwrites.
        """
        decoded, now = self._decoded, current_moment(self.device)
        if decoded is None or now is None:
            return None
        if decoded.moment == now:
            return decoded.reopen() if decoded.flat is None else decoded.flat
        flat = decoded.flat
        self._decoded = None
        if (
            flat is None
            or (decoded.moment.task, decoded.moment.stream) != (now.task, now.stream)
            or flat._version != decoded.version
            or _holders(flat) > 1
        ):
            return None
        self.remember(flat)
        return flat

    def remember(self, flat: Tensor) -> None:
        """Let later unpacks share decoded elements: of this node while it holds them, and of other nodes,
        which need them to be held here, until `forget`."""
        moment = current_moment(self.device)
        keep = flat if self.users.held > 1 else None
        self._decoded = None if moment is None else _Decoded(flat, moment, keep)

    def forget(self) -> None:
        """Hold no decoded elements any longer."""
        if self._decoded is not None:
            self._decoded.flat = None


class _Decoded:
    """Decoded elements, held or not, and for whom they were decoded."""

    def __init__(self, flat: Tensor, moment: Moment, keep: Tensor | None) -> None:
        self.flat = keep
        self.moment = moment
        self.version = flat._version
        self._nbytes = flat.nbytes  # its storage may have more
        self._storage = StorageWeakRef(flat.untyped_storage())  # type: ignore[no-untyped-call]

    def reopen(self) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        octets = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return octets.set_(storage, 0, (self._nbytes,), (1,))


def _holders(flat: Tensor) -> int:
    """Tensors over the storage of `flat`, itself counted."""
    storage = flat.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # less the object that asks


class Ticket:
    """What autograd keeps in place of an offloaded tensor."""

    __slots__ = ("_claim", "_user", "stash", "view")

    def __init__(self, stash: Stash, view: View, claim: object) -> None:
        self.stash = stash
        self.view = view
        self._claim = claim
        self._user = stash.users.claim()


class Kept:
    """What autograd keeps in place of a tensor that stays: the tensor, and the version check that hooks turn
    off.

    The tensor is detached, since a saved output that holds its own graph would be a reference cycle. A leaf
    has no graph and is held as it is: wrappers that swap the data of a parameter between forward and backward
    rely on it.
    """

    __slots__ = ("_tensor", "_version", "weight")

    def __init__(self, tensor: Tensor, weight: bool = False) -> None:
        self.weight = weight  # or a view of one
        self._tensor = tensor if tensor.is_leaf else tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version

    def open(self) -> Tensor:
        """The tensor. Raises OffloadError when it was changed in place since it was saved."""
        tensor = self._tensor
        if self._version is not None and tensor._version != self._version:
            raise OffloadError(
                f"a tensor needed for backward was modified in place: {describe(tensor)} is at version "
                f"{tensor._version}, it was saved at {self._version}; clone it before the change"
            )
        return tensor


class Key(NamedTuple):
    """What a stash was made from.

    `data` is from `data_key`. `kind` is "whole" for a whole storage, else "elements" or "lossy" for the
    elements of one view, given by dtype, offset and `element_set`.
    """

    data: Hashable
    kind: str
    dtype: torch.dtype | None = None
    offset: int = 0
    pairs: Pairs | None = None


class _Entry(ref[Stash]):
    """The index's side of a stash."""

    __slots__ = ("key",)
    key: Key


class Index:
    """Live stashes by what they were made from. Thread-safe. See Note: [Interrupts] in `pool`."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._dead: deque[_Entry] = deque()
        self._lock = RLock()

    def __len__(self) -> int:
        with self._lock:
            return sum(entry() is not None for entry in self._entries.values())

    def find(self, key: Key) -> Stash | None:
        """The stash of `key`, or of the whole storage of its data."""
        stash = self._of(key)
        return stash if stash is not None or key.kind == "whole" else self._of(Key(key.data, "whole"))

    def add(self, key: Key, stash: Stash) -> None:
        entry = _Entry(stash, self._dead.append)
        entry.key = key
        with self._lock:
            while self._dead:
                dead = self._dead.popleft()
                known = getattr(dead, "key", None)  # none where an interrupt came before it
                if known is not None and self._entries.get(known) is dead:
                    del self._entries[known]
            self._entries[key] = entry

    def _of(self, key: Key) -> Stash | None:
        entry = self._entries.get(key)
        return None if entry is None else entry()


def data_key(tensor: Tensor, shape: Geometry | None = None) -> Hashable:
    """Identity and version of the memory behind `tensor`; `shape`: its geometry, where that is known.

    The address of a storage object names it for as long as a stash of it lives, since the stash holds a weak
    reference that keeps the address from being reused. Views count versions with the tensor they are views
    of; tensors that merely lie in one storage (`torch.unsafe_chunk`, which GRU cells use) count each their
    own, so the bytes that the counting tensor spans are part of the key. Writes that the counter does not see
    (through `.data`, or by raw kernels) are not told apart; checker mode finds them.
    """
    storage = tensor.untyped_storage()
    owner = tensor._base
    if owner is None:
        owner, span = tensor, (shape or geometry(tensor)).span
    else:
        span = geometry(owner).span
    first, itemsize = owner.storage_offset(), owner.dtype.itemsize
    counted = first * itemsize, (first + span) * itemsize
    return storage._cdata, storage.data_ptr(), storage.nbytes(), tensor._version, counted


class Moment(NamedTuple):
    """A node of a running backward pass: of which pass, which node, on which stream."""

    task: int
    node: int
    sequence: int
    stream: torch.cuda.Stream | None


def current_moment(device: torch.device) -> Moment | None:
    """The node that runs on this thread, or None outside of a backward pass."""
    task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
    if task == -1 or node is None:
        return None
    stream = current_stream(device) if device.type == "cuda" else None
    return Moment(task, id(node), node._sequence_nr(), stream)
