"""What the benchmark of the planner makes of times: flips, errors, regrets."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sidelane.demo_model import QUICK

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import planner

    return planner


def test_flip_rates_lie_where_the_times_cross(planner: ModuleType) -> None:
    rates = planner.FLIP_RATES
    raw = [0.5e-3 / rate for rate in rates]
    lane = [1e-4 + 0.125e-3 / rate for rate in rates]  # equal at 3.75 GB/s
    assert planner.flip_between(rates, lane, raw) == pytest.approx(3.75, rel=0.03)
    assert isnan(planner.flip_between(rates, [2 * t for t in raw], raw))


def cell(path: str, times: dict[str, float], predicted: dict[str, float], chosen: str) -> list[dict]:
    return [
        {
            "path": path,
            "tensor": "t",
            "load": "idle",
            "lane": lane,
            "predicted_ms": predicted.get(lane, ""),
            "measured_ms": measured,
            "any": int(lane == chosen),
            "exact": int(lane == "raw"),
        }
        for lane, measured in times.items()
    ]


def test_summary(planner: ModuleType) -> None:
    times = {"raw": 4.0, "exact": 3.0, "packed:8": 2.0, "packed:4": 1.0, "packed:2": 5.0, "auto": 4.1}
    rows = cell("a", times, {"raw": 4.4, "packed:4": 1.0}, "packed:8")
    rows += cell("b", times | {"auto": 3.0}, {"raw": 3.6}, "packed:4")
    flips = [{"predicted": 2.0, "measured": 2.5}, {"predicted": float("nan"), "measured": 1.0}]
    found = planner.summary(rows, flips)
    assert found["median error of prediction, all"] == pytest.approx(0.1)
    assert found["worst regret, any"] == pytest.approx(1.0)
    assert found["mean regret, any"] == pytest.approx(0.5)
    assert found["mean regret, exact"] == pytest.approx(1 / 3)
    assert found["most that the choice loses to raw, any"] == pytest.approx(-0.5)
    assert found["most that auto loses to raw, as measured"] == pytest.approx(0.025)
    assert found["flip rates found"] == 1
    assert found["worst error of flip rates"] == pytest.approx(0.25)


def test_activations_have_the_kinds_and_sizes(planner: ModuleType) -> None:
    kinds = planner.activations(QUICK, torch.device("cpu"), 0.2, 1 << 16)
    dtypes = {kind: x.dtype for kind, x in kinds.items()}
    bf16 = dict.fromkeys(("hidden", "mlp", "kv"), torch.bfloat16)
    assert dtypes == bf16 | {"norm": torch.float32, "codes": torch.int8}
    assert all(x.nbytes >= 1 << 16 and x.ndim == 2 for x in kinds.values())
    assert all(x.float().std() > 0 for x in kinds.values())
