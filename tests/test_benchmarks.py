"""The benchmarks on small synthetic tensors: what they measure is what they say."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event, Thread, get_native_id
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from sidelane.pipeline.lanes import open_lane

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def activations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import activations

    return activations


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import common

    return common


def correlated(rows: int, seed: int) -> Tensor:
    """bfloat16 [rows, 32] with Laplacian coefficients of falling scale in a random orthonormal frame."""
    frame = np.linalg.qr(np.random.default_rng(5).standard_normal((32, 32)))[0]
    z = np.random.default_rng(seed).laplace(size=(rows, 32)) * np.logspace(0, -2, 32)
    return torch.from_numpy(z @ frame.T).bfloat16()


def test_measured_rows(activations: ModuleType, tmp_path: Path) -> None:
    bases, everything = activations.calibrated(correlated(2048, 0))
    x = correlated(512, 1)
    rows = list(activations.measure("t", x, activations.methods(bases, everything)))
    rows += activations.yardsticks("t", x, bases[activations.VIDEO_BITS])
    by_name = {(row["method"], row["setting"]): row for row in rows}
    assert len(by_name) == len(rows)
    assert len({tuple(row) for row in rows}) == 1
    for row in rows:
        assert row["raw_bytes"] == 512 * 32 * 2
        assert row["ratio"] == pytest.approx(row["raw_bytes"] / row["wire_bytes"], rel=1e-3)
    assert by_name["exact", ""]["rel_error"] == 0
    for bits in ("8.5 bit", "4.5 bit", "2.5 bit"):
        ours, cut = by_name["pca allocated", bits], by_name["pca truncated", bits]
        assert ours["rel_error"] < cut["rel_error"]
        assert ours["wire_bytes"] < cut["wire_bytes"] + 512 * 32 / 8  # widths are whole bits
    lossless = [row for row in rows if row["method"] == "nv12 lossless"]
    assert len(lossless) == 3
    assert len({row["rel_error"] for row in lossless}) == 1
    assert lossless[0]["rel_error"] == by_name["entropy", "nv12 codes"]["rel_error"]
    for mapping in {row["setting"] for row in lossless}:
        sizes = [
            by_name[f"nv12 {rate}", mapping]["wire_bytes"] for rate in ("lossless", "QP 10", "QP 18", "QP 28")
        ]
        assert sizes == sorted(sizes, reverse=True)
    activations.draw(tmp_path / "f.png", {"t": everything}, rows)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert activations.summary(rows).row_count == len(rows)


def test_a_row_needs_its_check(activations: ModuleType) -> None:
    """A lossy lane that claims to be exact stops the benchmark."""
    honest = activations.Method("exact", "", open_lane("exact"), activations.identical)
    liar = replace(honest, lane=open_lane("packed", bits=2))
    x = correlated(256, 0)
    assert len(list(activations.measure("t", x, [honest]))) == 1
    with pytest.raises(RuntimeError, match="t: the round trip of 'exact"):
        list(activations.measure("t", x, [liar]))


def test_group_check_has_teeth(activations: ModuleType) -> None:
    x = correlated(256, 0)
    lane = open_lane("packed", bits=4, group=64)
    restored = lane.decode(lane.encode(x))
    assert activations.within_half_a_step(4)(x, restored)
    step = (x.float().view(-1, 64).amax(1) - x.float().view(-1, 64).amin(1)).amax() / 15
    restored[0, 0] = x[0, 0] + step
    assert not activations.within_half_a_step(4)(x, restored)


def test_entropy_of_known_histograms(activations: ModuleType) -> None:
    assert activations.entropy_bytes(torch.zeros(800)) == 0
    assert activations.entropy_bytes(torch.arange(16).repeat(100)) == pytest.approx(1600 * 4 / 8)


def test_rows_are_appended_under_one_header(common: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    common.append_rows(path, [{"a": 1, "b": "x, y"}])
    common.append_rows(path, [{"a": 2, "b": ""}])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    with pytest.raises(ValueError, match="other columns"):
        common.append_rows(path, [{"b": 1, "a": 2}])


def test_a_process_moves_to_the_quietest_cpus_and_back(
    common: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus, threads = common.CPUS, []
    slow = {cpu: 100.0 - i for i, cpu in enumerate(cpus)}  # the last one is the quietest
    monkeypatch.setattr(common, "loop_us", lambda: slow[next(iter(os.sched_getaffinity(0)))])
    stop = Event()
    thread = Thread(target=lambda: (threads.append(get_native_id()), stop.wait(10)))
    thread.start()
    with pytest.raises(KeyError, match="mine"), common.quiet_cpus(1) as move:
        while not threads:
            pass
        move()
        assert os.sched_getaffinity(0) == os.sched_getaffinity(threads[0]) == {cpus[-1]}
        raise KeyError("mine")
    assert os.sched_getaffinity(0) == os.sched_getaffinity(threads[0]) == set(cpus)
    stop.set()
    thread.join()


def test_environment_names_the_machine_and_versions(common: ModuleType) -> None:
    env = common.environment()
    assert list(env) == ["date", "commit", "cpu", "gpu", "driver", "python", "torch", "triton", "av"]
    assert env["torch"] == torch.__version__
    assert bool(env["gpu"]) == torch.cuda.is_available()


def test_the_commit_can_be_named_from_outside(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDELANE_COMMIT", "0123456789ab")
    assert common.environment()["commit"] == "0123456789ab"


@pytest.mark.parametrize(
    ("loops", "moves", "value", "slowed"),
    [
        ("10 10", 0, 0, 1.0),
        ("20 10 9 9", 0, 1, 1.0),  # what was the least at first was not undisturbed
        ("10 20 20 10 10", 1, 1, 1.0),  # a second loop after a move
        ("10 12" + " 15 15 12" * 19, 19, 0, 1.2),  # never undisturbed
    ],
)
def test_work_is_repeated_until_it_runs_undisturbed(
    common: ModuleType, monkeypatch: pytest.MonkeyPatch, loops: str, moves: int, value: int, slowed: float
) -> None:
    coming = [float(loop) for loop in loops.split()]
    monkeypatch.setattr(common, "loop_us", lambda rounds: coming.pop(0))
    monkeypatch.setattr(common, "STAY", 0.0)
    moved: list[int] = []
    quiet, runs = common.Quiet(lambda: moved.append(1)), count()
    turn = quiet.undisturbed(lambda: next(runs))
    assert not coming and len(moved) == moves
    assert turn.value == value and turn.loop / quiet.least == pytest.approx(slowed)


@pytest.mark.parametrize(
    ("loops", "kept", "left_out"),
    [
        ((10, 10), [0, 1], 0),
        ((20, 10, 10), [1, 2], 1),
        ((30, 10, 20, 40), [1, 2], 2),
    ],
)
def test_rounds_of_products_and_chains_are_the_least_disturbed(
    common: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    loops: tuple[float, ...],
    kept: list[int],
    left_out: int,
) -> None:
    """`loops`: the slowest of each round of two works, which are between two loops each."""
    import overlap

    coming = [loop for slowest in loops for loop in (10, slowest, 10, 10)]
    monkeypatch.setattr(common, "loop_us", lambda rounds: coming.pop(0))
    monkeypatch.setattr(common, "STAY", float("inf"))
    runs = count()
    rounds = overlap.undisturbed_rounds(common.Quiet(lambda: None), [lambda: next(runs)] * 2, 2)
    assert [turns[0].value // 2 for turns in rounds[:2]] == kept and len(rounds) - 2 == left_out
