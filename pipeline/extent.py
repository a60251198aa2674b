"""Which elements of a storage a saved tensor covers, and how it is laid over the decoded ones again."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sidelane.codec.packet import compact

# A view that covers this share of its storage stands for all of it: the q, k and v of one fused projection
# are a third each, are all saved, and so share one packet. A smaller view is stored alone, as its own
# elements.
WHOLE_SHARE = 3
KINDS = 4096  # that are known at a time

Pairs = tuple[tuple[int, int], ...]


def element_set(size: tuple[int, ...], stride: tuple[int, ...]) -> Pairs | None:
    """The distinct elements of a view as merged (stride, size) pairs, innermost first: equal for a view, its
    transposes, its reshapes and its expansions. None when two indices share an element otherwise than by
    stride 0.
    """
    merged: list[tuple[int, int]] = []
    reach = 0  # furthest element of the inner dimensions
    for step, n in sorted((step, n) for n, step in zip(size, stride, strict=True) if n > 1 and step > 0):
        if step <= reach:
            return None
        if merged and merged[-1][0] * merged[-1][1] == step:
            merged[-1] = (merged[-1][0], merged[-1][1] * n)
        else:
            merged.append((step, n))
        reach += step * (n - 1)
    return tuple(merged)


class Geometry(NamedTuple):
    """What sizes and strides imply; made once for each of them.

    Attributes:
        size, stride: in elements.
        compact: `stride` with the gaps closed.
        pairs: see `element_set`.
        numel: distinct elements, those of expanded dimensions counted once.
        span: elements from the first to the last, both included.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    compact: tuple[int, ...]
    pairs: Pairs | None
    numel: int
    span: int


@lru_cache(KINDS)
def _geometry(size: tuple[int, ...], stride: tuple[int, ...]) -> Geometry:
    dims = list(zip(size, stride, strict=True))
    return Geometry(
        tuple(size),
        stride,
        compact(size, stride),
        element_set(size, stride),
        prod(n for n, step in dims if step or n < 2),
        1 + sum((n - 1) * step for n, step in dims),
    )


def geometry(tensor: Tensor) -> Geometry:
    return _geometry(tensor.shape, tensor.stride())


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of `tensor`, those of expanded dimensions counted once."""
    return geometry(tensor).numel * tensor.dtype.itemsize


class View(NamedTuple):
    """A strided tensor without its memory; `offset` is in elements of `dtype`."""

    dtype: torch.dtype
    geometry: Geometry
    offset: int
    conj: bool
    neg: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct elements."""
        return self.geometry.numel * self.dtype.itemsize

    def over(self, flat: Tensor) -> Tensor:
        """The saved tensor over a copy of its whole storage, flat: same size, stride, offset and bits."""
        return self._flags(self._lay(flat, self.offset, self.geometry.stride))

    def over_elements(self, flat: Tensor) -> Tensor:
        """The saved tensor from its elements alone, flat in memory order. Same size and stride; the offset is
        0. Gaps between the elements are allocated again, and their content is undefined."""
        size, stride, dense_stride = self.geometry[:3]
        dense = self._lay(flat, 0, dense_stride)
        if dense_stride == stride:
            return self._flags(dense)
        out = torch.empty(self.geometry.span, dtype=self.dtype, device=flat.device)
        out = out.as_strided(size, stride)
        target, source = out, dense
        for d, step in enumerate(stride):
            if step == 0:  # one element stands for all
                target, source = target.narrow(d, 0, 1), source.narrow(d, 0, 1)
        target.copy_(source)
        return self._flags(out)

    def _lay(self, flat: Tensor, offset: int, stride: tuple[int, ...]) -> Tensor:
        """Shares memory and version counter with `flat`, which starts at the start of its storage."""
        if flat.dtype != self.dtype:
            octets = flat.view(torch.uint8)
            flat = octets[: len(octets) - len(octets) % self.dtype.itemsize].view(self.dtype)
        return flat.as_strided(self.geometry.size, stride, offset).detach()

    def _flags(self, tensor: Tensor) -> Tensor:
        if self.conj:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self.neg else tensor


def without_flags(tensor: Tensor) -> Tensor:
    """`tensor`, detached, as its memory holds it: conjugate and negative bits taken off."""
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def whole_storage(tensor: Tensor) -> Tensor:
    """The storage of `tensor` as a flat tensor, of its dtype where that divides the bytes."""
    storage = tensor.untyped_storage()
    dtype = tensor.dtype if storage.nbytes() % tensor.dtype.itemsize == 0 else torch.uint8
    numel = storage.nbytes() // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, (numel,), (1,))


def describe(tensor: Tensor | View) -> str:
    shape = tensor.geometry.size if isinstance(tensor, View) else tuple(tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(shape)}"
