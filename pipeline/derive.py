"""Saved tensors that need not be stored, since others that are saved make them again.

Note: [Derived tensors]
The output of an operation that works element by element follows from its inputs, and where backward of that
operation needs these, they are saved too: the product of gate and value in a feed-forward layer, the
activation of the gate, a norm before and after its weight. Such a tensor is made again from what autograd
keeps in place of the inputs, by the same operation, so with the same bits. What the graph does not tell is
whether the program changed something in between without autograd (an intermediate, say): a trip that learns
compares, and only what it found equal, and not all zero, is derived later. A program that changes such
intermediates in some steps and not in others is beyond this.

A float32 tensor that was cast from bfloat16, as norms do, has nothing in its lower halves: the upper ones are
all that has to be stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from sidelane.codec.packet import Packet, flatten
from sidelane.errors import OffloadError
from sidelane.kernels.multiply import is_factor, multiply
from sidelane.pipeline.extent import distinct_bytes, geometry, without_flags
from sidelane.pipeline.stash import Kept

Place = tuple[int, int]  # address, and bytes of the storage


def place_of(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.untyped_storage().nbytes()


class Recipe(NamedTuple):
    """How a tensor that spans its storage was made.

    Attributes:
        make: the operations, without autograd.
        sources: what autograd keeps in place of their arguments.
        cast: the result is cast to `dtype`.
        shape, stride, dtype: of the result.
        moved: bytes that the operations read and write, as a rule of thumb.
        places: of the sources that stay, where they lie and how many bytes their storage has; None of others.
    """

    make: Callable[..., Tensor]
    sources: tuple[Any, ...]
    cast: bool
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    moved: int
    places: tuple[Place | None, ...]

    def run(self, sources: Sequence[Tensor]) -> Tensor:
        """The elements, flat in the order of memory, at the start of a storage of their own.

        Raises OffloadError when the memory of a source that stays is not what it was.
        """
        for source, place in zip(sources, self.places, strict=True):
            if place is not None and place != place_of(source):
                raise OffloadError(
                    "a weight that saved tensors are made again from was moved between forward and backward: "
                    "leave it where it is, or use another lane than 'auto'"
                )
        floats = self.make is torch.mul and torch.result_type(*sources).is_floating_point
        if self.make is torch.mul and (product := multiply(sources[0], sources[1], self.dtype)) is not None:
            made = product
        elif floats and self.cast and self.dtype.is_floating_point:
            # In one kernel, which rounds as two do.
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=sources[0].device)
            torch.mul(*sources, out=made)
        else:
            made = self.make(*sources).to(self.dtype)
        if made.shape != self.shape or made.stride() != self.stride:
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=made.device).copy_(
                made
            )
        return flatten(made).detach()  # the only tensor over its storage


class Remade:
    """The home of a tensor that is derived.

    Args:
        sources: in place of those of the recipe, to be opened.
    """

    def __init__(self, recipe: Recipe, sources: tuple[Any, ...]) -> None:
        self._recipe = recipe
        self._sources = sources

    def make(self, open_source: Callable[[Any], Tensor]) -> Tensor:
        """The elements, flat."""
        return self._recipe.run([open_source(source) for source in self._sources])

    def use(self) -> AbstractContextManager[Packet]:
        raise OffloadError("a tensor that is derived has no packet")


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How a tensor that is being saved was made from others that are; None where that is not known."""
    made = tensor if tensor._base is None else tensor._base
    node = made.grad_fn
    # A version counts changes since the operation.
    if node is None or made._version or distinct_bytes(tensor) != made.nbytes:
        return None
    if made.nbytes != made.untyped_storage().nbytes() or made.is_conj() or made.is_neg():
        return None
    cast = node.name() == "ToCopyBackward0"
    inner = node.next_functions[0][0] if cast else node
    names, operation = ((), None) if inner is None else _OPERATIONS.get(inner.name(), ((), None))
    if inner is None or operation is None:
        return None
    sources = tuple(_packed(inner, name) for name in names)
    if any(source is None for source in sources):
        return None
    if inner.name() == "GeluBackward0":
        operation = partial(operation, approximate=inner._saved_approximate)  # type: ignore[attr-defined]
    kept = [source.open() for source in sources if isinstance(source, Kept)]
    by_factor = operation is torch.mul and made.is_cuda and any(is_factor(t, made.shape) for t in kept)
    parts = len(names) + 1
    if by_factor:
        parts = _FACTOR
    elif cast or kept:
        parts = _CAST if cast else _BROADCAST
    places = tuple(place_of(source.open()) if isinstance(source, Kept) else None for source in sources)
    moved = parts * made.nbytes
    return Recipe(operation, sources, cast, made.shape, made.stride(), made.dtype, moved, places)


def stays_usable(kept: Kept, device: torch.device) -> bool:
    """What is kept can be a source for a tensor on `device`. Processes that train together may free weights
    between forward and backward, and bring them back for their own operations alone."""
    try:
        tensor = kept.open()
    except OffloadError:
        return False
    end = (tensor.storage_offset() + geometry(tensor).span) * tensor.itemsize
    there = tensor.untyped_storage().nbytes() >= end
    return there and tensor.device == device and not (kept.weight and is_distributed())


def is_widened(tensor: Tensor) -> bool:
    """A tensor that is being saved was cast from bfloat16 to float32."""
    made = tensor if tensor._base is None else tensor._base
    node = made.grad_fn
    if made._version or node is None or node.name() != "ToCopyBackward0":
        return False
    if not made.dtype == tensor.dtype == torch.float32 or made.nbytes != made.untyped_storage().nbytes():
        return False
    parent, output = node.next_functions[0]
    return parent is not None and parent._input_metadata[output].dtype == torch.bfloat16


def has_lower_halves(tensor: Tensor) -> Tensor:
    """Whether an element of float32 `tensor` has a bit set that bfloat16 has not; bool, on its device."""
    return (without_flags(tensor).view(torch.int32) & 0xFFFF).any()


def upper_halves(flat: Tensor) -> Tensor:
    """Those of float32 [N], as bfloat16 [N]."""
    upper = flat.view(torch.bfloat16)[1 if sys.byteorder == "little" else 0 :: 2]
    return upper.clone(memory_format=torch.contiguous_format)  # of a single element too


# Times the bytes of its result, what an operation could move on an H200 in its time: one that casts, one of
# PyTorch that broadcasts what stays in any case, and a product with a factor, cast from twice as many bytes.
_CAST, _BROADCAST, _FACTOR = 8, 5, 3
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OPERATIONS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]] = {
    "MulBackward0": (("self", "other"), torch.mul),
    "SiluBackward0": (("self",), F.silu),
    "GeluBackward0": (("self",), F.gelu),
}


def equal_in_memory(made: Tensor, tensor: Tensor) -> Tensor:
    """Whether `made`, flat, has the elements of `tensor` in the order of memory, bit for bit.

    Returns a bool tensor on their device; the host does not wait for it.
    """
    parts = [flatten(without_flags(part)).view(torch.uint8) for part in (made, tensor)]
    width = next(n for n in (8, 4, 2, 1) if all(part.numel() % n == 0 for part in parts))
    a, b = (part.view(_WHOLE[width]) for part in parts)
    return (a == b).all()


def _packed(node: Node, name: str) -> Any:
    """What autograd keeps in place of a saved tensor; None where there is none, or none that is ours."""
    saved = getattr(node, f"_raw_saved_{name}", None)
    return getattr(saved, "data", None)


def is_distributed() -> bool:
    """Processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1
