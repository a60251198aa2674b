"""Calibration: principal components from streamed samples, code widths from held-out error."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace
from math import ceil

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sidelane.errors import BasisError
from sidelane.kernels.reference import (
    MAX_CODE_BITS,
    dequantize_project_ref,
    project_quantize_ref,
    round_half_up,
)
from sidelane.pipeline.basis import Basis, clip_range
from sidelane.pipeline.lanes import undisturbed
from sidelane.pipeline.spread import GOLDEN

Floats = npt.NDArray[np.float64]

CHUNK = 4096  # rows converted to float64 at a time
BLOCK = 16  # consecutive rows that are held out together, so that neighbours do not leak into the fit
HELDOUT_ROWS = 8192  # most held-out rows kept
MIN_ROWS = 64  # fewest rows to fit, however few dimensions


def calibrate(
    samples: Iterable[Tensor], *, rank: int | None = None, bits: float = 4.0, heldout: float = 0.25
) -> Basis:
    """Fit a basis to samples read once, and allocate `bits` per element to its coefficients.

    Mean and covariance are accumulated in float64; the components are an exact eigendecomposition. Blocks
    of 16 rows are held out, spread evenly over the samples; a uniform sample of up to 8192 of these rows is
    kept. One half of it gives the error of every coefficient at every width, from which the widths are
    allocated; the other half gives `heldout_error`. How rows are split into batches makes no difference.
    Ten to twenty rows for each dimension make a good fit.

    Args:
        samples: float tensors [..., D] on any device. Rows with NaN or Inf are dropped and counted.
        rank: most components to keep; None leaves that to the allocation.
        bits: budget per element of x; the widths sum to at most bits * D.
        heldout: fraction of rows held out, above 0 and at most 0.5.

    Raises:
        BasisError: an argument is out of range, batches differ in D or are not floats, there are fewer than
            2 * D rows to fit, or the rows do not vary.
    """
    if not 0 < bits <= MAX_CODE_BITS:
        raise BasisError(f"bits {bits} is outside 0..{MAX_CODE_BITS}")
    if not 0 < heldout <= 0.5:
        raise BasisError(f"heldout {heldout} is not above 0 and at most 0.5")
    if rank is not None and type(rank) is not int:
        raise BasisError(f"rank {rank!r} is no whole number")
    try:
        batches = iter(samples)
    except TypeError as error:
        raise BasisError(
            f"samples is a {type(samples).__name__}: pass an iterable of tensors [..., D]"
        ) from error
    rows = _Rows(heldout)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.is_meta:
            raise BasisError(f"a sample is a {type(batch).__name__} without data: pass tensors [..., D]")
        with undisturbed(batch.device):
            rows.add(batch)
    dim = rows.mean.numel()
    if rank is not None and dim and not 1 <= rank <= dim:
        raise BasisError(f"rank {rank} is outside 1..{dim}, the width of the samples")
    rows.check()
    with undisturbed(rows.mean.device):
        return _fit(rows, dim if rank is None else rank, bits)


def _fit(rows: _Rows, rank: int, bits: float) -> Basis:
    dim = rows.mean.numel()
    if not rows.scatter.isfinite().all():
        raise BasisError("the samples are too large for a covariance in float64: scale them down")
    spectrum, components = _principal_components(rows.scatter / rows.fitted)
    components = components[:, :rank]
    kept = rows.kept.to(components.device, torch.float64)
    z = (kept[0::2] - rows.mean) @ components
    std, peak = z.square().mean(0).sqrt(), z.abs().amax(0)
    widths = allocate_bits(quantization_errors(z, std, peak), int(bits * dim))
    used = max((k + 1 for k, w in enumerate(widths) if w), default=0)
    if not used:
        raise BasisError(f"the rows do not vary, or {bits} bits are too few for {dim} dimensions: raise bits")
    basis = Basis(
        mean=rows.mean.float().cpu(),
        components=components[:, :used].float().cpu().contiguous(),
        std=std[:used].float().cpu(),
        peak=peak[:used].float().cpu(),
        spectrum=spectrum.float().cpu(),
        widths=widths[:used],
        heldout_error=0.0,
        samples=rows.fitted,
        dropped=rows.dropped,
    )
    return replace(basis, heldout_error=coding_error(basis, kept[1::2].float().cpu()))


def coding_error(basis: Basis, rows: Tensor) -> float:
    """Relative Frobenius error of float32 rows [T, D] coded with the allocated widths."""
    q = basis.quantizer()
    codes, _ = project_quantize_ref(rows, q.components, q.offset, q.inv_scale, q.levels)
    restored = dequantize_project_ref(codes, q.components, q.scale, q.bias, torch.float32)
    norm = rows.double().norm()
    return float((restored.double() - rows.double()).norm() / norm) if norm > 0 else 0.0


def quantization_errors(z: Tensor, std: Tensor, peak: Tensor) -> Tensor:
    """Mean squared error [K, 13] of coefficients z [N, K] coded with 0..12 bits."""
    errors = [z.square().mean(0)]
    for width in range(1, MAX_CODE_BITS + 1):
        limit = clip_range(std, peak, [width] * std.numel())
        scale = 2 * limit / (2**width - 1)
        inv = torch.where(scale > 0, 1 / scale, 0.0)
        codes = round_half_up((z + limit) * inv).clamp(0, 2**width - 1)
        errors.append((codes * scale - limit - z).square().mean(0))
    return torch.stack(errors, dim=1)


def allocate_bits(errors: Tensor, budget: int) -> tuple[int, ...]:
    """Widths [K] with a sum of at most `budget` that minimize the sum of errors[k, widths[k]].

    Steps along the lower convex hull of each row of `errors` [K, W] are taken in order of falling gain per
    bit: Y. Shoham and A. Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans.
    ASSP 36(9), 1988. Optimal at every budget where a step ends; with errors variance / 4^width it is reverse
    water-filling in whole bits (T. Cover and J. Thomas, "Elements of Information Theory", section 10.3.3).
    """
    table = errors.double().cpu().numpy()
    widths = [0] * len(table)
    steps = [
        (*_next_step(row, 0, budget), k) for k, row in enumerate(table)
    ]  # (-gain per bit, bits, component)
    heapq.heapify(steps)
    while steps:
        slope, bits, k = heapq.heappop(steps)
        if bits <= budget:
            widths[k] += bits
            budget -= bits
        slope, bits = _next_step(table[k], widths[k], budget)
        if slope < 0:
            heapq.heappush(steps, (slope, bits, k))
    return tuple(widths)


def _next_step(row: Floats, width: int, budget: int) -> tuple[float, int]:
    """(-gain per bit, bits) of the steepest step up from `width` within `budget`; (0, 0) if none gains."""
    steps = ((float(row[w] - row[width]) / (w - width), w - width) for w in range(width + 1, len(row)))
    return min((step for step in steps if step[0] < 0 and step[1] <= budget), default=(0.0, 0))


def _principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [D], falling and not negative, and eigenvectors [D, D], largest entry of each positive."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


class _Rows:
    """Running mean and scatter matrix of the fitted rows, and a bounded sample of the held-out ones."""

    def __init__(self, heldout: float) -> None:
        self.heldout = heldout
        self.seen = self.dropped = self.fitted = 0
        self.mean = self.scatter = self.kept = torch.empty(0, device="cpu")
        self._keys = np.empty(0)
        self._rng = np.random.default_rng(0)

    def add(self, batch: Tensor) -> None:
        if not batch.is_floating_point() or batch.ndim == 0:
            raise BasisError(f"samples must be float tensors [..., D], not {batch.dtype} {list(batch.shape)}")
        dim = batch.shape[-1]
        if not self.mean.numel():
            self.mean = torch.zeros(dim, dtype=torch.float64, device=batch.device)
            self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=batch.device)
            self.kept = torch.empty(0, dim, device=batch.device)
        if dim != self.mean.numel() or dim == 0:
            raise BasisError(f"samples have {dim} dimensions after {self.mean.numel()}: fit a basis for each")
        for chunk in batch.detach().reshape(-1, dim).split(CHUNK):  # type: ignore[no-untyped-call]
            finite = chunk.isfinite().all(1)
            self.dropped += int((~finite).sum())
            self._add_finite(chunk[finite].to(self.mean.device))

    def _add_finite(self, rows: Tensor) -> None:
        index = torch.arange(self.seen, self.seen + len(rows), device=rows.device)
        self.seen += len(rows)
        held = (index // BLOCK).double() * GOLDEN % 1 < self.heldout
        self._merge(rows[~held].double())
        self._keep(rows[held].float())

    def _merge(self, rows: Tensor) -> None:
        """T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance", 1983, eq. 2.1."""
        count = len(rows)
        if not count:
            return
        total = self.fitted + count
        mean = rows.mean(0)
        centred, delta = rows - mean, mean - self.mean
        self.scatter += centred.t() @ centred + torch.outer(delta, delta) * (self.fitted * count / total)
        self.mean = self.mean + delta * (count / total)
        self.fitted = total

    def _keep(self, rows: Tensor) -> None:
        """Bottom-k sampling: every row draws a key, those with the smallest keys stay."""
        self._keys = np.concatenate((self._keys, self._rng.random(len(rows))))
        self.kept = torch.cat((self.kept, rows))
        if len(self._keys) > HELDOUT_ROWS:
            smallest = np.sort(np.argpartition(self._keys, HELDOUT_ROWS)[:HELDOUT_ROWS])
            self._keys, self.kept = self._keys[smallest], self.kept[torch.from_numpy(smallest)]

    def check(self) -> None:
        """Raise BasisError unless there are enough rows to fit; the first block is always held out."""
        fit = max(2 * self.mean.numel(), MIN_ROWS)
        needed = ceil(fit / (1 - self.heldout)) + 3 * BLOCK  # the spread is even to within three blocks
        if self.seen < needed:
            raise BasisError(f"{self.seen} finite rows are too few: calibrate with at least {needed}")
