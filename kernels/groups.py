"""Group quantization to 2, 4 or 8 bits and back, one launch each way. Format and arithmetic: reference.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.kernels import reference
from sidelane.kernels._launch import (
    Part,
    cdiv,
    check_parts,
    current_device,
    cut,
    launch,
    multiprocessors,
    programs,
    span,
    starts,
    use_triton,
)
from sidelane.kernels._pairs import extremes_of_pairs, first_of, larger, load_pairs, second_of, smaller
from sidelane.kernels._stochastic import (
    INTERPRETED,
    at_and_noise,
    hashes,
    merge,
    second_bytes,
    second_hashes,
)
from sidelane.kernels.reference import (
    GROUP_BITS,
    GROUP_SIZES,
    GroupCodes,
    group_quantize_pack_ref,
    group_unpack_dequantize_ref,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LIMITS = {  # largest number, words of Inf and NaN
    torch.bfloat16: (torch.finfo(torch.bfloat16).max, 0x7F80, 0x7FC0),
    torch.float16: (torch.finfo(torch.float16).max, 0x7C00, 0x7E00),
    torch.float32: (torch.finfo(torch.float32).max, 0x7F800000, 0x7FC00000),
}
PACK_REGISTERS = {2: 96, 4: 72, 8: 72}  # of a thread that rounds stochastically, by bits
NEAREST_REGISTERS = 80
TILES = {False: 2, True: 4}  # that a program packs where they are many, by whether it rounds stochastically
MANY = 4096  # programs that are enough
RESIDENT = 4 * (16384 // (32 * PACK_REGISTERS[2]))  # of 2 bits a multiprocessor with 4 x 16384 registers
UNPACK_TILE, UNPACK_WARPS = 2048, 2  # elements per program, a power of two
WIDE = tl.constexpr(reference.WIDE)
WIDE_NONFINITE = tl.constexpr(reference.WIDE_NONFINITE)


@triton.jit  # type: ignore[untyped-decorator]
def _to_words(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of finite float32 v rounded to nearest even in `dtype`."""
    if dtype == tl.float32:
        return v.to(tl.int32, bitcast=True)
    elif dtype == tl.float16:
        return v.to(tl.float16).to(tl.int16, bitcast=True)
    elif INTERPRETED:  # it truncates
        word = v.to(tl.int32, bitcast=True)
        return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return v.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def _half_step(e):  # type: ignore[no-untyped-def]
    """2^(e - 128) of e in 1..255."""
    return tl.maximum((e - 1) << 23, 0x400000).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _extremes(v, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Least and largest of v [G, 4, C] by group, or the largest magnitude twice; NaN where there is one."""
    if INTERPRETED:  # slow at reductions that it does not know, and in those that it knows it ignores NaN
        nan = tl.where(tl.max(tl.max((v != v).to(tl.int32), axis=1), axis=1) > 0, float("nan"), 0.0)
        high = tl.max(tl.max(tl.abs(v) if SYMMETRIC else v, axis=1), axis=1) + nan
        low = high if SYMMETRIC else tl.min(tl.min(v, axis=1), axis=1) + nan
    elif SYMMETRIC:
        high = tl.reduce(tl.reduce(tl.abs(v), 1, larger), 1, larger)
        low = high
    else:
        low = tl.reduce(tl.reduce(v, 1, smaller), 1, smaller)
        high = tl.reduce(tl.reduce(v, 1, larger), 1, larger)
    return low + 0.0, high  # -0 becomes +0


@triton.jit(do_not_specialize=["numel", "seed"])  # type: ignore[untyped-decorator]
def _group_quantize_pack_kernel(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr,
    RAGGED: tl.constexpr, PAIRS: tl.constexpr, FULL: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes, scales and offsets, BLOCK_GROUPS groups at a time; wide ones among them in a second go.

    PAIRS: bfloat16 that can be read two at a time. FULL: BLOCK_GROUPS groups every time.
    """
    FEW: tl.constexpr = BLOCK_GROUPS // 4 if BLOCK_GROUPS >= 4 else 1
    tiles = (numel - 1) // (BLOCK_GROUPS * GROUP) + 1
    again = False
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * BLOCK_GROUPS
        again |= _quantize_groups(
            x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed, first,
            BITS, GROUP, SYMMETRIC, STOCHASTIC, RAGGED, PAIRS, FULL, False, BLOCK_GROUPS,
        )  # fmt: skip
    if again:  # a loop of its own, whose constants do not take registers from the first
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            first = tl.cast(tile, tl.int64) * BLOCK_GROUPS
            wide = _quantize_groups(
                x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed, first,
                BITS, GROUP, SYMMETRIC, STOCHASTIC, RAGGED, PAIRS, FULL, False, BLOCK_GROUPS,
            )  # fmt: skip
            if wide:
                tl.debug_barrier()
                for part in range(0, BLOCK_GROUPS, FEW):
                    _quantize_groups(
                        x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed, first + part,
                        BITS, GROUP, SYMMETRIC, STOCHASTIC, RAGGED, PAIRS, FULL, True, FEW,
                    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _load_groups(  # type: ignore[no-untyped-def]
    x_ptr, first, numel, GROUP: tl.constexpr, RAGGED: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """float32 [GROUPS, 4, GROUP / 4]; beyond the end of a RAGGED tensor, copies of its last element."""
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    if BF16:
        x_ptr = x_ptr.to(tl.pointer_type(tl.int16))
    g = tl.arange(0, GROUPS)[:, None, None]
    i = tl.arange(0, 4)[None, :, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, None, :]
    at = x_ptr + first * GROUP + g * GROUP + i
    if RAGGED:
        inside = g * GROUP + i < numel - first * GROUP
        x = tl.where(inside, tl.load(at, mask=inside, other=0), tl.load(x_ptr + numel - 1))
    else:
        x = tl.load(at, mask=g < (numel - 1) // GROUP + 1 - first, other=0)
    return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True) if BF16 else x.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _encode(  # type: ignore[no-untyped-def]
    v, zero, inv, at, words, BITS: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """Codes of v [G, 4, C], those of a byte put together: in the lowest byte, with STOCHASTIC in the second.
    The other bits are of no account."""
    N: tl.constexpr = 8 // BITS  # codes per byte
    t = (v - zero[:, None, None]) * inv[:, None, None]
    if STOCHASTIC:
        # The code is in the second byte, below it the fraction that noise was added to.
        codes = (t + at_and_noise(at, words)).to(tl.uint32, bitcast=True)
        codes = merge(tl.reshape(codes, (v.shape[0], N, 4 // N, v.shape[2])), BITS)
    else:
        codes = (t + (at + 2.0**23)[:, None, None]).to(tl.uint32, bitcast=True)
        if N > 1:
            codes = tl.reshape(codes, (v.shape[0], N, 4 // N, v.shape[2]))
            codes = tl.sum(codes << (BITS * tl.arange(0, N)[None, :, None, None]).to(tl.uint32), axis=1)
    return codes


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_groups(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scale_ptr, offset_ptr, numel, seed, first,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, STOCHASTIC: tl.constexpr,
    RAGGED: tl.constexpr, PAIRS: tl.constexpr, FULL: tl.constexpr, WIDE_TOO: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Write GROUPS groups; say whether there are wide ones, which come out right if WIDE_TOO."""
    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - 1
    C: tl.constexpr = GROUP // 4
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    g = tl.arange(0, GROUPS)
    exists = g < GROUPS if FULL else g < (numel - 1) // GROUP + 1 - first

    HALVES: tl.constexpr = PAIRS and not WIDE_TOO
    if HALVES:
        pairs = load_pairs(x_ptr, first, exists, GROUP, FULL)
        low, high = extremes_of_pairs(pairs, SYMMETRIC)
    else:
        v = _load_groups(x_ptr, first, numel, GROUP, RAGGED, GROUPS)
        low, high = _extremes(v, SYMMETRIC)
    if SYMMETRIC:
        absmax = high
        zero = tl.zeros_like(high)
        offset = zero.to(tl.float16)
        span = absmax * (1.0 / MIDDLE)
    else:
        absmax = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
        offset = low.to(tl.float16)
        below = (low - tl.maximum(tl.abs(low) * 2.0**-11, 0.75 * 2.0**-24)).to(tl.float16)
        offset = tl.where(offset.to(tl.float32) > low, below, offset)
        zero = offset.to(tl.float32)
        span = (high - zero) * (1.0 / TOP)
    scale = tl.where(span > 0, span * (1 + 2.0**-10) + 0.75 * 2.0**-24, 0.0).to(tl.float16)
    step = scale.to(tl.float32)
    plain = (absmax + step + tl.abs(zero) < float("inf")) & (step * TOP <= 4 * absmax)
    inv = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    at = tl.full(step.shape, MIDDLE if SYMMETRIC else 0, tl.float32)
    scale_word = scale.to(tl.int16, bitcast=True)

    if WIDE_TOO:
        finite = (v.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
        nonfinite = tl.max(tl.max((finite == 0).to(tl.int32), axis=1), axis=1)
        known = tl.where(finite, v, 0.0)
        low, high = _extremes(known, SYMMETRIC)
        levels = MIDDLE - nonfinite
        gap = tl.maximum(tl.abs(low), tl.abs(high)).to(tl.int32, bitcast=True)
        gap -= tl.maximum(levels, 1).to(tl.float32).to(tl.int32, bitcast=True)
        e = tl.minimum(tl.maximum(((gap + (2**23 - 1)) >> 23) + 127, 1), 255)
        wide_inv = tl.where(levels > 0, tl.div_rn(0.5, _half_step(e)), 0.0)
        # In a group with NaN or Inf, v becomes the code less `at`.
        special = tl.where(v > 0, TOP, tl.where(v < 0, TOP - 1, TOP - 2)) - (MIDDLE - 1)
        special = tl.where(finite, known * wide_inv[:, None, None], special.to(tl.float32))
        v = tl.where((nonfinite > 0)[:, None, None], special, v)
        inv = tl.where(plain, inv, tl.where(nonfinite > 0, 1.0, wide_inv))
        at = tl.where(plain, at, levels.to(tl.float32))
        zero = tl.where(plain, zero, 0.0)
        offset = tl.where(plain, offset, tl.zeros_like(offset))
        scale_word = tl.where(plain, scale_word, (e | nonfinite * WIDE_NONFINITE | WIDE).to(tl.int16))

    N: tl.constexpr = 8 // BITS  # codes per byte
    words = hashes(seed, first, GROUPS, C) if STOCHASTIC else 0
    if HALVES:  # one after the other, in half the registers
        even = _encode(first_of(pairs), zero, inv, at, words, BITS, STOCHASTIC)
        words = second_hashes(words) if STOCHASTIC else 0
        odd = _encode(second_of(pairs), zero, inv, at, words, BITS, STOCHASTIC)
        codes = tl.reshape(tl.join(even, odd), (GROUPS, 4 // N, C))
    else:
        if STOCHASTIC:
            words = tl.reshape(tl.join(words, second_hashes(words)), (GROUPS, 1, C))
        codes = _encode(v, zero, inv, at, words, BITS, STOCHASTIC)
    if STOCHASTIC:
        codes = second_bytes(codes)
    byte = tl.arange(0, 4 // N)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    byte = tl.max_contiguous(g[:, None, None] * (GROUP // N) + byte, (1, 1, VECTOR))  # as a thread has them
    tl.store(codes_ptr + first * (GROUP // N) + byte, codes.to(tl.uint8), mask=exists[:, None, None])
    tl.store(scale_ptr.to(tl.pointer_type(tl.int16)) + first + g, scale_word, mask=exists)
    if not SYMMETRIC:
        word = offset.to(tl.int16, bitcast=True)
        tl.store(offset_ptr.to(tl.pointer_type(tl.int16)) + first + g, word, mask=exists)
    return tl.min(plain.to(tl.int32), axis=0) == 0


@triton.jit(do_not_specialize=["numel"])  # type: ignore[untyped-decorator]
def _group_unpack_dequantize_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, scale_ptr, offset_ptr, out_ptr, numel,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, LIMIT: tl.constexpr, INF: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """x = (code - bias) * scale + offset of groups, BLOCK_GROUPS at a time. Tiles are [groups, P, C],
    P * C = GROUP.

    LIMIT, INF and NAN are the largest number of the output dtype and the words of what lies beyond it.
    """
    tiles = (numel - 1) // (BLOCK_GROUPS * GROUP) + 1
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _dequantize_tile(
            codes_ptr, scale_ptr, offset_ptr, out_ptr, numel, tl.cast(tile, tl.int64) * BLOCK_GROUPS,
            BITS, GROUP, SYMMETRIC, RAGGED, BLOCK_GROUPS, LIMIT, INF, NAN,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_tile(  # type: ignore[no-untyped-def]
    codes_ptr, scale_ptr, offset_ptr, out_ptr, numel, first,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, LIMIT: tl.constexpr, INF: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = 2**BITS - 1
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - 1
    P: tl.constexpr = 8 // BITS
    C: tl.constexpr = GROUP // P
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    WORD: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
    base = first * GROUP
    g = tl.arange(0, BLOCK_GROUPS)
    p = tl.arange(0, P)[None, :, None]
    c = tl.arange(0, C)[None, None, :]
    local = g[:, None, None] * GROUP + p * C + c
    exists = g < (numel - 1) // GROUP + 1 - first

    codes = _load_codes(codes_ptr, g, p, c, first, exists, BITS, GROUP)
    scale_word = tl.load(scale_ptr.to(tl.pointer_type(tl.int16)) + first + g, mask=exists, other=0)
    scale = scale_word.to(tl.float16, bitcast=True).to(tl.float32)
    number = (codes | 0x4B000000).to(tl.float32, bitcast=True)  # 2^23 + code
    if SYMMETRIC:
        v = (number - (2.0**23 + MIDDLE)) * scale[:, None, None]
    else:
        offset_word = tl.load(offset_ptr.to(tl.pointer_type(tl.int16)) + first + g, mask=exists, other=0)
        offset = offset_word.to(tl.float16, bitcast=True).to(tl.float32)
        v = (number - 2.0**23) * scale[:, None, None] + offset[:, None, None]
    if dtype == tl.float16:
        v = tl.minimum(tl.maximum(v, -LIMIT), LIMIT)
    out = _to_words(v, dtype)

    wide = (scale_word & 0x7C00) == 0x7C00
    if tl.max(wide.to(tl.int32), axis=0) > 0:
        again = _load_codes(codes_ptr, g, p, c, first, exists, BITS, GROUP)
        nonfinite = (wide & ((scale_word & WIDE_NONFINITE) > 0))[:, None, None]
        levels = tl.where(nonfinite, MIDDLE - 1, MIDDLE)
        w = (again - levels).to(tl.float32) * _half_step(scale_word.to(tl.int32) & 255)[:, None, None] * 2.0
        words = _to_words(tl.minimum(tl.maximum(w, -LIMIT), LIMIT), dtype)
        beyond = tl.where(again == TOP - 1, INF - 2 ** (WORD.primitive_bitwidth - 1), NAN)
        beyond = tl.where(again == TOP, INF, beyond).to(WORD)
        words = tl.where(nonfinite & (again >= TOP - 2), beyond, words)
        out = tl.where(wide[:, None, None], words, out)

    out_ptr = out_ptr.to(tl.pointer_type(WORD)) + base
    if RAGGED:
        tl.store(out_ptr + local, out, mask=local < numel - base)
    else:
        tl.store(out_ptr + local, out, mask=exists[:, None, None])


@triton.jit  # type: ignore[untyped-decorator]
def _load_codes(  # type: ignore[no-untyped-def]
    codes_ptr, g, p, c, first, exists, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """int32 codes [G, P, C] of the groups from `first` on."""
    if BITS == 8:
        at = g[:, None, None] * GROUP + c
        return tl.load(codes_ptr + first * GROUP + at, mask=exists[:, None, None], other=0).to(tl.int32)
    else:
        BYTES: tl.constexpr = GROUP * BITS // 8
        at = g[:, None, None] * BYTES + c
        byte = tl.load(codes_ptr + first * BYTES + at, mask=exists[:, None, None], other=0).to(tl.int32)
        return (byte >> (p * BITS)) & (2**BITS - 1)


@lru_cache(4096)
def group_sizes(numel: int, bits: int, group: int, symmetric: bool) -> tuple[int, ...]:
    """Bytes of the parts of `GroupCodes` in order."""
    groups = cdiv(numel, group)
    scales = (2 * groups,) if symmetric else (2 * groups, 2 * groups)
    return (groups * group * bits // 8, *scales)


def group_quantize_pack(
    x: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    seed: int | None = None,
    max_programs: int | None = None,
) -> GroupCodes:
    """Quantize flat floats [n], n >= 1, in groups of `group` in a row; see `group_quantize_pack_ref`.

    The parts are made by `carve`. On a GPU this is one launch and the host never waits for the device.

    Args:
        x: [n] bfloat16, float16 or float32, contiguous.
        bits, group: one of GROUP_BITS and GROUP_SIZES.
        symmetric: no offsets; codes are centred on zero.
        seed: None rounds to nearest; a number rounds stochastically, the same way for the same seed.
        max_programs: the most programs to launch, a warp each; None for what is fastest by itself.

    The codes are not differentiable. Raises LaneError for any other input.
    """
    if x.dtype not in FLOATS:
        raise LaneError(f"groups of {x.dtype} are not supported: convert to bfloat16, float16 or float32")
    numel = x.numel()
    if x.ndim != 1 or not x.is_contiguous() or numel == 0:
        raise LaneError(
            f"shape {tuple(x.shape)}, strides {x.stride()}: flatten at least one element, as by "
            "x.contiguous().view(-1)"
        )
    if bits not in GROUP_BITS or group not in GROUP_SIZES:
        raise LaneError(
            f"no {bits}-bit groups of {group}: use bits of {GROUP_BITS} and groups of {GROUP_SIZES}"
        )
    sizes = group_sizes(numel, bits, group, symmetric)
    buffer = torch.empty(span(sizes), dtype=torch.uint8, device=x.device)
    group_packer(numel, x.dtype, bits, group, symmetric, seed, max_programs)(x, buffer)
    parts = cut(buffer, sizes)
    return GroupCodes(parts[0], parts[1], None if symmetric else parts[2], bits, group, numel)


class GroupPacker:
    """`group_quantize_pack` of tensors that differ in their elements and addresses alone.

    Called with a valid x of `numel` elements, contiguous of any shape, and uint8 [span(sizes)] for the codes,
    where sizes = `group_sizes(numel, bits, group, symmetric)`. That begins at a multiple of 16, and the parts
    in it at `starts(sizes)`.
    """

    def __init__(
        self,
        numel: int,
        dtype: torch.dtype,
        bits: int,
        group: int,
        symmetric: bool,
        seed: int | None,
        max_programs: int | None = None,
    ) -> None:
        self._how = bits, group, symmetric, seed, max_programs
        self._sizes = group_sizes(numel, bits, group, symmetric)
        self._starts = starts(self._sizes)
        self._again: dict[int | None, Callable[..., object] | None] = {}  # by device
        self._tail, _ = _arguments(numel, dtype, True, *self._how)

    def __call__(self, x: Tensor, buffer: Tensor) -> None:
        if not use_triton(x):
            self._by_reference(x, buffer)
            return
        source, target = x.data_ptr(), buffer.data_ptr()
        device = x.device.index
        again = None if (source | target) % 16 else self._again.get(device)
        if again is not None and device == current_device():
            parts = [target + start for start in self._starts]
            again(source, parts[0], parts[1], parts[-1], *self._tail)
            return
        at = [Part(buffer, start) for start in self._starts]
        again = _launch_pack(x, at[0], at[1], at[-1], *self._how)
        if not (source | target) % 16:
            self._again[device] = again

    def _by_reference(self, x: Tensor, buffer: Tensor) -> None:
        bits, group, symmetric, seed, _ = self._how
        found = group_quantize_pack_ref(x.detach().reshape(-1), bits, group, symmetric=symmetric, seed=seed)
        for part, section in zip(cut(buffer, self._sizes), found.sections.values(), strict=True):
            part.copy_(section)


group_packer = lru_cache(4096)(GroupPacker)


def group_quantize_pack_into(
    x: Tensor, codes: GroupCodes, *, seed: int | None = None, max_programs: int | None = None
) -> None:
    """The launch of `group_quantize_pack`: fills the parts of `codes`, which begin at multiples of 16."""
    offset, symmetric = (codes.scale, True) if codes.offset is None else (codes.offset, False)
    _launch_pack(x, codes.codes, codes.scale, offset, codes.bits, codes.group, symmetric, seed, max_programs)


def _launch_pack(
    x: Tensor,
    codes: Tensor | Part,
    scale: Tensor | Part,
    offset: Tensor | Part,
    bits: int,
    group: int,
    symmetric: bool,
    seed: int | None,
    max_programs: int | None,
) -> Callable[..., object] | None:
    """`offset`: not used where `symmetric`. Returns what `launch` does."""
    in_pairs = x.data_ptr() % 4 == 0
    if bits == 2 and seed is not None and max_programs is None:  # starting a program weighs most here
        max_programs = RESIDENT * multiprocessors(x.device)
    (numel, number, *constants), count = _arguments(
        x.numel(), x.dtype, in_pairs, bits, group, symmetric, seed, max_programs
    )
    return launch(
        _group_quantize_pack_kernel,
        count,
        (x, codes, scale, offset),
        (numel, number),
        tuple(constants),
        num_warps=1,
        maxnreg=NEAREST_REGISTERS if seed is None else PACK_REGISTERS[bits],
        enable_fp_fusion=False,
    )


def _arguments(
    numel: int,
    dtype: torch.dtype,
    in_pairs: bool,
    bits: int,
    group: int,
    symmetric: bool,
    seed: int | None,
    max_programs: int | None,
) -> tuple[tuple[Any, ...], int]:
    """Those of the kernel behind the addresses, and how many programs. `in_pairs`: x begins at a multiple of
    four bytes."""
    block = 32 * 4 * (16 // dtype.itemsize) // group  # a warp loads four times 16 bytes per thread
    tiles = cdiv(numel, block * group)
    pairs = in_pairs and numel % group == 0 and dtype == torch.bfloat16 and not INTERPRETED.value
    numbers = numel, 0 if seed is None else _as_int32(seed)
    whole = numel % (block * group) == 0
    constants = bits, group, symmetric, seed is not None, numel % group > 0, pairs, whole, block
    count = cdiv(tiles, TILES[seed is not None])
    return (*numbers, *constants), programs(count if count >= MANY else tiles, max_programs)


def group_unpack_dequantize(
    codes: GroupCodes, dtype: torch.dtype, *, max_programs: int | None = None
) -> Tensor:
    """The flat tensor [numel] of `dtype` that `codes` stand for; never waits for the device.

    `max_programs`: the most programs to launch, two warps each. Raises LaneError if `dtype` is not one of
    FLOATS or the parts of `codes` do not fit each other.
    """
    _check_codes(codes, dtype)
    if not use_triton(codes.codes):
        return group_unpack_dequantize_ref(codes, dtype)
    out = torch.empty(codes.numel, dtype=dtype, device=codes.codes.device)
    group_unpack_dequantize_into(codes, out, max_programs=max_programs)
    return out


def group_unpack_dequantize_into(codes: GroupCodes, out: Tensor, *, max_programs: int | None = None) -> None:
    """The launch of `group_unpack_dequantize` into `out` [numel]."""
    numel, group = codes.numel, codes.group
    constants = codes.bits, group, codes.offset is None, numel % group > 0, UNPACK_TILE // group
    launch(
        _group_unpack_dequantize_kernel,
        programs(cdiv(numel, UNPACK_TILE), max_programs),
        (codes.codes, codes.scale, codes.scale if codes.offset is None else codes.offset, out),
        (numel,),
        (*constants, *_LIMITS[out.dtype]),
        num_warps=UNPACK_WARPS,
        enable_fp_fusion=False,
    )


def _as_int32(seed: int) -> int:
    """The number in the range of int32 with the low 32 bits of `seed`."""
    return ((seed + 2**31) & 0xFFFFFFFF) - 2**31


def _check_codes(codes: GroupCodes, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise LaneError(f"groups do not decode to {dtype}: ask for bfloat16, float16 or float32")
    if codes.bits not in GROUP_BITS or codes.group not in GROUP_SIZES or codes.numel < 1:
        raise LaneError(f"no {codes.bits}-bit groups of {codes.group} for {codes.numel} elements")
    sizes = group_sizes(codes.numel, codes.bits, codes.group, codes.offset is None)
    check_parts(codes.sections, sizes)
