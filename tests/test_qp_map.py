"""QP maps from variances: the closed form, every layout against a count by hand, and libx265 at these QPs."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulated import EmulatedDriver, build, installed, random_surface
from sidelane.codec.hevc import decode_hevc
from sidelane.codec.nvenc import Encoder
from sidelane.codec.qp_map import CTB, map_shape, variance_qp_map
from sidelane.errors import LaneError
from sidelane.kernels.surface import project_quantize_pack, unpack_dequantize_project
from sidelane.layout import (
    CHANNEL_ROWS,
    MAPPINGS,
    NV12,
    NV12_SPLIT12,
    P010,
    TOKEN_ROWS,
    YUV444,
    YUV444_10,
    SurfaceFormat,
    SurfaceLayout,
    plan_surface,
)
from test_layout import positions

FORMATS = (NV12, P010, YUV444, YUV444_10)


@pytest.fixture
def driver() -> Iterator[EmulatedDriver]:
    with installed(build()) as emulated:
        yield emulated


def one_channel_per_block_row(bands: int, frames: int = 1) -> SurfaceLayout:
    """4:4:4 with three planes of `bands` rows of blocks; the tokens of a channel fill a row of blocks."""
    width = 160
    tokens, channels = width * CTB, 3 * bands * frames
    return SurfaceLayout(YUV444, CHANNEL_ROWS, tokens, channels, width, bands * CTB, frames, 256)


def test_the_closed_form() -> None:
    """Rows of blocks whose three planes hold one variance: -6 log2 of sigma over the geometric mean."""
    layout = one_channel_per_block_row(4)
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0])  # geometric mean 2^1.5
    got = variance_qp_map(sigma.square().repeat(3), layout, qp=30)
    assert got.dtype == torch.int8 and tuple(got.shape) == (1, 4, 5) == map_shape(layout)
    assert got[0].tolist() == [[round(-6 * (log2(s) - 1.5))] * 5 for s in sigma.tolist()]
    assert got[0, :, 0].tolist() == [-9, -3, 3, 9]


def test_planes_that_share_a_block_count_by_their_mean_variance() -> None:
    layout = one_channel_per_block_row(2)
    variances = torch.tensor([1.0, 64.0, 3.0, 64.0, 8.0, 64.0])  # planes over rows of blocks: mean 4 and 64
    assert variance_qp_map(variances, layout, qp=30)[0, :, 0].tolist() == [6, -6]


def test_equal_variances_change_nothing() -> None:
    for fmt in FORMATS:
        layout = plan_surface(fmt, TOKEN_ROWS, 301, 77, max_side=144)
        assert not variance_qp_map(torch.full((77,), 0.37), layout, qp=30).any()


def test_sums_stay_in_the_range_of_qp() -> None:
    layout = one_channel_per_block_row(2, frames=2)
    variances = torch.tensor([1e12, 1e-12] * 6)
    for qp in (0, 1, 30, 51):
        sums = variance_qp_map(variances, layout, qp).int() + qp
        assert sums.min() == 0 and sums.max() == 51


def test_channels_that_are_worth_nothing() -> None:
    layout = one_channel_per_block_row(3)
    got = variance_qp_map(torch.tensor([4.0, 0.0, 1.0] * 3), layout, qp=30)[0, :, 0].tolist()
    assert got == [-3, 21, 3]  # as coarse as it goes; the others as if there were nothing else
    assert (variance_qp_map(torch.zeros(9), layout, qp=30) == 21).all()


def test_blocks_without_codes_keep_the_qp() -> None:
    width, height = 160, 160
    layout = SurfaceLayout(NV12, CHANNEL_ROWS, width, 40, width, height, 1, 256)  # the first 40 rows of luma
    got = variance_qp_map(torch.cat((torch.full((32,), 4.0), torch.ones(8))), layout, qp=20)[0]
    # Sigmas 2 and 1, of 32 and 8 rows: reference 2^(4/5).
    assert got.tolist() == [[round(-6 * 0.2)] * 5, [round(6 * 0.8)] * 5] + [[0] * 5] * 3


def counted_by_hand(variances: torch.Tensor, layout: SurfaceLayout, qp: int) -> torch.Tensor:
    """The map from the place of every code."""
    at = positions(layout)
    frame_rows = layout.format.rows(layout.height)
    row, x = at // layout.width % frame_rows, at % layout.width
    y = row % layout.height // CTB
    if layout.format.subsampled:
        y = torch.where(row < layout.height, row // CTB, (row - layout.height) // (CTB // 2))
    frames, down, across = map_shape(layout)
    block = ((at // layout.width // frame_rows * down + y) * across + x // CTB).flatten()
    result = torch.zeros(frames * down * across, dtype=torch.int8)
    weights = variances.expand(layout.tokens, -1).flatten()
    used = block.unique().tolist()
    log_sigma2 = {b: log2(weights[block == b].mean()) for b in used}
    counts = {b: int((block == b).sum()) for b in used}
    reference = sum(counts[b] * log_sigma2[b] for b in used) / sum(counts.values())
    for b in used:
        result[b] = min(max(round(-3 * (log_sigma2[b] - reference)), -qp), 51 - qp)
    return result.view(frames, down, across)


@settings(max_examples=30, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    mapping=st.sampled_from(sorted(MAPPINGS)),
    tokens=st.integers(1, 500),
    channels=st.integers(1, 60),
    qp=st.integers(0, 51),
    seed=st.integers(0, 99),
)
def test_every_layout(
    format: SurfaceFormat, mapping: str, tokens: int, channels: int, qp: int, seed: int
) -> None:
    layout = plan_surface(format, mapping, tokens, channels, max_side=146)
    spread = torch.randn(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    variances = (2 * spread).exp()
    got = variance_qp_map(variances, layout, qp)
    assert torch.equal(got, counted_by_hand(variances, layout, qp))


@pytest.mark.parametrize(
    ("variances", "format", "qp", "problem"),
    [
        (torch.ones(7), NV12, 30, r"variances are \[7\]: pass \[6\]"),
        (torch.ones(6, 1), NV12, 30, r"pass \[6\]"),
        (-torch.ones(6), NV12, 30, "finite and not negative"),
        (torch.full((6,), float("nan")), NV12, 30, "finite and not negative"),
        (torch.ones(6), NV12, 52, "qp=52 is not an integer 0..51"),
        (torch.ones(6), NV12, None, "qp=None"),
        (torch.ones(6), NV12_SPLIT12, 30, "coded without loss"),
    ],
)
def test_wrong_arguments(variances: torch.Tensor, format: SurfaceFormat, qp: int, problem: str) -> None:
    layout = plan_surface(format, CHANNEL_ROWS, 100, 6)
    with pytest.raises(LaneError, match=problem):
        variance_qp_map(variances, layout, qp)


def encoded(layout: SurfaceLayout, source: torch.Tensor, qp: int, qp_map: torch.Tensor | None) -> bytes:
    with Encoder(layout, qp=qp, qp_map=True, device="cuda:0") as encoder:
        return encoder.encode(source, qp_map).stream()


@pytest.mark.parametrize("format", [NV12, YUV444_10], ids=lambda f: f.name)
def test_bits_and_errors_follow_the_map(driver: EmulatedDriver, format: SurfaceFormat) -> None:
    """libx265 at the QP of every block: six QP more are four times the squared error and fewer bits."""
    driver.real_hevc()
    layout = SurfaceLayout(format, TOKEN_ROWS, 1, 1, 160, 160, 1, 512)
    source = random_surface(layout)
    blocks = torch.zeros(map_shape(layout), dtype=torch.int8)
    blocks[0, :2], blocks[0, 3:] = -6, 6

    def errors(stream: bytes) -> list[float]:
        """Mean squared error of luma of the upper, the middle and the lower rows of blocks."""
        decoded = decode_hevc(stream, layout)
        wide = [s if format.itemsize == 1 else s.view(torch.int16).int() & 0xFFFF for s in (decoded, source)]
        luma = (wide[0][:160, :160].double() - wide[1][:160, :160].double()).square()
        return [luma[:64].mean().item(), luma[64:96].mean().item(), luma[96:].mean().item()]

    plain, mapped = encoded(layout, source, 26, None), encoded(layout, source, 26, blocks)
    for before, after, ratio in zip(errors(plain), errors(mapped), (1 / 4, 1, 4), strict=True):
        assert ratio / 1.2 < after / before < ratio * 1.2
    sizes = [len(encoded(layout, source, 26, torch.full_like(blocks, delta))) for delta in (-6, 0, 6)]
    assert sizes[0] > sizes[1] == len(plain) > sizes[2]
    assert sizes[0] > len(mapped) > sizes[2]


def test_a_map_spends_bits_where_they_are_worth_most(driver: EmulatedDriver) -> None:
    """Channels of different size, all scaled to the range of the codes: the same stream size, less error."""
    driver.real_hevc()
    tokens, channels, qp = 32 * 160, 15, 18
    layout = SurfaceLayout(YUV444, CHANNEL_ROWS, tokens, channels, 160, 160, 1, 256)
    sigma = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25]).repeat(3)
    x = sigma * torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    scale = sigma / 30  # of a code
    bias = -128 * scale
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    project_quantize_pack(x, None, bias, 1 / scale, torch.full((15,), 255.0), surface, layout)
    qp_map = variance_qp_map(sigma.square(), layout, qp)
    assert qp_map[0, :, 0].tolist() == [-12, -6, 0, 6, 12]
    error, size = [], []
    for one in (None, qp_map):
        stream = encoded(layout, surface, qp, one)
        out = unpack_dequantize_project(decode_hevc(stream, layout), layout, None, scale, bias, torch.float32)
        error.append((out - x).square().mean(0).view(3, 5).mean(0))
        size.append(len(stream))
    # Arithmetic over geometric mean of the variances: 4.26; the codes themselves are rounded to integers.
    assert error[1].mean() < error[0].mean() / 3
    assert error[1].max() < 2 * error[1].min()
    assert size[1] < 1.05 * size[0]
