"""Products of a tensor with a factor for each row or column, cast in the same launch.

PyTorch's broadcasting kernels move such tensors at a third of the speed of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.kernels._launch import cdiv, launch, use_triton
from sidelane.kernels._stochastic import INTERPRETED

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TILE = 2048  # elements per program, about
WARPS = 4
MOST = 2**31 - TILE  # elements: their numbers are of 32 bits


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float32 v as the nearest `dtype`, or even."""
    if INTERPRETED and dtype == tl.bfloat16:  # it truncates
        word = v.to(tl.int32, bitcast=True)
        v = ((word + 0x7FFF + ((word >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return v.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply_kernel(  # type: ignore[no-untyped-def]
    x_ptr, factor_ptr, out_ptr, rows, columns,
    BY_ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[r, c] = x[r, c] * factor[r or c], rounded to the dtype of x and then to that of out."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    r = tl.program_id(0) // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    c = tl.program_id(0) % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (r < rows) & (c < columns)
    x = tl.load(x_ptr + r * columns + c, mask=inside)
    factor = tl.load(factor_ptr + r, mask=r < rows) if BY_ROW else tl.load(factor_ptr + c, mask=c < columns)
    product = _rounded(x.to(tl.float32) * factor.to(tl.float32), x_ptr.dtype.element_ty)
    out = _rounded(product.to(tl.float32), out_ptr.dtype.element_ty)
    tl.store(out_ptr + r * columns + c, out, mask=inside)


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`(a * b).to(dtype)` in one launch on a GPU, with the bits of `torch.mul`, but perhaps of NaN; None
    where that is not to be had.

    It is where one of `a` and `b` is contiguous floats [..., D] of two dimensions or more, and the other one,
    of the same dtype, a factor of it (see `is_factor`).
    """
    x, factor = (a, b) if (a.numel(), a.ndim) >= (b.numel(), b.ndim) else (b, a)
    by_row, alike = _by_row(factor, x.shape), x.dtype == factor.dtype and x.device == factor.device
    if by_row is None or not alike or dtype not in FLOATS or not use_triton(x):
        return None
    if not 0 < x.numel() <= MOST or not x.is_contiguous() or x.is_neg():
        return None
    out = torch.empty_like(x, dtype=dtype)
    columns = x.shape[-1]
    rows = x.numel() // columns
    block_columns = min(triton.next_power_of_2(columns), TILE)
    block_rows = TILE // block_columns
    launch(
        _multiply_kernel,
        cdiv(rows, block_rows) * cdiv(columns, block_columns),
        (x, factor, out),
        (rows, columns),
        (by_row, block_rows, block_columns),
        num_warps=WARPS,
    )
    return out


def is_factor(factor: Tensor, shape: torch.Size) -> bool:
    """`factor`, contiguous floats [D], [1, ..., D] or [..., 1], has a number for each column or row of
    tensors [..., D] of `shape`."""
    return _by_row(factor, shape) is not None


def _by_row(factor: Tensor, shape: torch.Size) -> bool | None:
    """Whether `factor` is of rows, or of columns; None where it is neither."""
    if factor.dtype not in FLOATS or len(shape) < 2 or not factor.is_contiguous() or factor.is_neg():
        return None
    if factor.shape == (*shape[:-1], 1):
        return True
    of_columns = factor.ndim <= len(shape) and factor.numel() == shape[-1] == factor.shape[-1:].numel()
    return False if of_columns else None
