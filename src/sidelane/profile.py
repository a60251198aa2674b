"""`sidelane profile`: measure this machine once, keep the tables, show them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import localtime, perf_counter, strftime

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sidelane.errors import ProfileError
from sidelane.pipeline.machine import DISK_FOLDER, HOST_TIMES, Curve, Machine, cache_path
from sidelane.pipeline.probe import measure

COLUMNS = {"1 MiB": 1 << 20, "16 MiB": 16 << 20, "256 MiB": 256 << 20}


def run_profile(out: Path | None, spill_dir: Path | None, force: bool) -> None:
    """Show the tables of this machine, measured unless they are in the cache folder with the disk of
    `spill_dir`, and write them to `out`.

    Raises ProfileError when `out` exists and not `force`, when its folder or `spill_dir` is not there, when
    nothing can be measured, and when `out` or the cache folder cannot be written: after all else is done with
    `out`, before it without. Files are written before anything is printed, since who reads may be gone.
    """
    if out is not None and out.is_dir():
        raise ProfileError(f"{out} is a folder: name a file in it")
    if out is not None and out.exists() and not force:
        raise ProfileError(f"{out} exists: --force replaces it")
    if out is not None and not out.parent.is_dir():
        raise ProfileError(f"{out}: {out.parent} is no folder: make it first")
    if spill_dir is not None and not spill_dir.is_dir():
        raise ProfileError(f"--spill-dir {spill_dir} is no folder: make it first")
    machine, said = (None, "") if force else _cached(spill_dir)
    fresh = machine is None
    if machine is None:
        if out is None:
            _check_folder(cache_path().parent)
        begin = perf_counter()
        machine = _measure(spill_dir)
        said += f"measured in {perf_counter() - begin:.1f} s, kept in {cache_path()}"
    errors = []
    for path in (out, cache_path() if fresh else None):
        if path is None:
            continue
        try:
            machine.save(path)
        except ProfileError as error:
            errors.append(error)
    console = Console()
    for part in (said, *summary(machine)):
        console.print(part)
    if errors:
        raise errors[0]


def summary(machine: Machine) -> Iterator[RenderableType]:
    """The tables at a few sizes, with what was left out and why."""
    key = machine.key
    versions = ", ".join(f"{name} {key.get(name, 'none')}" for name in ("driver", "torch", "triton"))
    when = strftime("%Y-%m-%d %H:%M", localtime(machine.created))
    yield Text(f"GPU {key.get('gpu', 'none')}; CPU {key.get('cpu', 'none')}; {versions}; {when}")
    yield Text(
        f"bf16 matrix products {machine.gemm / 1e12:.3g} TFLOP/s; engines: "
        + ", ".join(f"{count} {name.upper()}" for name, count in machine.engines.items())
    )
    hosts = {name: curve(1) * 1e6 for name, curve in machine.wires.items() if name in HOST_TIMES}
    if hosts:
        costs = ", ".join(f"{name} {microseconds:.0f} us" for name, microseconds in hosts.items())
        yield Text(f"host time for each tensor: {costs}")
    wires = {name: (curve,) for name, curve in machine.wires.items() if name not in hosts}
    yield _table("Wires, GB/s", wires)
    lanes = {name.replace("|", " "): (speed.encode, speed.decode) for name, speed in machine.lanes.items()}
    yield _table("Lanes, encode / decode, GB/s of raw bytes", lanes)
    yield Text("Columns are sizes of a tensor. In brackets: beyond the sizes that were measured.")
    for name, reason in machine.left_out.items():
        yield Text(f"left out: {name}: {reason}", style="yellow")


def _table(title: str, rows: Mapping[str, Sequence[Curve]]) -> Table:
    """The rates of `rows` at `COLUMNS`; those beyond the sizes that were measured in brackets."""
    table = Table("", title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for name, curves in rows.items():
        table.add_row(name, *(_rates(curves, size) for size in COLUMNS.values()))
    return table


def _rates(curves: Sequence[Curve], size: int) -> str:
    text = " / ".join(f"{curve.rate(size) / 1e9:.3g}" for curve in curves)
    return text if all(curve.sizes[0] <= size <= curve.sizes[-1] for curve in curves) else f"({text})"


def _check_folder(folder: Path) -> None:
    """Raise ProfileError for one that cannot be written, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ProfileError(f"{folder} cannot be written ({reason}): set XDG_CACHE_HOME, or give --out")


def _cached(spill_dir: Path | None) -> tuple[Machine | None, str]:
    """The tables of the cache folder, if they serve, and what is to be said of them."""
    try:
        machine = Machine.cached()
    except ProfileError as error:
        return None, f"measuring again: {str(error).removesuffix(': run sidelane profile')}\n"
    if machine is None:
        return None, ""
    if spill_dir is not None and machine.key.get(DISK_FOLDER) != str(spill_dir.resolve()):
        return None, f"measuring again: the disk of {spill_dir} is not in {cache_path()}\n"
    return machine, f"from {cache_path()}; --force measures again"


def _measure(spill_dir: Path | None) -> Machine:
    """With a bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return measure(
            None if spill_dir is None else str(spill_dir),
            progress=lambda name, i, n: bar.update(task, description=name, completed=i, total=n),
        )
