"""Group quantization: the reference against bounds and bytes worked out by hand, the kernels against it."""

from __future__ import annotations

import warnings
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
from sidelane.kernels import _stochastic, groups
from sidelane.kernels._launch import ALIGNMENT, cdiv
from sidelane.kernels.groups import group_quantize_pack, group_sizes, group_unpack_dequantize
from sidelane.kernels.reference import (
    GROUP_BITS,
    GROUP_SIZES,
    GroupCodes,
    group_noise,
    group_quantize_pack_ref,
    group_unpack_dequantize_ref,
    hash32,
)

FLOATS = groups.FLOATS
PARTS = ("codes", "scale", "offset")


@pytest.fixture(autouse=True)
def _silent_overflow() -> Iterator[None]:
    """The interpreter computes with NumPy, which warns of what a GPU does not notice."""
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        yield


def hard_values(numel: int, dtype: torch.dtype) -> Tensor:
    """Activations of many magnitudes, zeros, constants, denormals; every 300 elements a wide group."""
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


def steps_of(codes: GroupCodes) -> tuple[Tensor, Tensor]:
    """float64 [numel]: the step of each element; bool [numel]: whether its group is wide."""
    scale = codes.scale.view(torch.float16).cpu()
    e = scale.view(torch.int16).int() & 255
    wide = scale.isnan()
    step = torch.where(wide, 2.0 ** (e.double() - 127), scale.double())
    return tuple(part.repeat_interleave(codes.group)[: codes.numel] for part in (step, wide))


def assert_within_bound(x: Tensor, codes: GroupCodes, *, stochastic: bool) -> None:
    """|x - decoded| <= step / 2 (step when stochastic) + float32 steps + rounding to the dtype.

    Encoding has four roundings of at most 2^-24 of a code below 2^bits or of x, decoding two: below 2^-21.
    Infinities and NaN come back; finite numbers next to them have 2 * levels + 1 codes, none of 2 bits.
    """
    y = group_unpack_dequantize(codes, x.dtype)
    step, _ = steps_of(codes)
    finite = x.isfinite()
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(x[x.isinf()], y[x.isinf()])
    assert bool(y[finite].isfinite().all())
    groups = torch.nn.functional.pad(~finite, (0, -len(x) % codes.group)).view(-1, codes.group)
    lost = groups.any(1).repeat_interleave(codes.group)[: len(x)] & finite & (codes.bits == 2)
    assert bool((y[lost] == 0).all())
    finfo = torch.finfo(x.dtype)
    size = x.double().abs()
    coded = step * (1.0 if stochastic else 0.5)
    arithmetic = (2**codes.bits * step + size) * 2.0**-21
    rounding = (size + coded + arithmetic) * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
    error = (x.double() - y.double()).abs()
    assert bool((error <= coded + arithmetic + rounding)[finite & ~lost].all())


def python_hash(seed: int, index: int) -> int:
    """hash32 of one index in Python integers."""
    m = 0xFFFFFFFF
    h = (index & m) ^ ((index >> 32) * 0x85EBCA6B & m)
    h = (h * 0x9E3779B1 + seed) & m
    h = ((h ^ h >> 16) * 0x7FEB352D) & m
    h = ((h ^ h >> 15) * 0x846CA68B) & m
    return h ^ h >> 16


# The format


def hexes(part: Tensor) -> str:
    return bytes(part.tolist()).hex()


def test_two_bit_bytes() -> None:
    x = torch.tensor([0.0, 1, 2, 3, 0, 1, 2, 3] + [1.0] * 8 + [2.0] * 8 + [3.0] * 8)
    codes = group_quantize_pack(x, 2, 32)
    # Byte c: elements c, c + 8, c + 16, c + 24, lowest bits first: 0b11_10_01_00 + x[c].
    assert hexes(codes.codes) == "e4e5e6e7" * 2
    # span 1 raised by 2^-10 and less than a step of float16, rounded to nearest: 1 + 2^-10.
    assert hexes(codes.scale) == "013c"
    assert codes.offset is not None and hexes(codes.offset) == "0000"


def test_symmetric_eight_bit_bytes() -> None:
    x = torch.zeros(33)
    x[:4] = torch.tensor([127.0, -127.0, 1.0, -1.0])
    x[32] = nan
    codes = group_quantize_pack(x, 8, 32, symmetric=True)
    assert hexes(codes.codes[:32]) == "fe00807e" + "7f" * 28
    assert hexes(codes.codes[32:]) == "fd" * 32  # copies of the last element
    # No finite element: the exponent of the smallest step, 1.
    assert hexes(codes.scale) == "013c" + "017f"
    assert codes.offset is None


@pytest.mark.parametrize("symmetric", [False, True])
def test_wide_bytes(symmetric: bool) -> None:
    """levels = 7: 7 * 2^100 needs the step 2^100, 7.5 * 2^100 the next one. Codes that end in a half become
    even, those of 0.5 and 1.5 are 8."""
    x = torch.zeros(2, 32)
    x[:, :6] = torch.tensor([7.0, -7, 1, 0.5, 1.5, -0.49])
    x[1, 0] = 7.5
    codes = group_quantize_pack((x * 2.0**100).flatten(), 4, 32, symmetric=symmetric)
    assert hexes(codes.codes[:16]) == "7e" + "70787878" + "77" * 11
    assert hexes(codes.codes[:6]) == "7e7078787877"
    assert hexes(codes.scale) == "e37e" + "e47e"  # 227 = 127 + 100
    assert codes.offset is None or hexes(codes.offset) == "00000000"


@pytest.mark.parametrize(
    ("bits", "codes_of"), [(2, "3 2 1 0 0"), (4, "15 14 13 12 0"), (8, "255 254 253 252 0")]
)
def test_nonfinite_codes(bits: int, codes_of: str) -> None:
    levels = 2 ** (bits - 1) - 2
    x = torch.full((256,), 0.0)
    x[0], x[1], x[2], x[3], x[4] = inf, -inf, nan, 2.0 * levels, 0.0 - 2.0 * levels
    codes = group_quantize_pack(x, bits, 256)
    per_byte = 8 // bits
    assert [int(b) % 2**bits for b in codes.codes[:5]] == [int(c) for c in codes_of.split()]
    assert [int(b) % 2**bits for b in codes.codes[5:9]] == [levels] * 4
    assert len(codes.codes) == 256 // per_byte
    e = 1 if bits == 2 else 128
    assert hexes(codes.scale) == f"{e:02x}7f"
    y = group_unpack_dequantize(codes, torch.float32)
    assert same_bits(y, x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_comes_back_as_the_default_one(dtype: torch.dtype) -> None:
    payloads = torch.tensor([0x7F81 if dtype == torch.bfloat16 else 0x7C01, -1], dtype=torch.int16).repeat(16)
    x = (
        torch.tensor([0x7F800001, -1]).int().repeat(16).view(dtype)
        if dtype == torch.float32
        else payloads.view(dtype)
    )
    y = group_unpack_dequantize(group_quantize_pack(x, 4, 32), dtype)
    assert same_bits(y, torch.full((32,), nan, dtype=dtype))


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
        assert torch.equal(codes.offset.view(torch.float16).float(), low)


# Error bounds


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", GROUP_BITS)
def test_error_bound(bits: int, symmetric: bool, seed: int | None, dtype: torch.dtype) -> None:
    x = hard_values(5003, dtype)
    codes = group_quantize_pack(x, bits, 64, symmetric=symmetric, seed=seed)
    assert 3 <= int(steps_of(codes)[1][::64].sum()) <= 12  # planted values and no group of ordinary ones
    assert_within_bound(x, codes, stochastic=seed is not None)


@example(values=[5.5e-23], bits=2, symmetric=False, seed=None, dtype=torch.bfloat16)  # scale 2^-24, wide
@example(values=[3e38, -3e38, 2.0**127], bits=2, symmetric=True, seed=None, dtype=torch.float32)  # e = 255
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
def test_ordinary_groups_are_not_wide(bits: int, group: int) -> None:
    assert not steps_of(group_quantize_pack(torch.randn(4096), bits, group))[1].any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("numel", [1, 33, 5000])
def test_parts_lie_in_one_allocation(numel: int, symmetric: bool) -> None:
    codes = group_quantize_pack(torch.randn(numel), 4, 64, symmetric=symmetric)
    parts = list(codes.sections.values())
    sizes = group_sizes(numel, 4, 64, symmetric)
    assert [part.numel() for part in parts] == list(sizes)
    storage = parts[0].untyped_storage()
    assert all(part.untyped_storage().data_ptr() == storage.data_ptr() for part in parts)
    starts = [sum(cdiv(size, ALIGNMENT) * ALIGNMENT for size in sizes[:i]) for i in range(len(sizes) + 1)]
    assert [part.storage_offset() for part in parts] + [storage.nbytes()] == starts


def test_constant_groups_come_back_within_the_offset_step() -> None:
    x = torch.full((64,), 1.2345)
    y = group_unpack_dequantize(group_quantize_pack(x, 2, 64), torch.float32)
    assert float((x - y).abs().max()) <= 1.2345 * 2.0**-10


def test_codes_do_not_hold_the_graph_of_their_input() -> None:
    x = torch.tensor([1.0, nan]).repeat(32).requires_grad_()
    assert not any(part.requires_grad for part in group_quantize_pack(x, 4, 32).sections.values())


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
    scale = steps_of(group_quantize_pack(x, 2, 256))[0]
    error = (decoded.double() - x.double()) / scale
    assert abs(float(error.mean())) < 5 * 0.5 / error.numel() ** 0.5
    assert float(error.mean(0).abs().max()) < 6 * 0.5 / seeds**0.5
    assert float(error.mean(1).abs().max()) < 6 * 0.5 / x.numel() ** 0.5


def test_stochastic_rounding_repeats_with_its_seed() -> None:
    x = torch.randn(4096)
    first, again, other = (group_quantize_pack(x, 4, 64, seed=s) for s in (5, 5, 6))
    assert_same_codes(again, first)
    assert not torch.equal(other.codes, first.codes)


def test_seeds_count_modulo_two_to_the_32() -> None:
    assert torch.equal(hash32(2**32 + 3, 64), hash32(3, 64))


def test_hash_values() -> None:
    assert hash32(0xDEADBEEF, 100).tolist() == [python_hash(0xDEADBEEF, i) for i in range(100)]


def test_noise_is_cut_from_the_hash() -> None:
    """Elements i, i + 8, i + 16 and i + 24 of a group of 32: the four bytes of word 8 * group + i."""
    noise = group_noise(5, 3, 32)
    h = python_hash(5, 11)
    assert noise[2, 6::8].tolist() == list(h.to_bytes(4, "little"))
    h = h * 0x9E3779B1 & 0xFFFFFFFF
    assert noise[2, 7::8].tolist() == list((h ^ h >> 16).to_bytes(4, "little"))


def test_noise_is_uniform_and_its_bytes_do_not_depend_on_each_other() -> None:
    """Chi-squared of single bytes, and of pairs that share a hash or neighbour each other, by their top bits.

    With n samples in b cells it has mean b - 1 and a standard deviation of sqrt(2 (b - 1)).
    """
    noise = group_noise(3, 4096, 32).view(-1, 4, 4, 2).long()  # [group, byte, hash, word]
    for values, cells in (
        (noise, 256),
        *((noise[:, b, :, 0] // 16 * 16 + noise[:, c, :, 1] // 16, 256) for b in range(4) for c in range(4)),
        *((noise[:, b, :, 0] % 16 * 16 + noise[:, c, :, 1] % 16, 256) for b in range(4) for c in range(4)),
        *((noise[:, b] // 16 * 16 + noise[:, c] // 16, 256) for b in range(4) for c in range(b)),
        (noise[:, 0, :-1] // 16 * 16 + noise[:, 0, 1:] // 16, 256),
    ):
        counts = torch.bincount(values.flatten(), minlength=cells).double()
        expected = values.numel() / cells
        excess = float(((counts - expected) ** 2 / expected).sum()) - (cells - 1)
        assert abs(excess) < 5 * (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF])
def test_noise_statistics(seed: int) -> None:
    """Mean, a chi-squared test over 256 bins and correlations, each within six standard deviations."""
    n, bins = 2**18, 256
    noise = group_noise(seed, n // 64, 64).flatten()
    assert int(noise.min()) >= 0 and int(noise.max()) < bins
    u = (noise.double() + 0.5) / bins
    assert abs(float(u.mean()) - 0.5) < 6 / (12 * n) ** 0.5
    counts = torch.histc(u, bins, 0, 1)
    chi2 = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert abs(chi2 - (bins - 1)) < 6 * (2 * (bins - 1)) ** 0.5
    centred = (u - 0.5) * 12**0.5
    other = ((group_noise(seed + 1, n // 64, 64).flatten().double() + 0.5) / bins - 0.5) * 12**0.5
    for lag in (1, 2, 16, 32, 64, 4096):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 6 / (n - lag) ** 0.5
    assert abs(float((centred * other).mean())) < 6 / n**0.5


# Errors


@pytest.mark.parametrize(
    ("x", "bits", "group", "says"),
    [
        (torch.zeros(4, dtype=torch.float64), 4, 32, "convert to bfloat16"),
        (torch.zeros(0), 4, 32, "flatten at least one element"),
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
    shifted = torch.empty(len(codes.scale) + 1, dtype=torch.uint8)[1:]
    wrong = {
        "codes is": replace(codes, codes=codes.codes[:3]),
        "scale is": replace(codes, scale=codes.scale.view(torch.float16)),
        "offset is": replace(codes, offset=codes.offset[:1]),
        "multiple of 16": replace(codes, scale=shifted),
        "3-bit": replace(codes, bits=3),
        "0 elements": replace(codes, numel=0),
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
    into = replace(got, **{name: guard.like(part) for name, part in got.sections.items()})
    groups.group_quantize_pack_into(x, into, seed=seed)
    assert_same_codes(into, want)
    out = guard.empty((numel,), dtype)
    groups.group_unpack_dequantize_into(got, out)
    assert same_bits(out, group_unpack_dequantize_ref(want, dtype))
    guard.check()


@pytest.mark.kernel
@pytest.mark.parametrize(("symmetric", "seed"), [(False, None), (True, 11)])
@pytest.mark.parametrize("bits", GROUP_BITS)
def test_whole_groups_that_begin_anywhere(
    device: torch.device, bits: int, symmetric: bool, seed: int | None
) -> None:
    """bfloat16 is read two at a time where its address allows it."""
    x = hard_values(64 * 80 + 3, torch.bfloat16)
    moved = x.to(device)
    for start in range(4):
        here = slice(start, start + 64 * 80)
        want = group_quantize_pack_ref(x[here], bits, 64, symmetric=symmetric, seed=seed)
        assert_same_codes(group_quantize_pack(moved[here], bits, 64, symmetric=symmetric, seed=seed), want)


@pytest.mark.kernel
@pytest.mark.parametrize(("numel", "seed"), [(5003, None), (5120, None), (5120, 7)])
def test_few_programs_do_the_work_of_many(device: torch.device, numel: int, seed: int | None) -> None:
    x = hard_values(numel, torch.bfloat16)
    codes = group_quantize_pack(x.to(device), 4, 64, seed=seed, max_programs=2)
    want = group_quantize_pack_ref(x, 4, 64, seed=seed)
    assert_same_codes(codes, want)
    y = group_unpack_dequantize(codes, x.dtype, max_programs=2)
    assert same_bits(y, group_unpack_dequantize_ref(want, x.dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("wide", [0, 900, 4095, None])
def test_programs_that_share_tiles(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, wide: int | None, seed: int | None
) -> None:
    """Of four tiles, all to one program or two to each of two, one has a wide group or none has."""
    monkeypatch.setattr(groups, "MANY", 1)
    groups.group_packer.cache_clear()
    x = torch.randn(4096).to(torch.bfloat16)
    if wide is not None:
        x[wide] = nan
    want = group_quantize_pack_ref(x, 2, 64, seed=seed)
    for _ in range(2):  # the second launch is the kept one
        assert_same_codes(group_quantize_pack(x.to(device), 2, 64, seed=seed), want)
    groups.group_packer.cache_clear()


@pytest.mark.kernel
@pytest.mark.parametrize(("bits", "seed", "programs"), [(2, 1, 20 * 2), (2, None, 50), (4, 1, 50)])
def test_programs_of_two_bits_with_noise_are_as_many_as_run_at_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, bits: int, seed: int | None, programs: int
) -> None:
    """50 tiles on two multiprocessors, of 65,536 registers each."""
    counts: list[int] = []

    def counted(kernel: object, count: int, *rest: object, **options: object) -> object:
        counts.append(count)
        return launch(kernel, count, *rest, **options)

    launch = groups.launch
    monkeypatch.setattr(groups, "launch", counted)
    monkeypatch.setattr(groups, "multiprocessors", lambda _device: 2)
    groups.group_packer.cache_clear()
    x = torch.randn(50 * 1024).to(torch.bfloat16)
    codes = group_quantize_pack(x.to(device), bits, 64, seed=seed)
    groups.group_packer.cache_clear()
    assert counts == [programs]
    assert_same_codes(codes, group_quantize_pack_ref(x, bits, 64, seed=seed))


@pytest.mark.kernel
def test_kernel_rounds_values_beside_every_tie_as_the_reference(device: torch.device) -> None:
    """Multiples of 1/64 in groups whose scale is near 1: a fused multiply-add would move some codes."""
    x = torch.arange(0, 4096).float().view(-1, 64) / 64
    x[:, 0], x[:, 1] = 0.0, 255.0
    x = (x + torch.randn(64, 1) * 1e-3).flatten()
    for seed in (None, 1):
        want = group_quantize_pack_ref(x, 8, 64, seed=seed)
        assert_same_codes(group_quantize_pack(x.to(device), 8, 64, seed=seed), want)


@pytest.mark.kernel
def test_kernel_gives_positive_zeros_for_negative_ones(device: torch.device) -> None:
    codes = group_quantize_pack(torch.full((32,), -0.0, device=device), 4, 32)
    assert codes.offset is not None
    assert codes.offset.tolist() == codes.scale.tolist() == [0, 0]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", GROUP_BITS)
def test_every_scale_word_decodes_as_the_reference_says(
    device: torch.device, bits: int, dtype: torch.dtype
) -> None:
    """Also words that no encoder writes; all codes occur."""
    step = 1 if torch.cuda.is_available() else 37
    words = torch.arange(-(2**15), 2**15, step).to(torch.int16)
    numel = 32 * len(words)
    codes = torch.randint(0, 256, (numel * bits // 8,), dtype=torch.uint8)
    offset = torch.randint(-(2**15), 2**15, words.shape).to(torch.int16)
    offset = torch.where((offset & 0x7C00) == 0x7C00, 0, offset)  # finite
    forged = GroupCodes(codes, words.view(torch.uint8), offset.view(torch.uint8), bits, 32, numel)
    for parts in (forged, replace(forged, offset=None)):
        want = group_unpack_dequantize_ref(parts, dtype)
        moved = {name: part.to(device) for name, part in parts.sections.items()}
        assert same_bits(group_unpack_dequantize(replace(parts, **moved), dtype), want)


@triton.jit
def _hash_kernel(out_ptr, base_ptr, seed, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(out_ptr + i, _stochastic.hash32(seed, tl.load(base_ptr), i).to(tl.int64))


@pytest.mark.kernel
@pytest.mark.parametrize("base", [0, 2**32 - 64, 5 * 2**32 + 2048])
def test_kernel_hash_beyond_32_bits(device: torch.device, base: int) -> None:
    out = torch.empty(64, dtype=torch.int64, device=device)
    _hash_kernel[(1,)](out, torch.tensor([base], device=device), 0xDEADBEEF - 2**32, N=64)
    assert out.tolist() == [python_hash(0xDEADBEEF, base + i) for i in range(64)]
