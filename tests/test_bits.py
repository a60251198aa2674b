"""Bit planes: bytes worked out by hand, round trips, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guarded import Guarded
from sidelane.errors import LaneError
from sidelane.kernels.bits import pack_bits, pack_bits_into, unpack_bits, unpack_bits_into
from sidelane.kernels.reference import pack_bits_ref, packed_bits_size


def random_codes(tokens: int, widths: list[int]) -> Tensor:
    return (torch.randint(0, 4096, (tokens, len(widths))) % 2 ** torch.tensor(widths)).to(torch.int16)


def test_plane_bytes() -> None:
    codes = torch.zeros(9, 3, dtype=torch.int16)
    codes[:, 0] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 2])
    codes[:, 2] = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1])
    # Channel 0: bit 0 of tokens 1, 3, 5, 7; bit 1 of tokens 2, 3, 6, 7 and 8. Channel 2: tokens 0, 7 and 8.
    assert bytes(pack_bits(codes, [2, 0, 1]).tolist()).hex() == "aa00" + "cc01" + "8101"


@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(0, 12), max_size=6))
    tokens = data.draw(st.integers(0, 40))
    columns = [
        data.draw(st.lists(st.integers(0, 2**w - 1), min_size=tokens, max_size=tokens)) for w in widths
    ]
    codes = torch.tensor(columns, dtype=torch.int16).view(len(widths), tokens).t()
    packed = pack_bits(codes, widths)
    assert packed.shape == (packed_bits_size(tokens, widths),) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, widths, tokens), codes)


def test_bits_above_the_width_are_dropped() -> None:
    codes = torch.tensor([[-1], [12]], dtype=torch.int16)
    assert unpack_bits(pack_bits(codes, [3]), [3], 2).tolist() == [[7], [4]]


def test_pack_refuses() -> None:
    codes = torch.zeros(4, 2, dtype=torch.int16)
    with pytest.raises(LaneError, match="torch.int32"):
        pack_bits(codes.int(), [1, 1])
    with pytest.raises(LaneError, match="int16 \\[tokens, channels\\]"):
        pack_bits(codes[:, 0], [1])
    with pytest.raises(LaneError, match="1 widths for 2 channels"):
        pack_bits(codes, [1])
    with pytest.raises(LaneError, match="outside 0..12"):
        pack_bits(codes, [1, 13])


def test_unpack_refuses() -> None:
    packed = torch.zeros(6, dtype=torch.uint8)
    for wrong in (packed[:5], packed.to(torch.int8), packed.view(2, 3), packed.repeat(2)[::2]):
        with pytest.raises(LaneError, match="9 tokens need uint8 \\[6\\]"):
            unpack_bits(wrong, [2, 1], 9)
    with pytest.raises(LaneError, match="-8 tokens"):
        unpack_bits(packed, [2, 1], -8)
    with pytest.raises(LaneError, match="outside 0..12"):
        unpack_bits(packed, [-1, 3], 8)


# Kernels

CASES = [
    (1, [5]),
    (7, [3, 0, 12]),
    (9001, [4]),
    (16384, [12]),
    (64, [1, 2, 3, 4, 5]),
    (333, [12] * 8 + [0] * 57),
    (515, [(7 * k) % 13 for k in range(70)]),
    (40, [0, 0, 0]),
]


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}x{len(c[1])}")
def test_kernels_equal_the_reference(device: torch.device, case: tuple[int, list[int]]) -> None:
    tokens, widths = case
    codes = random_codes(tokens, widths)
    want = pack_bits_ref(codes, widths)
    guard = Guarded(device)
    packed = guard.like(want)
    pack_bits_into(codes.to(device), widths, packed)
    assert torch.equal(packed.cpu(), want)
    back = guard.like(codes)
    unpack_bits_into(packed, widths, back)
    assert torch.equal(back.cpu(), codes)
    guard.check()
    assert torch.equal(pack_bits(codes.to(device), widths).cpu(), want)
    assert torch.equal(unpack_bits(packed, widths, tokens).cpu(), codes)


@pytest.mark.kernel
def test_kernel_takes_any_strides_and_drops_bits_above_the_width(device: torch.device) -> None:
    whole = torch.randint(-(2**15), 2**15, (130, 96)).to(torch.int16)
    on_device = whole.to(device)
    for view in (lambda x: x[3:, 5:45], lambda x: x.t()[:40, ::3], lambda x: x[:, 7:8]):
        codes = view(whole)
        widths = [(5 * k + 1) % 13 for k in range(codes.shape[1])]
        assert torch.equal(pack_bits(view(on_device), widths).cpu(), pack_bits_ref(codes, widths))


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(0, 3), (5, 0)])
def test_kernels_do_nothing_for_no_codes(device: torch.device, shape: tuple[int, int]) -> None:
    widths = [4] * shape[1]
    packed = pack_bits(torch.zeros(shape, dtype=torch.int16, device=device), widths)
    assert packed.shape == (0,)
    assert unpack_bits(packed, widths, shape[0]).shape == shape
