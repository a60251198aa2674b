"""What the surface kernels share: tiles of matrices on the device, and how launchers cut the work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from sidelane.kernels._launch import multiprocessors
from sidelane.kernels._surface import Geometry

# How a kernel reads a matrix: through pointers, or through a tensor descriptor of it or of its transpose.
POINTERS = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)

PASS_PER_SM = 8  # programs on a multiprocessor in passes without a product


@triton.jit  # type: ignore[untyped-decorator]
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of tile `pid`, column by column within bands of GROUP rows: operands stay in L2."""
    per_band = GROUP * tiles_n
    first = pid // per_band * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + pid % per_band % rows, pid % per_band // rows


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(  # type: ignore[no-untyped-def]
    matrix,
    row,
    column,
    rows,
    columns,
    strides,
    ACCESS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Elements [HEIGHT, WIDTH] of a matrix [rows, columns] from (row, column) on, 0 outside."""
    if ACCESS == ROWS:
        tile = matrix.load([row, column])
    elif ACCESS == COLUMNS:
        tile = matrix.load([column, row]).T
    else:
        i = (row + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
        j = (column + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
        mask = (i < rows) & (j < columns)
        tile = tl.load(matrix + i * strides[0] + j * strides[1], mask=mask, other=0.0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(out, tile, row, column, rows, columns, ACCESS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a tile of a contiguous matrix [rows, columns] at (row, column), clipped to it."""
    if ACCESS == ROWS:
        out.store([row, column], tile.to(out.dtype))
    else:
        i = (row + tl.arange(0, tile.shape[0])).to(tl.int64)[:, None]
        j = column + tl.arange(0, tile.shape[1])[None, :]
        tl.store(
            out + i * columns + j,
            tile.to(out.dtype.element_ty),
            mask=(i < rows) & (j < columns),
        )


@triton.jit  # type: ignore[untyped-decorator]
def slices(tile, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The columns of a tile in PARTS (1, 2 or 4) equal parts: storing one at a time takes fewer registers."""
    HEIGHT: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, (HEIGHT, 2, HALF)), (0, 2, 1)))
        parts = slices(left, PARTS // 2) + slices(right, PARTS // 2)
    return parts


@triton.jit  # type: ignore[untyped-decorator]
def load_channels(pointer, k, channels, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One float32 for each channel `k`, 0 outside, to be broadcast along the other axis."""
    return tl.expand_dims(tl.load(pointer + k, mask=k < channels, other=0.0), 1 - AXIS)


@triton.jit
def prefetch_channels(pointer, k, channels):  # type: ignore[no-untyped-def]
    """Have the L1 cache fetch what `load_channels` is to load."""
    at = pointer + tl.minimum(k, channels - 1)
    tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, False, 1)


class Tiles(NamedTuple):
    """How a GEMM is cut: sides of its tiles and of a step, and what the compiler is told."""

    m: int
    n: int
    step: int
    stages: int
    warps: int
    slices: int = 1  # of a tile, stored one after the other
    group: int = 8  # rows of tiles that go through the columns together
    per_sm: int = 1  # programs on a multiprocessor
    flatten: bool = True  # loads of the next tile start before this one is stored
    prefetch: bool = False  # what the end of a tile reads is asked for at its start


def access(m: Tensor, height: int, width: int) -> tuple[Tensor | TensorDescriptor, int]:
    """What a kernel loads tiles [height, width] of `m` from, and how: a descriptor where strides allow it."""
    size = m.itemsize
    if size <= 4 and m.data_ptr() % 16 == 0:
        for access, view, block in (
            (ROWS, m, [height, width]),
            (COLUMNS, m.t(), [width, height]),
        ):
            row, column = view.stride()
            if column == 1 and row >= view.shape[1] and row * size % 16 == 0:
                return TensorDescriptor(view, list(view.shape), [row, 1], block), access.value
    return m, POINTERS.value


def programs(tiles: int, per_sm: int, sms: int | None, device: torch.device) -> int:
    """Programs that share `tiles`."""
    available = multiprocessors(device)
    return min(tiles, per_sm * min(sms or available, available))


def pass_blocks(lines: int, length: int, flags: dict[str, Any]) -> tuple[int, int]:
    """Lines and samples of each that a program moves at a time in a pass without a product."""
    return (32, 64) if flags["CHANNEL_LINES"] else (min(8, triton.next_power_of_2(lines)), side(length, 512))


def piece(g: Geometry, length: int) -> int:
    """The largest power of two within `length` and a run of `g`."""
    return min(length, 1 << (g.run.bit_length() - 1))


def by_line(pair: tuple[int, ...], flags: dict[str, Any]) -> tuple[int, ...]:
    """What belongs to tokens and to channels, as what belongs to lines and along them."""
    return pair[::-1] if flags["CHANNEL_LINES"] else pair


def side(size: int, largest: int) -> int:
    """A power of two that covers `size`, from 16 (the least side of a tensor-core product) to `largest`."""
    return max(16, min(largest, int(triton.next_power_of_2(size))))


def starts_early() -> bool:
    """Whether a kernel can start before the one ahead of it ends: compute capability 9.0 and later."""
    return not interpreted() and int(driver.active.get_current_target().arch) >= 90


def interpreted() -> bool:
    """True under the Triton interpreter, whose dot multiplies the bit patterns of bfloat16."""
    return bool(triton.knobs.runtime.interpret)
