"""Group quantization: the reference against bounds and bytes worked out by hand, the kernels against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from guarded import Guarded
from sidelane.errors import LaneError
from sidelane.kernels import groups
from sidelane.kernels.groups import group_quantize_pack, group_unpack_dequantize
from sidelane.kernels.reference import (
    GROUP_BITS,
    GROUP_SIZES,
    GroupCodes,
    group_quantize_pack_ref,
    group_unpack_dequantize_ref,
    uniform_hash,
)

FLOATS = groups.FLOATS
PARTS = ("packed", "scale", "offset", "escapes")


@pytest.fixture(autouse=True)
def _silent_overflow() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of an overflow that a GPU does not notice."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def hard_values(numel: int, dtype: torch.dtype) -> Tensor:
    """Activations of many magnitudes with zeros, constants, denormals; every 300 elements one to escape."""
    x = torch.randn(numel) * torch.exp(3 * torch.randn(numel // 64 + 1)).repeat_interleave(64)[:numel]
    x[100:190] = 0.0
    x[130:140] = -0.0
    x[900:1200] = 1.2345
    x[1300:1400] *= 1e-6
    x[1500:1600] *= 1e-9
    for i, value in enumerate((nan, inf, -inf, 1e30, -7e4, 65504.0, 1e-30)):
        x[300 * i + 5 : 300 * i + 6] = value
    return x.to(dtype)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    as_bytes = [t.contiguous().cpu().view(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*as_bytes)


def assert_same_codes(got: GroupCodes, want: GroupCodes) -> None:
    different = [name for name in PARTS if not same_bits(getattr(got, name), getattr(want, name))]
    assert different == []
    assert (got.bits, got.group, got.numel) == (want.bits, want.group, want.numel)


def assert_within_bound(x: Tensor, codes: GroupCodes, *, stochastic: bool) -> None:
    """|x - decoded| <= scale / 2 (scale when stochastic) + float32 steps + rounding to the dtype.

    Encoding has four roundings of at most 2^-24 of a code below 2^bits or of x, decoding two: below 2^-21.
    """
    y = group_unpack_dequantize(codes, x.dtype)
    scale = codes.scale.double().repeat_interleave(codes.group)[: codes.numel]
    escaped = scale.isnan()
    assert same_bits(x[escaped], y[escaped])
    finfo = torch.finfo(x.dtype)
    size = x.double().abs()
    coded = scale * (1.0 if stochastic else 0.5)
    arithmetic = (2**codes.bits * scale + size) * 2.0**-21
    rounding = (size + coded + arithmetic) * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
    error = (x.double() - y.double()).abs()
    assert bool((error <= coded + arithmetic + rounding)[~escaped].all())


def python_hash(seed: int, index: int) -> float:
    """uniform_hash of one index in Python integers."""
    m = 0xFFFFFFFF
    h = (index & m) ^ ((index >> 32) * 0x85EBCA6B & m)
    h = (h * 0x9E3779B1 + seed) & m
    h = ((h ^ h >> 16) * 0x7FEB352D) & m
    h = ((h ^ h >> 15) * 0x846CA68B) & m
    return ((h ^ h >> 16) >> 8) / 2**24


# The format


def test_two_bit_bytes() -> None:
    x = torch.tensor([0.0, 1, 2, 3, 0, 1, 2, 3] + [1.0] * 8 + [2.0] * 8 + [3.0] * 8)
    codes = group_quantize_pack(x, 2, 32)
    # Byte c: elements c, c + 8, c + 16, c + 24, lowest bits first: 0b11_10_01_00 + x[c].
    assert bytes(codes.packed.flatten().tolist()).hex() == "e4e5e6e7" * 2
    # span 1 raised by 2^-10 and less than a step of float16, rounded to nearest: 1 + 2^-10.
    assert codes.scale.view(torch.int16).tolist() == [0x3C01]
    assert codes.offset is not None and codes.offset.view(torch.int16).tolist() == [0]


def test_symmetric_eight_bit_bytes() -> None:
    x = torch.zeros(33)
    x[:4] = torch.tensor([127.0, -127.0, 1.0, -1.0])
    x[32] = nan
    codes = group_quantize_pack(x, 8, 32, symmetric=True)
    assert bytes(codes.packed[0].tolist()).hex() == "fe00807e" + "7f" * 28
    assert bytes(codes.packed[1].tolist()).hex() == "00" * 32
    assert codes.scale.view(torch.int16).tolist() == [0x3C01, 0x7E00]
    assert codes.offset is None
    assert codes.escapes.shape == (1, 32) and codes.escapes.isnan().all()  # copies of the last element


def test_offset_is_the_largest_float16_at_or_below_the_minimum() -> None:
    """Between all neighbours in float16: at the lower one, beside both, beside their middle."""
    positive = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    steps = torch.cat((-positive.flip(0), positive[1:]))
    low, high = steps[:-1], steps[1:]
    middle = ((low.double() + high.double()) / 2).float()
    beside = [low, torch.nextafter(low, high), torch.nextafter(high, low)]
    beside += [torch.nextafter(middle, low), middle, torch.nextafter(middle, high)]
    for minimum in beside:
        x = torch.where(torch.arange(32) == 7, minimum[:, None], 65504.0)
        codes = group_quantize_pack(x.flatten(), 2, 32)
        assert codes.offset is not None
        assert torch.equal(codes.offset.float(), low)


# Error bounds


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", GROUP_BITS)
def test_error_bound(bits: int, symmetric: bool, seed: int | None, dtype: torch.dtype) -> None:
    x = hard_values(5003, dtype)
    codes = group_quantize_pack(x, bits, 64, symmetric=symmetric, seed=seed)
    assert 3 <= len(codes.escapes) <= 12  # the planted values and no group of ordinary ones
    assert_within_bound(x, codes, stochastic=seed is not None)


@example(values=[5.5e-23], bits=2, symmetric=False, seed=None, dtype=torch.bfloat16)  # scale 2^-24, escaped
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=80),
    bits=st.sampled_from(GROUP_BITS),
    symmetric=st.booleans(),
    seed=st.none() | st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(FLOATS),
)
def test_error_bound_of_any_floats(
    values: list[float], bits: int, symmetric: bool, seed: int | None, dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=torch.float32).to(dtype)
    codes = group_quantize_pack(x, bits, 32, symmetric=symmetric, seed=seed)
    assert_within_bound(x, codes, stochastic=seed is not None)


@pytest.mark.parametrize("bits", GROUP_BITS)
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_ordinary_values_do_not_escape(bits: int, group: int) -> None:
    codes = group_quantize_pack(torch.randn(4096), bits, group)
    assert codes.escapes.shape == (0, group)


def test_constant_groups_come_back_within_the_offset_step() -> None:
    x = torch.full((64,), 1.2345)
    y = group_unpack_dequantize(group_quantize_pack(x, 2, 64), torch.float32)
    assert float((x - y).abs().max()) <= 1.2345 * 2.0**-10


def test_codes_do_not_hold_the_graph_of_their_input() -> None:
    x = torch.tensor([1.0, nan]).repeat(32).requires_grad_()
    codes = group_quantize_pack(x, 4, 32)
    assert not any(
        part.requires_grad for part in (codes.scale, codes.offset, codes.escapes) if part is not None
    )


def test_escaped_groups_keep_every_bit() -> None:
    payload = torch.tensor([0x7FC0, 0x7F81, -0x007F, 0x7F80, -0x0080, 1, 0, -0x8000], dtype=torch.int16)
    x = payload.repeat(8).view(torch.bfloat16)
    codes = group_quantize_pack(x, 4, 32)
    assert codes.scale.isnan().all()
    assert same_bits(group_unpack_dequantize(codes, torch.bfloat16), x)


def test_decoding_stays_finite_at_the_top_of_float16() -> None:
    x = torch.full((32,), 65504.0, dtype=torch.float16)
    x[0] = 0
    codes = group_quantize_pack(x, 2, 32)
    assert group_unpack_dequantize(codes, torch.float16).isfinite().all()


# Stochastic rounding


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean error over n draws, in codes, has a standard deviation of at most 1 / (2 sqrt(n))."""
    x, seeds = torch.linspace(0, 3, 4096), 256
    decoded = torch.stack(
        [group_unpack_dequantize(group_quantize_pack(x, 2, 256, seed=s), x.dtype) for s in range(seeds)]
    )
    scale = group_quantize_pack(x, 2, 256).scale.double().repeat_interleave(256)
    error = (decoded.double() - x.double()) / scale
    assert abs(float(error.mean())) < 5 * 0.5 / error.numel() ** 0.5
    assert float(error.mean(0).abs().max()) < 6 * 0.5 / seeds**0.5
    assert float(error.mean(1).abs().max()) < 6 * 0.5 / x.numel() ** 0.5


def test_stochastic_rounding_repeats_with_its_seed() -> None:
    x = torch.randn(4096)
    first, again, other = (group_quantize_pack(x, 4, 64, seed=s) for s in (5, 5, 6))
    assert_same_codes(again, first)
    assert not torch.equal(other.packed, first.packed)


def test_seeds_count_modulo_two_to_the_32() -> None:
    assert torch.equal(uniform_hash(2**32 + 3, 64), uniform_hash(3, 64))


def test_uniform_hash_values() -> None:
    got = uniform_hash(0xDEADBEEF, 100).tolist()
    assert got == [python_hash(0xDEADBEEF, i) for i in range(100)]


@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF])
def test_uniform_hash_statistics(seed: int) -> None:
    """Mean, a chi-squared test over 256 bins and correlations, each within six standard deviations."""
    n, bins = 2**18, 256
    u = uniform_hash(seed, n).double()
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 6 / (12 * n) ** 0.5
    counts = torch.histc(u, bins, 0, 1)
    chi2 = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert abs(chi2 - (bins - 1)) < 6 * (2 * (bins - 1)) ** 0.5
    centred = (u - 0.5) * 12**0.5
    other = (uniform_hash(seed + 1, n).double() - 0.5) * 12**0.5
    for lag in (1, 2, 64, 4096):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 6 / (n - lag) ** 0.5
    assert abs(float((centred * other).mean())) < 6 / n**0.5


# Errors


@pytest.mark.parametrize(
    ("x", "bits", "group", "says"),
    [
        (torch.zeros(4, dtype=torch.float64), 4, 32, "convert to bfloat16"),
        (torch.zeros(0), 4, 32, "at least one element"),
        (torch.zeros(2, 2), 4, 32, "flatten"),
        (torch.zeros(8)[::2], 4, 32, "flatten"),
        (torch.zeros(4), 3, 32, "3-bit"),
        (torch.zeros(4), 4, 48, "groups of 48"),
    ],
)
def test_quantize_refuses(x: Tensor, bits: int, group: int, says: str) -> None:
    with pytest.raises(LaneError, match=says):
        group_quantize_pack(x, bits, group)


def test_dequantize_refuses_parts_that_do_not_fit() -> None:
    codes = group_quantize_pack(torch.randn(100), 4, 32)
    assert codes.offset is not None
    wrong = {
        "packed": replace(codes, packed=codes.packed[:3]),
        "scale is": replace(codes, scale=codes.scale.float()),
        "offset is": replace(codes, offset=codes.offset[:1]),
        "escapes is": replace(codes, escapes=torch.zeros(1, 31)),
        "3-bit": replace(codes, bits=3),
        "0 elements": replace(codes, numel=0),
        "0 groups are marked": replace(codes, escapes=torch.zeros(1, 32)),
    }
    for says, parts in wrong.items():
        with pytest.raises(LaneError, match=says):
            group_unpack_dequantize(parts, torch.float32)
    with pytest.raises(LaneError, match="torch.int8"):
        group_unpack_dequantize(codes, torch.int8)


# Kernels

CASES = [
    # bits, group, symmetric, seed, dtype, numel
    (2, 32, False, None, torch.bfloat16, 5003),
    (2, 256, True, 0x9ABCDEF0, torch.float16, 5003),
    (2, 128, False, 1, torch.float32, 4096),
    (4, 64, False, None, torch.float16, 5003),
    (4, 128, True, None, torch.bfloat16, 6144),
    (4, 32, False, 0xFFFFFFFF, torch.float32, 3001),
    (4, 256, False, 0, torch.bfloat16, 5001),
    (8, 64, True, None, torch.float32, 5003),
    (8, 128, False, 3, torch.float16, 5003),
    (8, 32, True, 2**31, torch.bfloat16, 2049),
    (4, 128, False, None, torch.bfloat16, 1),
    (8, 256, True, 12, torch.float32, 33),
]


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_kernels_equal_the_reference(
    device: torch.device, case: tuple[int, int, bool, int | None, torch.dtype, int]
) -> None:
    bits, group, symmetric, seed, dtype, numel = case
    x = hard_values(numel, dtype)
    want = group_quantize_pack_ref(x, bits, group, symmetric=symmetric, seed=seed)
    x = x.to(device)
    got = group_quantize_pack(x, bits, group, symmetric=symmetric, seed=seed)
    assert_same_codes(got, want)
    assert same_bits(group_unpack_dequantize(got, dtype), group_unpack_dequantize_ref(want, dtype))

    guard = Guarded(device)
    into = replace(got, packed=guard.like(got.packed), scale=guard.like(got.scale), escapes=got.escapes[:0])
    into = replace(into, offset=None if symmetric else guard.like(got.scale))
    count = torch.zeros(1, dtype=torch.int32, device=device)
    groups.group_quantize_pack_into(x, into, count, seed=seed)
    assert_same_codes(replace(into, escapes=groups.gather_escapes(x, into)), want)
    assert count.item() == len(want.escapes)
    out = guard.empty((numel,), dtype)
    groups.group_unpack_dequantize_into(got, out)
    assert same_bits(out, group_unpack_dequantize_ref(want, dtype))
    guard.check()


@pytest.mark.kernel
def test_kernel_rounds_values_beside_every_tie_as_the_reference(device: torch.device) -> None:
    """Multiples of 1/64 in groups whose scale is near 1: a fused multiply-add would move some codes."""
    x = torch.arange(0, 4096).float().view(-1, 64) / 64
    x[:, 0], x[:, 1] = 0.0, 255.0
    x = (x + torch.randn(64, 1) * 1e-3).flatten()
    want = group_quantize_pack_ref(x, 8, 64)
    assert_same_codes(group_quantize_pack(x.to(device), 8, 64), want)


@pytest.mark.kernel
def test_kernel_gives_positive_zeros_for_negative_ones(device: torch.device) -> None:
    codes = group_quantize_pack(torch.full((32,), -0.0, device=device), 4, 32)
    assert codes.offset is not None
    assert codes.offset.view(torch.int16).tolist() == codes.scale.view(torch.int16).tolist() == [0]


@pytest.mark.kernel
def test_missing_escapes_read_as_zero(device: torch.device) -> None:
    x = torch.randn(256, device=device)
    x[[3, 200]] = nan
    codes = group_quantize_pack(x, 4, 32)
    out = group_unpack_dequantize(replace(codes, escapes=codes.escapes[:1]), x.dtype)
    assert same_bits(out[:32], x[:32])
    assert out[192:224].tolist() == [0.0] * 32


@triton.jit
def _hash_kernel(out_ptr, base_ptr, seed, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(out_ptr + i, groups._uniform(seed, tl.load(base_ptr), i))


@pytest.mark.kernel
@pytest.mark.parametrize("base", [0, 2**32 - 64, 5 * 2**32 + 2048])
def test_kernel_hash_beyond_32_bits(device: torch.device, base: int) -> None:
    out = torch.empty(64, device=device)
    _hash_kernel[(1,)](out, torch.tensor([base], device=device), 0xDEADBEEF - 2**32, N=64)
    assert out.tolist() == [python_hash(0xDEADBEEF, base + i) for i in range(64)]
