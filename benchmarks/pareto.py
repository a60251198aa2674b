"""Step time over peak memory of `offload(lane="auto")` at many budgets, beside fixed policies and peers.

    python benchmarks/pareto.py [--shape 1b|8b|tiny] [--shares 0.2,...] [--lossy 4] [--settings NAMES]
    python benchmarks/pareto.py --draw COMMITS

A share is of the peak without offload: the budget is what is left of it beside all that is not saved for
backward. Every row has passed the gate of `measure`: gradients of a planned step equal those
without offload bit for bit, unless bits may be lost. Settings are those of `peers`, in fresh processes where
they are not sidelane's.
"""

from __future__ import annotations

import csv
import gc
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from time import monotonic
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; deterministic GEMMs in the gate

import measure as measuring
import torch
from common import RESULTS, append_rows, environment, figure
from llama import SHAPES, Llama
from measure import GIB, bandwidth, measure
from offload import Job, Row, results, table
from peers import SETTINGS, Method, Setting
from rich.console import Console

import sidelane
from sidelane.pipeline.arena import shared

TINY = 400 << 10  # bytes that the tiny shape saves
SETTLE = 14  # steps: one learns, each of three plans at most takes four, and the fastest one stays
OFF_SCALE = 2.5
SHARES = "0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0"
FIXED = "sidelane 4-bit,sidelane 8-bit,sidelane exact,sidelane exact 10.8 GiB,sidelane checkpoint raw"
PLAN = (
    "gpu_budget_gib",
    "predicted_ms",
    "recomputed",
    "kept_gib",
    "derived_gib",
    "coded_gib",
    "away_gib",
    "bound_by",
)
COLUMNS = ("setting", "share", "gradients", "cosine", "ms", "ms_q1", "ms_q3", "peak_gib", *PLAN)

_opened: list[sidelane.offload] = []
_traces: Path | None = None  # folder for a Chrome trace of a step of each setting


def auto(model: Llama, **options: Any) -> Method:
    """sidelane.offload("auto") around forward, which may recompute the layers."""
    if not torch.cuda.is_available():
        options = {"min_bytes": 1024, **options}  # the shape for that is tiny
    context = sidelane.offload("auto", blocks=model.backbone.layers, **options)
    _opened.append(context)
    return Method("sidelane", around_forward=lambda: context, report=context.report)


def budget_of(share: float, none_gib: float, kept_gib: float) -> int:
    """Bytes for saved tensors: the share of the peak without offload, less what else there is then."""
    return int(max(0.0, share * none_gib - (none_gib - kept_gib)) * GIB)


def planned(context: sidelane.offload) -> Row:
    """Columns of its plan; empty where there is none."""
    if (plan := context.plan) is None:
        return dict.fromkeys(PLAN[1:], "")
    sums = dict.fromkeys(("keep", "derived", "here", "away"), 0)
    for entry, choice in zip(plan.script.lesson.entries, plan.choices, strict=True):
        if entry.block < 0 or plan.recompute[entry.block] == entry.boundary:
            sums[choice.place] += entry.weight
    places = (round(nbytes / GIB, 3) for nbytes in sums.values())
    values = (round(plan.predicted * 1e3, 1), sum(plan.recompute), *places, plan.binding)
    return dict(zip(PLAN[1:], values, strict=True))


def one(name: str, setting: Setting, shape: str, share: float | str, console: Console) -> Row | None:
    """A row of a setting in this process."""
    _opened.clear()
    keep = None if _traces is None else _traces / f"{name.replace(' ', '_')}_{share}.json.gz"
    try:
        row = measure(setting, SHAPES[shape], True, keep)
    except Exception as error:
        console.print(f"{name}: {type(error).__name__}: {error}".partition("\n")[0], markup=False)
        return None
    if _opened:
        console.print(_opened[0].plan.explain() if _opened[0].plan else "no plan", markup=False)
    extra = planned(_opened[0]) if _opened else dict.fromkeys(PLAN[1:], "")
    _opened.clear()
    gc.collect()
    return {"setting": name, "share": share, **row, **extra}


def curve(
    names: Sequence[str], shape: str, shares: Sequence[float], bits: int, console: Console
) -> Iterator[Row]:
    """Rows of the anchors, of our settings, and of auto at every share."""
    none = one("none", SETTINGS["none"], shape, "", console)
    if none is None:
        return
    yield none
    none_gib = none["peak_gib"] if torch.cuda.is_available() else TINY / GIB  # a CPU has no peak
    kept_gib = none_gib
    # All fits at a share of 1, which tells how much is saved.
    for share in sorted({1.0, *shares}, reverse=True):
        budget = budget_of(share, none_gib, none_gib if share == 1 else kept_gib)
        for name, exact, options in (("auto", True, {}), (f"auto, {bits} bits", False, {"bits": bits})):
            if not exact and (bits == 0 or share == 1):
                continue
            setting = Setting(auto, exact, settle=SETTLE, options={"gpu_budget": budget, **options})
            if (row := one(name, setting, shape, share, console)) is not None:
                yield row
                kept_gib = row["kept_gib"] if share == 1 else kept_gib
    for name in ("checkpoint", *names):
        if (row := one(name, SETTINGS[name], shape, "", console)) is not None:
            yield row


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Step time over peak memory: a line for every curve, a point for every fixed setting; those that take
    longer than OFF_SCALE times the least are in the legend alone."""
    from matplotlib import colormaps

    top = OFF_SCALE * min((row["ms"] for row in rows), default=1.0)
    with figure(path, columns=2) as (axes, legend):
        for i, name in enumerate(dict.fromkeys(row["setting"] for row in rows)):
            mine = sorted((row["peak_gib"], row["ms"]) for row in rows if row["setting"] == name)
            style = "-*" if name.startswith("auto") else "o" if name.startswith("sidelane") else "s"
            label = name if len(mine) > 1 else f"{name}: {mine[0][1]:.0f} ms, {mine[0][0]:.1f} GiB"
            if mine[0][1] > top:
                label += ", off the scale"
                mine = [(nan, nan)]
            axes.plot(*zip(*mine, strict=True), style, color=colormaps["tab20"](i), label=label, markersize=8)
        axes.set(xlabel="peak of a step, GiB", ylabel="ms per step, median", title=title)
        axes.grid(alpha=0.25)
        legend.axis("off")
        legend.legend(*axes.get_legend_handles_labels(), loc="center left", frameon=False)


def rows_of(folder: Path, shape: str, commits: Sequence[str]) -> list[Row]:
    """Rows of these commits in pareto.csv and offload.csv, of each setting those of the first that has it.

    Raises ValueError for a commit without rows.
    """
    found: list[Row] = []
    for commit in commits:
        for name in ("pareto.csv", "offload.csv"):
            known = {row["setting"] for row in found}
            found += [
                row
                for row in _read(folder / name, shape)
                if row["commit"] == commit and row["setting"] not in known
            ]
        if not any(row["commit"] == commit for row in found):
            raise ValueError(f"commit {commit}: neither pareto.csv nor offload.csv has a new row of it")
    return found


def _read(path: Path, shape: str) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["shape"] == shape]
    return [row | {name: float(row[name]) for name in ("ms", "peak_gib")} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file and the figure")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--shares", default=SHARES, help="of the peak without offload, by commas")
    parser.add_argument("--lossy", type=int, default=0, help="bits of a second curve; 0 for none")
    parser.add_argument("--settings", default=FIXED, help="names of `peers`, by commas")
    parser.add_argument("--steps", type=int, default=measuring.TIMED, help="timed, of each row")
    parser.add_argument("--traces", type=Path, help="folder for a Chrome trace of a step of each setting")
    parser.add_argument("--deadline", type=float, default=1200, help="seconds after which no peer starts")
    parser.add_argument(
        "--draw",
        metavar="COMMITS",
        help="draw the rows of these, by commas, the first counts; measure nothing",
    )
    options = parser.parse_args(arguments)
    if options.draw:
        title = f"Llama {options.shape}, rows of {options.draw.replace(',', ', ')}"
        try:
            rows = rows_of(options.out, options.shape, options.draw.split(","))
        except ValueError as error:
            parser.error(f"--draw: {error}")
        draw(options.out / f"pareto_{options.shape}.png", rows, title)
        return
    names = [name.strip() for name in options.settings.split(",") if name.strip()]
    for name in names:
        if name not in SETTINGS:
            parser.error(f"--settings: '{name}' is none of {', '.join(SETTINGS)}")
    global _traces
    measuring.TIMED, _traces = options.steps, options.traces
    start, console, machine, speed = monotonic(), Console(width=200), environment(), bandwidth()
    shares = [float(share) for share in options.shares.split(",") if share]
    ours = [name for name in names if name.startswith("sidelane")]
    others = [Job(name, options.shape, head=True, longest=False) for name in names if name not in ours]
    rows = []

    def keep(row: Row) -> None:
        rows.append(row)
        console.print(f"[{monotonic() - start:.0f} s] {row}", markup=False)
        append_rows(options.out / "pareto.csv", [{"shape": options.shape, **row, **speed, **machine}])
        draw(options.out / f"pareto_{options.shape}.png", rows, f"Llama {options.shape}")

    for row in curve(ours, options.shape, shares, options.lossy, console):
        keep(row)
    shared().trim()
    for job, answer in results(others, start + options.deadline, 300):
        if isinstance(answer, str):
            console.print(f"{job.setting}: {answer}", markup=False)
        else:
            keep({"setting": job.setting, "share": "", **answer, **dict.fromkeys(PLAN[1:], "")})
    if not rows:
        sys.exit("no setting gave a row")
    console.print(table(rows, COLUMNS, "pareto"))


if __name__ == "__main__":
    main()
