"""Checker mode: what was packed is kept beside its packet, and compared with what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from sidelane.errors import OffloadError
from sidelane.pipeline.compress import relative_error
from sidelane.pipeline.extent import View, describe


@dataclass(frozen=True)
class Truth:
    """What a stash is compared with: the flat elements that were packed, and what they decode to."""

    packed: Tensor
    decoded: Tensor

    @classmethod
    def of(cls, tensor: Tensor, packed: Tensor, decoded: Tensor, lane: str, bound: float | None) -> Truth:
        """Raises OffloadError when `lane`, which packed `tensor`, lost a bit that it must not lose, or erred
        by more than `bound`, None for no bound."""
        if lane in ("raw", "exact"):
            bound, error = 0.0, 0.0 if same_bits(packed, decoded) else inf
        else:
            error = relative_error(packed, decoded)
        if bound is not None and error > bound:
            raise OffloadError(
                f"{describe(tensor)} has error {error:.3g} in lane '{lane}', above {bound:.3g}"
            )
        return cls(packed, decoded)

    def verify(self, flat: Tensor, view: View) -> None:
        """Raise OffloadError unless `flat` is what was decoded at first."""
        if not same_bits(flat, self.decoded):
            raise OffloadError(
                f"{describe(view)} differs from what was packed: a transfer failed, or its node overwrote it"
            )

    def match(self, elements: Tensor, tensor: Tensor) -> None:
        """Raise OffloadError unless `elements` of `tensor`, which is saved again, are what was packed."""
        if not same_bits(elements, self.packed):
            raise OffloadError(
                f"{describe(tensor)} changed since it was first saved, and its version counter did not: "
                "clone it before the change"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
