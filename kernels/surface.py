"""Tensors to codes in a video surface and back. The kernels are in _project.py and _restore.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sidelane.kernels._arguments import MAX_SIZE as MAX_SIZE
from sidelane.kernels._arguments import (
    check_codes,
    check_projection,
    check_restoration,
    check_surface,
    check_weights,
)
from sidelane.kernels._launch import use_triton
from sidelane.kernels._project import project
from sidelane.kernels._restore import Weights as Weights
from sidelane.kernels._restore import restore, weigh
from sidelane.kernels._surface import Geometry
from sidelane.kernels.reference import (
    MAX_CODE_BITS,
    dequantize_project_ref,
    project_quantize_pack_ref,
    project_quantize_ref,
    unpack_dequantize_project_ref,
)
from sidelane.layout import CHANNEL_TILES, TOKEN_ROWS, SurfaceFormat, SurfaceLayout

_PLAIN = {"CHANNEL_LINES": False, "TILES": False, "SPLIT": False, "SHIFT": 0}


def project_quantize_pack(
    x: Tensor,
    components: Tensor | None,
    offset: Tensor,
    inv_scale: Tensor,
    levels: Tensor,
    surface: Tensor,
    layout: SurfaceLayout,
    *,
    sms: int | None = None,
) -> Tensor:
    """Project, quantize and write the codes into a video surface.

    code = clamp(floor((x @ components - offset) * inv_scale + 0.5), 0, levels), stored where `layout` says.
    Positions without a code get `layout.fill`; bytes between the samples of a row and the pitch are kept.

    Args:
        x: [T, D] finite floats, any strides.
        components: [D, K] floats, any strides; None for the identity (K = D).
        offset, inv_scale, levels: [K] float32, contiguous; levels whole, at most 2^bits - 1 of the format.
        surface: uint8 [layout.rows, layout.pitch], contiguous.
        sms: multiprocessors to use at most; None for all.

    Returns:
        The number of codes that the clamp changed, int32 [1] on the device of `x`.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    tokens, channels = check_projection(x, components, offset, inv_scale, levels, sms)
    check_surface(surface, layout, tokens, channels, x.device)
    if not use_triton(x):
        return project_quantize_pack_ref(x, components, offset, inv_scale, levels, surface, layout)
    out, g, flags = _samples(surface, layout), Geometry.of(layout), _flags(layout)
    return project(x, components, offset, inv_scale, levels, out, g, layout.fill, flags, sms)


def project_quantize(
    x: Tensor,
    components: Tensor | None,
    offset: Tensor,
    inv_scale: Tensor,
    levels: Tensor,
    *,
    sms: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`project_quantize_pack` into plain codes: returns them, [T, K] int16 contiguous, and the clamp counter.

    Levels are at most 4095.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    tokens, channels = check_projection(x, components, offset, inv_scale, levels, sms)
    if not use_triton(x):
        return project_quantize_ref(x, components, offset, inv_scale, levels)
    codes = torch.empty((tokens, channels), dtype=torch.int16, device=x.device)
    g = Geometry.plain(tokens, channels)
    return codes, project(x, components, offset, inv_scale, levels, codes, g, 0, _PLAIN, sms)


def weigh_components(
    components: Tensor | None, scale: Tensor, bias: Tensor, fmt: SurfaceFormat, dtype: torch.dtype
) -> Weights | None:
    """What `unpack_dequantize_project` makes of its operands for surfaces of `fmt`, made once for many calls.

    Args:
        components: [D, K] floats, any strides, or None. scale: [K], bias: [D], float32, contiguous.
        fmt: of the surfaces, whose codes fill it. dtype: of the results.

    Returns:
        Its `weights`; None where it makes nothing of them: without components, or without a GPU.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    check_restoration(scale.numel(), components, scale, bias, dtype, scale.device, None, None)
    if components is None or not use_triton(scale):
        return None
    return weigh(components, scale, bias, _parts(dtype), fmt.fill)


def unpack_dequantize_project(
    surface: Tensor,
    layout: SurfaceLayout,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    *,
    levels: Tensor | None = None,
    weights: Weights | None = None,
    sms: int | None = None,
) -> Tensor:
    """Read the codes of a video surface and restore x = (codes * scale) @ components^T + bias.

    On a GPU the product is one of float16: codes less the middle m of their range, which are exact, and
    components * scale, which are rounded to 11 bits for float16 and bfloat16 results, to 22 for others. What
    that adds to the error of x[d] is at most 2^-11 (2^-22) * sum over k of |(code - m) * scale * component|.

    Args:
        surface: uint8 [layout.rows, layout.pitch], contiguous, from `project_quantize_pack` or a decoder.
        components: [D, K] floats, any strides; None for the identity (D = K).
        scale: [K] float32, contiguous.
        bias: [D] float32, contiguous: the mean and the projected offset.
        dtype: float dtype of the result.
        levels: [K] float32, contiguous: the largest codes, where they are smaller than those of the format;
            the error above is smaller with them.
        weights: of `weigh_components` for components, scale, bias, format and dtype, without `levels`.
        sms: multiprocessors to use at most; None for all.

    Returns:
        [T, D] of `dtype`, contiguous.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    check_surface(surface, layout, layout.tokens, layout.channels, surface.device)
    check_restoration(layout.channels, components, scale, bias, dtype, surface.device, levels, sms)
    parts = _parts(dtype)
    if weights is not None:
        check_weights(weights, components, levels, parts, layout.fill)
    if not use_triton(surface):
        return unpack_dequantize_project_ref(surface, layout, components, scale, bias, dtype)
    return restore(
        _samples(surface, layout),
        layout.tokens,
        components,
        scale,
        bias,
        dtype,
        Geometry.of(layout),
        _flags(layout),
        levels,
        layout.fill,
        parts,
        sms,
        weights,
    )


def dequantize_project(
    codes: Tensor,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    *,
    levels: Tensor | None = None,
    sms: int | None = None,
) -> Tensor:
    """`unpack_dequantize_project` from plain codes [T, K] int16, contiguous, 0..4095.

    Without `levels` the weights are always rounded to 22 bits: slower, but right for codes of any width.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    tokens, channels = check_codes(codes)
    check_restoration(channels, components, scale, bias, dtype, codes.device, levels, sms)
    if not use_triton(codes):
        return dequantize_project_ref(codes, components, scale, bias, dtype)
    g = Geometry.plain(tokens, channels)
    parts = 1 if dtype.itemsize == 2 and levels is not None else 2
    middle = 2 ** (MAX_CODE_BITS - 1)
    return restore(
        codes,
        tokens,
        components,
        scale,
        bias,
        dtype,
        g,
        _PLAIN,
        levels,
        middle,
        parts,
        sms,
    )


def _parts(dtype: torch.dtype) -> int:
    """Float16 numbers for each weight."""
    return 1 if dtype.itemsize == 2 else 2


def _flags(layout: SurfaceLayout) -> dict[str, Any]:
    return {
        "CHANNEL_LINES": layout.mapping != TOKEN_ROWS,
        "TILES": layout.mapping == CHANNEL_TILES,
        "SPLIT": layout.format.split,
        "SHIFT": layout.format.shift,
    }


def _samples(surface: Tensor, layout: SurfaceLayout) -> Tensor:
    return surface if layout.format.itemsize == 1 else surface.view(torch.int16)
