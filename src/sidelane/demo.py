"""`sidelane demo`: a small GPT trained with its activations sent through every lane.

Every run starts from the same weights and sees the same batches. Ratio, error and gradients are measured on
the weights that the run without offload ends with, so they are those of a trained model.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sidelane import __version__
from sidelane.demo_model import FULL, QUICK, Corpus
from sidelane.demo_train import LEARNING_RATE, SETTINGS, Result, Trainer
from sidelane.errors import SidelaneError

QUICK_STEPS = 4


def run_demo(out: Path, *, steps: int, device: str, seed: int, quick: bool) -> bool:
    """Train with every setting, print the table, write results.json and results.png to the directory `out`.

    `device` is "auto", "cpu" or "cuda"; `quick` takes a tiny model and at most 4 steps. Returns False when an
    exact lane is not bitwise equal to no offload. Raises SidelaneError when there is no such device or no
    matplotlib, OSError when `out` cannot be written.
    """
    try:
        from sidelane.demo_figure import draw
    except ImportError as error:
        raise SidelaneError(f"{error}: pip install 'sidelane[demo]'") from None
    place = _device(device)
    if out.exists() and not out.is_dir():
        raise SidelaneError(f"{out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    shape, steps = (QUICK, min(steps, QUICK_STEPS)) if quick else (FULL, steps)
    trainer = Trainer(shape, Corpus(), place, seed)
    console = Console()
    with _reproducible(place):
        results = _run(trainer, steps, console)
    record: dict[str, Any] = {
        "environment": _environment(place),
        "settings": {"seed": seed, "steps": steps, "learning_rate": LEARNING_RATE, **asdict(shape)},
        "corpus": {"files": trainer.corpus.files, "bytes": len(trainer.corpus.text)},
        "runs": [asdict(result) for result in results],
    }
    json_path, png_path = out / "results.json", out / "results.png"
    json_path.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, png_path)
    console.print(_table(results))
    console.print(f"{json_path}\n{png_path}", highlight=False)
    broken = [result.name for result in results if result.exact and not result.bitwise]
    if broken:
        console.print(f"[red]Not bitwise equal to no offload: {'; '.join(broken)}")
    return not broken


def _run(trainer: Trainer, steps: int, console: Console) -> list[Result]:
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    models, results = [], []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for setting in SETTINGS:
            task = progress.add_task(setting.name, total=steps)
            model, result = trainer.train(setting, steps, partial(progress.advance, task))
            models.append(model)
            results.append(result)
            if not console.is_terminal:
                console.print(f"{setting.name}: loss {result.losses[-1]:.4f} after {steps} steps")
    trained, batch = models[0], steps  # a batch that training has not seen
    reference = trainer.gradient(trained, batch)
    for setting, result in zip(SETTINGS, results, strict=True):
        trainer.measure(setting, result, trained, batch, reference)
        result.bitwise &= result.losses == results[0].losses
    return results


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on CUDA; one thread on the CPU, where the tensors are too small for more."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise SidelaneError(f"unknown device '{name}': use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise SidelaneError("no CUDA device here: `sidelane doctor` says why")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "sidelane": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpus": os.cpu_count(),
    }


def _table(results: list[Result]) -> Table:
    numbers = "ratio", "worst\nerror", "gradient\ncosine", "last\nloss", "held\nMiB", "ms per\nstep"
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("lane", no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("against\nno offload", no_wrap=True)
    for result in results:
        table.add_row(
            result.name,
            f"{result.ratio:.2f}",
            f"{result.worst_error:.1e}" if result.worst_error else "0",
            f"{result.cosine:.5f}",
            f"{result.losses[-1]:.4f}",
            f"{result.held_bytes / 2**20:.2f}",
            f"{result.seconds * 1e3:.0f}",
            "bitwise equal" if result.bitwise else "differs",
        )
    return table
