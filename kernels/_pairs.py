"""Device code for bfloat16 numbers read two at a time, as int32: the first in the lower half."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def smaller(a, b):  # type: ignore[no-untyped-def]
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller_pair(a, b):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise("min.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _larger_pair(a, b):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit  # type: ignore[untyped-decorator]
def load_pairs(  # type: ignore[no-untyped-def]
    x_ptr, first, exists, GROUP: tl.constexpr, FULL: tl.constexpr
):
    """Pairs [groups, 4, GROUP / 8] of groups from `first` on, 0 where they do not exist; FULL: all do."""
    g = tl.arange(0, exists.shape[0])[:, None, None]
    i = tl.arange(0, 4)[None, :, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, None, :]
    at = x_ptr.to(tl.pointer_type(tl.int32)) + first * (GROUP // 2) + g * (GROUP // 2) + i
    return tl.load(at) if FULL else tl.load(at, mask=exists[:, None, None], other=0)


@triton.jit
def first_of(pairs):  # type: ignore[no-untyped-def]
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def second_of(pairs):  # type: ignore[no-untyped-def]
    return (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def extremes_of_pairs(pairs, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_extremes` of groups.py of the numbers in pairs [G, 4, C]: two comparisons in one instruction."""
    if SYMMETRIC:
        pairs = pairs & 0x7FFF7FFF
    high = tl.reduce(tl.reduce(pairs, 1, _larger_pair), 1, _larger_pair)
    high = larger(first_of(high), second_of(high))
    low = high
    if not SYMMETRIC:
        low = tl.reduce(tl.reduce(pairs, 1, _smaller_pair), 1, _smaller_pair)
        low = smaller(first_of(low), second_of(low))
    return low + 0.0, high  # -0 becomes +0
