"""Does offload change what a model learns? A GPT on the standard library, every lane, three seeds.

    python benchmarks/training.py [--steps N] [--seeds N] [--jobs N] [--settings NAMES] [--out DIR]

A run starts from the weights of its seed and sees the batches of its seed. The exact lane must give the
losses of no offload bit for bit. For the others the question is whether the last loss differs from that of
the same seed by less than seeds differ from each other. Runs share the GPUs there are, so times mean nothing.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from math import cos, inf, pi
from multiprocessing import get_context
from pathlib import Path
from time import monotonic, time
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; deterministic GEMMs

import torch
from common import RESULTS, append_rows, environment
from regions import REGIONS, lane_in
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training_runs import SHAPES, Job, Run, draw, summary

import sidelane
from sidelane.codec.lane import Lane
from sidelane.demo_model import GPT, Corpus, Shape, call_layer

Row = dict[str, Any]

MIN_BYTES = 1024  # of a tensor that is offloaded: nearly all of them are
GPU_BUDGETS = {"full": 256 << 20, "tiny": 128 << 10}  # a third of what a step saves
LEARNING_RATE, WARM_UP = 1e-3, 100
HELD_OUT = 0.05  # of the text
HELD_BATCHES = 64
PROBES = (1, 100, 500, 1000)  # steps at which gradients are compared


@dataclass(frozen=True)
class Setting:
    """Arguments of `sidelane.offload`; no lane: no offload. `layers_only`: not around head and loss."""

    lane: str | Lane | None
    options: dict[str, Any] = field(default_factory=dict)
    layers_only: bool = False

    @property
    def exact(self) -> bool:
        return self.lane in (None, "raw", "exact")

    def context(self, shape: str) -> sidelane.offload | None:
        if self.lane is None:
            return None
        budget = GPU_BUDGETS[shape]
        return sidelane.offload(self.lane, min_bytes=MIN_BYTES, gpu_budget=budget, **self.options)


SETTINGS = {
    "none": Setting(None),
    "exact": Setting("exact"),
    "8-bit": Setting("packed", {"bits": 8, "seed": 0}),
    "8-bit nearest 256": Setting("packed", {"bits": 8, "group": 256}),  # as steps are timed
    "4-bit": Setting("packed", {"bits": 4, "seed": 0}),
    "4-bit layers": Setting("packed", {"bits": 4, "seed": 0}, layers_only=True),
    "4-bit nearest": Setting("packed", {"bits": 4}),
    "auto 4-bit": Setting("auto", {"bits": 4, "seed": 0}),
    "2-bit": Setting("packed", {"bits": 2, "seed": 0}),
}


def train(job: Job) -> Run:
    """One run, on its GPU where there is one. Raises TimeoutError when its time is up."""
    place = torch.device("cpu")
    if torch.cuda.is_available():
        place = torch.device("cuda", job.gpu)
        torch.cuda.set_device(place)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    shape, setting = SHAPES[job.shape], SETTINGS[job.setting]
    learn, held = texts()
    model = GPT(shape, job.seed).to(place)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=place.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, job.steps))
    context = setting.context(job.shape)
    losses, cosines = [], []
    for step in range(job.steps):
        if time() > job.until:
            raise TimeoutError(f"out of time at step {step}")
        tokens = learn.batch(shape, job.seed, step).to(place)
        if step in PROBES and not setting.exact:
            cosines += [(step, *pair) for pair in probe(model, tokens, setting, job.shape, context)]
        losses.append(backward(model, tokens, context, setting.layers_only))
        optimizer.step()
        schedule.step()
    total = context.report().total if context else None
    return Run(
        job,
        torch.stack(losses).tolist(),
        evaluate(model, held, shape, place),
        total.bytes_in / total.bytes_wire if total else 1.0,
        sum(p.numel() for p in model.parameters()),
        cosines,
    )


def texts() -> tuple[Corpus, Corpus]:
    """The standard library to learn from, and the end of it held out."""
    learn, held = Corpus(), Corpus()
    cut = int(len(learn.text) * (1 - HELD_OUT))
    learn.text, held.text = learn.text[:cut], held.text[cut:]
    return learn, held


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up, then a cosine down to a tenth."""
    warm = min(WARM_UP, steps)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * cos(pi * (step - warm) / max(1, steps - warm))


def backward(
    model: GPT, tokens: Tensor, context: AbstractContextManager[Any] | None, layers_only: bool = False
) -> Tensor:
    """Gradients of one batch into `.grad`; the loss, detached."""
    model.zero_grad(set_to_none=True)
    around = context or nullcontext()

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        with around:
            return call_layer(layer, x)

    with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
        if layers_only:
            loss: Tensor = model(tokens, call)
        else:
            with around:
                loss = model(tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def probe(
    model: GPT, tokens: Tensor, setting: Setting, shape: str, planned: sidelane.offload | None
) -> Iterator[tuple[str, float]]:
    """Cosines of the gradients of one batch with and without the lane, also in one region alone; of lane
    "auto" through `planned`, which has learned the step."""
    reference, automatic = gradients(model, tokens, None), setting.lane == "auto"
    around = planned if automatic else setting.context(shape)
    found = gradients(model, tokens, around, setting.layers_only)
    for part, gradient in reference.items():
        yield part, float(torch.cosine_similarity(gradient, found[part], dim=0))
    for region in () if automatic else REGIONS:
        context = setting.context(shape)
        if context is not None:
            with lane_in(model, region, context):
                found = gradients(model, tokens, None)
            yield region, float(torch.cosine_similarity(reference["all"], found["all"], dim=0))


def gradients(
    model: GPT, tokens: Tensor, context: AbstractContextManager[Any] | None, layers_only: bool = False
) -> dict[str, Tensor]:
    """Flat float64 gradients of one batch: of every layer, of what lies outside of layers, and of all."""
    backward(model, tokens, context, layers_only)
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            words = name.split(".")
            for part in (f"layer {words[1]}" if words[0] == "layers" else words[0], "all"):
                parts.setdefault(part, []).append(parameter.grad.flatten().double())
    model.zero_grad(set_to_none=True)
    return {part: torch.cat(tensors) for part, tensors in parts.items()}


@torch.no_grad()
def evaluate(model: GPT, text: Corpus, shape: Shape, place: torch.device) -> float:
    """Loss on held-out text, the same for every run."""
    losses = []
    for batch in range(HELD_BATCHES):
        tokens = text.batch(shape, 0, batch).to(place)
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            losses.append(model(tokens))
    return float(torch.stack(losses).mean())


def all_runs(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Run | Exception]]:
    """Runs in the order in which they end."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, job): job for job in jobs}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], error if isinstance(error, Exception) else future.result()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV files and the figure")
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=12, help="runs at a time")
    parser.add_argument("--deadline", type=float, default=inf, help="seconds after which runs give up")
    parser.add_argument("--settings", default="none,exact,8-bit,4-bit", help="names, by commas")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.settings.split(",")]
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--settings: '{unknown[0]}' is none of {', '.join(SETTINGS)}")
    if "none" not in names:
        parser.error("--settings: 'none' is what the others are compared with")
    start, console, machine = monotonic(), Console(width=160), environment()
    slow_first = sorted(names, key=lambda name: name != "exact")
    until = time() + options.deadline
    gpus = max(1, torch.cuda.device_count())
    jobs = [
        Job(name, seed, options.shape, options.steps, until, order % gpus)
        for order, (name, seed) in enumerate(product(slow_first, range(options.seeds)))
    ]
    runs, failed = [], False
    for job, run in all_runs(jobs, options.jobs):
        took = f"{monotonic() - start:.0f} s, {job.setting}, seed {job.seed}"
        if isinstance(run, Exception):
            failed = True
            console.print(f"{took}: {type(run).__name__}: {run}", markup=False)
        else:
            runs.append(run)
            console.print(f"{took}: last {run.last:.4f}, held out {run.held_out:.4f}", markup=False)
    if {run.job.seed for run in runs if run.job.setting == "none"} != set(range(options.seeds)):
        sys.exit("nothing to compare with: a run without offload failed")
    runs.sort(key=lambda run: (names.index(run.job.setting), run.job.seed))
    draw(options.out / "training.png", runs)
    columns = {f"{run.job.setting} {run.job.seed}": run.losses for run in runs}
    curves = [
        {"step": step, **{name: round(losses[step], 5) for name, losses in columns.items()}}
        for step in range(options.steps)
    ]
    append_rows(options.out / "training_curves.csv", curves)
    cosines = [
        {
            "setting": run.job.setting,
            "seed": run.job.seed,
            "step": step,
            "part": part,
            "cosine": f"{cosine:.6f}",
        }
        for run in runs
        for step, part, cosine in run.cosines
    ]
    if cosines:
        append_rows(options.out / "training_cosines.csv", cosines)
    rows = summary(runs, [name for name in names if SETTINGS[name].exact])
    append_rows(options.out / "training.csv", [row | machine for row in rows])
    table = Table(box=None, pad_edge=False)
    shown = ("setting", "seed", "ratio", "bitwise", "last_loss", "held_out_loss", "difference", "spread")
    for column in (*shown, "inside", "cosine", "worst_layer_cosine"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in (*shown, "inside", "cosine", "worst_layer_cosine")))
    console.print(table)
    if failed:
        sys.exit("some runs failed")
    if not all(row["inside"] for row in rows):
        sys.exit("a lane changed the loss by more than the seeds do")


if __name__ == "__main__":
    main()
