"""Activation offload on a Llama-shaped model: step time and peak memory of every method, side by side.

    python benchmarks/offload.py [--shape 1b|8b] [--settings NAMES] [--longest] [--out DIR]

Every setting runs in a fresh process; all import first, then one after another has the GPU. A row is written
only after its gate: the gradients of one step under deterministic algorithms equal those without offload,
taken in the same process, bit for bit (lossy lanes: their cosine is in the row). A setting has two CPUs, and
of up to `measure.MOST` times as many steps those count in which others disturbed these least. The weights are
random, so that the rows say nothing about compression ratios of trained models.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; deterministic GEMMs in the gate

from common import RESULTS, append_rows, environment, figure
from llama import SHAPES
from longest import longest
from measure import GIB, bandwidth, measure
from peers import SETTINGS
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
ANCHORS = {False: "none", True: "checkpoint"}  # by whether a setting recomputes


@dataclass(frozen=True)
class Job:
    """One setting for a worker."""

    setting: str
    shape: str
    head: bool
    longest: bool
    trace: Path | None = None


def work(connection: Connection) -> None:
    """A worker: import, say so, then do the one job that comes."""
    __import__("transformers.models.llama.modeling_llama")
    connection.send("ready")
    job: Job = connection.recv()
    try:
        what = SETTINGS[job.setting], SHAPES[job.shape], job.head
        connection.send(longest(*what) if job.longest else measure(*what, job.trace))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}".partition("\n")[0])


def results(jobs: Sequence[Job], deadline: float, limit: float) -> Iterable[tuple[Job, Row | str]]:
    """What each job gave: a row, or why there is none. `limit`: seconds for one job."""
    context = get_context("spawn")
    workers = []
    for job in jobs:
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there,), daemon=True)
        process.start()
        there.close()
        workers.append((job, process, here))
    answers = [_answer(here, deadline) for _, _, here in workers]  # imports are over before anything is timed
    for (job, process, here), ready in zip(workers, answers, strict=True):
        answer: Row | str = ready
        if ready == "ready":
            here.send(job)
            answer = _answer(here, min(deadline, monotonic() + limit))
        if isinstance(answer, str):
            process.kill()
        process.join()
        yield job, answer


def _answer(connection: Connection, until: float) -> Any:
    try:
        return connection.recv() if connection.poll(max(0.0, until - monotonic())) else "out of time"
    except EOFError:
        return "the process died: out of host memory?"


def hidden_fraction(row: Row, alone: float) -> float:
    """Share of the shorter of computing and copying that the other one hides; all in ms.

    (serial - parallel) / min(compute, copies), where compute alone takes `alone` and the copies take their
    bytes over the pinned bandwidth of this run.
    """
    copies = 1e3 * GIB * (row["out_gib"] / row["d2h_gb_s"] + row["in_gib"] / row["h2d_gb_s"]) / 1e9
    return round((alone + copies - row["ms"]) / min(alone, copies), 3) if min(alone, copies) > 0 else 0.0


def compared(rows: Sequence[Row], row: Row) -> Row:
    """`row` with what needs the anchors before it: time over that of "none", and the hidden fraction."""
    alone = {each["setting"]: each["ms"] for each in (row, *reversed(rows))}
    anchor = alone.get(ANCHORS[SETTINGS[row["setting"]].recompute])
    moved = row["out_gib"] + row["in_gib"] > 0.05
    hidden = hidden_fraction(row, anchor) if anchor and moved else ""
    versus = round(row["ms"] / alone["none"], 3) if "none" in alone else ""
    return {**row, "times_none": versus, "hidden_fraction": hidden}


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Peak memory against step time, one point for each setting."""
    with figure(path, columns=2) as (axes, legend):
        for i, row in enumerate(rows):
            mine = row["package"].startswith("sidelane")
            marker = "*" if row["setting"] in ANCHORS.values() else "o" if mine else "s"
            label = f"{row['setting']}: {row['ms']:.0f} ms, {row['peak_gib']:.1f} GiB"
            axes.plot(row["ms"], row["peak_gib"], marker, color=f"C{i % 10}", label=label, markersize=8)
        axes.set(xlabel="ms per step, median", ylabel="peak activations, GiB", title=title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
        axes.grid(alpha=0.25, which="both")
        legend.axis("off")
        legend.legend(*axes.get_legend_handles_labels(), loc="center left", frameon=False)


def table(rows: Sequence[Row], columns: Sequence[str], title: str) -> Table:
    out = Table(title=title, box=None, pad_edge=False)
    for column in columns:
        out.add_column(column, justify="left" if column in ("setting", "gradients", "limit") else "right")
    for row in rows:
        out.add_row(*(str(row[column]) for column in columns))
    return out


COLUMNS = (
    "setting",
    "gradients",
    "cosine",
    "steps",
    "ms",
    "ms_q1",
    "ms_q3",
    "times_none",
    "peak_gib",
    "gpu_budget_gib",
    "out_gib",
    "in_gib",
    "hidden_fraction",
    "idle_ms",
    "waited_ms",
    "host_gib",
)
LONGEST_COLUMNS = ("setting", "tokens", "limit", "ms", "peak_gib", "host_gib", "trials")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file and the figure")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="names, by commas")
    parser.add_argument("--no-head", action="store_true", help="loss: mean of the last hidden state")
    parser.add_argument("--longest", action="store_true", help="longest sequence in 80 of 141 GB instead")
    parser.add_argument("--traces", type=Path, help="folder for a Chrome trace of a step of each setting")
    parser.add_argument("--deadline", type=float, default=3600, help="seconds after which nothing starts")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one setting")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.settings.split(",")]
    for name in names:
        if name not in SETTINGS:
            parser.error(f"--settings: '{name}' is none of {', '.join(SETTINGS)}")
    if options.longest:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # of the workers
    start, console, machine = monotonic(), Console(width=200), environment()
    speed = bandwidth()
    shape = SHAPES[options.shape]
    shape = shape.with_tokens(shape.tokens) if options.longest else shape
    rows: list[Row] = []
    jobs = [
        Job(
            name,
            options.shape,
            not options.no_head,
            options.longest,
            options.traces and options.traces / f"{name.replace(' ', '_')}.json.gz",
        )
        for name in names
    ]
    stem = "longest" if options.longest else "offload"
    for order, (job, answer) in enumerate(results(jobs, start + options.deadline, options.limit)):
        took = f"{monotonic() - start:.0f} s"
        if isinstance(answer, str):
            console.print(f"[{took}] {job.setting}: {answer}", markup=False)
            continue
        sizes = {"shape": job.shape, **asdict(shape), "head": job.head, "order": order}
        row = {**sizes, "setting": job.setting, **answer, **speed}
        rows.append(row if options.longest else compared(rows, row))
        console.print(f"[{took}] {rows[-1]}", markup=False)
        append_rows(options.out / f"{stem}.csv", [rows[-1] | machine])  # now: what comes next may be stopped
    if not rows:
        sys.exit("no setting gave a row")
    if not options.longest:
        name = f"{stem}_{options.shape}{'_no_head' if options.no_head else ''}.png"
        draw(options.out / name, rows, f"Llama {options.shape}, {shape.batch} x {shape.tokens} tokens")
    console.print(table(rows, LONGEST_COLUMNS if options.longest else COLUMNS, stem))


if __name__ == "__main__":
    main()
