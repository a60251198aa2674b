"""Layers with keys and values of their own making, and the rounding within which these can be made again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear

from sidelane.pipeline.recompute import StoredKV

BASE = 10000.0  # of RoPE


def rope(keys: Tensor, positions: Tensor) -> Tensor:
    """[l, ..., heads, dim] turned by [l], pairs half a head apart; in float32, rounded once."""
    half = keys.shape[-1] // 2
    angles = positions.float()[:, None] * BASE ** -(torch.arange(half, device=keys.device) / half)
    angles = angles.view(len(positions), *[1] * (keys.ndim - 2), half)
    a, b = keys.float().split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(keys.dtype)


class Layer:
    """Inputs `x` [tokens, *batch, heads * dim], projections, and what these make of them, rounded once from
    float64, rotated keys twice: `kv` [2, tokens, *batch, kv_heads, dim]."""

    def __init__(
        self,
        tokens: int,
        batch: tuple[int, ...],
        *,
        heads: int,
        kv_heads: int,
        dtype: torch.dtype,
        dim: int = 16,
        bias: bool = False,
        rotated: bool = False,
        first: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        width = heads * dim
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.x = torch.randn(tokens, *batch, width, **options)
        self.keys, self.values = (
            Linear(width, kv_heads * dim, bias=bias, **options).requires_grad_(False) for _ in range(2)
        )
        self.positions = torch.arange(first, first + tokens, device=device)
        self.rotated = rotated
        self.kv = torch.stack([self._exact(linear).to(dtype) for linear in (self.keys, self.values)])
        self.kv = self.kv.view(2, tokens, *batch, kv_heads, dim)
        if rotated:
            self.kv[0] = rope(self.kv[0], self.positions)

    def store(self, **options: Any) -> StoredKV:
        arguments: dict[str, Any] = {"x": self.x, "kv": self.kv, "keys": self.keys, "values": self.values}
        if self.rotated:
            arguments |= {"rotate": rope, "positions": self.positions}
        return StoredKV(**arguments | options)

    def bound(self) -> Tensor:
        """What recomputed and stored values may differ by, like `kv`; see Note: [Not the same bits]."""
        eps = torch.finfo(self.kv.dtype).eps
        found = []
        for linear, part in zip((self.keys, self.values), self.kv, strict=True):
            sums = self.x.double().abs() @ linear.weight.double().abs().t()
            if linear.bias is not None:
                sums += linear.bias.double().abs()
            exact = self._exact(linear).abs()
            found.append((eps * exact + 2 * self.x.shape[-1] * 2**-24 * sums).view(part.shape))
        if self.rotated:  # each is a sum of two, at most as large as both, and rounded again
            a, b = found[0].split(found[0].shape[-1] // 2, dim=-1)
            found[0] = torch.cat((a + b, a + b), dim=-1) + eps * self.kv[0].double().abs()
        return torch.stack(found)

    def _exact(self, linear: Linear) -> Tensor:
        product = self.x.double() @ linear.weight.double().t()
        return product if linear.bias is None else product + linear.bias.double()


def within_rounding(layer: Layer, kv: Tensor, front: int) -> bool:
    """Whether the first `front` tokens are those of the layer within `Layer.bound`."""
    difference = (kv.double() - layer.kv.double()).abs()[:, :front]
    return bool((difference <= layer.bound()[:, :front]).all())
