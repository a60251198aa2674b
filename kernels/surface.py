"""Tensors to codes in a video surface and back, one launch each way. The device code is in _surface.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.kernels._launch import cdiv, use_triton
from sidelane.kernels._surface import Geometry, dequantize_project_kernel, project_quantize_kernel
from sidelane.kernels.reference import (
    dequantize_project_ref,
    project_quantize_pack_ref,
    project_quantize_ref,
    unpack_dequantize_project_ref,
)
from sidelane.layout import CHANNEL_TILES, TOKEN_ROWS, SurfaceLayout

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_SIZE = 2**30  # of one dimension: kernels index within a dimension in int32
FILL_BLOCK = 4096  # positions that one program fills
_PLAIN = {"CHANNEL_LINES": False, "TILES": False, "SPLIT": False, "SHIFT": 0}


def project_quantize_pack(
    x: Tensor,
    components: Tensor | None,
    offset: Tensor,
    inv_scale: Tensor,
    levels: Tensor,
    surface: Tensor,
    layout: SurfaceLayout,
) -> Tensor:
    """Project, quantize and write the codes into a video surface.

    code = clamp(floor((x @ components - offset) * inv_scale + 0.5), 0, levels), stored where `layout` says.
    Positions without a code get `layout.fill`; bytes between the samples of a row and the pitch are kept.

    Args:
        x: [T, D] finite floats, any strides.
        components: [D, K] floats, any strides; None for the identity (K = D).
        offset, inv_scale, levels: [K] float32, contiguous; levels at most 2^bits - 1 of the format.
        surface: uint8 [layout.rows, layout.pitch], contiguous.

    Returns:
        The number of codes that the clamp changed, int32 [1] on the device of `x`.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    tokens, channels = _check_projection(x, components, offset, inv_scale, levels)
    _check_surface(surface, layout, tokens, channels, x.device)
    if not use_triton(x):
        return project_quantize_pack_ref(x, components, offset, inv_scale, levels, surface, layout)
    g, flags = Geometry.of(layout), _flags(layout)
    return _project(
        x, components, offset, inv_scale, levels, _samples(surface, layout), g, layout.fill, flags
    )


def project_quantize(
    x: Tensor, components: Tensor | None, offset: Tensor, inv_scale: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """`project_quantize_pack` into plain codes: returns them, [T, K] int16 contiguous, and the clamp counter.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    tokens, channels = _check_projection(x, components, offset, inv_scale, levels)
    if not use_triton(x):
        return project_quantize_ref(x, components, offset, inv_scale, levels)
    codes = torch.empty((tokens, channels), dtype=torch.int16, device=x.device)
    g = Geometry.plain(tokens, channels)
    return codes, _project(x, components, offset, inv_scale, levels, codes, g, 0, _PLAIN)


def unpack_dequantize_project(
    surface: Tensor,
    layout: SurfaceLayout,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Read the codes of a video surface and restore x = (codes * scale) @ components^T + bias.

    Args:
        surface: uint8 [layout.rows, layout.pitch], contiguous, from `project_quantize_pack` or a decoder.
        components: [D, K] floats, any strides; None for the identity (D = K).
        scale: [K] float32, contiguous.
        bias: [D] float32, contiguous: the mean and the projected offset.
        dtype: float dtype of the result.

    Returns:
        [T, D] of `dtype`, contiguous.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    _check_surface(surface, layout, layout.tokens, layout.channels, surface.device)
    _check_restoration(layout.channels, components, scale, bias, dtype, surface.device)
    if not use_triton(surface):
        return unpack_dequantize_project_ref(surface, layout, components, scale, bias, dtype)
    codes, g = _samples(surface, layout), Geometry.of(layout)
    return _restore(codes, layout.tokens, components, scale, bias, dtype, g, _flags(layout))


def dequantize_project(
    codes: Tensor, components: Tensor | None, scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """`unpack_dequantize_project` from plain codes [T, K] int16, contiguous.

    Raises:
        LaneError: a shape, dtype, stride or device does not fit.
    """
    _check_matrix("codes", codes, codes.device, (torch.int16,))
    if not codes.is_contiguous():
        raise LaneError("codes are not contiguous: pass codes.contiguous()")
    tokens, channels = codes.shape
    _check_restoration(channels, components, scale, bias, dtype, codes.device)
    if not use_triton(codes):
        return dequantize_project_ref(codes, components, scale, bias, dtype)
    g = Geometry.plain(tokens, channels)
    return _restore(codes, tokens, components, scale, bias, dtype, g, _PLAIN)


def _project(
    x: Tensor,
    components: Tensor | None,
    offset: Tensor,
    inv_scale: Tensor,
    levels: Tensor,
    out: Tensor,
    g: Geometry,
    fill: int,
    flags: dict[str, Any],
) -> Tensor:
    """Launch the forward kernel; returns the clamp counter."""
    tokens, depth = x.shape
    cells = x if components is None else components
    padded_t, padded_k = (g.length, g.lines) if flags["CHANNEL_LINES"] else (g.lines, g.length)
    halves = components is not None and x.dtype == cells.dtype and x.dtype in (torch.float16, torch.bfloat16)
    native = halves and not _interpreted()
    block_t, block_k, warps = _blocks(padded_t, padded_k, native and _wide(x.device))
    grid = cdiv(padded_t, block_t) * cdiv(padded_k, block_k) + cdiv(g.unused, FILL_BLOCK)
    clamped = torch.zeros(1, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        project_quantize_kernel[(grid,)](
            x,
            cells,
            offset,
            inv_scale,
            levels,
            out,
            clamped,
            tokens,
            depth,
            offset.numel(),
            x.stride(),
            cells.stride(),
            g,
            PROJECT=components is not None,
            NATIVE=native,
            FILL=fill,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            BLOCK_D=_side(depth, 128 // max(x.element_size(), cells.element_size())),
            BLOCK_FILL=FILL_BLOCK,
            num_warps=warps,
            num_stages=3,
            enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the reference
            **flags,
        )
    return clamped


def _restore(
    codes: Tensor,
    tokens: int,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    g: Geometry,
    flags: dict[str, Any],
) -> Tensor:
    """Launch the inverse kernel; returns [tokens, D]."""
    depth, channels = bias.numel(), scale.numel()
    cells = scale[:, None] if components is None else components
    out = torch.empty((tokens, depth), dtype=dtype, device=codes.device)
    native = cells.dtype == torch.bfloat16 and not _interpreted()
    block_t, block_d, warps = _blocks(tokens, depth, native and _wide(codes.device))
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        dequantize_project_kernel[(cdiv(tokens, block_t) * cdiv(depth, block_d),)](
            codes,
            cells,
            scale,
            bias,
            out,
            tokens,
            depth,
            channels,
            cells.stride(),
            g,
            PROJECT=components is not None,
            NATIVE=native,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_K=_side(channels, 128 // max(cells.element_size(), 2 if native else 4)),
            num_warps=warps,
            num_stages=3,
            enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the reference
            **flags,
        )
    return out


def _blocks(rows: int, columns: int, wide: bool) -> tuple[int, int, int]:
    """Tile sides and warps for [rows, columns]: the larger where about 128 of them are left to fill a GPU."""
    if wide and rows * columns >= 128 * 128 * 256:
        return _side(rows, 128), _side(columns, 256), 8
    if rows * columns >= 128 * 128 * 128:
        return _side(rows, 128), _side(columns, 128), 8
    return _side(rows, 64), _side(columns, 64), 4


def _wide(device: torch.device) -> bool:
    """Whether shared memory holds three stages of 16-bit operands of a 128 x 256 tile."""
    # Compute capability 9 and 10: 227 KiB per block.
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _side(size: int, largest: int) -> int:
    """A power of two that covers `size`, from 16 (the least side of a tensor-core product) to `largest`."""
    return max(16, min(largest, int(triton.next_power_of_2(size))))


def _interpreted() -> bool:
    """True under the Triton interpreter, whose dot multiplies the bit patterns of bfloat16."""
    return bool(triton.knobs.runtime.interpret)


def _flags(layout: SurfaceLayout) -> dict[str, Any]:
    return {
        "CHANNEL_LINES": layout.mapping != TOKEN_ROWS,
        "TILES": layout.mapping == CHANNEL_TILES,
        "SPLIT": layout.format.split,
        "SHIFT": layout.format.shift,
    }


def _samples(surface: Tensor, layout: SurfaceLayout) -> Tensor:
    return surface if layout.format.itemsize == 1 else surface.view(torch.int16)


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


def _check_projection(
    x: Tensor, components: Tensor | None, offset: Tensor, inv_scale: Tensor, levels: Tensor
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
    return tokens, channels


def _check_restoration(
    channels: int,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    device: torch.device,
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
    if dtype not in FLOATS:
        raise LaneError(f"cannot restore {dtype}: use one of {', '.join(map(str, FLOATS))}")


def _check_surface(
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
