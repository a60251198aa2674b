"""The benchmark of two lanes on small tensors of the CPU: its gate closes, its rows say what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sidelane.pipeline.calibrate import calibrate
from sidelane.pipeline.dual import dual_rate
from sidelane.pipeline.lanes import open_lane

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def dual(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import dual

    monkeypatch.setattr(dual, "WIRES", (1.0, None))
    monkeypatch.setattr(dual, "VIDEO_PARTS", 3)
    return dual


@pytest.fixture
def inputs(dual: ModuleType):
    def rows():
        return (torch.randn(512, 64) * torch.logspace(0, -1, 64)).bfloat16()

    basis = calibrate([rows(), rows()], bits=4.0)
    packet = open_lane("video-cpu", basis=basis).encode(rows())
    return dual.Inputs(rows(), packet, dual.surface_digest(packet, basis, torch.device("cpu")), basis)


def test_rows(dual: ModuleType, inputs) -> None:
    bench = dual.Bench(inputs, repeat=2, seconds=1e-3, largest=1 << 20)
    rows = [*bench.video(), *bench.on_gpu("exact", {}), *bench.on_gpu("packed", {"bits": 8})]
    assert len({tuple(row) for row in rows}) == 1
    assert [row["direction"] for row in rows] == ["load"] * 2 + ["store", "load"] * 4
    assert {row["wire"] for row in rows} == {"1.0 simulated", "pcie"}
    for row in rows:
        assert 0 <= row["share"] <= 1 and row["ratio"] > 1
        formula = dual_rate(row["wire_gb_s"], row["lane_gb_s"], row["ratio"])
        assert row["formula_gb_s"] == pytest.approx(formula, rel=0.02, abs=2e-4)
        assert row["fraction"] == pytest.approx(row["gb_s_median"] / row["formula_gb_s"], rel=0.02, abs=0.02)
        if row["wire"] == "1.0 simulated":
            assert row["wire_gb_s"] < 1.2


def test_wrong_surfaces_give_no_row(dual: ModuleType, inputs) -> None:
    wrong = replace(inputs, digest=inputs.digest[::-1])
    with pytest.raises(SystemExit, match="software decoder"):
        next(dual.Bench(wrong, repeat=2, seconds=1e-3, largest=1 << 20).video())


@pytest.mark.parametrize("lane", ["video", "exact"])
def test_wrong_elements_give_no_row(dual: ModuleType, inputs, monkeypatch, lane) -> None:
    from sidelane.pipeline.dual_wire import DualWire

    bench = dual.Bench(inputs, repeat=2, seconds=1e-3, largest=1 << 20)
    receive = DualWire.receive

    def careless(self, parcel, out=None):
        y = receive(self, parcel, out)
        y.view(-1)[-1] += 1
        return y

    monkeypatch.setattr(DualWire, "receive", careless)
    with pytest.raises(SystemExit, match="one after the other"):
        next(bench.video() if lane == "video" else bench.on_gpu("exact", {}))
