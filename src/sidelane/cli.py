"""The command line. Bad input ends in one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from sidelane import __version__
from sidelane.errors import LaneError, SidelaneError

if TYPE_CHECKING:
    from sidelane.archive import Progress as Report
    from sidelane.archive import Summary

# Its own base class is the usage error of whichever click this typer is built on.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]

INTERRUPTED = 130

app = typer.Typer(
    help="Move tensors over narrow wires by making them smaller on the way.",
    add_completion=False,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)

Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]


def main() -> None:
    """Entry point of the `sidelane` command."""
    status = run(sys.argv[1:])
    if status == INTERRUPTED:
        # A thread that measures may be in C++, and a process that exits by itself then aborts.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command; exit status 0, 1 (a check failed), 2 (bad input) or 130 (interrupted)."""
    try:
        return app(arguments, prog_name="sidelane", standalone_mode=False) or 0
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
    except SidelaneError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename2 or error.filename or 'standard output'}: {error.strerror}"
        if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
            message += ": check the path"
    except MemoryError:
        message = "not enough memory"
    except KeyboardInterrupt:
        return INTERRUPTED
    print("sidelane:", " ".join(message.split()), file=sys.stderr)
    return 2


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"sidelane {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def doctor() -> None:
    """Show which lanes and engines work here, and what to do about those that do not."""
    from sidelane.doctor import report

    Console().print(report())


@app.command()
def profile(
    out: Annotated[Path | None, typer.Option(help="Write the tables to this JSON file too.")] = None,
    spill_dir: Annotated[
        Path | None, typer.Option(help="Folder whose disk is measured, again if it is another one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again, and replace OUT.")] = False,
) -> None:
    """Measure wires, lanes and matrix products of this machine once, in half a minute, for planning."""
    from sidelane.profile import run_profile

    run_profile(out, spill_dir, force)


@app.command()
def plan(
    source: Annotated[
        Path | None, typer.Argument(metavar="[IN.safetensors]", help="Tensors; without, random numbers.")
    ] = None,
    wire: Annotated[
        list[str] | None,
        typer.Option(help="Name in the profile, or GB/s; with commas, one after the other. Repeat for more."),
    ] = None,
    mib: Annotated[
        list[float] | None,
        typer.Option(min=0.01, help="MiB of random numbers, without a file. Repeat for more."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the random numbers; bfloat16 without.")] = None,
    load: Annotated[str, typer.Option(help="idle, or busy beside matrix products.")] = "idle",
    max_rel_error: Annotated[
        float | None, typer.Option(help="Largest relative Frobenius error; only exact lanes without.")
    ] = None,
    together: Annotated[
        int, typer.Option(min=1, help="Tensors under way at once, whose stages overlap.")
    ] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="What `sidelane profile --out` wrote, also elsewhere.")
    ] = None,
) -> None:
    """Show which lane is predicted to be fastest over which wire, and why the others are not."""
    from sidelane.plan import plans

    for table in plans(source, wire or [], mib, dtype, load, max_rel_error, together, profile):
        print(table, end="\n\n")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the table as JSON and the figure as PNG.")] = Path(
        "demo-results"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of every run.")] = 40,
    device: Annotated[str, typer.Option(help="cpu or cuda; a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of weights and batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and a few steps, in seconds.")] = False,
) -> None:
    """Train a small GPT on Python's own sources, with its activations sent through every lane."""
    from sidelane.demo import run_demo

    raise typer.Exit(0 if run_demo(out, steps=steps, device=device, seed=seed, quick=quick) else 1)


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(metavar="IN.safetensors")],
    target: Annotated[Path, typer.Argument(metavar="OUT")],
    lane: Annotated[
        str | None,
        typer.Option(help="raw, exact, packed, video-cpu, video, dual or auto; exact without an error."),
    ] = None,
    wire: Annotated[
        str | None,
        typer.Option(help="For auto: what the file crosses, as for `sidelane plan`."),
    ] = None,
    max_rel_error: Annotated[
        float | None, typer.Option(help="Largest relative Frobenius error of a tensor.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Code width of the packed lane: 2, 4 or 8.")] = None,
    surface: Annotated[
        str | None, typer.Option("--format", help="Surface format of the video lanes, as nv12 or p010.")
    ] = None,
    qp: Annotated[
        int | None, typer.Option(help="HEVC quantizer of the video lanes; lossless without.")
    ] = None,
    force: Force = False,
) -> None:
    """Compress a safetensors file tensor by tensor."""
    from sidelane.archive import compress_file
    from sidelane.pipeline.choice import all_raw, listed, present
    from sidelane.plan import parse_wire

    if (lane == "auto") != (wire is not None):
        raise LaneError("--lane auto and --wire (GB/s, or a name in the profile) go together: give both")
    given: dict[str, Any] = {
        "lane": lane,
        "wire": None if wire is None else parse_wire(wire),
        "max_rel_error": max_rel_error,
        "bits": bits,
        "format": surface,
        "qp": qp,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if lane == "auto" and (reason := all_raw(listed(options["wire"]), present())):
        print(f"{reason}; until then everything goes raw", file=sys.stderr)
    with _progress("compress") as progress:
        summary = compress_file(source, target, force=force, progress=progress, **options)
    _print_summary(summary, summary.bytes_in / summary.bytes_out)


@app.command()
def decompress(
    source: Annotated[Path, typer.Argument(metavar="IN")],
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    force: Force = False,
) -> None:
    """Restore the safetensors file that `sidelane compress` read."""
    from sidelane.archive import decompress_file

    with _progress("decompress") as progress:
        summary = decompress_file(source, target, force=force, progress=progress)
    _print_summary(summary, summary.bytes_out / summary.bytes_in)


@contextmanager
def _progress(title: str) -> Iterator[Report]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_summary(summary: Summary, ratio: float) -> None:
    table = Table("tensors", "bytes in", "bytes out", "ratio", "worst relative error")
    for column in table.columns:
        column.justify = "right"
    error = f"{summary.worst_error:.2e}" if summary.worst_error else "0 (exact)"
    if isnan(summary.worst_error):
        error = "not in the archive"
    table.add_row(
        str(summary.tensors), f"{summary.bytes_in:,}", f"{summary.bytes_out:,}", f"{ratio:.3f}", error
    )
    Console().print(table)
