"""Time to bring keys and values back from host memory, over how many tokens are computed again (KVPR).

Rows: one layer of a model, restored with the first `front` tokens recomputed, against the time that the cost
model predicts from two rates measured beforehand: keys and values loaded whole, products alone. With one
piece the inputs arrive as a whole before anything is computed, as in KVPR. Wires slower than the real one are
simulated: every byte crosses `crossings` times. Inputs are normal random numbers, which time copies and
products; keys and values are those that the model's projections make of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, append_rows, environment, figure, timing_event
from torch import Tensor
from torch.nn import Linear

from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.planner import kv_split_time
from sidelane.pipeline.recompute import StoredKV

GRID = 16  # steps from no token to all
BASE = 10000.0  # of RoPE
LINE = (
    "{model:22} {lane:6} x{crossings} {pieces} pieces, front {front:5} of {tokens}: {ms} ms "
    "({ms_p20}..{ms_p80}), predicted {predicted_ms}, gain {gain:+.1%}"
)


@dataclass(frozen=True)
class Shape:
    """One attention layer."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    rotated: bool
    tokens: int
    batch: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("OPT-6.7B, MHA", 32, 32, 128, torch.float16, False, 1024, 32),
        Shape("Llama-2-7B, MHA, RoPE", 32, 32, 128, torch.bfloat16, True, 1024, 32),
        Shape("Llama-3.1-8B, GQA, RoPE", 32, 8, 128, torch.bfloat16, True, 2048, 32),
        Shape("tiny, MHA", 4, 4, 16, torch.float32, False, 256, 2),
    )
}
RUNS = (
    ("OPT-6.7B, MHA", "raw", 1, 1),
    ("OPT-6.7B, MHA", "raw", 1, 8),
    ("OPT-6.7B, MHA", "raw", 2, 1),
    ("OPT-6.7B, MHA", "raw", 4, 1),
    ("Llama-2-7B, MHA, RoPE", "raw", 1, 1),
    ("Llama-2-7B, MHA, RoPE", "raw", 1, 8),
    ("Llama-2-7B, MHA, RoPE", "exact", 1, 1),
    ("Llama-2-7B, MHA, RoPE", "exact", 1, 8),
    ("Llama-3.1-8B, GQA, RoPE", "raw", 1, 8),
    ("Llama-3.1-8B, GQA, RoPE", "raw", 4, 8),
)


class Layer:
    """Inputs [tokens, batch, width], projections, and the keys and values [2, tokens, batch, heads, dim] that
    the whole sequence gives."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape = shape
        width = shape.heads * shape.dim
        options: dict[str, Any] = {"dtype": shape.dtype, "device": device}
        self.x = torch.randn(shape.tokens, shape.batch, width, **options)
        self.projections = [
            Linear(width, shape.kv_heads * shape.dim, bias=False, **options).requires_grad_(False)
            for _ in range(2)
        ]
        angles = torch.arange(shape.tokens)[:, None] * BASE ** -(torch.arange(0, shape.dim, 2) / shape.dim)
        self._cos, self._sin = (
            torch.cat((turn, turn), dim=-1).to(**options)[:, None, None]  # [tokens, 1, 1, dim]
            for turn in (angles.cos(), angles.sin())
        )
        kv = torch.stack([linear(self.x) for linear in self.projections])
        self.kv = kv.view(2, shape.tokens, shape.batch, shape.kv_heads, shape.dim)
        if shape.rotated:
            self.kv[0] = self.rotate(self.kv[0], torch.arange(shape.tokens, device=device))

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """RoPE as models apply it, in the dtype of the keys."""
        a, b = keys.chunk(2, dim=-1)
        return keys * self._cos[positions] + torch.cat((-b, a), dim=-1) * self._sin[positions]

    def store(self, lane: str, crossings: int, pieces: int) -> StoredKV:
        """All inputs are kept, also where the split leaves them unused."""

        def copy(to: Tensor, source: Tensor) -> None:
            for _ in range(crossings):
                to.copy_(source, non_blocking=True)

        opened = None if lane == "raw" else open_lane(lane)
        return StoredKV(
            self.x,
            self.kv,
            *self.projections,
            rotate=self.rotate if self.shape.rotated else None,
            lane=opened,
            x_lane=opened,
            limit=self.shape.tokens,
            copy=copy,
            pieces=pieces,
        )


@dataclass(frozen=True)
class Error:
    """Of recomputed keys and values: relative Frobenius error, and the part of them that has every bit."""

    relative: float
    equal: float


def gate(layer: Layer, stored: StoredKV, front: int, out: Tensor) -> Error:
    """Raise RuntimeError unless every bit that was loaded is right, and what was recomputed within a rounding
    (two for rotated keys) of the dtype."""
    out.fill_(nan)
    stored.restore(front, out=out)
    if not torch.equal(out[:, front:], layer.kv[:, front:]):
        raise RuntimeError(f"{layer.shape.name}, front={front}: loaded values are wrong: no times")
    if not front:
        return Error(0.0, 1.0)
    errors = []
    for found, true in zip(out[:, :front], layer.kv[:, :front], strict=True):
        norm = torch.linalg.vector_norm(true, dtype=torch.float32)
        errors.append(float(torch.linalg.vector_norm(found - true, dtype=torch.float32) / norm))
    equal = float((out[:, :front] == layer.kv[:, :front]).sum() / layer.kv[:, :front].numel())
    if not max(errors) <= torch.finfo(layer.shape.dtype).eps * (1 + layer.shape.rotated):
        raise RuntimeError(f"{layer.shape.name}, front={front}: recomputed values are off by {errors}")
    return Error(max(errors), equal)


def elapsed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, by events on the current stream."""
    if device.type == "cpu":
        begin = perf_counter()
        work()
        return perf_counter() - begin
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    first, last = (timing_event() for _ in range(2))
    stream.record_event(first)
    work()
    stream.record_event(last)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def curve(layer: Layer, lane: str, crossings: int, pieces: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one curve T(l): `GRID` steps and the split itself, in random order in every round."""
    shape = layer.shape
    stored = layer.store(lane, crossings, pieces)
    out = stored.empty()
    rates = stored.measure()
    best = stored.split(rates)
    grid = {round(shape.tokens * i / GRID / stored.block) * stored.block for i in range(GRID + 1)}
    fronts = sorted(grid | {best.tokens})
    errors = {front: gate(layer, stored, front, out) for front in fronts}
    times: dict[int, list[float]] = {front: [] for front in fronts}
    order = random.Random(0)
    for number in range(repeats + 2):
        for front in order.sample(fronts, len(fronts)):
            seconds = elapsed(partial(stored.restore, front, out=out), stored.device)
            if number >= 2:
                times[front].append(seconds)
    pure = median(times[0])
    x_bytes = (stored.nbytes - stored.kv_nbytes) / shape.tokens
    found = []
    for front in fronts:
        low, *_, high = quantiles(times[front], n=5)
        sizes = shape.tokens, x_bytes, stored.kv_nbytes / shape.tokens, stored.flops
        predicted = kv_split_time(front, *sizes, rates.wire, rates.compute, pieces)
        found.append(
            {
                "model": shape.name,
                "lane": lane,
                "crossings": crossings,
                "wire": "h2d" if crossings == 1 else f"simulated, h2d {crossings} times",
                "pieces": pieces,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "batch": shape.batch,
                "tokens": shape.tokens,
                "x_bytes": round(x_bytes),
                "kv_bytes": round(stored.kv_nbytes / shape.tokens),
                "wire_gb_s": round(rates.wire / 1e9, 2),
                "tflops": round(rates.compute / 1e12, 1),
                "split": best.tokens,
                "front": front,
                "ms": round(median(times[front]) * 1e3, 4),
                "ms_p20": round(low * 1e3, 4),
                "ms_p80": round(high * 1e3, 4),
                "predicted_ms": round(predicted * 1e3, 4),
                "gain": round(1 - median(times[front]) / pure, 4),
                "predicted_gain": round(1 - predicted / (stored.kv_nbytes / rates.wire), 4),
                "rel_error": f"{errors[front].relative:.2e}",
                "equal": round(errors[front].equal, 4),
                "repeats": repeats,
            }
        )
    return found


def verdict(rows: list[dict[str, Any]]) -> str:
    """What a curve says of the split that was chosen beforehand."""
    by_front = {row["front"]: row for row in rows}
    least = min(rows, key=lambda row: row["ms"])
    chosen = by_front[rows[0]["split"]]
    step = rows[0]["tokens"] / GRID
    off = max(abs(row["predicted_ms"] / row["ms"] - 1) for row in rows)
    return (
        f"{chosen['model']}, {chosen['lane']}, {chosen['pieces']} pieces, {chosen['wire']}, "
        f"{chosen['wire_gb_s']} GB/s, {chosen['tflops']} TFLOP/s: split {chosen['front']} takes "
        f"{chosen['ms']} ms, {chosen['gain']:.1%} less than loading (predicted "
        f"{chosen['predicted_gain']:.1%}); least at {least['front']}, "
        f"{abs(least['front'] - chosen['front']) / step:.2f} steps away; recomputing all "
        f"{rows[-1]['gain']:+.1%}; predictions within {off:.1%}"
    )


def draw(path: Path, curves: list[list[dict[str, Any]]]) -> None:
    """One panel for each kind of attention."""
    kinds = {
        kind: chosen
        for kind in ("MHA", "GQA")
        if (chosen := [rows for rows in curves if kind in rows[0]["model"]])
    }
    with figure(path, len(kinds)) as panels:
        for panel, (title, chosen) in zip(panels, kinds.items(), strict=True):
            for color, rows in enumerate(chosen):
                first, pure = rows[0], rows[0]["ms"]
                at = [row["front"] / row["tokens"] for row in rows]
                label = (
                    f"{first['model']}, {first['lane']}, pieces: {first['pieces']}, {first['wire_gb_s']} GB/s"
                )
                if first["crossings"] > 1:
                    label += " (simulated)"
                panel.plot(at, [row["ms"] / pure for row in rows], "o", ms=3, color=f"C{color}", label=label)
                panel.plot(at, [row["predicted_ms"] / pure for row in rows], lw=0.8, color=f"C{color}")
                panel.axvline(first["split"] / first["tokens"], color=f"C{color}", lw=0.8, ls=":")
            panel.set_title(f"{title}: points measured, lines and split (dotted) predicted")
            panel.set_xlabel("part of the tokens that is recomputed")
            panel.set_ylabel("time, of that of loading all")
            panel.set_ylim(bottom=0)
            panel.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=40.0, help="start no curve after so long")
    parser.add_argument("--tiny", action="store_true", help="a shape that tests this script, also on the CPU")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = perf_counter()
    env = environment()
    curves: list[list[dict[str, Any]]] = []
    layer: Layer | None = None
    runs = (("tiny, MHA", "raw", 1, 1), ("tiny, MHA", "exact", 1, 8)) if arguments.tiny else RUNS
    for name, lane, crossings, pieces in runs:
        if perf_counter() - begin > arguments.seconds:
            print("out of time", flush=True)
            break
        if layer is None or layer.shape.name != name:
            layer = None
            layer = Layer(SHAPES[name], device)
        rows = curve(layer, lane, crossings, pieces, arguments.repeats)
        for row in rows:
            print(LINE.format(**row), flush=True)
        print(verdict(rows), flush=True)
        append_rows(arguments.out / "recompute.csv", [row | env for row in rows])
        curves.append(rows)
    draw(arguments.out / "recompute.png", curves)


if __name__ == "__main__":
    main()
