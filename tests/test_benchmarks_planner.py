"""What the benchmark of the planner makes of times: flips, errors, regrets, losses to raw, parts."""

from __future__ import annotations

import csv
import json
from math import isnan, log, nan
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sidelane.demo_model import QUICK
from sidelane.pipeline.machine import Curve, Machine

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
STAGES = ("encode", 1), ("decode", -1)
LANES = ("raw", "exact", "packed:8", "packed:4", "packed:2", "auto")


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import planner

    return planner


@pytest.fixture
def cells(planner: ModuleType) -> ModuleType:
    import planner_cells

    return planner_cells


@pytest.fixture
def summary(planner: ModuleType) -> ModuleType:
    import planner_summary

    return planner_summary


def test_flip_rates_lie_where_the_times_cross(planner: ModuleType, summary: ModuleType) -> None:
    """Equal at 3.75 GB/s."""
    from planner_flips import FLIP_RATES as rates

    gaps = [log((1e-4 + 125e3 / rate) / (0.5e6 / rate)) for rate in rates]
    near = summary.crossing(rates, gaps)
    assert near == pytest.approx(3.75e9, rel=0.25)
    assert summary.flip_of(rates, gaps, near) == pytest.approx(3.75e9, rel=0.03)
    assert summary.crossing(rates, [-gap for gap in gaps]) is None
    assert isnan(summary.flip_of(rates, [-gap for gap in gaps], near))
    assert isnan(summary.flip_of(rates, [gap + 1 for gap in gaps], near))  # far from the rates of the line


def test_errors_of_flips(summary: ModuleType) -> None:
    nan = float("nan")
    pairs = [(2.0, 2.5), (3.0, 2.0), (nan, 1.0), (1.0, nan)]
    flips = [{"predicted": predicted, "measured": measured, "slowed": 1.1} for predicted, measured in pairs]
    flips.append({"predicted": 1.0, "measured": 9.0, "slowed": 1.3})  # others disturbed it
    assert summary.flip_errors(flips, "predicted") == pytest.approx([0.25, 0.5, float("inf")])


def test_ratios_are_of_the_same_round(summary: ModuleType) -> None:
    """Both drift by a factor of ten."""
    raw = [1.0 + i for i in range(10)]
    middle, error = summary.ratio_of([1.1 * time for time in raw], raw)
    assert middle == pytest.approx(1.1)
    assert error == pytest.approx(0.0, abs=1e-9)
    assert summary.ratio_of([1.0, 1.2, 0.8, 1.1], [1.0] * 4)[1] > 0.03


def cell(
    path: str,
    times: tuple[float, ...],
    predicted: dict[str, float],
    chosen: str,
    took: str,
    error: float = 0.0,
    stored: str = "",
) -> list[dict]:
    simulated = "GB/s" in path
    return [
        {
            "path": path,
            "group": "simulated d2h" if simulated else path,
            "simulated": int(simulated),
            "tensor": "t",
            "load": "idle",
            "lane": lane,
            "stored": stored or lane,
            "took": took if lane == "auto" else lane,
            "predicted_ms": predicted.get(lane, ""),
            "measured_ms": time,
            "over_raw": time / times[0],
            "over_raw_se": error,
            "any": int(lane == chosen),
            "exact": int(lane == "raw"),
        }
        for lane, time in zip(LANES, times, strict=True)
    ]


def test_summary_by_group_of_wires(summary: ModuleType) -> None:
    rows = cell("host", (4.0, 3.0, 2.0, 1.0, 5.0, 4.1), {"raw": 4.4, "packed:4": 1.0}, "packed:8", "exact")
    rows += cell("1 GB/s", (4.0, 5.0, 2.0, 1.0, 5.0, 3.0), {"raw": 3.6}, "packed:4", "raw")
    flips = [
        {"predicted": 2.0, "learned": 2.4, "measured": 2.5, "slowed": 1.0},
        {"predicted": 2.0, "learned": 2.4, "measured": 9.0, "slowed": 1.3},
    ]
    lines = {line["group"]: line for line in summary.summary(rows, flips, {"cached_us": 1.5})}
    assert list(lines) == ["host", "simulated d2h", "real", "simulated", "all"]
    assert {line["cells"] for line in lines.values()} == {1, 2}
    every = lines["all"]
    assert every["error_median"] == pytest.approx(0.1)
    assert every["regret_worst"] == pytest.approx(1.0)
    assert every["regret_mean"] == pytest.approx(0.5)
    assert every["regret_exact_mean"] == pytest.approx(1 / 6, rel=1e-3)
    assert (every["raw_best"], every["auto_took_raw"], every["auto_took_other"]) == (1, 1, 1)
    assert every["auto_over_raw_worst"] == every["auto_loses"] == pytest.approx(0.025)
    assert every["noise_of_same_lane"] == pytest.approx(0.25)
    assert lines["simulated"]["auto_over_raw_worst"] == ""
    assert lines["simulated"]["flip_error_worst"] == every["flip_error_worst"] == pytest.approx(0.25)
    assert every["flip_learned_error_worst"] == pytest.approx(0.1 / 2.4, rel=1e-3)
    assert lines["host"]["flips"] == lines["host"]["cached_us"] == ""
    assert every["cached_us"] == 1.5
    met = summary.verdicts(every | {"cold_us": 2000.0})
    assert met[0] == "met: error_median 0.1, at most 0.1"
    assert met[-1] == "NOT met: cold_us 2000.0, at most 1000.0"


def test_a_loss_within_its_error_is_none(summary: ModuleType) -> None:
    times = (4.0, 4.1, 4.0, 4.0, 4.0, 4.1)
    (found,) = (
        summary.figures(cell("host", times, {"raw": 4.0}, "raw", "exact", error)) for error in (0.02,)
    )
    assert found["auto_over_raw_worst"] == pytest.approx(0.025)
    assert found["auto_loses"] == 0


def test_what_is_stored_raw_is_no_other_lane(summary: ModuleType) -> None:
    """Int8 codes: the same transfer five times, whose fastest is no choice that was missed."""
    times = (4.0, 3.9, 3.8, 4.1, 3.9, 4.0)
    found = summary.figures(cell("host", times, {"raw": 4.0}, "raw", "raw", stored="raw"))
    assert found["regret_worst"] == found["regret_exact_worst"] == 0
    assert found["raw_best"] == found["auto_took_raw"] == 1


def test_rounds_keep_to_their_time(cells: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(cells, "perf_counter", lambda: float(next(now)))
    assert len(list(cells.Rounds(0.0))) == cells.LEAST
    assert cells.LEAST < len(list(cells.Rounds(20.0))) < cells.MOST
    assert len(list(cells.Rounds(1e9))) == cells.MOST


def test_activations_have_the_kinds_and_sizes(planner: ModuleType) -> None:
    kinds = planner.activations(QUICK, torch.device("cpu"), 0.2, 1 << 16)
    dtypes = {kind: x.dtype for kind, x in kinds.items()}
    bf16 = dict.fromkeys(("hidden", "mlp", "kv"), torch.bfloat16)
    assert dtypes == bf16 | {"norm": torch.float32, "codes": torch.int8}
    assert all(x.nbytes >= 1 << 16 and x.ndim == 2 for x in kinds.values())
    assert all(x.float().std() > 0 for x in kinds.values())


@pytest.fixture
def setting(planner: ModuleType):
    wires = {name: Curve.line(1e-5, 5e9) for name in ("d2h", "h2d", "disk write", "disk read")}
    return planner.Setting(torch.device("cpu"), Machine({}, wires, {}, 1e12, {}), 512)


def test_every_path_brings_back_what_it_got(
    planner: ModuleType, cells: ModuleType, setting, tmp_path: Path
) -> None:
    x = torch.randn(40, 64).bfloat16()
    paths = [planner.Host(setting), planner.OnDisk(setting, str(tmp_path))]
    paths += [planner.Simulated(setting, way, 1e9, 32) for way in ("d2h", "h2d")]
    for path in paths:
        stored = cells.gate(path, x)
        assert stored["packed:4"] == "packed"
    assert [path.simulated for path in paths] == [False, False, True, True]


@pytest.mark.parametrize("way, place", [("d2h", 0), ("h2d", 1)])
def test_a_throttled_way_is_measured_once_without_the_other_one(
    planner: ModuleType, setting, way: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that takes 1 ms and 1 us for each KiB."""
    path = planner.Simulated(setting, way, 1e9, 32)
    sent = []
    monkeypatch.setattr(path, "carry", lambda packets: sent.append(packets[0].raw_nbytes))

    def timed(work):
        work()
        return 1e-3 + sent[-1] / 1024 * 1e-6

    monkeypatch.setattr(setting, "timed", timed)
    path.calibrate()
    path.calibrate()
    assert len(sent) == 9 * len(set(sent))
    assert path.wires[1 - place] == path.other
    for size in set(sent):
        other = setting.machine.wires[path.other](size)
        assert path.wires[place](size) == pytest.approx(1e-3 + size / 1024 * 1e-6 - other)


def test_a_simulated_wire_keeps_its_rate(planner: ModuleType, cells: ModuleType, setting) -> None:
    path = planner.Simulated(setting, "d2h", 1e6, 32)
    x = torch.zeros(64 << 10, dtype=torch.uint8)
    assert setting.timed(lambda: cells.round_trip(path, "raw", x)) >= 64 * 1.024e-3
    path.pace(64e6)
    assert setting.timed(lambda: cells.round_trip(path, "raw", x)) < 32e-3


def test_a_unit_of_rows(planner: ModuleType, cells: ModuleType, setting) -> None:
    kinds = {kind: torch.randn(64, 64).bfloat16() for kind in planner.KINDS}
    names = [unit.name for unit in planner.units(setting, kinds, "/tmp")]
    assert len(names) == len(set(names)) == 5 * (2 + 2 * len(planner.RATES)) + 3 + 4 * 2
    found = [unit for unit in planner.units(setting, kinds, "/tmp") if unit.name == "d2h 0.125 GB/s kv"]
    rows = found[0].work(0.0)
    assert [row["lane"] for row in rows] == list(LANES)
    assert rows[0]["rounds"] == cells.LEAST - 1
    assert rows[-1]["took"] == "raw"


def test_parts_are_put_together(planner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, each with a GPU of its own; the second starts when the first has its profile."""
    started = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            number = int(command[command.index("--part") + 1].partition("/")[0])
            out = Path(command[command.index("--part") + 3])
            started.append((number, env["CUDA_VISIBLE_DEVICES"], planner.machine_file(out, 0).exists()))
            Machine({}, {}, {}, 1.0, {}).save(planner.machine_file(out, number))
            rows = cell(f"{number + 1} GB/s", (4.0, 3.0, 2.0, 1.0, 5.0, 4.1), {"raw": 4.4}, "raw", "raw")
            done = {"rows": rows, "flips": [], "missing": [], "costs": {"cached_us": number}}
            planner.part_file(out, number).write_text(json.dumps(done))

        def poll(self) -> None:
            return None

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(planner, "Popen", Process)
    monkeypatch.setattr(planner, "visible_gpus", lambda: ["3", "5"])
    monkeypatch.setattr(planner.sys, "argv", ["planner.py", "--out", str(tmp_path)])
    planner.main()
    assert started == [(0, "3", False), (1, "5", True)]
    with open(tmp_path / "planner.csv") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["1 GB/s"] * 6 + ["2 GB/s"] * 6
    with open(tmp_path / "planner_summary.csv") as file:
        assert [row["cached_us"] for row in csv.DictReader(file)] == ["", "", "0"]
    assert (tmp_path / "planner_machine.json").exists()


def test_flips_that_others_disturbed_count_for_nothing(summary: ModuleType) -> None:
    rows = cell("1 GB/s", (4.0, 3.0, 2.0, 1.0, 5.0, 4.1), {"raw": 4.4}, "packed:8", "exact")
    flips = [{"predicted": 2.0, "learned": 2.4, "measured": value, "slowed": 1.3} for value in (9.0, nan)]
    every = summary.summary(rows, flips, {})[-1]
    assert (every["flips"], every["flips_disturbed"]) == ("", 1)
    assert [line for line in summary.verdicts(every) if "flip" in line] == [
        "NOT measured: flip_error_worst, on an undisturbed host",
        "NOT measured: flip_learned_error_worst, on an undisturbed host",
    ]
    assert summary.summary(rows, [], {})[-1]["flips_disturbed"] == ""


@pytest.mark.parametrize(
    ("loops", "until", "kept", "left_out"),
    [
        ("q" * 6, 1e9, ["q"] * 3, 0),
        ("qdqqqd", 1e9, ["q"] * 3, 1),
        ("d" * 20, 1e9, ["d"] * 3, 6),  # never undisturbed: three times as many are tried
        ("d" * 20, 0.0, ["d"] * 3, 0),  # nor is there time
    ],
)
def test_turns_are_repeated_until_enough_are_undisturbed(
    planner: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    loops: str,
    until: float,
    kept: list[str],
    left_out: int,
) -> None:
    import common
    import planner_flips

    class Quiet(common.Quiet):
        def run(self, work: Any) -> Any:
            return common.Turn(0.0, 1.0 if next(coming) == "q" else 2.0, work())

    class Wire:
        def pace(self, rate: float) -> None:
            paced.append(rate)

    coming, paced = iter(loops), []
    monkeypatch.setattr(planner_flips, "in_turn", lambda *_: {"raw": (1.0, paced[-1], 1.0)})
    setting = SimpleNamespace(quiet=Quiet(lambda: None, least=1.0))
    sweep = planner_flips.taken(setting, Wire(), torch.zeros(1), [5.0], ["raw"], 3, until=until)
    assert ["q" if turn.loop == 1 else "d" for turn in sweep.turns[5.0]] == kept
    assert sweep.left_out == left_out and set(paced) == {5.0}


def test_undisturbed_turns_teach_in_the_order_of_time(
    planner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import common
    import planner_flips

    class Seen:
        def observe(self, name: str, nbytes: float, predicted: float, actual: float) -> None:
            seen.append((name, actual))

    curve = SimpleNamespace(encode=lambda nbytes: 1.0, decode=lambda nbytes: 1.0)
    monkeypatch.setattr(planner_flips, "speed_of", lambda *_: curve)
    seen: list[tuple[str, float]] = []
    turns = {
        rate: [common.Turn(begin, loop, {"exact": (begin, 0.0, -begin)})]
        for rate, begin, loop in ((1.0, 3.0, 1.0), (2.0, 1.0, 1.0), (3.0, 2.0, 5.0))
    }
    setting = SimpleNamespace(quiet=common.Quiet(lambda: None, least=1.0), machine=None)
    planner_flips.learn(setting, torch.zeros(1), planner_flips.Sweep(turns, 0), Seen())
    assert seen == [(f"{stage} exact", sign * t) for t in (1.0, 3.0) for stage, sign in STAGES]
