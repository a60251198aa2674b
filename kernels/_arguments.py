"""Checks of the arguments of surface.py. Every one raises LaneError and says what to pass instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.layout import SurfaceLayout

if TYPE_CHECKING:
    from sidelane.kernels._restore import Weights

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_SIZE = 2**30  # of one dimension: kernels index within a dimension in int32


def check_projection(
    x: Tensor,
    components: Tensor | None,
    offset: Tensor,
    inv_scale: Tensor,
    levels: Tensor,
    sms: int | None,
) -> tuple[int, int]:
    """T and K of a projection whose arguments fit each other."""
    _check_matrix("x", x, x.device, FLOATS)
    tokens, channels = x.shape
    if components is not None:
        _check_matrix("components", components, x.device, FLOATS)
        depth, channels = components.shape
        if depth != x.shape[1]:
            raise LaneError(f"x has {x.shape[1]} features: components [{depth}, {channels}] need {depth}")
    for name, v in (("offset", offset), ("inv_scale", inv_scale), ("levels", levels)):
        _check_vector(name, v, channels, x.device)
    _check_sms(sms)
    return tokens, channels


def check_restoration(
    channels: int,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    levels: Tensor | None,
    sms: int | None,
) -> None:
    depth = channels
    if components is not None:
        _check_matrix("components", components, device, FLOATS)
        depth = components.shape[0]
        if components.shape[1] != channels:
            raise LaneError(
                f"components have shape {list(components.shape)}: {channels} channels need [D, {channels}]"
            )
    _check_vector("scale", scale, channels, device)
    _check_vector("bias", bias, depth, device)
    if levels is not None:
        _check_vector("levels", levels, channels, device)
    if dtype not in FLOATS:
        raise LaneError(f"cannot restore {dtype}: use one of {', '.join(map(str, FLOATS))}")
    _check_sms(sms)


def check_weights(
    weights: Weights, components: Tensor | None, levels: Tensor | None, parts: int, middle: int
) -> None:
    if components is None or levels is not None:
        raise LaneError("weights need components, and codes without levels: leave weights out")
    found = (weights.scaled.shape[1], weights.unit.numel(), weights.parts, weights.middle)
    depth, channels = components.shape
    if found != (channels, depth, parts, middle) or weights.scaled.device != components.device:
        raise LaneError(
            "weights are of other components, format, dtype or device: make them with weigh_components"
        )


def check_codes(codes: Tensor) -> tuple[int, int]:
    """T and K of plain codes."""
    _check_matrix("codes", codes, codes.device, (torch.int16,))
    if not codes.is_contiguous():
        raise LaneError("codes are not contiguous: pass codes.contiguous()")
    tokens, channels = codes.shape
    return tokens, channels


def check_surface(
    surface: Tensor, layout: SurfaceLayout, tokens: int, channels: int, device: torch.device
) -> None:
    if (layout.tokens, layout.channels) != (tokens, channels):
        planned = [layout.tokens, layout.channels]
        raise LaneError(f"the layout is for codes {planned}: plan one for {[tokens, channels]}")
    if surface.dtype != torch.uint8 or surface.shape != layout.shape or not surface.is_contiguous():
        want = list(layout.shape)
        raise LaneError(
            f"surface is {surface.dtype} {list(surface.shape)}: pass contiguous torch.uint8 {want}"
        )
    if surface.data_ptr() % layout.format.itemsize:
        raise LaneError(f"surface starts at an odd address: {layout.format.name} samples have two bytes")
    if surface.device != device:
        raise LaneError(f"surface is on {surface.device}: move it to {device}")
    if max(layout.shape) >= MAX_SIZE or max(layout.tokens, layout.channels) >= MAX_SIZE:
        raise LaneError(
            f"surface {list(layout.shape)}: rows, pitch, tokens and channels must stay below {MAX_SIZE}"
        )


def _check_matrix(name: str, m: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    if m.ndim != 2 or not all(0 < n < MAX_SIZE for n in m.shape):
        raise LaneError(
            f"{name} has shape {list(m.shape)}: pass a matrix with sides from 1 to {MAX_SIZE - 1}"
        )
    if m.dtype not in dtypes:
        raise LaneError(f"{name} has dtype {m.dtype}: convert it to {' or '.join(map(str, dtypes))}")
    if m.device != device:
        raise LaneError(f"{name} is on {m.device}: move it to {device}")


def _check_vector(name: str, v: Tensor, size: int, device: torch.device) -> None:
    if v.shape != (size,) or v.dtype != torch.float32 or not v.is_contiguous():
        raise LaneError(f"{name} is {v.dtype} {list(v.shape)}: pass contiguous torch.float32 [{size}]")
    if v.device != device:
        raise LaneError(f"{name} is on {v.device}: move it to {device}")


def _check_sms(sms: int | None) -> None:
    if sms is not None and (not isinstance(sms, int) or sms < 1):
        raise LaneError(f"sms={sms!r} is neither None nor a number of multiprocessors above 0")
