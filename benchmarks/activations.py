"""Ratio and error of every lane on the activations of a trained encoder, beside general-purpose yardsticks.

    python benchmarks/activations.py [--out DIR] [--tokens N]

Bases are calibrated on one half of the text and all figures are measured on the other. A row is written only
after the round trip of that very tensor, through the bytes of its packet, passed the check of its method.
"""

from __future__ import annotations

import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from common import RESULTS, append_rows, environment, figure
from minilm import BATCH, MiniLM, standard_library
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet
from sidelane.kernels.reference import dequantize_project_ref, project_quantize_ref
from sidelane.layout import CHANNEL_ROWS, MAPPINGS
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.calibrate import calibrate
from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.video import VideoLane, basis_quantizer

GROUP = 64
SCALE_BITS = 32 / GROUP  # float16 scale and offset of a group, per element
GROUP_BITS = (8, 4, 2)
VIDEO_BITS = 4 + SCALE_BITS  # the basis whose components the video lane codes
QPS = (None, 10, 18, 28)  # None is lossless
CAPTURED = (16, 64, 128)  # leading components whose share of the variance is reported
CALIBRATION = 4  # times as many tokens to calibrate as to report

Row = dict[str, Any]
Check = Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True)
class Method:
    """A lane with its options. `check(x, restored)` is what the round trip must satisfy."""

    name: str
    setting: str
    lane: Lane
    check: Check
    basis: Basis | None = None


def methods(bases: Mapping[float, Basis], everything: Basis) -> list[Method]:
    """The lanes to compare. `bases` by bits per element; `everything` keeps all components."""
    found = [Method("exact", "", open_lane("exact"), identical)]
    for width in GROUP_BITS:
        lane = open_lane("packed", bits=width, group=GROUP)
        found.append(Method("groups", f"{width} bit", lane, within_half_a_step(width)))
    for bits, basis in bases.items():
        lane = open_lane("packed", basis=basis)
        found.append(Method("pca allocated", f"{bits:g} bit", lane, same_codes(basis), basis))
        cut = truncated(everything, int(bits * basis.dim / 8))
        lane = open_lane("packed", basis=cut)
        found.append(Method("pca truncated", f"{bits:g} bit", lane, same_codes(cut), cut))
    middle = bases[VIDEO_BITS]
    found += [video(middle, "nv12", mapping, qp) for mapping in MAPPINGS for qp in QPS]
    return [*found, video(middle, "p010", CHANNEL_ROWS, None)]


def truncated(basis: Basis, rank: int) -> Basis:
    """The leading `rank` components with 8 bits each."""
    rank = min(rank, len(basis.widths))
    return replace(
        basis,
        components=basis.components[:, :rank].contiguous(),
        std=basis.std[:rank],
        peak=basis.peak[:rank],
        widths=(8,) * rank,
    )


def video(basis: Basis, format: str, mapping: str, qp: int | None) -> Method:
    lane = VideoLane(basis=basis, format=format, mapping=mapping, qp=qp)
    if qp is None:
        return Method(f"{format} lossless", mapping, lane, same_surface_codes(basis, lane.bits), basis)
    return Method(f"{format} QP {qp}", mapping, lane, finite, basis)


def identical(x: Tensor, restored: Tensor) -> bool:
    return torch.equal(x.view(torch.int16), restored.view(torch.int16))


def finite(x: Tensor, restored: Tensor) -> bool:
    return bool(restored.isfinite().all()) and restored.shape == x.shape


def within_half_a_step(bits: int) -> Check:
    """Every element is within half a step of its group; float16 scales and bfloat16 output cost a little."""

    def check(x: Tensor, restored: Tensor) -> bool:
        groups, error = x.float().view(-1, GROUP), (x.float() - restored.float()).abs().view(-1, GROUP)
        low, high, largest = groups.amin(1), groups.amax(1), groups.abs().amax(1)
        step = (high - low + low.abs() * 2.0**-9) / (2**bits - 1) * (1 + 2.0**-8)
        return bool((error.amax(1) <= step / 2 + largest * 2.0**-8).all())

    return check


def same_codes(basis: Basis) -> Check:
    """The codes of the reference arrive unchanged: they restore the same floats."""
    q = basis.quantizer()

    def check(x: Tensor, restored: Tensor) -> bool:
        codes, _ = project_quantize_ref(x, q.components, q.offset, q.inv_scale, q.levels)
        return identical(dequantize_project_ref(codes, q.components, q.scale, q.bias, x.dtype), restored)

    return check


def same_surface_codes(basis: Basis, bits: int) -> Check:
    """As `same_codes`, with the operands of the video lane."""
    return lambda x, restored: identical(surface_codes(x, basis, bits)[1], restored)


def surface_codes(x: Tensor, basis: Basis, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [T, K] of the video lane, and what they restore."""
    q = basis_quantizer(basis, bits)
    levels = torch.full_like(q.scale, 2**bits - 1)
    codes, _ = project_quantize_ref(x, q.components, q.offset, q.inv_scale, levels)
    return codes, dequantize_project_ref(codes, q.components, q.scale, q.bias, x.dtype)


def relative_error(x: Tensor, restored: Tensor) -> float:
    return float((x.double() - restored.double()).norm() / x.double().norm())


def measure(name: str, x: Tensor, chosen: Sequence[Method]) -> Iterator[Row]:
    """A row for each method on bfloat16 x [T, D]. Raises RuntimeError when a check fails."""
    for method in chosen:
        data = method.lane.encode(x).to_bytes()
        restored = method.lane.decode(Packet.from_bytes(data))
        if not method.check(x, restored):
            raise RuntimeError(f"{name}: the round trip of '{method.name} {method.setting}' fails its check")
        error = relative_error(x, restored)
        yield result(name, x, method.name, method.setting, len(data), error, method.basis)


def yardsticks(name: str, x: Tensor, basis: Basis) -> Iterator[Row]:
    """Rows of zlib level 6 and of ideal order-0 coders.

    zlib takes the bytes, or their two planes one after the other. One ideal coder codes the exponents beside
    raw signs and mantissas, the other each channel of the codes that the video lane makes with `basis`.
    """
    data = x.contiguous().view(torch.uint8)
    for setting, order in (("bytes", data), ("planes", data.view(-1, 2).t().contiguous())):
        yield result(name, x, "zlib", setting, len(zlib.compress(order.numpy().tobytes(), 6)), 0.0)
    exponents = (x.contiguous().view(torch.int16).int() >> 7) & 255
    yield result(name, x, "entropy", "exponents", ceil(entropy_bytes(exponents.view(-1)) + x.numel()), 0.0)
    codes, restored = surface_codes(x, basis, 8)
    size = ceil(sum(map(entropy_bytes, codes.t())))
    yield result(name, x, "entropy", "nv12 codes", size, relative_error(x, restored), basis)


def entropy_bytes(symbols: Tensor) -> float:
    """Bytes of an ideal coder that knows the histogram of `symbols`."""
    p = torch.bincount(symbols.int()).double() / symbols.numel()
    return float(torch.special.entr(p).sum()) / log(2) * symbols.numel() / 8


def result(
    name: str, x: Tensor, method: str, setting: str, size: int, error: float, basis: Basis | None = None
) -> Row:
    samples = len(x) * basis.rank if basis else x.numel()
    return {
        "tensor": name,
        "tokens": len(x),
        "dim": x.shape[1],
        "method": method,
        "setting": setting,
        "raw_bytes": x.nbytes,
        "wire_bytes": size,
        "ratio": round(x.nbytes / size, 4),
        "rank": basis.rank if basis else "",
        "bits_per_sample": round(8 * size / samples, 4),
        "basis_bytes": basis.nbytes if basis else 0,
        "rel_error": float(f"{error:.4g}"),
    }


def calibrated(fit: Tensor) -> tuple[dict[float, Basis], Basis]:
    """Bases with the bytes of each group code, and one that keeps every component."""
    budgets = [bits + SCALE_BITS for bits in GROUP_BITS]
    return {bits: calibrate([fit], bits=bits) for bits in budgets}, calibrate([fit], bits=12.0)


def spectrum_row(name: str, basis: Basis) -> Row:
    share = basis.spectrum.double().cumsum(0) / basis.spectrum.double().sum()
    return {
        "tensor": name,
        "dim": basis.dim,
        "samples": basis.samples,
        "effective_rank": round(basis.effective_rank, 2),
        **{f"variance_top_{k}": round(float(share[:k][-1]), 5) for k in CAPTURED},
    }


def capture(tokens: int, progress: Progress) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations [tokens, D] by name of the half to calibrate and of the half to report."""
    model, halves = MiniLM(), []
    for files, count in zip(standard_library(), (CALIBRATION * tokens, tokens), strict=True):
        windows = model.windows(files, count)
        batches = progress.track(
            model.activations(windows),
            -(-len(windows) // BATCH),
            description=f"MiniLM, {windows.numel()} tokens",
        )
        parts = list(batches)
        halves.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return halves[0], halves[1]


def draw(path: Path, bases: Mapping[str, Basis], rows: Sequence[Row]) -> None:
    with figure(path, columns=2) as (left, right):
        for name, basis in bases.items():
            spectrum = basis.spectrum.double() / basis.spectrum.double().sum()
            left.semilogy(torch.arange(1, basis.dim + 1) / basis.dim, spectrum, label=name)
        left.set(xlabel="component / D", ylabel="share of the variance", title="Spectra", ylim=(1e-7, 1))
        left.legend(fontsize=7)
        for method in dict.fromkeys(row["method"] for row in rows if row["rel_error"] > 0):
            mine = [row for row in rows if row["method"] == method]
            right.loglog([r["ratio"] for r in mine], [r["rel_error"] for r in mine], ".", label=method)
        right.set(
            xlabel="raw bytes / wire bytes", ylabel="relative error", title="One dot: tensor and setting"
        )
        right.legend(fontsize=7)


def spectrum_table(spectra: Sequence[Row]) -> Table:
    table = Table("tensor", "D", "effective rank", title="Spectra, and variance in the leading components")
    for k in CAPTURED:
        table.add_column(f"top {k}", justify="right")
    for row in spectra:
        shares = (f"{row[f'variance_top_{k}']:.1%}" for k in CAPTURED)
        table.add_row(row["tensor"], str(row["dim"]), f"{row['effective_rank']:.0f}", *shares)
    return table


def summary(rows: Sequence[Row]) -> Table:
    """Geometric mean and least ratio, median and worst error, mean bits per sample over the tensors."""
    table = Table(Column("method", no_wrap=True), Column("setting", no_wrap=True), title="Over all tensors")
    for heading in ("ratio", "least", "error", "worst", "bit/sample"):
        table.add_column(heading, justify="right")
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
        ratios, errors = [row["ratio"] for row in mine], [row["rel_error"] for row in mine]
        table.add_row(
            method,
            setting,
            f"{exp(fmean(map(log, ratios))):.2f}",
            f"{min(ratios):.2f}",
            f"{median(errors):.2%}" if max(errors) else "exact",
            f"{max(errors):.2%}" if max(errors) else "exact",
            f"{fmean(row['bits_per_sample'] for row in mine):.2f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV files and the figure")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to report on, a multiple of 256")
    options = parser.parse_args(arguments)
    if options.tokens < 256 or options.tokens % 256:
        parser.error("--tokens must be a positive multiple of 256")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    machine = environment()
    rows, spectra, bases = [], [], {}
    with Progress(*columns) as progress:
        fits, reports = capture(options.tokens, progress)
        for name, fit in fits.items():
            by_bits, everything = calibrated(fit)
            chosen = methods(by_bits, everything)
            bases[name] = everything
            spectra.append(spectrum_row(name, everything) | machine)
            measured = measure(name, reports[name], chosen)
            found = list(progress.track(measured, len(chosen), description=f"{name} {list(fit.shape)}"))
            found += yardsticks(name, reports[name], by_bits[VIDEO_BITS])
            rows += [row | machine for row in found]
    append_rows(options.out / "activations.csv", rows)
    append_rows(options.out / "activations_spectrum.csv", spectra)
    draw(options.out / "activations.png", bases, rows)
    Console().print(spectrum_table(spectra), summary(rows))


if __name__ == "__main__":
    main()
