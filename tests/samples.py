"""Tensors and a basis that several tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from sidelane.pipeline.basis import Basis


def bits_of(tensor: Tensor) -> Tensor:
    """Every bit of the elements of `tensor` in index order, uint8."""
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def hadamard_basis(dim: int = 4, widths: tuple[int, ...] = (5, 4, 3, 0)) -> Basis:
    """A basis of `dim` = 4, 16, ... Walsh-Hadamard columns: all products exact in float32."""
    columns = torch.ones(1, 1)
    while columns.shape[0] < dim:
        columns = torch.cat((torch.cat((columns, columns), 1), torch.cat((columns, -columns), 1)))
    rank = len(widths)
    return Basis(
        mean=torch.arange(dim, dtype=torch.float32) / 4,
        components=(columns[:, :rank] / dim**0.5).contiguous(),
        std=torch.full((rank,), 2.0),
        peak=8 * 0.5 ** torch.arange(rank),
        spectrum=torch.ones(dim),
        widths=widths,
        heldout_error=0.25,
        samples=64,
    )
