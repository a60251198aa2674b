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

from guarded import Guarded
from sidelane.errors import LaneError
from sidelane.kernels import exact, reference
from sidelane.kernels.exact import exact_decode, exact_encode
from sidelane.kernels.reference import (
    EXACT_FIELDS,
    ExactCodes,
    exact_book,
    exact_decode_ref,
    exact_encode_ref,
)

PARTS = ("book", "codes", "counts", "escapes", "planes", "odd")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def assert_same_codes(got: ExactCodes | None, want: ExactCodes | None) -> None:
    if got is None or want is None:
        assert got is want
        return
    for name in PARTS:
        a, b = getattr(got, name).cpu(), getattr(want, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
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


def exponent_counts(x: Tensor) -> Tensor:
    f = EXACT_FIELDS[x.dtype]
    return torch.bincount(f.exponents(x.view(f.word)), minlength=256)


# The format


def test_bf16_bytes() -> None:
    """Exponents 100..115 four times each: 115 comes last and escapes. Odd ones negative, mantissa i."""
    i = torch.arange(64)
    word = (i % 2) << 15 | (100 + i % 16) << 7 | i
    codes = encoded(word.to(torch.int16).view(torch.bfloat16))
    assert codes.book.tolist() == list(range(100, 115))
    assert bytes(codes.codes.tolist()).hex() == "1032547698badcfe" * 4
    assert codes.escapes.tolist() == [115] * 4
    assert codes.counts.tolist() == [4]
    assert codes.planes.tolist() == [[k | (k % 2) << 7 for k in range(64)]]
    assert codes.odd.tolist() == []
    assert (codes.zero_planes, codes.numel, codes.nbytes) == (0, 64, 15 + 32 + 2 + 4 + 64)


def test_fp16_bytes() -> None:
    """One exponent; mantissa bits 8 and 9 are i % 4, the sign every eighth: 3 odd bits as planes."""
    i = torch.arange(200)
    word = (i % 8 == 7).long() << 15 | 17 << 10 | (i % 4) << 8 | i
    codes = encoded(word.to(torch.int16).view(torch.float16))
    assert codes.book.tolist() == [17] + [0] * 14
    assert bytes(codes.codes.tolist()) == bytes(100)
    assert codes.planes.tolist() == [list(range(200))]
    assert bytes(codes.odd.tolist()).hex() == "aa" * 25 + "cc" * 25 + "80" * 25


def test_fp32_zero_planes() -> None:
    """The two low mantissa bytes are zero: one plane is stored, sign << 7 | seven mantissa bits."""
    codes = encoded(torch.tensor([1.0, -1.0, 1.5, -2.0] * 10))
    assert codes.book.tolist()[:2] == [127, 128]
    assert bytes(codes.codes.tolist()).hex() == "0010" * 10
    assert codes.zero_planes == 0b011
    assert codes.planes.tolist() == [[0, 0x80, 0x40, 0x80] * 10]


def test_book_breaks_ties_towards_smaller_exponents() -> None:
    histogram = torch.zeros(256, dtype=torch.int64)
    histogram[[200, 3, 90]] = torch.tensor([5, 7, 5])
    book, index = exact_book(histogram)
    assert book.tolist() == [3, 90, 200] + [0] * 12
    assert index[[3, 90, 200]].tolist() == [0, 1, 2]


# Round trips


@pytest.mark.parametrize(("dtype", "ordinary"), [(torch.bfloat16, 1), (torch.float16, 5)], ids=str)
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
    assert x.numel() * 4 / codes.nbytes > 2.5
    assert same_bits(exact_decode(codes, torch.float32), x)


def test_normal_bf16_shrinks_by_a_quarter() -> None:
    assert 2 * 2**16 / encoded(torch.randn(2**16).bfloat16()).nbytes > 1.3


@given(
    data=st.data(),
    dtype=st.sampled_from(list(EXACT_FIELDS)),
    numel=st.integers(1, 3000),
    wild=st.sampled_from([0.0, 0.01, 0.3]),
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
    x = torch.where(torch.rand(5003) < 0.05, random_bits(5003, torch.float16), torch.randn(5003).half())
    whole = exact_encode_ref(x)
    assert whole is not None
    monkeypatch.setattr(reference, "EXACT_CHUNK", 1024)
    assert_same_codes(exact_encode_ref(x), whole)
    assert same_bits(exact_decode_ref(whole, torch.float16), x)


# Sizes


@pytest.mark.parametrize("dtype", list(EXACT_FIELDS), ids=str)
def test_random_bits_never_grow(dtype: torch.dtype) -> None:
    for n in (1, 2, 37, 1024, 20_001):
        x = random_bits(n, dtype)
        codes = exact_encode(x)
        assert codes is None or codes.nbytes < x.numel() * x.element_size()


def test_smallest_tensor_that_shrinks() -> None:
    """bf16 of one exponent: 15 + ceil(n / 2) + 2 + n < 2 n from n = 36 on."""
    assert exact_encode(torch.ones(35, dtype=torch.bfloat16) * 1.5) is None
    assert encoded(torch.ones(36, dtype=torch.bfloat16) * 1.5).nbytes == 15 + 18 + 2 + 36


# Errors


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(4, dtype=torch.float64), "torch.float64 has no exact code"),
        (torch.zeros(0), "at least one element"),
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
    wrong = {
        "book is": replace(codes, book=codes.book[:14]),
        "codes is": replace(codes, codes=codes.codes.to(torch.int8)),
        "counts is": replace(codes, counts=codes.counts.repeat(2)[::2]),
        "planes is": replace(codes, zero_planes=1),
        "odd is": replace(codes, odd=codes.book),
        "0 elements": replace(codes, numel=0),
        "zero planes 0b10": replace(codes, zero_planes=2),
        "are listed": replace(codes, escapes=codes.escapes[:-1]),
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
    x = torch.randn(6007).bfloat16()
    x[1024:2048] = (2.0 ** torch.arange(-100, 28)).repeat(8).bfloat16()
    x[6006] = 1e-38
    return x


STEP = 1 if torch.cuda.is_available() else 11  # an odd step meets every exponent and every mantissa
INPUTS: dict[str, Callable[[], Tensor]] = {
    "bf16-patterns": lambda: bit_patterns(torch.bfloat16, 1, STEP),
    "fp16-patterns": lambda: bit_patterns(torch.float16, 5, STEP),
    "fp32-odd": odd_floats,
    "fp32-of-bf16": lambda: torch.randn(5001).bfloat16().float(),
    "fp32-zeros": lambda: torch.zeros(1030),
    "bf16-blocks": sparse_bf16,
    "bf16-small": lambda: torch.full((36,), 1.5, dtype=torch.bfloat16),
    "fp16-ragged": lambda: torch.randn(2049).half(),
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
    codes = replace(want, **{part: guard.like(getattr(want, part)) for part in PARTS})
    codes.book.copy_(want.book)
    _, index = exact_book(exponent_counts(x.cpu()))
    exact.exact_encode_into(x, index.to(device), codes)
    assert_same_codes(codes, want)
    out = guard.like(x)
    exact.exact_decode_into(codes, out)
    assert same_bits(out, x)
    guard.check()
    assert same_bits(exact_decode(codes, x.dtype), x)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", list(EXACT_FIELDS), ids=str)
def test_kernels_leave_random_bits_raw(device: torch.device, dtype: torch.dtype) -> None:
    for n in (1, 34, 3001):
        x = random_bits(n, dtype)
        assert_same_codes(exact_encode(x.to(device)), exact_encode_ref(x))


@pytest.mark.kernel
def test_kernels_leave_what_would_stay_the_same_size_raw(device: torch.device) -> None:
    x = torch.full((35,), 1.5, dtype=torch.bfloat16, device=device)
    assert exact_encode(x) is None


@pytest.mark.kernel
def test_survey_counts_every_element_once(device: torch.device) -> None:
    """More tiles than programs: programs * TILE < numel."""
    x = torch.randn(5 * exact.SURVEY_TILE + 13).bfloat16()
    guard = Guarded(device)
    table = guard.empty((2, 257), torch.int32)
    exact.survey_into(x.to(device), table)
    guard.check()
    assert table[:, :256].sum(0).tolist() == exponent_counts(x).tolist()


@pytest.mark.kernel
def test_decode_of_lying_counts_stays_inside_its_buffers(device: torch.device) -> None:
    x, codes = with_escapes()
    parts = {part: getattr(codes, part).to(device) for part in PARTS}
    lie = replace(
        codes, **parts | {"counts": torch.tensor([-5, 9999, 30000], dtype=torch.int16, device=device)}
    )
    guard = Guarded(device)
    out = guard.like(x)
    exact.exact_decode_into(lie, out)
    guard.check()
    ordinary = x.float().abs() > 1e-3
    assert same_bits(out.cpu()[ordinary], x[ordinary])
