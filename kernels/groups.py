"""Group quantization to 2, 4 or 8 bits and back, one launch each way. Format and arithmetic: reference.py."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.kernels._launch import cdiv, use_triton
from sidelane.kernels.reference import (
    GROUP_BITS,
    GROUP_SIZES,
    GroupCodes,
    group_quantize_pack_ref,
    group_unpack_dequantize_ref,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TILE = 2048  # elements per program, a power of two


@triton.jit  # type: ignore[untyped-decorator]
def _from_words(x, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 of loaded elements; bfloat16 comes as its bits, int16."""
    if BF16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _to_words(v, dtype: tl.constexpr, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inverse of `_from_words` for finite v, rounded to nearest even."""
    if BF16:
        word = v.to(tl.int32, bitcast=True)
        return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return v.to(dtype)


@triton.jit
def _uniform(seed, base, local):  # type: ignore[no-untyped-def]
    """`uniform_hash` of the indices base + local; base is a multiple of TILE: all share one high word."""
    low = base.to(tl.uint32) + local.to(tl.uint32)
    h = low ^ ((base >> 32).to(tl.uint32) * 0x85EBCA6B)
    h = h * 0x9E3779B1 + seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return ((h ^ (h >> 16)) >> 8).to(tl.float32) * 2.0**-24


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def _group_quantize_pack_kernel(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_ptr, offset_ptr, escape_count_ptr, numel, seed,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr,
    BF16: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """code = clamp(floor((x - offset) / scale + noise), 0, 2^BITS - 1) per group of GROUP elements in a row.

    Element p * BYTES + c of a group goes to bits [p * BITS, (p + 1) * BITS) of its byte c; tiles are [groups,
    p, c]. Escaped groups get scale NaN, offset 0, codes 0 and are counted.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = GROUP // PER_BYTE
    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - 1
    first = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS
    base = first * GROUP
    g = tl.arange(0, BLOCK_GROUPS)
    p = tl.arange(0, PER_BYTE)[None, :, None]
    c = tl.arange(0, BYTES)[None, None, :]
    local = g[:, None, None] * GROUP + p * BYTES + c
    exists = first + g < (numel - 1) // GROUP + 1  # [BLOCK_GROUPS]
    inside = local < numel - base

    x = tl.load(x_ptr + base + local, mask=inside, other=0)
    x = tl.where(inside, x, tl.load(x_ptr + numel - 1))
    v = _from_words(x, BF16)
    # The magnitude as an integer orders NaN above Inf above all numbers.
    peak = tl.max(tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2), axis=1)
    absmax = peak.to(tl.float32, bitcast=True)
    v = tl.where((peak < 0x7F800000)[:, None, None], v, 0.0)
    if SYMMETRIC:
        zero = tl.zeros_like(absmax)
        span = tl.div_rn(absmax, MIDDLE)
    else:
        low = tl.min(tl.min(v, axis=2), axis=1) + 0.0  # -0 becomes +0
        offset = low.to(tl.float16)
        below = (low - tl.maximum(tl.abs(low) * 2.0**-11, 0.75 * 2.0**-24)).to(tl.float16)
        offset = tl.where(offset.to(tl.float32) > low, below, offset)
        zero = offset.to(tl.float32)
        span = tl.div_rn(tl.max(tl.max(v, axis=2), axis=1) - zero, TOP)
    raised = span * (1 + 2.0**-10) + 0.75 * 2.0**-24
    scale = tl.where(span > 0, raised, 0.0).to(tl.float16)
    step = scale.to(tl.float32)
    kept = (absmax + step + tl.abs(zero) < float("inf")) & (step * TOP <= 4 * absmax)
    divides = kept & (step > 0)
    inv = tl.where(divides, tl.div_rn(1.0, tl.where(divides, step, 1.0)), 0.0)

    t = (v - tl.where(kept, zero, 0.0)[:, None, None]) * inv[:, None, None]
    if SYMMETRIC:
        t += MIDDLE
    if STOCHASTIC:
        t += _uniform(seed, base, local)
    else:
        t += 0.5
    codes = tl.minimum(tl.maximum(tl.floor(t), 0.0), TOP).to(tl.int32)
    codes = tl.where(kept[:, None, None], codes, 0)
    packed = tl.sum(codes << (p * BITS), axis=1)  # [BLOCK_GROUPS, BYTES]

    byte = g[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    tl.store(packed_ptr + first * BYTES + byte, packed.to(tl.uint8), mask=exists[:, None])
    tl.store(scale_ptr + first + g, tl.where(kept, scale, float("nan")), mask=exists)
    if not SYMMETRIC:
        tl.store(offset_ptr + first + g, tl.where(kept, offset, 0.0), mask=exists)
    escaped = tl.sum((exists & ~kept).to(tl.int32), axis=0)
    tl.atomic_add(escape_count_ptr, escaped, mask=escaped > 0)


@triton.jit  # type: ignore[untyped-decorator]
def _group_unpack_dequantize_kernel(  # type: ignore[no-untyped-def]
    packed_ptr, scale_ptr, offset_ptr, escapes_ptr, rank_ptr, out_ptr, numel, escape_rows, limit,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, ESCAPES: tl.constexpr,
    BF16: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """x = code * scale + offset, clamped to +-limit; groups with scale NaN are rows rank[g] of the escapes.

    Tiles are [groups, p, c] as in `_group_quantize_pack_kernel`.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = GROUP // PER_BYTE
    first = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS
    base = first * GROUP
    g = tl.arange(0, BLOCK_GROUPS)
    p = tl.arange(0, PER_BYTE)[None, :, None]
    c = tl.arange(0, BYTES)[None, None, :]
    local = g[:, None, None] * GROUP + p * BYTES + c
    exists = first + g < (numel - 1) // GROUP + 1
    inside = local < numel - base

    packed = tl.load(
        packed_ptr + first * BYTES + g[:, None, None] * BYTES + c, mask=exists[:, None, None], other=0
    )
    scale = tl.load(scale_ptr + first + g, mask=exists, other=0.0).to(tl.float32)
    t = ((packed.to(tl.int32) >> (p * BITS)) & (2**BITS - 1)).to(tl.float32)
    if SYMMETRIC:
        v = (t - (2 ** (BITS - 1) - 1)) * scale[:, None, None]
    else:
        offset = tl.load(offset_ptr + first + g, mask=exists, other=0.0).to(tl.float32)
        v = t * scale[:, None, None] + offset[:, None, None]
    v = tl.minimum(tl.maximum(v, -limit), limit)
    out = _to_words(v, out_ptr.dtype.element_ty, BF16)
    if ESCAPES:
        rank = tl.load(rank_ptr + first + g, mask=exists, other=0)
        escaped = exists & (scale != scale)
        listed = escaped & (rank < escape_rows)
        raw = tl.load(
            escapes_ptr + (rank * GROUP)[:, None, None] + p * BYTES + c, mask=listed[:, None, None], other=0
        )
        out = tl.where(escaped[:, None, None], raw, out)
    tl.store(out_ptr + base + local, out, mask=inside)


def group_quantize_pack(
    x: Tensor, bits: int, group: int, *, symmetric: bool = False, seed: int | None = None
) -> GroupCodes:
    """Quantize flat floats [n], n >= 1, in groups of `group` in a row; see `group_quantize_pack_ref`.

    On a GPU the host waits once, for the number of escaped groups; `group_quantize_pack_into` does not wait.

    Args:
        x: [n] bfloat16, float16 or float32, contiguous.
        bits, group: one of GROUP_BITS and GROUP_SIZES.
        symmetric: no offsets; codes are centred on zero.
        seed: None rounds to nearest; a number rounds stochastically, the same way for the same seed.

    The codes are not differentiable. Raises LaneError for any other input.
    """
    _check_floats(x)
    x = x.detach()
    if bits not in GROUP_BITS or group not in GROUP_SIZES:
        raise LaneError(
            f"no {bits}-bit groups of {group}: use bits of {GROUP_BITS} and groups of {GROUP_SIZES}"
        )
    if not use_triton(x):
        return group_quantize_pack_ref(x, bits, group, symmetric=symmetric, seed=seed)
    codes = empty_group_codes(x, bits, group, symmetric=symmetric)
    escape_count = torch.zeros(1, dtype=torch.int32, device=x.device)
    group_quantize_pack_into(x, codes, escape_count, seed=seed)
    if escape_count.item():
        codes = replace(codes, escapes=gather_escapes(x, codes))
    return codes


def empty_group_codes(x: Tensor, bits: int, group: int, *, symmetric: bool = False) -> GroupCodes:
    """Uninitialized codes for `x` with no escapes."""
    groups = cdiv(x.numel(), group)
    scale = torch.empty(groups, dtype=torch.float16, device=x.device)
    return GroupCodes(
        packed=torch.empty((groups, group * bits // 8), dtype=torch.uint8, device=x.device),
        scale=scale,
        offset=None if symmetric else torch.empty_like(scale),
        escapes=x.new_empty((0, group)),
        bits=bits,
        group=group,
        numel=x.numel(),
    )


def group_quantize_pack_into(
    x: Tensor, codes: GroupCodes, escape_count: Tensor, *, seed: int | None = None
) -> None:
    """The launch of `group_quantize_pack`: fills `codes` and adds the escaped groups to `escape_count`.

    Args:
        escape_count: int32 [1]. Where it ends above zero, `gather_escapes` gives `codes.escapes`.
    """
    bf16, block = x.dtype == torch.bfloat16, TILE // codes.group
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _group_quantize_pack_kernel[(cdiv(codes.scale.numel(), block),)](
            _words(x),
            codes.packed,
            codes.scale,
            codes.offset,
            escape_count,
            x.numel(),
            _as_int32(seed or 0),
            BITS=codes.bits,
            GROUP=codes.group,
            SYMMETRIC=codes.offset is None,
            STOCHASTIC=seed is not None,
            BF16=bf16,
            BLOCK_GROUPS=block,
            enable_fp_fusion=False,
        )


def gather_escapes(x: Tensor, codes: GroupCodes) -> Tensor:
    """Raw elements [*, group] of the groups of `x` that `codes` marks as escaped; waits for their number."""
    rows = codes.scale.isnan().nonzero()  # [*, 1]
    index = rows * codes.group + torch.arange(codes.group, device=x.device)
    return x[index.clamp_max(codes.numel - 1)]


def group_unpack_dequantize(codes: GroupCodes, dtype: torch.dtype) -> Tensor:
    """The flat tensor [numel] of `dtype` that `codes` stand for; never waits for the device.

    A NaN scale beyond the rows of `codes.escapes` gives arbitrary finite values on a GPU, an error on a CPU.

    Raises LaneError if `dtype` is not one of FLOATS or the parts of `codes` do not fit each other.
    """
    _check_codes(codes, dtype)
    if not use_triton(codes.packed):
        marked = int(codes.scale.isnan().sum())
        if marked != codes.escapes.shape[0]:
            raise LaneError(f"{marked} groups are marked as escaped, {codes.escapes.shape[0]} are listed")
        return group_unpack_dequantize_ref(codes, dtype)
    out = torch.empty(codes.numel, dtype=dtype, device=codes.packed.device)
    group_unpack_dequantize_into(codes, out)
    return out


def group_unpack_dequantize_into(codes: GroupCodes, out: Tensor) -> None:
    """The launch of `group_unpack_dequantize` into `out` [numel]."""
    escape_rows, block = codes.escapes.shape[0], TILE // codes.group
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        _group_unpack_dequantize_kernel[(cdiv(codes.scale.numel(), block),)](
            codes.packed,
            codes.scale,
            codes.offset,
            _words(codes.escapes),
            codes.scale.isnan().cumsum(0) - 1 if escape_rows else None,
            _words(out),
            codes.numel,
            escape_rows,
            torch.finfo(out.dtype).max,
            BITS=codes.bits,
            GROUP=codes.group,
            SYMMETRIC=codes.offset is None,
            ESCAPES=escape_rows > 0,
            BF16=out.dtype == torch.bfloat16,
            BLOCK_GROUPS=block,
            enable_fp_fusion=False,
        )


def _words(x: Tensor) -> Tensor:
    """What a kernel gets for `x`: the bits of bfloat16, other floats as they are (see `_from_words`)."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def _as_int32(seed: int) -> int:
    """The number in the range of int32 with the low 32 bits of `seed`."""
    return ((seed + 2**31) & 0xFFFFFFFF) - 2**31


def _check_floats(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise LaneError(f"groups of {x.dtype} are not supported: convert to bfloat16, float16 or float32")
    if x.ndim != 1 or not x.is_contiguous() or x.numel() == 0:
        raise LaneError(f"shape {tuple(x.shape)}: flatten to one dimension of at least one element")


def _check_codes(codes: GroupCodes, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise LaneError(f"groups do not decode to {dtype}: ask for bfloat16, float16 or float32")
    if codes.bits not in GROUP_BITS or codes.group not in GROUP_SIZES or codes.numel < 1:
        raise LaneError(f"no {codes.bits}-bit groups of {codes.group} for {codes.numel} elements")
    groups = cdiv(codes.numel, codes.group)
    parts = [
        ("packed", codes.packed, (groups, codes.group * codes.bits // 8), torch.uint8),
        ("scale", codes.scale, (groups,), torch.float16),
        ("escapes", codes.escapes, (codes.escapes.shape[0], codes.group), dtype),
    ]
    if codes.offset is not None:
        parts.append(("offset", codes.offset, (groups,), torch.float16))
    for name, part, shape, kind in parts:
        if part.shape != shape or part.dtype != kind or not part.is_contiguous():
            raise LaneError(f"{name} is {part.dtype} {tuple(part.shape)}, not contiguous {kind} {shape}")
        if part.device != codes.packed.device:
            raise LaneError(
                f"{name} is on {part.device}, packed on {codes.packed.device}: move them together"
            )
