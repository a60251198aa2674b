"""What times of the benchmark of the planner say: errors, regrets, losses to raw, flips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, isfinite, log, nan, sqrt
from statistics import fmean, median
from typing import Any

import numpy as np
from common import DISTURBED

Row = dict[str, Any]

GOALS = {  # column of the summary: the most that it may be
    "error_median": 0.10,
    "regret_mean": 0.05,
    "regret_worst": 0.10,
    "regret_exact_mean": 0.05,
    "regret_exact_worst": 0.10,
    "auto_loses": 0.02,
    "flip_error_worst": 0.20,
    "flip_learned_error_worst": 0.20,
    "cached_us": 50.0,
    "cold_us": 1000.0,
}
SURE = 2.0  # standard errors


def ratio_of(times: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The median of times[i] / others[i], measured next to each other, and its standard error."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    middle = median(ratios)
    spread = 1.4826 * median(abs(ratio - middle) for ratio in ratios)
    return middle, 1.2533 * spread / sqrt(len(ratios))


def flip_of(rates: Sequence[float], gaps: Sequence[float], near: float) -> float:
    """The rate at which log(lane / raw) is 0, from a line through the gaps at rates within a factor of two of
    `near`, over log rates; NaN where it is not between these, or a faster wire does not favour raw."""
    points = [(log(rate), gap) for rate, gap in zip(rates, gaps, strict=True) if 0.5 <= rate / near <= 2]
    x, y = np.array(points).T
    slope, offset = np.polyfit(x, y, 1)
    if slope <= 0 or not points[0][0] <= -offset / slope <= points[-1][0]:
        return nan
    return exp(-offset / slope)


def crossing(rates: Sequence[float], gaps: Sequence[float]) -> float | None:
    """The geometric mean of the first two rates, from below, between which a lane falls behind raw."""
    for i in range(len(rates) - 1):
        if gaps[i] <= 0 < gaps[i + 1]:
            return sqrt(rates[i] * rates[i + 1])
    return None


def cells_of(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Rows by lane, by (path, tensor, load)."""
    cells: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["path"], row["tensor"], row["load"]), {})[row["lane"]] = row
    return cells


def figures(rows: Sequence[Row]) -> Row:
    """Of a group of wires.

    error: |predicted / measured - 1| of lanes that have a prediction; bias: the median with its sign. regret:
    of the lane chosen among all ("regret"), or among exact ones, against the fastest of those that do not
    store the tensor as raw does. raw_best: cells in which raw is faster than exact; auto_took_raw: in so many
    of them "auto" did. auto_took_other: cells in which it took another lane; auto_over_raw_worst: the most by
    which that was slower than raw, auto_loses: beyond `SURE` standard errors. noise_of_same_lane: the largest
    difference where both did the same.
    """
    cells = list(cells_of(rows).values())
    errors = [
        row["predicted_ms"] / row["measured_ms"] - 1
        for row in rows
        if row["predicted_ms"] != "" and row["lane"] != "auto"
    ]
    sizes = sorted(abs(error) for error in errors)
    found: Row = {
        "cells": len(cells),
        "error_median": median(sizes),
        "error_p90": sizes[int(0.9 * len(sizes))],
        "bias": median(errors),
    }
    for policy, name in (("any", "regret"), ("exact", "regret_exact")):
        regrets = [_regret(cell, policy) for cell in cells]
        found |= {f"{name}_mean": fmean(regrets), f"{name}_worst": max(regrets)}
    autos = [cell["auto"] for cell in cells]
    others = [row for row in autos if row["took"] != "raw"]
    best = [cell for cell in cells if min(_coding(cell), key=_time)["lane"] == "raw"]
    found |= {"raw_best": len(best), "auto_took_raw": sum(cell["auto"]["took"] == "raw" for cell in best)}
    found["auto_took_other"] = len(others)
    found["auto_over_raw_worst"] = max((row["over_raw"] - 1 for row in others), default=nan)
    found["auto_loses"] = max(
        (max(row["over_raw"] - 1 - SURE * row["over_raw_se"], 0.0) for row in others), default=0.0
    )
    same = [abs(row["over_raw"] - 1) for row in autos if row["took"] == "raw"]
    found["noise_of_same_lane"] = max(same, default=nan)
    return found


def _regret(cell: dict[str, Row], policy: str) -> float:
    taken = next(row for row in cell.values() if row["lane"] != "auto" and row[policy])
    return _time(taken) / min(map(_time, _coding(cell, policy))) - 1


def _coding(cell: dict[str, Row], policy: str = "exact") -> list[Row]:
    """Raw and the lanes that do not store the tensor as raw does; "exact": among "raw" and "exact" alone."""
    lanes = ("raw", "exact") if policy == "exact" else tuple(lane for lane in cell if lane != "auto")
    return [cell[lane] for lane in lanes if lane == "raw" or cell[lane]["stored"] != "raw"]


def _time(row: Row) -> float:
    return float(row["measured_ms"])


def summary(rows: Sequence[Row], flips: Sequence[Row], costs: Row) -> list[Row]:
    """A row for each group of wires, for all real and for all simulated ones, and for everything. Flips are
    of simulated wires out; costs of decisions are of everything."""
    groups = {group: [row for row in rows if row["group"] == group] for group in _ordered(rows)}
    for name, simulated in (("real", 0), ("simulated", 1)):
        groups[name] = [row for row in rows if row["simulated"] == simulated]
    groups["all"] = list(rows)
    found = []
    for group, some in groups.items():
        if not some:
            continue
        line: Row = {"group": group} | {name: _short(value) for name, value in figures(some).items()}
        mine = flips if group in ("simulated", "all") else []
        for name, by in (("flip", "predicted"), ("flip_learned", "learned")):
            off = flip_errors(mine, by)
            line |= {
                f"{name}s": len(off) or "",
                f"{name}_error_median": _short(median(off)) if off else "",
                f"{name}_error_worst": _short(max(off)) if off else "",
                f"{name}s_within_20": sum(each <= 0.2 for each in off) if off else "",
            }
        disturbed = [flip for flip in mine if isfinite(flip["measured"]) and flip["slowed"] > DISTURBED]
        line["flips_disturbed"] = len(disturbed) if mine else ""
        line |= {name: _short(value) if group == "all" else "" for name, value in costs.items()}
        found.append(line)
    return found


def flip_errors(flips: Sequence[Row], by: str) -> list[float]:
    """max(predicted / measured, measured / predicted) - 1 where a flip was measured on an undisturbed host;
    infinite where none was predicted. `by`: the column of predictions."""
    found = []
    for flip in flips:
        if flip["slowed"] > DISTURBED:
            continue
        measured, predicted = flip["measured"], flip[by]
        if isfinite(measured):
            found.append(exp(abs(log(predicted / measured))) - 1 if isfinite(predicted) else float("inf"))
    return found


def verdicts(everything: Row) -> list[str]:
    """Whether the row of everything meets the goals. Of what was not sought there is no line."""
    lines = []
    for name, most in GOALS.items():
        value = everything.get(name, "")
        if value == "" and name.startswith("flip") and everything.get("flips_disturbed", "") != "":
            lines.append(f"NOT measured: {name}, on an undisturbed host")
        if value != "":
            lines.append(f"{'met' if float(value) <= most else 'NOT met'}: {name} {value}, at most {most}")
    return lines


def _ordered(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["group"] for row in rows))


def _short(value: float) -> float | int | str:
    """Four digits, "" for what there is none of."""
    if isinstance(value, int) or value != value:
        return value if value == value else ""
    return float(f"{value:.4g}")
