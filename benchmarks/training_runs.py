"""Runs of the training benchmark as data: their rows and their figure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

from common import figure

from sidelane.demo_model import Shape

Row = dict[str, Any]

SHAPES = {
    "full": Shape(layers=8, width=512, heads=8, kv_heads=4, hidden=1408, context=256, batch=16),
    "tiny": Shape(layers=2, width=32, heads=2, kv_heads=1, hidden=64, context=32, batch=4),
}
LAST = 100  # steps whose mean is the last training loss


@dataclass(frozen=True)
class Job:
    setting: str
    seed: int
    shape: str
    steps: int
    until: float = inf  # time() at which it gives up
    gpu: int = 0


@dataclass
class Run:
    """What one run gave.

    Attributes:
        losses: of every step, nats per byte.
        held_out: loss on text that training does not see.
        ratio: bytes of the saved tensors over their bytes on the wire.
        cosines: (step, part, cosine) of gradients with and without the lane, same weights and batch. `part`
            is a layer, what lies outside of layers, or "all"; for a region, "all" with the lane in that
            region alone.
    """

    job: Job
    losses: list[float]
    held_out: float
    ratio: float
    parameters: int
    cosines: list[tuple[int, str, float]]

    @property
    def last(self) -> float:
        return fmean(self.losses[-LAST:])


def summary(runs: Sequence[Run], exact: Collection[str]) -> list[Row]:
    """A row for each run: its last losses, and what sets them apart from no offload.

    `difference`: of the held-out loss from that of no offload with the same seed; `spread`: largest minus
    smallest held-out loss of no offload over the seeds. Raises RuntimeError when a run of the settings
    `exact` differs.
    """
    plain = {run.job.seed: run for run in runs if run.job.setting == "none"}
    spread = max(run.held_out for run in plain.values()) - min(run.held_out for run in plain.values())
    rows = []
    for run in runs:
        other = plain[run.job.seed]
        bitwise = run.losses == other.losses and run.held_out == other.held_out
        if run.job.setting in exact and not bitwise:
            step = next(
                (i for i, (a, b) in enumerate(zip(run.losses, other.losses, strict=True)) if a != b), -1
            )
            raise RuntimeError(f"{run.job}: the losses differ from those without offload from step {step}")
        whole = [cosine for _, part, cosine in run.cosines if part == "all"]
        layers = [cosine for _, part, cosine in run.cosines if part.startswith("layer ")]
        rows.append(
            {
                "setting": run.job.setting,
                "seed": run.job.seed,
                "parameters": run.parameters,
                "steps": run.job.steps,
                **asdict(SHAPES[run.job.shape]),
                "ratio": round(run.ratio, 3),
                "bitwise": bitwise,
                "last_loss": round(run.last, 5),
                "held_out_loss": round(run.held_out, 5),
                "difference": round(run.held_out - other.held_out, 5),
                "spread": round(spread, 5),
                "inside": abs(run.held_out - other.held_out) <= spread,
                "cosine": round(min(whole), 6) if whole else 1.0,
                "worst_layer_cosine": round(min(layers), 6) if layers else 1.0,
            }
        )
    return rows


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Loss curves, their distance from no offload, and the gradient cosine of every part."""
    plain = {run.job.seed: run for run in runs if run.job.setting == "none"}
    names = list(dict.fromkeys(run.job.setting for run in runs))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    with figure(path, columns=3) as (left, middle, right):
        for run in runs:
            label = run.job.setting if run.job.seed == min(plain) else None
            smooth = _smooth(run.losses)
            style = {"color": colors[run.job.setting], "linewidth": 1, "label": label}
            left.plot(smooth, **style)
            if run.job.setting != "none":
                base = _smooth(plain[run.job.seed].losses)
                middle.plot([a - b for a, b in zip(smooth, base, strict=True)], **style)
        ends = [run.last for run in plain.values()]
        middle.axhspan(-(max(ends) - min(ends)), max(ends) - min(ends), alpha=0.15, label="spread of seeds")
        parts = list(dict.fromkeys(part for run in runs for _, part, _ in run.cosines))
        for name in names:
            mine = [c for run in runs if run.job.setting == name for c in run.cosines]
            worst = [min((c for _, part, c in mine if part == wanted), default=None) for wanted in parts]
            if any(worst):
                right.plot(parts, worst, "o", color=colors[name], label=name)
        left.set(xlabel="step", ylabel=f"nats per byte, mean of {LAST} steps", title="Training loss")
        middle.set(xlabel="step", title="Training loss minus that of no offload, same seed")
        right.set(title="Gradient cosine with and without the lane, worst step and seed")
        right.tick_params(axis="x", rotation=90)
        for axes in (left, middle, right):
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of up to LAST values that end at each."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - LAST] if i >= LAST else 0.0)
        out.append(total / min(i + 1, LAST))
    return out
