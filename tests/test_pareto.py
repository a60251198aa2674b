"""The benchmark of the automatic lane at a tiny size."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
GIB = 1 << 30


@pytest.fixture
def pareto(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("pareto")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_budget_is_what_a_peak_leaves(pareto):
    # 30 GiB without offload, 29 of them saved: 1 GiB is there anyway.
    assert pareto.budget_of(1.0, 30.0, 29.0) == 29 * GIB
    assert pareto.budget_of(0.5, 30.0, 29.0) == 14 * GIB
    assert pareto.budget_of(0.01, 30.0, 29.0) == 0


def test_rows_of_a_curve(pareto, tmp_path):
    pareto.main(
        ["--shape", "tiny", "--shares", "0.4", "--settings", "", "--steps", "2", "--lossy", "4"]
        + ["--out", str(tmp_path)]
    )
    with (tmp_path / "pareto.csv").open() as file:
        rows = {(row["setting"], row["share"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {
        ("none", ""), ("auto", "1.0"), ("auto", "0.4"), ("auto, 4 bits", "0.4"), ("checkpoint", "")
    }  # fmt: skip
    assert {row["gradients"] for key, row in rows.items() if "bits" not in key[0]} == {"bitwise"}
    assert rows["auto", "1.0"]["bound_by"] == "nothing: all fits"
    assert rows["auto", "0.4"]["bound_by"].startswith("gpu_budget")
    assert float(rows["auto", "0.4"]["predicted_ms"]) > 0
    assert (tmp_path / "pareto_tiny.png").stat().st_size > 0


def test_rows_of_commits_are_drawn(pareto, tmp_path, capsys):
    header = "shape,setting,commit,ms,peak_gib"
    rows = {
        "pareto.csv": [
            "1b,none,aa,5,30",
            "1b,auto,aa,6,20",
            "1b,auto,aa,7,10",
            "1b,auto,bb,1,1",
            "8b,trl,aa,1,1",
        ],
        "offload.csv": ["1b,none,bb,4,30", "1b,trl,bb,9,10", "1b,trl,cc,8,10"],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("\n".join([header, *lines]))
    found = pareto.rows_of(tmp_path, "1b", ["aa", "bb"])
    assert [(row["setting"], row["ms"]) for row in found] == [
        ("none", 5.0), ("auto", 6.0), ("auto", 7.0), ("trl", 9.0)
    ]  # fmt: skip
    pareto.main(["--draw", "aa,bb", "--out", str(tmp_path)])
    assert (tmp_path / "pareto_1b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        pareto.main(["--draw", "aa,dd", "--out", str(tmp_path)])
    assert "commit dd: neither pareto.csv nor offload.csv" in capsys.readouterr().err
