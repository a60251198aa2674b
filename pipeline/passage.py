"""Blocks of which a plan keeps all that they save: hooks around their forward pass that do no more than that
takes, so that a budget with room costs the host little.

What such a block saves stays in any case. Only what the budget counts depends on which tensor is which, so a
tensor that has the bytes and the dtype of the one that came at its place before is taken for that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sidelane.pipeline.budget import Claim
from sidelane.pipeline.extent import distinct_bytes
from sidelane.pipeline.lesson import Pack
from sidelane.pipeline.moves import Moves
from sidelane.pipeline.policy import plain_kind, why_kept
from sidelane.pipeline.recorder import Trip
from sidelane.pipeline.stash import Kept, data_key

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class Passed(Kept):
    """A tensor that stays, with its share of the device budget, and which one of which trip it is."""

    __slots__ = ("_claim", "number", "trip")

    def __init__(self, tensor: Tensor, claim: Claim, trip: Trip, number: int) -> None:
        super().__init__(tensor)
        self._claim = claim
        self.trip = trip
        self.number = number


class Passage:
    """The hooks of one call of such a block, on top of those of the context, which take what is not as the
    script says. Reports do not count what is kept here.

    Args:
        min_bytes: smaller tensors are not in the script.
        used: called with a `Passed` that is unpacked.
    """

    def __init__(self, trip: Trip, moves: Moves, min_bytes: int, used: Callable[[Passed], None]) -> None:
        self._trip = trip
        self._moves = moves
        self._min_bytes = min_bytes
        self._used = used
        self._known = trip.packs
        self._packs: list[Pack] = []
        self._claims: dict[int, tuple[int, Claim | None]] = {}  # by number, with its address, in this call
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._pack_below, self._unpack_below = hooks

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        above: list[Hooks] = []
        try:
            try:
                hooks.__enter__()
                result = forward(*args, **kwargs)
            finally:
                _remove(hooks.pack_hook, above)
        except BaseException:
            _remove(hooks.pack_hook, above)  # an interrupt may have come while they were removed
            raise
        finally:
            self._claims.clear()  # the tensors hold them
        if self._packs != self._known:
            self._trip.packs = self._packs
        return result

    def _pack(self, tensor: Tensor) -> Any:
        pack = self._which(tensor)
        self._packs.append(pack)
        call = pack.call
        if call is None:
            return Kept(tensor) if pack.kept else self._pack_below(tensor)
        address, claim = self._claims.get(call.number) or self._claim(call.number, tensor)
        if claim is None or address != tensor.untyped_storage().data_ptr():  # not one tensor saved twice
            return self._pack_below(tensor)
        self._trip.at += 1
        return Passed(tensor, claim, self._trip, call.number)

    def _which(self, tensor: Tensor) -> Pack:
        """What comes at this place of the block."""
        at, dtype = len(self._packs), tensor.dtype
        nbytes = (
            tensor.nbytes if tensor.layout == torch.strided else 0
        )  # others have none, or are kept anyway
        if at < len(self._known):
            pack = self._known[at]
            if pack.nbytes == nbytes and pack.dtype is dtype:
                return pack
            self._known = []
        if why_kept(tensor, self._min_bytes, plain_kind(tensor)) is not None:
            return Pack(nbytes, dtype, True, None)
        call = self._trip.expected()
        if call is None or call.dtype != dtype:
            return Pack(nbytes, dtype, False, None)
        # A view may stand for its storage.
        sizes = nbytes, distinct_bytes(tensor), tensor.untyped_storage().nbytes()
        return Pack(nbytes, dtype, False, call if call.nbytes in sizes else None)

    def _claim(self, number: int, tensor: Tensor) -> tuple[int, Claim | None]:
        entry = self._trip.entry(number)
        # What other blocks save too is counted by its memory.
        claim = self._moves.claim(data_key(tensor) if entry.block < 0 else None, entry.weight)
        found = tensor.untyped_storage().data_ptr(), claim
        if claim is not None:
            self._claims[number] = found
        return found

    def _unpack(self, packed: Any) -> Tensor:
        if type(packed) is Passed:
            self._used(packed)
        tensor: Tensor = packed.open() if isinstance(packed, Kept) else self._unpack_below(packed)
        return tensor


def _remove(pack: Callable[[Tensor], Any], above: list[Hooks]) -> None:
    """Remove the hooks that `pack` belongs to, if they are installed. Those that a block left on top of them
    stay.

    May be called again after an interrupt, with the same list, empty at first: hooks that are out for now.
    """
    autograd = torch._C._autograd
    top = autograd._top_saved_tensors_default_hooks(True)
    if above and top is not None and top[0] is above[-1][0]:  # interrupted between the lines of a loop below
        autograd._pop_saved_tensors_default_hooks()
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None and top[0] is not pack:
        above.append(top)
        autograd._pop_saved_tensors_default_hooks()
    if top is not None:
        autograd._pop_saved_tensors_default_hooks()
    while above:
        autograd._push_saved_tensors_default_hooks(*above[-1])
        above.pop()
