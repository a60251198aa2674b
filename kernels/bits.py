"""Bit planes of codes with a width per channel, one launch each way. Format: `pack_bits_ref`."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidelane.errors import LaneError
from sidelane.kernels._launch import cdiv, use_triton
from sidelane.kernels.reference import MAX_CODE_BITS, pack_bits_ref, packed_bits_size, unpack_bits_ref

BLOCK_CHANNELS = 32  # channels per program at most
BLOCK_PAIRS = 1024  # (byte, channel) pairs per program


@triton.jit  # type: ignore[untyped-decorator]
def _block(  # type: ignore[no-untyped-def]
    first_ptr, channels, BLOCK_BYTES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Bytes b, channels k, first plane and width of each channel, for one program.

    `first` int64 [K + 1]: planes before each channel.
    """
    b = tl.program_id(0).to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    if BLOCK_K > 1:  # one channel starts at zero; the compiler, seeing that, stores eight codes at once
        k += tl.program_id(1) * BLOCK_K
    first = tl.load(first_ptr + k, mask=k < channels, other=0)
    width = (tl.load(first_ptr + k + 1, mask=k < channels, other=0) - first).to(tl.int32)
    return b, k, first, width


@triton.jit
def _load_lanes(codes_ptr, t, k, tokens, channels, stride_t, stride_k):  # type: ignore[no-untyped-def]
    """Codes (t, k) in the low 16 bits of int64, zero outside."""
    at = codes_ptr + t[:, None] * stride_t + k[None, :] * stride_k
    mask = (t < tokens)[:, None] & (k < channels)[None, :]
    return tl.load(at, mask=mask, other=0).to(tl.int64) & 0xFFFF


@triton.jit
def _gather_nibble(x):  # type: ignore[no-untyped-def]
    """Bits 0, 16, 32 and 48 of int64 as bits 0..3."""
    x &= 0x0001000100010001
    return (x | x >> 15 | x >> 30 | x >> 45) & 15


@triton.jit  # type: ignore[untyped-decorator]
def _pack_bits_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, first_ptr, packed_ptr, tokens, channels, stride_t, stride_k,
    BLOCK_BYTES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """packed[(first[k] + j) * ceil(T / 8) + b] = sum over i < 8 of bit j of code (8 b + i, k) << i.

    Tiles are [b, k]. The eight codes of a byte become two int64 words of four 16-bit lanes, then planes.
    """
    b, k, first, width = _block(first_ptr, channels, BLOCK_BYTES, BLOCK_K)
    deepest = tl.max(width, axis=0)
    if deepest == 0:
        return
    low = tl.zeros((BLOCK_BYTES, BLOCK_K), dtype=tl.int64)
    high = tl.zeros((BLOCK_BYTES, BLOCK_K), dtype=tl.int64)
    for i in tl.static_range(4):
        shift = 16 * i
        low |= _load_lanes(codes_ptr, 8 * b + i, k, tokens, channels, stride_t, stride_k) << shift
        high |= _load_lanes(codes_ptr, 8 * b + i + 4, k, tokens, channels, stride_t, stride_k) << shift
    octets = (tokens - 1) // 8 + 1
    for j in range(deepest):
        byte = _gather_nibble(low >> j) | _gather_nibble(high >> j) << 4
        at = packed_ptr + (first + j)[None, :] * octets + b[:, None]
        tl.store(at, byte.to(tl.uint8), mask=(b < octets)[:, None] & (j < width)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_bits_kernel(  # type: ignore[no-untyped-def]
    packed_ptr, first_ptr, codes_ptr, tokens, channels, BLOCK_BYTES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """code (8 b + i, k) = sum over j of bit i of packed[(first[k] + j) * ceil(T / 8) + b] << j.

    Tiles are [b, k] and [i, b, k].
    """
    b, k, first, width = _block(first_ptr, channels, BLOCK_BYTES, BLOCK_K)
    i = tl.arange(0, 8)[:, None, None]
    octets = (tokens - 1) // 8 + 1
    codes = tl.zeros((8, BLOCK_BYTES, BLOCK_K), dtype=tl.int32)
    for j in range(tl.max(width, axis=0)):
        at = packed_ptr + (first + j)[None, :] * octets + b[:, None]
        byte = tl.load(at, mask=(b < octets)[:, None] & (j < width)[None, :], other=0).to(tl.int32)
        codes |= ((byte[None, :, :] >> i) & 1) << j
    t = 8 * b[None, :, None] + i
    mask = (t < tokens) & (k < channels)[None, None, :]
    tl.store(codes_ptr + t * channels + k[None, None, :], codes.to(tl.int16), mask=mask)


def pack_bits(codes: Tensor, widths: list[int]) -> Tensor:
    """Codes int16 [T, K], any strides, of `widths[k]` bits to bit planes, uint8 [packed_bits_size].

    Bits of a code above its width are dropped. Raises LaneError for anything else.
    """
    if codes.ndim != 2 or codes.dtype != torch.int16:
        raise LaneError(f"codes are {codes.dtype} {tuple(codes.shape)}: pack int16 [tokens, channels]")
    _check_widths(widths, codes.shape[1])
    if not use_triton(codes):
        return pack_bits_ref(codes, widths)
    size = packed_bits_size(codes.shape[0], widths)
    packed = torch.empty(size, dtype=torch.uint8, device=codes.device)
    pack_bits_into(codes, widths, packed)
    return packed


def pack_bits_into(codes: Tensor, widths: list[int], packed: Tensor) -> None:
    """The launch of `pack_bits` into `packed` uint8 [packed_bits_size(T, widths)]."""
    tokens, channels = codes.shape
    if packed.numel() == 0:
        return
    grid, blocks = _tiles(tokens, channels)
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        _pack_bits_kernel[grid](
            codes,
            _first_planes(widths, codes.device),
            packed,
            tokens,
            channels,
            codes.stride(0),
            codes.stride(1),
            **blocks,
        )


def unpack_bits(packed: Tensor, widths: list[int], tokens: int) -> Tensor:
    """Codes int16 [tokens, K] from the planes uint8 [packed_bits_size] that `pack_bits` wrote.

    Raises LaneError where the size does not fit `tokens` and `widths`.
    """
    _check_widths(widths, len(widths))
    size = packed_bits_size(tokens, widths)
    if tokens < 0 or packed.shape != (size,) or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise LaneError(
            f"planes are {packed.dtype} {tuple(packed.shape)}: {tokens} tokens need uint8 [{size}]"
        )
    if not use_triton(packed):
        return unpack_bits_ref(packed, widths, tokens)
    codes = torch.empty((tokens, len(widths)), dtype=torch.int16, device=packed.device)
    unpack_bits_into(packed, widths, codes)
    return codes


def unpack_bits_into(packed: Tensor, widths: list[int], codes: Tensor) -> None:
    """The launch of `unpack_bits` into contiguous `codes` int16 [tokens, K]."""
    tokens, channels = codes.shape
    if codes.numel() == 0:
        return
    grid, blocks = _tiles(tokens, channels)
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        _unpack_bits_kernel[grid](
            packed, _first_planes(widths, codes.device), codes, tokens, channels, **blocks
        )


def _tiles(tokens: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and block sizes: up to BLOCK_CHANNELS channels, the rest of BLOCK_PAIRS along the tokens."""
    block_k = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    block_bytes = BLOCK_PAIRS // block_k
    grid = cdiv(tokens, 8 * block_bytes), cdiv(channels, block_k)
    return grid, {"BLOCK_BYTES": block_bytes, "BLOCK_K": block_k}


def _first_planes(widths: list[int], device: torch.device) -> Tensor:
    """`_planes` for work on the current stream."""
    table = _planes(tuple(widths), device)
    if table.is_cuda:
        table.record_stream(torch.cuda.current_stream(device))  # of one that is forgotten meanwhile
    return table


@lru_cache(maxsize=1024)
def _planes(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Planes before each channel and their total, int64 [K + 1]."""
    return torch.tensor((0, *widths), dtype=torch.int64, device="cpu").cumsum(0).to(device)


def _check_widths(widths: list[int], channels: int) -> None:
    if len(widths) != channels:
        raise LaneError(f"{len(widths)} widths for {channels} channels: give one per channel")
    if not all(0 <= w <= MAX_CODE_BITS for w in widths):
        raise LaneError(f"widths {min(widths)}..{max(widths)} are outside 0..{MAX_CODE_BITS}")
