"""Every kernel in plain torch: the specification, the CPU path and the oracle of the tests.

Works on any device. All arithmetic is float32, one rounding at a time, in the order written, so that a kernel
built without fused multiply-add gives the same integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.layout import CHANNEL_ROWS, TOKEN_ROWS, SurfaceLayout

GROUP_BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128, 256)
WIDE, WIDE_NONFINITE = 0x7E00, 0x100  # in the scale word of a wide group
NOISE_BITS = 8  # of stochastic rounding
MAX_CODE_BITS = 12
EXACT_BLOCK = 1024  # elements that share a base exponent and an entry of the escape index
EXACT_SLACK = 4  # how far the base exponent may lie above that of the quietest part of a block
EXACT_ZERO = 15  # the 4-bit code that stands for exponent 0
EXACT_SECTIONS = ("base", "codes", "ends", "planes", "odd", "escapes")
EXACT_CHUNK = 256 * EXACT_BLOCK  # elements the reference holds temporaries for


def round_half_up(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


# Projection and surfaces


def project_quantize_ref(
    x: Tensor, components: Tensor | None, offset: Tensor, inv_scale: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """code = clamp(floor((x @ components - offset) * inv_scale + 0.5), 0, levels).

    Args:
        x: [T, D] finite floats.
        components: [D, K] or None for the identity (K = D).
        offset, inv_scale, levels: [K] float32. The mean of the data is folded into `offset`.

    Returns:
        codes [T, K] int16 and the number of codes that the clamp changed, int32 [1] on the device of `x`.
    """
    z = x.float() if components is None else x.float() @ components.float()
    q = round_half_up((z - offset) * inv_scale)
    codes = torch.minimum(q.clamp_min(0.0), levels)
    clamped = (codes != q).sum(dtype=torch.int32).reshape(1)
    return codes.to(torch.int16), clamped


def dequantize_project_ref(
    codes: Tensor, components: Tensor | None, scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """x = (codes * scale) @ components^T + bias: [T, K] codes to [T, D] of `dtype`.

    `bias` is [D] (or [K] when `components` is None) and holds the mean and the projected offset.
    """
    z = codes.float() * scale
    if components is not None:
        z = z @ components.float().t()
    return (z + bias).to(dtype)


def pack_surface_ref(codes: Tensor, surface: Tensor, layout: SurfaceLayout) -> None:
    """Write codes [T, K] into `surface` uint8 [rows, pitch] of `layout`; unused positions get `layout.fill`.

    Bytes between the row's samples and the pitch are not touched.
    """
    grid = torch.full((layout.capacity,), layout.fill, dtype=torch.int32, device=codes.device)
    _mapping_view(grid, layout).copy_(_pad_codes(codes, layout))
    fmt = layout.format
    rows = grid.view(layout.frames, fmt.code_rows(layout.height), layout.width)
    out = surface.view(layout.frames, fmt.rows(layout.height), layout.pitch)
    if fmt.split:
        pairs = (rows & 15).view(layout.frames, layout.height // 2, layout.width, 2)
        out[:, : layout.height, : layout.width] = (rows >> 4).to(torch.uint8)
        out[:, layout.height :, : layout.width] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    elif fmt.itemsize == 1:
        out[:, :, : layout.width] = rows.to(torch.uint8)
    else:
        out.view(torch.int16)[:, :, : layout.width] = (rows << fmt.shift).to(torch.int16)


def unpack_surface_ref(surface: Tensor, layout: SurfaceLayout) -> Tensor:
    """The codes [T, K] int16 that `pack_surface_ref` wrote, or that a decoder put into the same layout."""
    fmt = layout.format
    planes = surface.view(layout.frames, fmt.rows(layout.height), layout.pitch)
    if fmt.split:
        high = planes[:, : layout.height, : layout.width].to(torch.int32) << 4
        low = planes[:, layout.height :, : layout.width].to(torch.int32)
        grid = high | torch.stack((low & 15, low >> 4), dim=-1).view(high.shape)
    elif fmt.itemsize == 1:
        grid = planes[:, :, : layout.width].to(torch.int32)
    else:
        grid = (planes.view(torch.int16)[:, :, : layout.width].to(torch.int32) & 0xFFFF) >> fmt.shift
    padded = _mapping_view(grid.reshape(-1), layout)
    codes = _unpad_codes(padded, layout)
    return codes.to(torch.int16).contiguous()


def project_quantize_pack_ref(
    x: Tensor,
    components: Tensor | None,
    offset: Tensor,
    inv_scale: Tensor,
    levels: Tensor,
    surface: Tensor,
    layout: SurfaceLayout,
) -> Tensor:
    """`project_quantize_ref` followed by `pack_surface_ref`; returns the clamp counter, int32 [1]."""
    codes, clamped = project_quantize_ref(x, components, offset, inv_scale, levels)
    pack_surface_ref(codes, surface, layout)
    return clamped


def unpack_dequantize_project_ref(
    surface: Tensor,
    layout: SurfaceLayout,
    components: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`unpack_surface_ref` followed by `dequantize_project_ref`: surface to [T, D] of `dtype`."""
    return dequantize_project_ref(unpack_surface_ref(surface, layout), components, scale, bias, dtype)


def _mapping_view(grid: Tensor, layout: SurfaceLayout) -> Tensor:
    """View of the used positions of the linear `grid` with one index per padded code (see _pad_codes)."""
    used = grid[: layout.positions]
    if layout.mapping == TOKEN_ROWS:
        return used.view(layout.tokens, layout.stride)
    if layout.mapping == CHANNEL_ROWS:
        return used.view(layout.channels, layout.stride)
    bands = -(-layout.channels // layout.across)
    tiles = used.view(bands, layout.tile_h, layout.width)[:, :, : layout.across * layout.tile_w]
    return tiles.view(bands, layout.tile_h, layout.across, layout.tile_w)


def _pad_codes(codes: Tensor, layout: SurfaceLayout) -> Tensor:
    """[T, K] -> the shape of `_mapping_view`, padded with `layout.fill`."""
    wide = codes.to(torch.int32)
    if layout.mapping == TOKEN_ROWS:
        return _pad_last(wide, layout.stride, layout.fill)
    wide = wide.t()
    if layout.mapping == CHANNEL_ROWS:
        return _pad_last(wide, layout.stride, layout.fill)
    wide = _pad_last(wide, layout.tile_h * layout.tile_w, layout.fill)
    bands = -(-layout.channels // layout.across)
    wide = _pad_last(wide.t(), bands * layout.across, layout.fill).t()
    return wide.reshape(bands, layout.across, layout.tile_h, layout.tile_w).transpose(1, 2)


def _unpad_codes(padded: Tensor, layout: SurfaceLayout) -> Tensor:
    """Inverse of `_pad_codes`."""
    if layout.mapping == TOKEN_ROWS:
        return padded[:, : layout.channels]
    if layout.mapping == CHANNEL_ROWS:
        return padded[:, : layout.tokens].t()
    tiles = padded.transpose(1, 2).reshape(-1, layout.tile_h * layout.tile_w)
    return tiles[: layout.channels, : layout.tokens].t()


def _pad_last(x: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]), value=value)


# Group quantization


@dataclass(frozen=True)
class GroupCodes:
    """A flat tensor of `numel` elements quantized in groups of `group`; the last one is filled up with copies
    of the last element. The parts are bytes, uint8 [*], the same number of them for all data.

    `codes`: group * bits / 8 bytes per group. With n = 8 / bits codes per byte, byte c of a group holds its
    elements c, c + group / n, ..., lowest bits first. `scale`, `offset`: a float16 per group (`offset` is
    None when symmetric). An element is (code - bias) * scale + offset, bias = 2^(bits-1) - 1 when symmetric
    and 0 otherwise.

    A group is *wide* when it holds NaN or Inf, or values that float16 scales cannot describe (see
    `group_quantize_pack_ref`). Its scale word is a NaN, 0x7E00 | nonfinite << 8 | e, its offset word zero;
    its elements are (code - levels) * 2^(e - 127), at most the largest number of the output dtype. A group
    of finite numbers has levels = 2^(bits-1) - 1. One with others has levels = 2^(bits-1) - 2, and its three
    top codes are NaN, -Inf and +Inf, in this order.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    bits: int
    group: int
    numel: int

    @property
    def sections(self) -> dict[str, Tensor]:
        """The parts by name, in order."""
        parts = {"codes": self.codes, "scale": self.scale}
        return parts if self.offset is None else parts | {"offset": self.offset}


def group_quantize_pack_ref(
    x: Tensor, bits: int, group: int, *, symmetric: bool = False, seed: int | None = None
) -> GroupCodes:
    """Quantize flat floats [n], n >= 1, in groups of `group` consecutive elements.

    Asymmetric: offset = the largest float16 <= min, scale = (max - offset) / (2^bits - 1),
    code = (x - offset) / scale. Symmetric: scale = absmax / q, code = x / scale + q with q = 2^(bits-1) - 1.
    Scales are rounded up to float16, so nothing clamps and the error of every element is at most scale / 2
    (scale when rounding is stochastic) before the rounding to the output dtype.

    A group is wide where these numbers leave the range of float16 or a subnormal scale is more than four
    times as coarse as the data needs. Then e is the smallest of 1..255 with 2^(e - 127) * levels >= absmax
    of its finite elements, and their error is at most half of 2^(e - 127) (all of it when stochastic).

    Args:
        seed: None rounds to nearest; a number rounds stochastically, the same way each time (`group_noise`).
    """
    numel = x.numel()
    groups = -(-numel // group)
    padded = torch.cat((x, x[-1:].expand(groups * group - numel))).view(groups, group).float()
    finite = padded.isfinite()
    nonfinite = ~finite.all(1)
    v = torch.where(finite, padded, 0.0)
    top, middle = 2**bits - 1, 2 ** (bits - 1) - 1
    absmax = v.abs().amax(1)
    if symmetric:
        offset, zero, bias = None, torch.zeros_like(absmax), middle
        span = absmax * (1 / middle)
    else:
        low = v.amin(1) + 0.0  # -0 becomes +0
        offset = low.half()
        below = (
            low - torch.clamp_min(low.abs() * 2.0**-11, 0.75 * 2.0**-24)
        ).half()  # half to one step lower
        offset = torch.where(offset.float() > low, below, offset)
        zero, bias = offset.float(), 0
        span = (v.amax(1) - zero) * (1 / top)
    scale = torch.where(span > 0, span * (1 + 2.0**-10) + 0.75 * 2.0**-24, 0.0).half()
    step = scale.float()
    wide = ~(absmax + step + zero.abs()).isfinite() | (step * top > 4 * absmax) | nonfinite

    levels = torch.where(nonfinite, middle - 1, middle)
    e = _wide_exponent(absmax, levels)
    inv = torch.where(wide, 0.5 / _half_step(e), torch.where(step > 0, 1 / step, 0.0))
    t = (v - torch.where(wide, 0.0, zero)[:, None]) * torch.where(levels > 0, inv, 0.0)[:, None]
    at = torch.where(wide, levels, bias).float()[:, None]
    if seed is None:
        q = (t + (at + 2.0**23)).view(torch.int32)  # the code in the low bits, rounded half to even
    else:
        noise = group_noise(seed, groups, group, x.device) * 2.0**-NOISE_BITS
        q = (t + (at + 2.0 ** (23 - NOISE_BITS) + noise)).view(torch.int32) >> NOISE_BITS
    codes = (q & top).to(torch.uint8)
    special = torch.where(padded > 0, top, torch.where(padded < 0, top - 1, top - 2)).to(torch.uint8)
    codes = torch.where(finite, codes, special)

    per_byte = 8 // bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device).view(1, per_byte, 1)
    packed = (codes.view(groups, per_byte, group // per_byte) << shifts).sum(1, dtype=torch.uint8)
    word = torch.where(wide, WIDE | nonfinite * WIDE_NONFINITE | e, scale.view(torch.int16))
    return GroupCodes(
        packed.view(-1),
        word.to(torch.int16).view(torch.uint8),
        None if offset is None else torch.where(wide, 0.0, offset).view(torch.uint8),
        bits,
        group,
        numel,
    )


def group_unpack_dequantize_ref(codes: GroupCodes, dtype: torch.dtype) -> Tensor:
    """The flat tensor [numel] of `dtype` that `codes` stand for, clamped to the finite range of `dtype`.

    Scale words that the encoder does not write have a meaning too: every one with all exponent bits set is a
    wide group.
    """
    device, per_byte, middle = codes.codes.device, 8 // codes.bits, 2 ** (codes.bits - 1) - 1
    scale = codes.scale.view(torch.float16)
    word = scale.view(torch.int16).int()
    groups = scale.numel()
    shifts = torch.arange(0, 8, codes.bits, dtype=torch.uint8, device=device).view(1, per_byte, 1)
    q = ((codes.codes.view(groups, 1, -1) >> shifts) & (2**codes.bits - 1)).view(groups, codes.group)
    if codes.offset is None:
        v = (q.float() - middle) * scale.float()[:, None]
    else:
        v = q.float() * scale.float()[:, None] + codes.offset.view(torch.float16).float()[:, None]
    wide = (word & 0x7C00) == 0x7C00
    nonfinite = wide & (word & WIDE_NONFINITE > 0)
    levels = torch.where(nonfinite, middle - 1, middle)[:, None]
    v = torch.where(wide[:, None], (q.float() - levels) * _half_step(word & 255)[:, None] * 2, v)
    finfo = torch.finfo(dtype)
    out = v.clamp(finfo.min, finfo.max).to(dtype)
    for code, value in enumerate((torch.nan, -torch.inf, torch.inf), 2**codes.bits - 3):
        out = torch.where(nonfinite[:, None] & (q == code), value, out)
    return out.flatten()[: codes.numel]


def _wide_exponent(absmax: Tensor, levels: Tensor) -> Tensor:
    """int32: the smallest e of 1..255 with 2^(e - 127) * levels >= absmax, both as float32 bits."""
    gap = absmax.view(torch.int32) - levels.clamp_min(1).float().view(torch.int32)
    return ((gap + 2**23 - 1 >> 23) + 127).clamp(1, 255)


def _half_step(e: Tensor) -> Tensor:
    """2^(e - 128) as float32 for e of 1..255: half a step, since 2^128 is no float32."""
    return (e - 1 << 23).clamp_min(0x400000).view(torch.float32)


def group_noise(seed: int, groups: int, group: int, device: torch.device | None = None) -> Tensor:
    """int32 [groups, group] of 0..255, a function of (seed, index) alone.

    Byte j, lowest first, of word g * group / 4 + i is for element i + j * group / 4 of group g. Words 2 n and
    2 n + 1 are hash n and that hash times an odd number, its upper half added to the lower by exclusive or.
    """
    first = hash32(seed, groups * group // 8, device)
    second = (first * 0x9E3779B1) & 0xFFFFFFFF
    words = torch.stack((first, second ^ (second >> 16)), 1).view(groups, 1, group // 4)
    shifts = torch.arange(0, 32, NOISE_BITS, device=device).view(1, 4, 1)
    return (words >> shifts & 255).view(groups, group).int()


def hash32(seed: int, numel: int, device: torch.device | None = None) -> Tensor:
    """int64 [numel] of 0..2^32 - 1: the lowbias32 hash of (seed, index)."""
    mask = 0xFFFFFFFF
    index = torch.arange(numel, dtype=torch.int64, device=device)
    h = (index & mask) ^ (((index >> 32) * 0x85EBCA6B) & mask)
    h = (h * 0x9E3779B1 + (seed & mask)) & mask
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
    h = ((h ^ (h >> 15)) * 0x846CA68B) & mask
    return h ^ (h >> 16)


# Bit planes


def packed_bits_size(tokens: int, widths: list[int]) -> int:
    """Bytes of `pack_bits` for `tokens` rows of channels with `widths` bits."""
    return -(-tokens // 8) * sum(widths)


def pack_bits_ref(codes: Tensor, widths: list[int]) -> Tensor:
    """Codes [T, K] of `widths[k]` (0..12) bits to bit planes, uint8 [ceil(T / 8) * sum(widths)].

    The planes of channel 0 come first, least significant bit first; in the plane of bit j of channel k, bit i
    of byte b is bit j of code (8 b + i, k). Rows past T count as zero.
    """
    octets = -(-codes.shape[0] // 8)
    padded = _pad_last(codes.t(), 8 * octets, 0).view(len(widths), octets, 8)
    weights = 2.0 ** torch.arange(8, dtype=torch.float32, device=codes.device)
    planes = torch.empty((sum(widths), octets), dtype=torch.uint8, device=codes.device)
    for j, (channel, plane) in enumerate(_bit_planes(widths, codes.device)):
        bits = (padded[channel] >> j) & 1
        planes[plane] = (bits.float() @ weights).to(torch.uint8)
    return planes.view(-1)


def unpack_bits_ref(packed: Tensor, widths: list[int], tokens: int) -> Tensor:
    """Inverse of `pack_bits_ref`: codes [tokens, K] int16."""
    octets = -(-tokens // 8)
    planes = packed.view(sum(widths), octets, 1)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    codes = torch.zeros((len(widths), octets, 8), dtype=torch.int16, device=packed.device)
    for j, (channel, plane) in enumerate(_bit_planes(widths, packed.device)):
        bits = (planes[plane] >> shifts) & 1
        codes[channel] |= bits.to(torch.int16) << j
    return codes.flatten(1)[:, :tokens].t().contiguous()


def _bit_planes(widths: list[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For every bit j: the channels wider than j and the numbers of their planes of bit j, int64 both."""
    width = torch.tensor(widths, dtype=torch.int64, device="cpu")
    first = torch.cumsum(width, 0) - width
    channels = [torch.nonzero(width > j).view(-1) for j in range(max(widths, default=0))]
    return [(k.to(device), (first[k] + j).to(device)) for j, k in enumerate(channels)]


# Lossless floats


@dataclass(frozen=True)
class FloatFields:
    """Bits of one float: `exponent` of them are coded, the `rest` = sign and mantissa is stored raw."""

    word: torch.dtype
    mantissa: int
    exponent: int

    @property
    def rest(self) -> int:
        return self.mantissa + 1

    @property
    def planes(self) -> int:
        """Byte planes of the rest."""
        return self.rest // 8

    @property
    def odd_bits(self) -> int:
        """Bits of the rest beyond its byte planes."""
        return self.rest % 8

    @property
    def droppable(self) -> int:
        """Byte planes that are left out where they are zero: those of floats that have several."""
        return self.planes if self.planes > 1 else 0

    def exponents(self, word: Tensor) -> Tensor:
        return (word >> self.mantissa).bitwise_and(2**self.exponent - 1)


EXACT_FIELDS = {
    torch.bfloat16: FloatFields(torch.int16, 7, 8),
    torch.float16: FloatFields(torch.int16, 10, 5),
    torch.float32: FloatFields(torch.int32, 23, 8),
}


@dataclass(frozen=True)
class ExactCodes:
    """A flat float tensor of `numel` elements, losslessly, in blocks of EXACT_BLOCK; zeros fill up the last.

    The parts are bytes, uint8 [*]. `base`: an exponent per block. `codes`: 4 bits per element, byte c of a
    block holds its elements c (low half) and c + EXACT_BLOCK / 2. Code d < 15 is the exponent base - d, 15
    the exponent 0, to which escapes add bits. `ends`: int32 per block, escapes in all blocks up to this one,
    so that blocks decode independently. `planes`: the byte planes of sign << mantissa_bits | mantissa, lowest
    first, without those in `zero_planes` (bit p set: plane p is zero everywhere; float32 only). `odd`: the
    bits above the byte planes (float16 has 3) as bit planes, lowest first; bit i of byte b is that of element
    8 b + i.

    `escapes`: 16 bits each: the number of an element in its block, and from bit 10 on what is set in its
    exponent: p < 32 stands for base - 15 - p, 32 + n for the low half n of an exponent, 48 + n for its high
    half. Exponents that the first form cannot give take the two others. The high halves of a block come last;
    apart from that the element 256 q + 8 r + i, i < 8, r < 32, is sorted by (r, q, i).
    """

    base: Tensor
    codes: Tensor
    ends: Tensor
    planes: Tensor
    odd: Tensor
    escapes: Tensor
    zero_planes: int
    numel: int

    @classmethod
    def of(cls, parts: Iterable[Tensor], zero_planes: int, numel: int) -> ExactCodes:
        """From the parts in order."""
        base, codes, ends, planes, odd, escapes = parts
        return cls(base, codes, ends, planes, odd, escapes, zero_planes, numel)

    @property
    def sections(self) -> dict[str, Tensor]:
        """The parts by name, in order."""
        return {name: getattr(self, name) for name in EXACT_SECTIONS}

    @property
    def nbytes(self) -> int:
        return sum(part.numel() for part in self.sections.values())


def exact_sizes(
    dtype: torch.dtype, numel: int, zero_planes: int, escapes: int
) -> tuple[int, int, int, int, int, int]:
    """Bytes of the parts of `ExactCodes` in order."""
    f, blocks = EXACT_FIELDS[dtype], -(-numel // EXACT_BLOCK)
    stored = f.planes - zero_planes.bit_count()
    padded = blocks * EXACT_BLOCK
    return blocks, padded // 2, 4 * blocks, stored * padded, f.odd_bits * padded // 8, 2 * escapes


def exact_base(exponent: Tensor, special: int) -> Tensor:
    """Base exponents [blocks] for exponents [blocks, EXACT_BLOCK]; `special` is that of Inf and NaN.

    The largest exponent, but no more than EXACT_SLACK above the smallest of the largest exponents of the 64
    parts of the block, so that a few outliers do not push the others out of reach. Part j has the elements
    8 j..8 j + 7 and those EXACT_BLOCK / 2 behind them. Exponents 0 and `special`, and parts without others,
    do not count.
    """
    part = torch.where(exponent == special, 0, exponent).view(-1, 2, EXACT_BLOCK // 16, 8).amax((1, 3))
    floor = torch.where(part > 0, part, special).amin(1)
    return torch.minimum(part.amax(1), floor + EXACT_SLACK)


def exact_encode_ref(x: Tensor) -> ExactCodes | None:
    """Code the exponents of flat bf16, fp16 or fp32 [n], n >= 1; None when that would not make x smaller."""
    f = EXACT_FIELDS[x.dtype]
    words = x.view(f.word)
    chunks = [words[i : i + EXACT_CHUNK] for i in range(0, x.numel(), EXACT_CHUNK)]
    parts = zip(*(_encode_chunk(word, f) for word in chunks), strict=True)
    base, codes, counts, planes, odd, escapes = (torch.cat(part, dim=-1) for part in parts)
    used = planes.any(1).bool().tolist() if f.droppable else [True]  # `any` of uint8 is uint8
    encoded = ExactCodes(
        base=base,
        codes=codes,
        ends=counts.cumsum(0, dtype=torch.int32).view(torch.uint8),
        planes=(planes if all(used) else planes[used]).reshape(-1),
        odd=odd.reshape(-1),
        escapes=escapes.view(torch.uint8),
        zero_planes=sum(1 << p for p, u in enumerate(used) if not u),
        numel=x.numel(),
    )
    return encoded if encoded.nbytes < x.numel() * x.element_size() else None


def _encode_chunk(word: Tensor, f: FloatFields) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """base, codes, counts of escapes, planes [planes, *], odd bits [odd_bits, *], escapes of words [n]."""
    blocks = _pad_last(word, -(-word.numel() // EXACT_BLOCK) * EXACT_BLOCK, 0).view(-1, EXACT_BLOCK)
    exponent = f.exponents(blocks).to(torch.int32)
    base = exact_base(exponent, 2**f.exponent - 1)
    code = base[:, None] - exponent
    below = code - EXACT_ZERO  # 0..31: one escape
    code = torch.where((code >= 0) & (code < EXACT_ZERO), code, EXACT_ZERO)
    escaped = (code == EXACT_ZERO) & (exponent > 0)
    single = (below >= 0) & (below < 32)
    first = torch.where(single, below, 32 + (exponent & 15))
    listed = _escape_order(torch.stack((escaped, escaped & ~single), 1))
    place = torch.arange(EXACT_BLOCK, dtype=torch.int32, device=word.device)
    escapes = _escape_order(torch.stack((first, 48 + (exponent >> 4)), 1) << 10 | place)[listed]
    low, high = code.to(torch.uint8).view(-1, 2, EXACT_BLOCK // 2).unbind(1)
    flat = blocks.view(-1)
    rest = ((flat >> (f.exponent + f.mantissa)) & 1) << f.mantissa | flat & (2**f.mantissa - 1)
    top = (rest >> (8 * f.planes)).to(torch.int16)
    return (
        base.to(torch.uint8),
        (low | high << 4).view(-1),
        listed.sum(1, dtype=torch.int32),
        torch.stack([((rest >> (8 * p)) & 255).to(torch.uint8) for p in range(f.planes)]),
        pack_bits_ref(top[:, None], [f.odd_bits]).view(f.odd_bits, flat.numel() // 8),
        escapes.to(torch.int16),
    )


def _escape_order(x: Tensor) -> Tensor:
    """[blocks, 2, EXACT_BLOCK] to [blocks, 2 * EXACT_BLOCK] in the order of escapes."""
    return x.view(-1, 2, 4, 32, 8).transpose(2, 3).reshape(-1, 2 * EXACT_BLOCK)


def exact_decode_ref(codes: ExactCodes, dtype: torch.dtype) -> Tensor:
    """The flat tensor [numel] that was encoded, bit for bit. LaneError if `ends` does not fit `escapes`."""
    f = EXACT_FIELDS[dtype]
    out = torch.empty(codes.base.numel() * EXACT_BLOCK, dtype=f.word, device=codes.codes.device)
    stored = [p for p in range(f.planes) if not codes.zero_planes >> p & 1]
    planes = codes.planes.view(len(stored), out.numel())
    odd = codes.odd.view(f.odd_bits, out.numel() // 8)
    ends = codes.ends.view(torch.int32).long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    escapes = codes.escapes.view(torch.int16).int()
    if ends[-1] != escapes.numel() or counts.min() < 0 or counts.max() > 2 * EXACT_BLOCK:
        raise LaneError(f"exact codes end their escapes at {int(ends[-1])}, {escapes.numel()} are listed")
    for start in range(0, out.numel(), EXACT_CHUNK):
        stop = min(start + EXACT_CHUNK, out.numel())
        first, last = start // EXACT_BLOCK, stop // EXACT_BLOCK
        pairs = codes.codes[start // 2 : stop // 2].view(-1, 1, EXACT_BLOCK // 2)
        code = torch.cat((pairs & 15, pairs >> 4), dim=1).view(-1, EXACT_BLOCK)
        base = codes.base[first:last].to(torch.int32)
        exponent = torch.where(code < EXACT_ZERO, base[:, None] - code, 0).view(-1)
        mine = escapes[int(ends[first] - counts[first]) : int(ends[last - 1])]
        block = torch.arange(last - first, device=out.device).repeat_interleave(counts[first:last])
        place, what = block * EXACT_BLOCK + (mine & 1023), mine >> 10 & 63
        added = (base[block] - EXACT_ZERO - what, what & 15, (what & 15) << 4)
        for kind, bits in enumerate(added):
            chosen = (what >= 32).int() + (what >= 48).int() == kind
            exponent[place[chosen]] |= bits[chosen]
        octets = odd[:, start // 8 : stop // 8].reshape(-1)
        rest = unpack_bits_ref(octets, [f.odd_bits], stop - start)[:, 0].to(f.word) << (8 * f.planes)
        for p, plane in zip(stored, planes, strict=True):
            rest |= plane[start:stop].to(f.word) << (8 * p)
        sign = (rest >> f.mantissa) << (f.exponent + f.mantissa)
        exponent = (exponent & 2**f.exponent - 1).to(f.word) << f.mantissa
        out[start:stop] = sign | exponent | rest & (2**f.mantissa - 1)
    return out[: codes.numel].view(dtype)
