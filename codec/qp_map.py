"""QP maps: a quantizer for every block of a surface, from the variances of the channels that lie in it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from sidelane.codec.hevc import MAX_QP
from sidelane.errors import LaneError
from sidelane.layout import CHANNEL_TILES, TOKEN_ROWS, SurfaceLayout

CTB = 32  # luma samples to the side of a block: the largest coding tree block of NVENC
QP_STEP = 6  # doubles the quantizer step of HEVC (ITU-T H.265, 8.6.4.2)


def map_shape(layout: SurfaceLayout) -> tuple[int, int, int]:
    """Frames, rows and columns of blocks of a surface."""
    return layout.frames, -(-layout.height // CTB), -(-layout.width // CTB)


def variance_qp_map(variances: Tensor, layout: SurfaceLayout, qp: int) -> Tensor:
    """QP differences that give every channel the same error although their codes have the same range.

    In channels that were scaled to one range, a step of the quantizer is worth `sqrt(variances[k])`. The
    squared error that a rate buys is least when it is the same everywhere, down to channels not worth a bit
    (reverse water-filling: T. Cover and J. Thomas, Elements of Information Theory, section 10.3), so the step
    of a block has to be in inverse proportion to sigma, and six QP double a step:

        delta = -6 * log2(sigma / reference)

    sigma^2 is the mean variance of the codes in the block, which is what counts where channels share one. The
    reference is the geometric mean of the sigmas, so that the differences average to zero before they are
    rounded and limited. Blocks without codes get 0. Chroma follows luma as the decoder derives it.

    Args:
        variances: [K], of the channels before they were scaled; finite, not negative; 0 is worth nothing.
        layout: of codes [T, K]. The map depends on nothing else: make it once.
        qp: that the differences are added to; the sums are limited to 0..51.

    Returns:
        int8 [frames, ceil(height / 32), ceil(width / 32)] on the CPU, in steps of QP, for `Encoder.submit`.

    Raises LaneError for variances that do not fit, a split format, which is always lossless, or `qp` out of
    range.
    """
    if layout.format.split:
        raise LaneError(f"surface format '{layout.format.name}' is coded without loss: there is no QP to map")
    if not (isinstance(qp, int) and 0 <= qp <= MAX_QP):
        raise LaneError(f"qp={qp!r} is not an integer 0..{MAX_QP}")
    weights = variances.detach().to("cpu", torch.float64)
    if tuple(weights.shape) != (layout.channels,):
        raise LaneError(f"variances are {list(weights.shape)}: pass [{layout.channels}], one per channel")
    if not (weights.isfinite() & (weights >= 0)).all():
        raise LaneError("variances must be finite and not negative")
    total, count = _block_sums(weights, layout), _block_sums(torch.ones_like(weights), layout)
    mean = total / count.clamp(min=1)
    alive = (count > 0) & (mean > 0)
    log_sigma = torch.where(alive, mean, 1.0).log2() / 2
    reference = (log_sigma * count)[alive].sum() / count[alive].sum().clamp(min=1)
    delta = (-QP_STEP * (log_sigma - reference)).round().clamp(-qp, MAX_QP - qp)
    delta[~alive] = MAX_QP - qp
    delta[count == 0] = 0
    return delta.to(torch.int8)


def _block_sums(weights: Tensor, layout: SurfaceLayout) -> Tensor:
    """Sum of the weights [K] of the codes in every block, float64 [map_shape]."""
    shape = map_shape(layout)
    sums = torch.zeros(shape, dtype=torch.float64, device=weights.device)
    for frame in range(shape[0]):
        for block_row, first, rows in _strips(layout):
            columns = _strip(weights, layout, frame * layout.format.rows(layout.height) + first, rows).sum(0)
            filled = torch.nn.functional.pad(columns, (0, shape[2] * CTB - layout.width))
            sums[frame, block_row] += filled.view(-1, CTB).sum(1)
    return sums


def _strips(layout: SurfaceLayout) -> Iterator[tuple[int, int, int]]:
    """(row of blocks, first sample row of a frame, number of them) for every plane."""
    height = layout.height
    # Interleaved chroma has the columns of luma and half its rows.
    planes = [(0, height, CTB), (height, height // 2, CTB // 2)]
    if not layout.format.subsampled:
        planes = [(plane * height, height, CTB) for plane in range(3)]
    for start, rows, step in planes:
        for first in range(0, rows, step):
            yield first // step, start + first, min(step, rows - first)


def _strip(weights: Tensor, layout: SurfaceLayout, first: int, rows: int) -> Tensor:
    """Weight of every sample of `rows` rows of the surface, 0 where there is no code; [rows, width]."""
    tokens, width, stride = layout.tokens, layout.width, layout.stride
    start, stop = first * width, (first + rows) * width  # linear positions
    count = partial(torch.arange, device=weights.device)
    if layout.mapping == CHANNEL_TILES:
        row = count(first, first + rows)[:, None]
        tiles = _pick(weights, row // layout.tile_h * layout.across + count(layout.across))
        used = row % layout.tile_h * layout.tile_w + count(layout.tile_w) < tokens
        samples = (tiles[:, :, None] * used[:, None]).flatten(1)
        return torch.nn.functional.pad(samples, (0, width - samples.shape[1]))
    lanes = count(start // stride, -(-stop // stride))
    if layout.mapping == TOKEN_ROWS:
        lane = torch.nn.functional.pad(weights, (0, stride - layout.channels))
        flat = (lane * (lanes < tokens)[:, None]).flatten()[start % stride :]
        return flat[: stop - start].view(rows, width)
    # A lane has the tokens of a channel, then its padding.
    ends = (lanes[:, None] * stride + lanes.new_tensor([tokens, stride])).flatten().clamp(start, stop)
    lengths = ends.diff(prepend=lanes.new_tensor([start]))
    values = torch.stack((_pick(weights, lanes), weights.new_zeros(len(lanes))), 1).flatten()
    return values.repeat_interleave(lengths).view(rows, width)


def _pick(weights: Tensor, channels: Tensor) -> Tensor:
    """Weights of channels; 0 for numbers beyond the last."""
    return torch.nn.functional.pad(weights, (0, 1))[channels.clamp(max=len(weights))]
