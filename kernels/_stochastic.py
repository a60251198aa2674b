"""Device code of stochastic rounding. The format of its noise is `group_noise` in reference.py.

The steps of float32 from 2^15 to 2^16 are 2^-8, so what is added to 2^15 reads as a code in the second byte
and a fraction in the first, and instructions on bytes move noise and codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sidelane.kernels import reference

NOISE_BITS = tl.constexpr(reference.NOISE_BITS)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by NumPy, for the tests


@triton.jit
def hash32(seed, base, local):  # type: ignore[no-untyped-def]
    """`hash32` of reference.py of base + local, which all have the high word of `base`."""
    low = base.to(tl.uint32) + local.to(tl.uint32)
    h = low ^ ((base >> 32).to(tl.uint32) * 0x85EBCA6B)
    h = h * 0x9E3779B1 + seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def hashes(seed, first, GROUPS: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """A random word for the first four of every eight elements of groups first..: [GROUPS, 1, C / 2]."""
    g = tl.arange(0, GROUPS)[:, None, None]
    return hash32(seed, first * (C // 2), g * (C // 2) + tl.arange(0, C // 2)[None, None, :])


@triton.jit
def second_hashes(h):  # type: ignore[no-untyped-def]
    """The words of the second four of the eight."""
    other = h * 0x9E3779B1
    return other ^ (other >> 16)


@triton.jit
def at_and_noise(at, words):  # type: ignore[no-untyped-def]
    """float32 2^15 + at + noise / 2^8 of the whole numbers `at` [G] and words [G, 1, C]; [G, 4, C]."""
    bits = (0x47000000 + (at.to(tl.uint32) << NOISE_BITS))[:, None, None]
    j = tl.arange(0, 4)[None, :, None]
    if INTERPRETED:
        bits = bits | ((words >> (8 * j)) & 255)
    else:
        # program_id(1) is 0. Compilers do not know, keep `bits` in a register, and the selector need not be.
        bits += tl.program_id(1).to(tl.uint32)
        asm: tl.constexpr = "prmt.b32 $0, $1, $2, $3;"  # byte j of the word below the upper three of `bits`
        operands = [words, bits, 0x7650 + j]
        bits = tl.inline_asm_elementwise(asm, "=r,r,r,r", operands, tl.uint32, True, 1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def merge(codes, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes in the second bytes of [G, N, M, C] next to each other, in the second bytes of [G, M, C]."""
    G: tl.constexpr = codes.shape[0]
    N: tl.constexpr = codes.shape[1]
    M: tl.constexpr = codes.shape[2]
    C: tl.constexpr = codes.shape[3]
    if N == 1:
        out = tl.reshape(codes, (G, M, C))
    else:
        low, high = tl.split(tl.permute(tl.reshape(codes, (G, 2, N // 2 * M, C)), (0, 2, 3, 1)))
        high = high << (BITS * N // 2)
        LOW: tl.constexpr = 0x0F00 if N * BITS == 8 else 0x3300  # bits that `low` has its codes in
        if INTERPRETED:
            both = (low & LOW) | (high & (0xFF00 - LOW))
        else:
            asm: tl.constexpr = "lop3.b32 $0, $1, $2, $3, 0xca;"  # $1 ? $2 : $3
            operands = [tl.full(low.shape, LOW, tl.uint32), low, high]
            both = tl.inline_asm_elementwise(asm, "=r,r,r,r", operands, tl.uint32, True, 1)
        out = merge(tl.reshape(both, (G, N // 2, M, C)), BITS)
    return out


@triton.jit
def second_bytes(words):  # type: ignore[no-untyped-def]
    """Bits 8 to 15 as uint8."""
    if INTERPRETED:
        out = (words >> 8).to(tl.uint8)
    else:
        out = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            prmt.b32 a, $1, $2, 0x51; prmt.b32 b, $3, $4, 0x51; prmt.b32 $0, a, b, 0x5410; }""",
            "=r,r,r,r,r", [words], tl.uint8, True, 4,
        )  # fmt: skip
    return out
