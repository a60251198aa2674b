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
from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from common import RESULTS, append_rows, environment, figure
from minilm import BATCH, MiniLM, standard_library
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet
from sidelane.kernels.reference import dequantize_project_ref, project_quantize_ref
from sidelane.layout import MAPPINGS
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.calibrate import calibrate
from sidelane.pipeline.lanes import open_lane

GROUP = 64
SCALE_BITS = 32 / GROUP  # float16 scale and offset of a group, per element
GROUP_BITS = (8, 4, 2)
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
    mapping: str = ""


def methods(bases: Mapping[float, Basis], everything: Basis) -> list[Method]:
    """The lanes to compare. `bases` by bits per element; `everything` keeps all components."""
    found = [Method("exact", "", open_lane("exact"), identical)]
    for bits in GROUP_BITS:
        lane = open_lane("packed", bits=bits, group=GROUP)
        found.append(Method("groups", f"{bits} bit", lane, within_half_a_step(bits)))
    for bits, basis in bases.items():
        lane = open_lane("packed", basis=basis)
        found.append(Method("pca allocated", f"{bits:g} bit", lane, same_codes(basis), basis))
        kept = min(int(bits * basis.dim / 8), everything.dim)
        cut = replace(everything, widths=(8,) * kept + (0,) * (len(everything.widths) - kept))
        lane = open_lane("packed", basis=cut)
        found.append(Method("pca truncated", f"{bits:g} bit", lane, same_codes(cut), cut))
    return found + [video(bases[4 + SCALE_BITS], mapping, qp) for mapping in MAPPINGS for qp in QPS]


def video(basis: Basis, mapping: str, qp: int | None) -> Method:
    lane = open_lane("video-cpu", basis=basis, mapping=mapping, qp=qp)
    if qp is None:
        return Method("video lossless", mapping, lane, same_codes(basis, lane.bits), basis, mapping)
    return Method(f"video QP {qp}", mapping, lane, finite, basis, mapping)


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


def same_codes(basis: Basis, width: int | None = None) -> Check:
    """The codes of the reference arrive unchanged: they restore the same floats."""

    def check(x: Tensor, restored: Tensor) -> bool:
        q = basis.quantizer(width)
        codes, _ = project_quantize_ref(x, q.components, q.offset, q.inv_scale, q.levels)
        return identical(dequantize_project_ref(codes, q.components, q.scale, q.bias, x.dtype), restored)

    return check


def relative_error(x: Tensor, restored: Tensor) -> float:
    return float((x.double() - restored.double()).norm() / x.double().norm())


def measure(name: str, x: Tensor, chosen: Sequence[Method]) -> Iterator[Row]:
    """One row for each method and yardstick on bfloat16 x [T, D]. Raises RuntimeError when a check fails."""
    shared = {"tensor": name, "tokens": len(x), "dim": x.shape[1], "raw_bytes": x.nbytes}
    for method in chosen:
        data = method.lane.encode(x).to_bytes()
        restored = method.lane.decode(Packet.from_bytes(data))
        if not method.check(x, restored):
            raise RuntimeError(f"{name}: the round trip of '{method.name} {method.setting}' fails its check")
        codes = len(x) * method.basis.rank if method.basis else x.numel()
        yield shared | {
            "method": method.name,
            "setting": method.setting,
            "wire_bytes": len(data),
            "ratio": round(x.nbytes / len(data), 4),
            "bits_per_sample": round(8 * len(data) / codes, 4),
            "basis_bytes": method.basis.nbytes if method.basis else 0,
            "rel_error": float(f"{relative_error(x, restored):.4g}"),
        }
    for method_name, size in yardsticks(x):
        yield shared | {
            "method": method_name,
            "setting": "",
            "wire_bytes": size,
            "ratio": round(x.nbytes / size, 4),
            "bits_per_sample": round(8 * size / x.numel(), 4),
            "basis_bytes": 0,
            "rel_error": 0.0,
        }


YARDSTICKS = 3


def yardsticks(x: Tensor) -> Iterator[tuple[str, int]]:
    """(name, bytes): zlib level 6 on the bytes, on their two planes, and the order-0 entropy of exponents."""
    data = x.contiguous().view(torch.uint8)
    planes = data.view(-1, 2).t().contiguous()
    yield "zlib", len(zlib.compress(data.numpy().tobytes(), 6))
    yield "zlib planes", len(zlib.compress(planes.numpy().tobytes(), 6))
    exponents = (x.contiguous().view(torch.int16).int() >> 7) & 255
    p = torch.bincount(exponents.view(-1), minlength=256).double() / x.numel()
    entropy = float(torch.special.entr(p).sum()) / log(2)
    yield "entropy bound", int(x.numel() * (entropy + 8) / 8)


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
        left.set(xlabel="component / D", ylabel="share of the variance", title="Spectra")
        left.legend(fontsize=7)
        for method in dict.fromkeys(row["method"] for row in rows if row["rel_error"] > 0):
            mine = [row for row in rows if row["method"] == method]
            right.loglog([r["ratio"] for r in mine], [r["rel_error"] for r in mine], ".", label=method)
        right.set(
            xlabel="raw bytes / wire bytes", ylabel="relative error", title="One dot: tensor and setting"
        )
        right.legend(fontsize=7)


def summary(rows: Sequence[Row]) -> Table:
    table = Table("method", "setting", title="Over all tensors")
    for heading in ("ratio, mean", "least", "error, median", "worst", "bit / sample"):
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
            found = progress.track(
                measure(name, reports[name], chosen),
                len(chosen) + YARDSTICKS,
                description=f"{name} {list(fit.shape)}",
            )
            rows += [row | machine for row in found]
    append_rows(options.out / "activations.csv", rows)
    append_rows(options.out / "activations_spectrum.csv", spectra)
    draw(options.out / "activations.png", bases, rows)
    Console().print(summary(rows))


if __name__ == "__main__":
    main()
