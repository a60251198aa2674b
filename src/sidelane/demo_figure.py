"""The figure of the demo."""

from __future__ import annotations

from math import ceil, floor, log10
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind readers can tell apart, and three more.
_COLORS = (
    "#222222",
    "#8c8c8c",
    "#0072b2",
    "#e69f00",
    "#d55e00",
    "#56b4e9",
    "#cc79a7",
    "#009e73",
    "#c8b400",
    "#7b3294",
)
_SMOOTH = 5  # steps averaged in the loss curve
_LINEAR = 1e-3  # nats per byte


def draw(record: dict[str, Any], path: Path) -> None:
    """Loss curves, ratio against error, and bytes held, of the record that the demo writes as JSON."""
    figure = Figure(figsize=(15, 5.6), dpi=120, layout="constrained")
    rows: list[Any] = [["loss", "error", "held"], ["change", "error", "held"]]
    axes = figure.subplot_mosaic(rows, width_ratios=(1.25, 1, 1))
    runs = [{**run, "color": color} for run, color in zip(record["runs"], _COLORS, strict=True)]
    _loss(axes["loss"], runs[0])
    _change(axes["change"], runs)
    _error(axes["error"], runs)
    _held(axes["held"], runs)
    shape, machine = record["settings"], record["environment"]
    figure.suptitle(
        f"GPT of {shape['layers']} layers of width {shape['width']}, trained on Python's standard library "
        f"({machine['device']}, torch {machine['torch']}, sidelane {machine['sidelane']})",
        fontsize=11,
    )
    handles, names = axes["change"].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format="png")


def _loss(axes: Axes, run: dict[str, Any]) -> None:
    values = run["losses"]
    windows = [values[max(0, end - _SMOOTH) : end] for end in range(1, len(values) + 1)]
    means = [sum(window) / len(window) for window in windows]
    axes.plot(range(1, len(values) + 1), means, color=run["color"])
    axes.set_title(f"Training loss, {run['name']}")
    axes.set_ylabel(f"nats per byte,\nmean of {_SMOOTH} steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def _change(axes: Axes, runs: list[dict[str, Any]]) -> None:
    """Of the loss, from that of the first run, on an axis that is linear up to `_LINEAR`."""
    for i, run in enumerate(runs[1:]):
        changes = [loss - without for loss, without in zip(run["losses"], runs[0]["losses"], strict=True)]
        # Curves that coincide, as those of exact lanes do at 0, stay visible: they are dashed.
        style = {"linewidth": 2.4, "linestyle": (3 * i, (6, 4))} if run["exact"] else {"linewidth": 1.2}
        axes.plot(range(1, len(changes) + 1), changes, color=run["color"], label=run["name"], **style)
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.set_title("Its change by each lane, same weights and batches")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per byte")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def _error(axes: Axes, runs: list[dict[str, Any]]) -> None:
    errors = [run["worst_error"] for run in runs if run["worst_error"] > 0]
    low, high = floor(log10(min(errors))), ceil(log10(max(errors)))
    zero = 10.0 ** (low - 1)  # where an error of 0 is drawn on the logarithmic axis
    for run in runs:
        at = run["ratio"], run["worst_error"] or zero
        if run["recompute"]:
            axes.scatter(*at, s=170, facecolors="none", edgecolors=run["color"], linewidths=2.2, marker="s")
        else:
            axes.scatter(*at, s=80, color=run["color"], zorder=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ratios = [2**i for i in range(ceil(log10(max(run["ratio"] for run in runs)) / log10(2)) + 1)]
    axes.set_xticks(ratios, [f"{ratio}x" for ratio in ratios])
    decades = [10.0**i for i in range(low, high + 1)]
    axes.set_yticks([zero, *decades], ["0", *(f"{100 * d:g}%" for d in decades)])
    axes.minorticks_off()
    axes.set_title("What the error buys (squares: checkpoint)")
    axes.set_xlabel("bytes saved / bytes on the wire")
    axes.set_ylabel("worst relative error of a saved tensor")
    axes.grid(alpha=0.25)


def _held(axes: Axes, runs: list[dict[str, Any]]) -> None:
    mebibytes = [run["held_bytes"] / 2**20 for run in runs]
    bars = axes.barh([run["name"] for run in runs], mebibytes, color=[run["color"] for run in runs])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title("Saved activations held at the peak")
    axes.set_xlabel("MiB")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
