"""Lossless floats: bytes worked out by hand, every bit pattern, sizes, kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guarded import SENTINEL, Guarded
from sidelane.errors import LaneError
from sidelane.kernels import exact, reference
from sidelane.kernels._launch import ALIGNMENT, cdiv, span
from sidelane.kernels.exact import exact_decode, exact_encode
from sidelane.kernels.reference import (
    EXACT_BLOCK,
    EXACT_FIELDS,
    ExactCodes,
    exact_base,
    exact_decode_ref,
    exact_encode_ref,
    exact_sizes,
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def assert_same_codes(got: ExactCodes | None, want: ExactCodes | None) -> None:
    if got is None or want is None:
        assert got is want
        return
    for name, part in want.sections.items():
        assert torch.equal(got.sections[name].cpu(), part), name
    assert (got.zero_planes, got.numel) == (want.zero_planes, want.numel)


def encoded(x: Tensor) -> ExactCodes:
    codes = exact_encode(x)
    assert codes is not None
    return codes


def bit_patterns(dtype: torch.dtype, ordinary: int, step: int = 1) -> Tensor:
    """Every `step`-th of the 65,536 elements, shuffled among `ordinary` times as many normal ones."""
    patterns = torch.arange(-(2**15), 2**15, step).to(torch.int16).view(dtype)
    x = torch.cat((patterns, torch.randn(ordinary * len(patterns)).to(dtype)))
    return x[torch.randperm(len(x))]


def odd_floats() -> Tensor:
    """float32: normal numbers with NaN payloads, infinities, both zeros and denormals among them."""
    words = torch.tensor([0x7FC00001, 0x7F800001, -1, -0x3FFFFF, 1, 0x7FFFFF, -0x7FFFFFFF, -(2**31)])
    x = torch.randn(10_007)
    x[::101] = inf
    x[1::101] = -inf
    x[2::103] = 0.0
    x[5:4005:500] = words.to(torch.int32).view(torch.float32)
    return x


def random_bits(n: int, dtype: torch.dtype) -> Tensor:
    f = EXACT_FIELDS[dtype]
    bits = 8 * f.word.itemsize
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n,)).to(f.word).view(dtype)


def hexes(part: Tensor) -> str:
    return bytes(part.tolist()).hex()


def escapes_of(codes: ExactCodes) -> list[tuple[int, int]]:
    """(element in its block, what is added) of every escape."""
    words = [word & 0xFFFF for word in codes.escapes.view(torch.int16).tolist()]
    return [(word % 1024, word >> 10) for word in words]


# The format


def test_bf16_bytes() -> None:
    """Exponents 120, 118, .. 106 again and again, every 128th instead 105, 97, ..: it escapes."""
    i = torch.arange(1024)
    distance = torch.where(i % 128 == 127, 15 + i // 128 * 8, 2 * (i % 8))
    word = (i % 2) << 15 | (120 - distance) << 7 | i % 128
    codes = encoded(word.to(torch.int16).view(torch.bfloat16))
    assert codes.base.tolist() == [120]
    # Byte c: elements c and c + 512, which are alike.
    assert hexes(codes.codes) == ("0022446688aaccee" * 15 + "0022446688aaccff") * 4
    # By the place in 256 elements first; 47 and more below the base: 73, 65, 57 and 49 in two halves.
    assert escapes_of(codes) == [
        (127, 0),
        (383, 16),
        (639, 32 + 73 % 16),
        (895, 32 + 57 % 16),
        (255, 8),
        (511, 24),
        (767, 32 + 65 % 16),
        (1023, 32 + 49 % 16),
        (639, 48 + 73 // 16),
        (895, 48 + 57 // 16),
        (767, 48 + 65 // 16),
        (1023, 48 + 49 // 16),
    ]
    assert codes.ends.view(torch.int32).tolist() == [12]
    assert codes.planes.tolist() == [k % 128 | (k % 2) << 7 for k in range(1024)]
    assert codes.odd.tolist() == []
    assert (codes.zero_planes, codes.numel, codes.nbytes) == (0, 1024, 1 + 512 + 4 + 1024 + 24)


def test_fp16_bytes() -> None:
    """One exponent; mantissa bits 8 and 9 are i % 4, the sign every eighth: 3 odd bits as planes."""
    i = torch.arange(2048)
    word = (i % 8 == 7).long() << 15 | 17 << 10 | (i % 4) << 8 | i % 256
    codes = encoded(word.to(torch.int16).view(torch.float16))
    assert codes.base.tolist() == [17, 17]
    assert hexes(codes.codes) == "00" * 1024
    assert codes.planes.tolist() == list(range(256)) * 8
    assert hexes(codes.odd) == "aa" * 256 + "cc" * 256 + "80" * 256


def test_fp32_zero_planes() -> None:
    """The two low mantissa bytes are zero: one plane is stored, sign << 7 | seven mantissa bits."""
    codes = encoded(torch.tensor([1.0, -1.0, 1.5, -2.0] * 256))
    assert codes.base.tolist() == [128]
    assert hexes(codes.codes) == "11111100" * 128
    assert codes.zero_planes == 0b011
    assert hexes(codes.planes) == "00804080" * 256


def test_the_last_block_is_filled_up_with_zeros() -> None:
    codes = encoded(torch.full((1500,), 1.5))
    assert codes.base.tolist() == [127, 127]
    assert hexes(codes.codes[512:]) == "f0" * 476 + "ff" * 36
    assert hexes(codes.planes[1024:]) == "40" * 476 + "00" * 548


def test_escapes_of_every_kind() -> None:
    """Far outliers, Inf, NaN and the smallest normal number among ones: two escapes each, low half first."""
    x = torch.ones(1024)
    x[3], x[600], x[601], x[1000], x[1001] = 2.0**100, inf, float("nan"), 2.0**-126, 2.0**-40
    x[[100, 900]] = torch.tensor([0.0, 2.0**-15])
    codes = encoded(x)
    assert codes.base.tolist() == [131]
    low = [(3, 227), (600, 255), (601, 255), (1000, 1)]  # 88 and 89, 232 and 233 in 256 elements
    assert escapes_of(codes) == [
        (3, 32 + 227 % 16),
        (600, 32 + 15),
        (601, 32 + 15),
        (900, 131 - 15 - 112),
        (1000, 32 + 1),
        (1001, 131 - 15 - 87),
        *((place, 48 + exponent // 16) for place, exponent in low),
    ]
    assert same_bits(exact_decode(codes, torch.float32), x)


def test_base_leaves_outliers_to_the_escapes() -> None:
    exponent = torch.full((1, EXACT_BLOCK), 100)
    assert exact_base(exponent, 255).tolist() == [100]
    exponent[0, 17] = 104
    assert exact_base(exponent, 255).tolist() == [104]
    exponent[0, 17] = 105
    assert exact_base(exponent, 255).tolist() == [104]
    exponent[0, 8:16], exponent[0, 520:528] = 90, 0  # part 1 is quieter than the others
    assert exact_base(exponent, 255).tolist() == [94]
    exponent[0, 8:16] = 255
    assert exact_base(exponent, 255).tolist() == [104]
    assert exact_base(torch.full((1, EXACT_BLOCK), 255), 255).tolist() == [0]


@pytest.mark.parametrize("dtype", list(EXACT_FIELDS), ids=str)
@pytest.mark.parametrize("escapes", [0.0, 0.001, 0.02])
def test_parts_lie_in_one_allocation(dtype: torch.dtype, escapes: float) -> None:
    x = torch.randn(20_480).to(dtype)
    x[: int(escapes * len(x))] = inf
    codes = encoded(x)
    parts = list(codes.sections.values())
    sizes = exact_sizes(dtype, len(x), 0, codes.escapes.numel() // 2)
    assert [part.numel() for part in parts] == list(sizes)
    starts = [sum(cdiv(size, ALIGNMENT) * ALIGNMENT for size in sizes[:i]) for i in range(len(sizes))]
    assert [part.storage_offset() for part in parts] == starts
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert parts[0].untyped_storage().nbytes() == span(sizes)


# Round trips


@pytest.mark.parametrize(("dtype", "ordinary"), [(torch.bfloat16, 9), (torch.float16, 20)], ids=str)
def test_every_16_bit_pattern_survives(dtype: torch.dtype, ordinary: int) -> None:
    x = bit_patterns(dtype, ordinary)
    assert same_bits(exact_decode(encoded(x), dtype), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_alone_stays_raw(dtype: torch.dtype) -> None:
    assert exact_encode(bit_patterns(dtype, 0)) is None


def test_odd_floats_survive() -> None:
    x = odd_floats()
    assert same_bits(exact_decode(encoded(x), torch.float32), x)


def test_bf16_values_in_float32_shrink_to_their_own_size() -> None:
    x = torch.randn(2**16).bfloat16().float()
    codes = encoded(x)
    assert x.numel() * 4 / codes.nbytes > 2.6
    assert same_bits(exact_decode(codes, torch.float32), x)


def test_normal_bf16_shrinks_by_a_quarter() -> None:
    assert 2 * 2**16 / encoded(torch.randn(2**16).bfloat16()).nbytes > 1.32


@given(
    data=st.data(),
    dtype=st.sampled_from(list(EXACT_FIELDS)),
    numel=st.integers(1, 5000),
    wild=st.sampled_from([0.0, 0.01, 0.1]),
)
def test_round_trip_and_size(data: st.DataObject, dtype: torch.dtype, numel: int, wild: float) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    x = torch.randn(numel, generator=generator).to(dtype)
    x = torch.where(torch.rand(numel, generator=generator) < wild, random_bits(numel, dtype), x)
    codes = exact_encode(x)
    if codes is not None:
        assert codes.nbytes < x.numel() * x.element_size()
        assert same_bits(exact_decode(codes, dtype), x)


def test_chunks_of_the_reference_join(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.where(torch.rand(5003) < 0.05, random_bits(5003, torch.bfloat16), torch.randn(5003).bfloat16())
    whole = exact_encode_ref(x)
    assert whole is not None
    monkeypatch.setattr(reference, "EXACT_CHUNK", 1024)
    assert_same_codes(exact_encode_ref(x), whole)
    assert same_bits(exact_decode_ref(whole, torch.bfloat16), x)


# Sizes


@pytest.mark.parametrize("dtype", list(EXACT_FIELDS), ids=str)
def test_random_bits_never_grow(dtype: torch.dtype) -> None:
    for n in (1, 2, 37, 1024, 20_001):
        x = random_bits(n, dtype)
        codes = exact_encode(x)
        assert codes is None or codes.nbytes < x.numel() * x.element_size()


def test_smallest_tensor_that_shrinks() -> None:
    """A block of bf16 takes 1 + 512 + 4 + 1024 bytes: 2 n is more from n = 771 on."""
    assert exact_encode(torch.full((770,), 1.5, dtype=torch.bfloat16)) is None
    assert encoded(torch.full((771,), 1.5, dtype=torch.bfloat16)).nbytes == 1541


def test_more_elements_than_int32_counts_stay_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MOST", 5000)
    assert exact_encode(torch.ones(5000)) is not None
    assert exact_encode(torch.ones(5001)) is None


# Errors


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(4, dtype=torch.float64), "torch.float64 has no exact code"),
        (torch.zeros(0), "flatten at least one element"),
        (torch.zeros(2, 2), "flatten"),
        (torch.zeros(8)[::2], "flatten"),
    ],
)
def test_encode_refuses(x: Tensor, says: str) -> None:
    with pytest.raises(LaneError, match=says):
        exact_encode(x)


def with_escapes() -> tuple[Tensor, ExactCodes]:
    x = torch.randn(3000).bfloat16()
    x[::50] = (0.5 ** torch.arange(20, 80)).bfloat16()
    return x, encoded(x)


def test_decode_refuses_parts_that_do_not_fit() -> None:
    _, codes = with_escapes()
    shifted = torch.empty(len(codes.codes) + 1, dtype=torch.uint8)[1:]
    wrong = {
        "base is": replace(codes, base=codes.base[:2]),
        "codes is": replace(codes, codes=codes.codes.to(torch.int8)),
        "ends is": replace(codes, ends=codes.ends.repeat(2)[::2]),
        "odd is": replace(codes, odd=codes.base),
        "multiple of 16": replace(codes, codes=shifted),
        "0 elements": replace(codes, numel=0),
        "zero planes 0b1": replace(codes, zero_planes=1),
        "are listed": replace(codes, escapes=codes.escapes[:-2]),
    }
    for says, parts in wrong.items():
        with pytest.raises(LaneError, match=says):
            exact_decode(parts, torch.bfloat16)
    with pytest.raises(LaneError, match="are listed"):
        exact_decode(replace(codes, escapes=codes.escapes.repeat(2)), torch.bfloat16)
    with pytest.raises(LaneError, match="torch.int8"):
        exact_decode(codes, torch.int8)


# Kernels


def sparse_bf16() -> Tensor:
    """Blocks without escapes, blocks full of them, and a ragged end."""
    x = torch.randn(12_007).bfloat16()
    x[1024:2048] = (2.0 ** torch.arange(-100, 28)).repeat(8).bfloat16()
    x[12_006] = 1e-38
    return x


STEP = 1 if torch.cuda.is_available() else 31  # an odd step meets every exponent and every mantissa
INPUTS: dict[str, Callable[[], Tensor]] = {
    "bf16-patterns": lambda: bit_patterns(torch.bfloat16, 9, STEP),
    "fp16-patterns": lambda: bit_patterns(torch.float16, 20, STEP),
    "fp32-odd": odd_floats,
    "fp32-of-bf16": lambda: torch.randn(5001).bfloat16().float(),
    "fp32-zeros": lambda: torch.zeros(1030),
    "fp32-crowded": lambda: torch.where(
        torch.rand(7000) < 0.1, random_bits(7000, torch.float32), torch.randn(7000)
    ),
    "bf16-blocks": sparse_bf16,
    "bf16-small": lambda: torch.full((771,), 1.5, dtype=torch.bfloat16),
    "bf16-many": lambda: torch.randn(100_016).bfloat16(),
    "fp16-ragged": lambda: torch.randn(3049).half(),
}


@pytest.mark.kernel
@pytest.mark.parametrize("name", INPUTS)
def test_kernels_equal_the_reference(device: torch.device, name: str) -> None:
    x = INPUTS[name]()
    want = exact_encode_ref(x)
    assert want is not None
    x = x.to(device)
    assert_same_codes(exact_encode(x), want)

    guard = Guarded(device)
    room = want.escapes.numel() // 2
    buffer = guard.empty((span(exact_sizes(x.dtype, x.numel(), 0, room)),), torch.uint8)
    info, _ = exact.exact_encode_into(x, buffer, room)
    assert info[0] == room
    codes = replace(want, **{part: guard.like(tensor) for part, tensor in want.sections.items()})
    for part, tensor in want.sections.items():
        codes.sections[part].copy_(tensor)
    out = guard.like(x)
    exact.exact_decode_into(codes, out)
    assert same_bits(out, x)
    guard.check()
    assert same_bits(exact_decode(codes, x.dtype), x)


@pytest.mark.kernel
def test_escapes_without_room_are_counted_and_not_written(device: torch.device) -> None:
    x, codes = with_escapes()
    sizes = exact_sizes(x.dtype, x.numel(), 0, 5)
    guard = Guarded(device)
    buffer = guard.empty((span(sizes),), torch.uint8)
    info, _ = exact.exact_encode_into(x.to(device), buffer, 5)
    guard.check()
    assert info.tolist()[0] == codes.escapes.numel() // 2
    assert torch.equal(buffer[span(sizes[:5]) :][:10].cpu(), codes.escapes[:10])
    assert (buffer[span(sizes[:5]) + 10 :] == SENTINEL).all()


def late(x: Tensor) -> ExactCodes | Tensor:
    """Through a code of late size; `x` is overwritten before its size is asked for."""
    notice = torch.full((2,), -1, dtype=torch.int32, pin_memory=x.is_cuda)
    source = x.clone()
    codes = exact.exact_encode_late(source, notice)
    assert codes is not None and codes.nbytes <= x.nbytes + 5 * 256  # parts begin at multiples of that
    source.view(torch.uint8).fill_(0x5A)
    del source
    if x.is_cuda:
        torch.cuda.synchronize()
    return codes.settle()


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["bf16-blocks", "fp16-ragged", "fp32-of-bf16", "fp32-zeros", "fp32-crowded"])
def test_codes_of_late_size_are_the_same_codes(device: torch.device, name: str) -> None:
    x = INPUTS[name]().repeat(8)
    got = late(x.to(device))
    assert isinstance(got, ExactCodes)
    assert_same_codes(got, exact_encode_ref(x))
    assert all(part.data_ptr() % 16 == 0 for part in got.sections.values())


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", list(EXACT_FIELDS), ids=str)
@pytest.mark.parametrize("n", [2999, 4096])
def test_escapes_beyond_the_room_of_a_late_size_leave_the_tensor(
    device: torch.device, dtype: torch.dtype, n: int
) -> None:
    x = random_bits(n, dtype)
    got = late(x.to(device))
    assert isinstance(got, Tensor)
    assert torch.equal(got.cpu(), x.view(torch.uint8))


@pytest.mark.kernel
def test_a_code_that_all_planes_make_larger_has_no_late_size(device: torch.device) -> None:
    """fp32 [4200] fills five blocks: 18344 bytes with all planes, 16800 raw."""
    x = torch.randn(4200, device=device)
    notice = torch.zeros(2, dtype=torch.int32, pin_memory=x.is_cuda)
    assert exact.exact_encode_late(x, notice) is None
    zeros = x.bfloat16().float()
    codes = exact.exact_encode(zeros)
    assert codes is not None and codes.nbytes < zeros.nbytes


@pytest.mark.kernel
@pytest.mark.parametrize("extra", [0, 1])
def test_the_last_escape_that_fits_a_late_size(device: torch.device, extra: int) -> None:
    """bf16 [8192]: 12288 + 8 + 32 bytes, in whole 256s 12800, leave room for 1792 escapes."""
    x = torch.full((8192,), 1.0, dtype=torch.bfloat16)
    x[torch.arange(1792 + extra) * 4] = 2.0**-20
    got = late(x.to(device))
    assert isinstance(got, Tensor if extra else ExactCodes)
    assert extra or same_bits(exact_decode(got, x.dtype), x)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", list(EXACT_FIELDS), ids=str)
def test_kernels_leave_random_bits_raw(device: torch.device, dtype: torch.dtype) -> None:
    for n in (1, 34, 3001):
        x = random_bits(n, dtype)
        assert_same_codes(exact_encode(x.to(device)), exact_encode_ref(x))


@pytest.mark.kernel
def test_few_programs_do_the_work_of_many(device: torch.device) -> None:
    x = torch.randn(7 * EXACT_BLOCK + 16).to(device)
    with pytest.raises(LaneError, match="max_programs=0"):
        exact_encode(x, max_programs=0)
    codes = exact_encode(x, max_programs=2)
    assert_same_codes(codes, exact_encode_ref(x.cpu()))
    assert codes is not None
    assert same_bits(exact_decode(codes, x.dtype, max_programs=2), x)


@pytest.mark.kernel
def test_decode_of_lying_parts_stays_inside_its_buffers(device: torch.device) -> None:
    x, codes = with_escapes()
    lies = torch.tensor([-5, 9999, 2**30], dtype=torch.int32), torch.tensor([2**31 - 1, -(2**31), 7]).int()
    for ends in lies:
        parts = {part: tensor.to(device) for part, tensor in codes.sections.items()}
        lie = replace(codes, **parts | {"ends": ends.view(torch.uint8).to(device)})
        guard = Guarded(device)
        out = guard.like(x)
        exact.exact_decode_into(lie, out)
        guard.check()
