"""The tables of a machine: curves, the file they are kept in, how times are taken, and `sidelane profile`."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidelane import cli, doctor, profile
from sidelane.errors import LaneError, ProfileError
from sidelane.pipeline import machine as machines
from sidelane.pipeline import probe, probe_chain, probe_lanes, probe_wires, sampling
from sidelane.pipeline.machine import Curve, LaneSpeed, Machine, cache_path, current_key

KIB, MIB = 1 << 10, 1 << 20
TIMES = st.floats(1e-7, 1e3)


def curve(*seconds: float) -> Curve:
    return Curve(tuple(KIB << 2 * i for i in range(len(seconds))), seconds)


@pytest.fixture
def tables() -> Machine:
    """Of this machine, made up."""
    return Machine(
        key=current_key(),
        wires={
            "d2h": curve(1e-6, 2e-6, 7e-6),
            "tcp": Curve.line(1e-5, 1e9),
            "chain out": Curve((1, 2), (1.2e-5, 1.2e-5)),
        },
        lanes={"exact|bfloat16|idle": LaneSpeed(curve(3e-6), curve(1e-6, 1e-6))},
        gemm=7.9e14,
        engines={"nvenc": 0, "nvdec": 7},
        left_out={"peer": "one GPU"},
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sidelane"


@given(st.floats(0, 1), st.floats(1e3, 1e13), st.floats(0, 1e12))
def test_a_line_is_met_exactly(latency, rate, nbytes):
    assert Curve.line(latency, rate)(nbytes) == pytest.approx(latency + nbytes / rate, rel=1e-6, abs=1e-18)


def test_between_points_below_and_beyond():
    c = Curve((1000, 3000), (1.0, 2.0))
    assert [c(n) for n in (1000, 1500, 3000)] == [1.0, 1.25, 2.0]
    assert c(0) == 0.5
    assert c(30000) == 20.0
    assert c.rate(3000) == c.rate(10**9) == pytest.approx(1500)
    steep = Curve((1000, 3000), (1.0, 9.0))  # its first piece meets zero bytes below zero
    assert steep(0) == 0.0
    assert steep(500) == 0.5


@given(st.lists(TIMES, min_size=1, max_size=9), st.lists(st.floats(0, 1e9), min_size=2, max_size=20))
def test_more_bytes_never_take_less_time(seconds, sizes):
    c = Curve.fit([KIB << 2 * i for i in range(len(seconds))], seconds)
    taken = [c(n) for n in sorted(sizes)]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(taken)) and taken[0] >= 0


def test_the_lesser_of_two_curves():
    one, other = Curve((1, 4, 8), (1.0, 5.0, 6.0)), Curve((1, 2, 8, 16), (2.0, 2.5, 3.0, 9.0))
    assert one.lesser(other).sizes == (1, 2, 4, 8, 16)
    assert one.lesser(other).seconds == pytest.approx((1.0, 2.5, 15**0.5, 15**0.5, 9.0))
    assert one.lesser(one).seconds == pytest.approx(one.seconds)


@given(st.lists(TIMES, min_size=1, max_size=9))
def test_noise_is_taken_out_by_isotonic_regression(seconds):
    """The fit of point i is max over a <= i of min over b >= i of the mean of points a to b, in log time
    (R. Barlow and others, Statistical Inference under Order Restrictions, 1972, theorem 1.4)."""
    logs = torch.tensor(seconds, dtype=torch.float64).log()
    n = len(logs)
    wanted = [
        max(min(logs[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1)).exp().item()
        for i in range(n)
    ]
    assert Curve.fit(range(1, n + 1), seconds).seconds == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [
        ((), ()),
        ((1, 2), (1.0,)),
        ((2, 1), (1.0, 2.0)),
        ((1, 1), (1.0, 2.0)),
        ((0, 1), (1.0, 2.0)),
        ((1.5, 2), (1.0, 2.0)),
        ((1, 1 << 60), (1.0, 2.0)),
        ((1, 2), (2.0, 1.0)),
        ((1, 2), (0.0, 1.0)),
        ((1, 2), (1.0, inf)),
        ((1, 2), (1.0, nan)),
        ((1, 2), (1, 2)),
        (tuple(range(1, 100)), (1.0,) * 99),
    ],
)
def test_points_that_are_no_curve(sizes, seconds):
    with pytest.raises(ProfileError):
        Curve(sizes, seconds)


@pytest.mark.parametrize(("latency", "rate"), [(-1, 1), (nan, 1), (0, 0), (0, inf), (inf, 1)])
def test_numbers_that_are_no_line(latency, rate):
    with pytest.raises(ProfileError):
        Curve.line(latency, rate)


def test_the_file_holds_everything(tables, tmp_path):
    path = tmp_path / "folder" / "tables.json"
    tables.save(path)
    assert Machine.load(path) == tables
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("sidelane machine profile", 1)
    assert document["wires"]["d2h"] == {"sizes": [1024, 4096, 16384], "seconds": [1e-6, 2e-6, 7e-6]}
    assert [each.name for each in path.parent.iterdir()] == ["tables.json"]


def test_a_write_that_fails_leaves_nothing(tables, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ProfileError, match=r"taken: the profile cannot be written: "):
        tables.save(tmp_path / "taken")
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="cannot be written"):
        tables.save(tmp_path / "file" / "tables.json")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "taken"]


def changed(machine: Machine, path, **entries) -> None:
    """Save `machine` to `path` with some entries of the document replaced."""
    machine.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


BAD = {
    "format": "something else",
    "version": 2,
    "created": -1.0,
    "key": {"gpu": 3},
    "gemm": "7.9e14",
    "engines": {"nvdec": -1},
    "wires": {"d2h": {"sizes": [2, 1], "seconds": [1.0, 1.0]}},
    "lanes": {"exact": {"encode": {"sizes": [1], "seconds": [1.0]}}},
    "left_out": ["peer"],
    "more": 1,
}
POINTS = [
    {"sizes": [1], "seconds": [True]},
    {"sizes": [1], "seconds": [0]},
    {"sizes": [1], "seconds": [10**400]},
    {"sizes": [True], "seconds": [1.0]},
    {"sizes": [1.0], "seconds": [1.0]},
    {"sizes": 1, "seconds": [1.0]},
    {"sizes": [1], "seconds": [1.0], "more": 1},
    {"sizes": [*range(1, 100)], "seconds": [1.0] * 99},
    [],
]


@pytest.mark.parametrize("entry", [*BAD.items(), *(("wires", {"tcp": p}) for p in POINTS)], ids=repr)
def test_a_document_that_is_no_profile(tables, tmp_path, entry):
    path = tmp_path / "tables.json"
    changed(tables, path, **dict([entry]))
    with pytest.raises(
        ProfileError, match=r"^[^\n]+ is no profile \([^\n]+\): run sidelane profile --out FILE --force$"
    ):
        Machine.load(path, foreign=True)


@pytest.mark.parametrize("name", [name for name in BAD if name != "more"])
def test_every_entry_is_needed(tables, tmp_path, name):
    path = tmp_path / "tables.json"
    tables.save(path)
    document = json.loads(path.read_text())
    del document[name]
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=f"has no '{name}'"):
        Machine.load(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"created": NaN}', b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "open", "list", "no text", "deep", "nan", "long number"],
)
def test_bytes_that_are_no_profile(tmp_path, data):
    path = tmp_path / "tables.json"
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="is no profile"):
        Machine.load(path)


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "tables.json"
    path.write_bytes(b" " * (machines.MAX_FILE + 1))
    with pytest.raises(ProfileError, match="more than 1048576 bytes"):
        Machine.load(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_load_or_are_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "tables.json"
    Machine(current_key(), {"tcp": curve(1e-6, 2e-6)}, {}, 1e9, {}, created=1.7e9).save(path)
    text = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(at, min(at + 8, len(text))))
    text[at:end] = data.draw(st.binary(max_size=8))
    path.write_bytes(text)
    try:
        loaded = Machine.load(path, foreign=True)
    except ProfileError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(value, str) for value in loaded.key.values())
        assert 0 < loaded.gemm < inf


@pytest.mark.parametrize("name", ["gpu", "cpu", "cores"])
def test_the_profile_of_another_machine(tables, tmp_path, name):
    path = tmp_path / "tables.json"
    other = replace(tables, key=tables.key | {name: "another"})
    other.save(path)
    with pytest.raises(ProfileError, match=f"is of another machine .{name} another, here "):
        Machine.load(path)
    assert Machine.load(path, foreign=True) == other


@pytest.mark.parametrize("name", ["driver", "torch", "triton", "sidelane"])
def test_a_profile_of_other_versions_is_stale(tables, tmp_path, name):
    path = tmp_path / "tables.json"
    replace(tables, key={k: v for k, v in tables.key.items() if k != name} | {name: "0"}).save(path)
    with pytest.raises(
        ProfileError, match=f"is stale .{name} 0, here .*: run sidelane profile --out FILE --force$"
    ):
        Machine.load(path)


@pytest.mark.parametrize("days", [31, -3])
def test_an_old_profile_is_stale(tables, tmp_path, days):
    path = tmp_path / "tables.json"
    replace(tables, created=time.time() - days * 86400).save(path)
    with pytest.raises(
        ProfileError, match=f"is stale .{days} days old.: run sidelane profile --out FILE --force$"
    ):
        Machine.load(path)
    assert Machine.load(path, foreign=True).gemm == tables.gemm


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match=r"cannot be read \(No such file or directory\): run sidelane"):
        Machine.load(tmp_path / "tables.json")


def test_the_cache_folder(tables, cache, tmp_path, monkeypatch):
    assert cache_path().parent == cache
    assert Machine.cached() is None
    tables.save(cache_path())
    assert Machine.cached() == tables
    monkeypatch.setattr(machines, "version", lambda name: "0.0.0")  # these versions have a file of their own
    assert Machine.cached() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path().parent == tmp_path / ".cache" / "sidelane"


def test_a_cache_that_cannot_be_used(cache):
    cache.parent.mkdir()
    cache.touch()
    with pytest.raises(ProfileError, match=r"cannot be read \(Not a directory\)"):
        Machine.cached()
    cache.unlink()
    cache.mkdir()
    cache_path().write_text("{")
    with pytest.raises(ProfileError, match="is no profile"):
        Machine.cached()


class Clock:
    """Stands still but for `work`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> float:
        self.now += seconds
        return seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sampling, "perf_counter", clock)
    return clock


def test_samples_are_medians_after_a_warm_up(clock, monkeypatch):
    monkeypatch.setattr(sampling, "REPEATS", 7)
    times = iter([9.0, 1.0, 1.2, 7.0, 100.0, *[2.0] * 3, 1.1, 2.0, 1.3, 2.0, 1.4, 2.0, 1.5, 2.0])
    found = sampling.sample((KIB, MIB), lambda size: clock.work(next(times)), 1e6)
    assert found.seconds == pytest.approx((1.3, 2.0))


def test_sizes_without_time_are_left_out(clock):
    """A byte takes a second: after 10 and 20 bytes, 4 times 40 do not fit in what is left."""
    calls: list[int] = []

    def once(size: int) -> float:
        calls.append(size)
        return clock.work(float(size))

    found = sampling.sample((10, 20, 40), once, 200)
    assert found.sizes == (10, 20)
    assert found.seconds == pytest.approx((10, 20))
    assert calls == [10] * 4 + [20] * 4 + [10, 20] * 2 + [10]
    assert clock.now <= 200


def test_small_sizes_leave_time_for_large_ones(clock):
    """As copies beside copies of 64 MiB: up to 16 MiB a call takes 5 ms, whatever its size."""
    costs = {8 * KIB << 2 * i: 0.005 for i in range(7)} | {64 * MIB: 0.008, 256 * MIB: 0.03}
    found = sampling.sample(tuple(costs), lambda size: clock.work(costs[size]), 0.75)
    assert found.sizes == tuple(costs)
    assert 0.7 < clock.now <= 0.75


def test_the_first_size_is_always_taken(clock):
    assert sampling.sample((10, 20), lambda size: clock.work(float(size)), 1).sizes == (10,)


def test_work_that_stalls_is_left_alone():
    assert sampling.watched(lambda: 3, 10) == 3
    with pytest.raises(ZeroDivisionError):
        sampling.watched(lambda: 1 / 0, 10)
    done = Event()
    with pytest.raises(ProfileError, match="stalled: not done after 0.1 s"):
        sampling.watched(done.wait, 0.1)
    done.set()


def test_the_data_of_lanes_is_smooth_and_noisy():
    x = probe_lanes.activations(4 * MIB, torch.float32).double()
    assert x.shape == (1024, 1024)
    x = (x - x.mean(0)) / x.std(0)
    jump = (x[1:] - x[:-1]).std(0)  # 2 ** 0.5 for noise alone
    assert (jump > 0.1).all() and (jump < 0.5).all()
    half = probe_lanes.activations(MIB, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.nbytes == MIB


def test_the_disk_is_measured(tmp_path):
    found = probe_wires.disk(str(tmp_path), (8 * KIB, 64 * KIB), 2.0)
    assert set(found) == {"disk write", "disk read"}
    assert all(c.sizes == (8 * KIB, 64 * KIB) for c in found.values())
    assert list(tmp_path.iterdir()) == []


def test_a_chain_of_every_lane_is_measured(monkeypatch):
    monkeypatch.setattr(probe_chain, "COUNT", 4)
    found = probe_chain.chains(torch.device("cpu"), 0.0)
    assert set(found) == set(machines.HOST_TIMES)
    assert all(curve(1) == curve(1 << 30) > 0 for curve in found.values())


def test_chains_of_packed_lanes_share_a_median(monkeypatch):
    """The first round does not count."""
    times = {"raw": [9.0, 1.0], "exact": [9.0, 2.0], "packed:8": [9.0, 3.0], "packed:4": [9.0, 5.0]}
    times["packed:2"] = [9.0, 8.0]
    monkeypatch.setattr(probe_chain, "_round", lambda lane, tensor: (times[lane].pop(0), 0.5))
    found = probe_chain.chains(torch.device("cpu"), 0.0)
    out = {name: curve(1) for name, curve in found.items() if "out" in name}
    packed = {f"chain out packed:{bits}": 5.0 for bits in (8, 4, 2)}
    assert out == {"chain out": 1.0, "chain out exact": 2.0} | packed


def test_lanes_are_timed_in_turns_and_the_least_time_counts(monkeypatch):
    """What was slow before is not any more, and the other way round; large sizes stay as they are."""
    sizes = (8 * KIB, 64 * KIB, 2 * MIB)
    monkeypatch.setattr(probe_lanes, "TURNS", (8 * KIB, 64 * KIB))
    done = []

    def timed(work):
        done.append(work())
        return 0.25

    monkeypatch.setattr(probe_lanes, "host_seconds", timed)
    lanes = probe_lanes.Lanes(None)
    for name in ("raw", "exact"):
        before = Curve(sizes, (0.1, 0.5, 9.0))
        lanes.curves[f"{name}|bfloat16|idle"] = LaneSpeed(before, before)
        lanes.curves[f"{name}|bfloat16|busy"] = LaneSpeed(before, before)
    lanes.in_turns(0.0)
    for name in ("raw", "exact"):
        idle, busy = (lanes.curves[f"{name}|bfloat16|{load}"] for load in ("idle", "busy"))
        assert idle.encode.sizes == sizes
        assert idle.encode.seconds == idle.decode.seconds == pytest.approx((0.1, 0.25, 9.0))
        assert busy.encode.seconds == (0.1, 0.5, 9.0)
    packets = [each.lane for each in done[::2]]
    assert len(packets) == 8 and set(packets[:4]) == set(packets[4:]) == {"raw", "exact"}
    assert packets.count("raw") == packets.count("exact") == 4  # two sizes in each of two rounds


def test_lanes_of_a_gpu_are_measured_alone_and_beside_a_load(monkeypatch):
    """What runs there, with tensors of the CPU and streams that are none."""
    opened, guesses = [], []
    monkeypatch.setattr(probe_lanes, "_stream", lambda device: None)
    for name in ("seconds_in_use", "stream_seconds"):
        monkeypatch.setattr(probe_lanes, name, lambda stream, work: (work(), 0.25)[1])
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda subject: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (16 * 64 * KIB, 1 << 40))
    open_lane = probe_lanes.open_lane
    monkeypatch.setattr(
        probe_lanes, "open_lane", lambda kind, **options: opened.append(kind) or open_lane(kind, **options)
    )

    class Load:
        def beside(self, timed, guess):
            guesses.append(guess)
            return timed() + 1.0

    lanes = probe_lanes.Lanes(torch.device("cpu"))
    lanes.compile(20.0)
    assert sorted(opened) == sorted(probe_lanes.LANES[name][0] for name, _ in probe_lanes.pairs())
    lanes.measure("exact", "bfloat16", (8 * KIB, 64 * KIB, 1 << 20), Load, 0.1)
    idle, busy = (lanes.curves[f"exact|bfloat16|{load}"] for load in ("idle", "busy"))
    for curve, seconds in (
        (idle.encode, 0.25),
        (idle.decode, 0.25),
        (busy.encode, 1.25),
        (busy.decode, 1.25),
    ):
        assert curve.sizes == (8 * KIB, 64 * KIB) and curve.seconds == pytest.approx((seconds,) * 2)
    assert set(guesses) == {0.25}


def test_compilers_that_hang_or_fail_hold_nothing_up(monkeypatch):
    released = Event()

    def compile_lane(self, name, dtype):
        assert released.wait(60)

    monkeypatch.setattr(probe_lanes.Lanes, "_compile", compile_lane)
    lanes = probe_lanes.Lanes(torch.device("cpu"))
    begin = time.perf_counter()
    lanes.compile(0.1)
    assert time.perf_counter() - begin < 30
    threads = [thread for thread in threading.enumerate() if thread.name.endswith("(compile_lane)")]
    assert len(threads) == len(probe_lanes.pairs()) and all(thread.daemon for thread in threads)
    released.set()
    for thread in threads:
        thread.join()


def test_times_beside_products_are_of_all_turns(monkeypatch):
    """Medians of what all steps took but for their first rounds; sizes out of bounds stay as they are."""
    sizes = (8 * KIB, 64 * KIB, 2 * MIB)
    monkeypatch.setattr(probe_lanes, "TURNS_BESIDE", (64 * KIB, 64 * KIB))
    lanes, seconds = probe_lanes.Lanes(None), iter([9.0, 9.0, 0.9, 0.6, 9.0, 9.0, 0.2, 0.8])
    lanes.in_turns_beside(lambda: None, 1e3)  # of nothing

    class Load:
        def beside(self, timed, guess):
            timed()
            assert guess == 0.25
            return next(seconds)

    idle = LaneSpeed(Curve(sizes, (0.2,) * 3), Curve(sizes, (0.25,) * 3))
    busy = LaneSpeed(*[Curve(sizes, (0.1, 0.4, 0.6))] * 2)  # the last is less than what is found before it
    lanes.curves |= {"exact|bfloat16|idle": idle, "exact|bfloat16|busy": busy, "video|bfloat16|busy": busy}
    for _ in range(2):
        lanes.in_turns_beside(Load, 0.0)
    found = lanes.curves["exact|bfloat16|busy"]
    assert found.encode.seconds == pytest.approx((0.1, 0.55, 0.6))  # not what 0.9 made of the last
    assert found.decode.seconds == pytest.approx((0.1, 0.42**0.5, 0.42**0.5))
    assert lanes.curves["video|bfloat16|busy"] is busy
    assert lanes.curves["exact|bfloat16|idle"] is idle
    assert next(seconds, None) is None


def test_a_folder_that_takes_no_file(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        probe_wires.disk(str(tmp_path / "missing"), (8 * KIB,), 1.0)
    (tmp_path / "file").touch()
    with pytest.raises(LaneError, match="takes no file"):
        probe_wires.disk(str(tmp_path / "file"), (8 * KIB,), 1.0)


def test_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_wires, "RESERVE", 1 << 60)
    with pytest.raises(ProfileError, match="too little room on the disk"):
        probe_wires.disk(str(tmp_path), (8 * KIB,), 1.0)


def test_the_network_stack_is_measured():
    assert probe_wires.tcp((8 * KIB, 64 * KIB), 2.0)["tcp"].sizes == (8 * KIB, 64 * KIB)


def test_a_receiver_that_is_silent(monkeypatch):
    monkeypatch.setattr(probe_wires, "PATIENCE", 0.1)
    monkeypatch.setattr(probe_wires, "_receive", lambda connection, largest: None)
    with pytest.raises(TimeoutError):
        probe_wires.tcp((8 * KIB,), 1.0)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_machine_without_a_gpu(on_cpu, tmp_path):
    steps: list[tuple[str, int, int]] = []
    sizes = (8 * KIB, 64 * KIB)
    found = probe.measure(str(tmp_path), sizes=sizes, progress=lambda *step: steps.append(step))
    assert set(found.wires) == {"disk write", "disk read", "tcp"}
    assert found.key == current_key() | {"disk": str(tmp_path.resolve())}
    assert set(found.lanes) == {
        f"{lane}|{dtype}|idle" for lane in probe_lanes.LANES for dtype in probe_lanes.DTYPES
    }
    assert found.lanes["packed:4|bfloat16|idle"].decode.sizes == sizes
    assert found.engines == {"nvenc": 0, "nvdec": 0}
    assert found.left_out.keys() == {"busy"}
    assert [i for _, i, _ in steps] == list(range(steps[0][2]))
    names = [name for name, _, _ in steps]
    assert names.count("raw float32") == 2 and "kernels" not in names


def test_what_a_gpu_is_measured_by_comes_in_order_and_within_half_a_minute():
    steps = list(
        probe._steps(probe.Tables(), probe_lanes.Lanes(None), torch.device("cuda", 0), probe.SIZES, "/tmp")
    )
    names = [step.name for step in steps]
    order = (
        "products",
        "d2h, h2d",
        "kernels",
        "packed:4 bfloat16",
        "chain",
        "lanes in turns",
        "video bfloat16",
    )
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    assert names.count("lanes in turns") == names.count("lanes beside products") == 3
    # What others can do without comes last, and repeats what is known.
    first = names.index("lanes in turns")
    assert not any(step.again for step in steps[:first])
    assert all(step.again for step in steps[first:] if not step.name.startswith("video"))
    assert probe.BUDGET + probe.OVER < 30


def test_what_stalls_or_fails_is_left_out_and_named(on_cpu, tmp_path, monkeypatch):
    stalled = Event()
    monkeypatch.setattr(probe, "GRACE", 0.1)
    monkeypatch.setattr(probe_lanes, "LANES", {"raw": ("raw", {}), "video": ("gone", {})})
    monkeypatch.setattr(probe_wires, "tcp", lambda sizes, limit: {"tcp": stalled.wait()})
    steps = probe._steps
    monkeypatch.setattr(probe, "_steps", lambda *a: [replace(s, seconds=0.2, slack=0.3) for s in steps(*a)])
    found = probe.measure(str(tmp_path / "missing"), sizes=(64 * KIB,))
    stalled.set()
    assert set(found.lanes) == {"raw|bfloat16|idle", "raw|float32|idle"}
    assert found.wires == {}
    assert found.left_out["tcp"] == "stalled: not done after 0.5 s"
    assert "No such file" in found.left_out["disk"]
    assert "unknown lane 'gone'" in found.left_out["video bfloat16"]


def test_steps_without_time_are_left_out(on_cpu, tmp_path, monkeypatch):
    """The products take it all."""
    monkeypatch.setattr(
        probe, "_gemm", lambda tables, device, limit: setattr(tables, "gemm", time.sleep(0.3) or 1.0)
    )
    found = probe.measure(str(tmp_path), sizes=(64 * KIB,), budget=0.2)
    assert found.wires == found.lanes == {}
    assert all("no time left in 0 s" in found.left_out[name] for name in ("disk", "tcp", "raw float32"))


def test_a_second_pass_is_welcome_but_not_needed(on_cpu, monkeypatch):
    """The lesser times of both count; the second one fails for one lane, the first for another."""
    times = {"raw": [3.0, 2.0], "exact": [1.0, None], "packed:4": [None, 4.0]}

    def work(lanes, name, limit):
        if (seconds := times[name].pop(0)) is None:
            raise RuntimeError("out of memory")
        lanes.keep(name, LaneSpeed(curve(seconds), curve(seconds)))

    def steps(tables, lanes, *rest):
        yield probe.Step("products", 1.0, lambda limit: setattr(tables, "gemm", 1.0))
        for again in (False, True):
            for name in times:
                yield probe.Step(name, 1.0, partial(work, lanes, name), again=again)

    monkeypatch.setattr(probe, "_steps", steps)
    found = probe.measure()
    assert {name: speed.encode.seconds for name, speed in found.lanes.items()} == {
        "raw": (2.0,),
        "exact": (1.0,),
        "packed:4": (4.0,),
    }
    assert set(found.left_out) == {"busy"}


def test_a_machine_that_multiplies_nothing(on_cpu, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("illegal\ninstruction")

    monkeypatch.setattr(probe, "_product", refuse)
    monkeypatch.setattr(probe_lanes, "LANES", {})
    monkeypatch.setattr(probe_lanes, "DTYPES", {})
    with pytest.raises(ProfileError, match="no matrix product runs here .illegal instruction."):
        probe.measure(sizes=(8 * KIB,))


@pytest.fixture
def measured(tables, monkeypatch):
    """What `sidelane profile` measures, and how often it did."""
    calls: list[str | None] = []

    def measure(spill_dir, progress):
        calls.append(spill_dir)
        progress("products", 0, 1)
        if spill_dir is None:
            return tables
        return replace(tables, key=tables.key | {"disk": str(Path(spill_dir).resolve())})

    monkeypatch.setattr(profile, "measure", measure)
    return calls


def test_the_command_measures_once(tables, measured, capsys):
    assert cli.run(["profile"]) == 0
    shown = capsys.readouterr().out
    assert "d2h" in shown and "exact bfloat16 idle" in shown and "7 NVDEC" in shown
    assert "left out: peer: one GPU" in shown
    assert "chain out 12 us" in shown
    assert Machine.cached() == tables
    assert cli.run(["profile"]) == 0
    assert "--force measures again" in capsys.readouterr().out.replace("\n", " ")
    assert measured == [None]


def test_the_command_measures_the_disk_that_is_asked_for(tables, measured, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    for arguments, expected in (
        (["--spill-dir", str(first)], 1),
        (["--spill-dir", str(first / ".." / "first")], 1),
        ([], 1),
        (["--spill-dir", str(second)], 2),
        (["--spill-dir", str(second)], 2),
        (["--spill-dir", str(second), "--force"], 3),
    ):
        assert cli.run(["profile", *arguments]) == 0
        assert len(measured) == expected
    assert measured == [str(first), str(second), str(second)]
    assert f"measuring again: the disk of {second} is not in" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_command_refuses_a_spill_folder_that_is_none(tables, measured, cache, tmp_path, capsys, force):
    tables.save(cache_path())
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        assert cli.run(["profile", "--spill-dir", str(tmp_path / name), *force]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"sidelane: --spill-dir [^\n]+{name} is no folder: make it first\n", error)
    assert measured == []


def test_the_command_makes_no_folder_for_out(measured, tmp_path, capsys):
    for folder in (tmp_path / "absent", tmp_path / "absent" / "deeper"):
        assert cli.run(["profile", "--out", str(folder / "tables.json"), "--force"]) == 2
        expected = rf"sidelane: [^\n]+tables.json: {folder} is no folder: make it first\n"
        assert re.fullmatch(expected, capsys.readouterr().err)
    assert measured == [] and list(tmp_path.glob("absent*")) == []


def test_the_command_writes_a_file_and_does_not_replace_one(tables, measured, tmp_path, capsys):
    path = tmp_path / "tables.json"
    assert cli.run(["profile", "--out", str(path)]) == 0
    assert Machine.load(path) == tables
    path.write_text("mine")
    capsys.readouterr()
    assert cli.run(["profile", "--out", str(path)]) == 2
    assert re.fullmatch(r"sidelane: [^\n]+ exists: --force replaces it\n", capsys.readouterr().err)
    assert path.read_text() == "mine"
    assert cli.run(["profile", "--out", str(path), "--force"]) == 0
    assert Machine.load(path) == tables


def test_the_command_keeps_what_it_measured_when_out_cannot_be_written(
    tables, measured, tmp_path, capsys, monkeypatch
):
    folder, measure = tmp_path / "gone", profile._measure
    folder.mkdir()

    def replaced(spill_dir):
        folder.rmdir()
        folder.touch()
        return measure(spill_dir)

    monkeypatch.setattr(profile, "_measure", replaced)
    assert cli.run(["profile", "--out", str(folder / "tables.json"), "--force"]) == 2
    assert re.fullmatch(r"sidelane: [^\n]+ cannot be written: [^\n]+\n", capsys.readouterr().err)
    assert Machine.cached() == tables


def test_the_command_measures_nothing_for_a_folder(measured, tmp_path, capsys):
    assert cli.run(["profile", "--out", str(tmp_path), "--force"]) == 2
    assert (
        capsys.readouterr().err == f"sidelane: {tmp_path} is a folder: name a file in it\n" and not measured
    )


def test_the_command_keeps_what_it_measured_when_nobody_reads(tables, measured, tmp_path, monkeypatch):
    def broken(console, *what):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(profile.Console, "print", broken)
    with pytest.raises(SystemExit):  # as typer has it
        cli.run(["profile", "--out", str(tmp_path / "tables.json")])
    assert Machine.cached() == Machine.load(tmp_path / "tables.json") == tables


def test_the_command_measures_nothing_for_a_cache_that_takes_no_file(measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.run(["profile", "--force"]) == 2 and measured == []
    assert re.fullmatch(
        r"sidelane: [^\n]+ cannot be written \([^\n]+\): set XDG_CACHE_HOME[^\n]+\n", capsys.readouterr().err
    )


def test_doctor_says_what_the_profile_found(tables, cache):
    def pcie():
        return next(each for each in doctor.findings() if each.subject == "PCIe")

    assert (pcie().state, pcie().remedy) == ("not probed", "run sidelane profile")
    wires = {"d2h": Curve.line(0.0, 55e9), "h2d": Curve.line(0.0, 5e10)}
    replace(tables, wires=wires).save(cache_path())
    assert pcie().state == "yes"
    assert "GPU to pinned host memory 55 GB/s, back 50 GB/s for 64 MiB" in pcie().detail
    replace(tables, wires={}, left_out={"d2h, h2d": "stalled"}).save(cache_path())
    assert pcie().detail.endswith("stalled") and pcie().state == "not probed"
    cache_path().write_text("{")
    assert "is no profile" in pcie().detail


def test_the_command_measures_again_what_is_damaged(tables, measured, cache, capsys):
    cache.mkdir(parents=True)
    cache_path().write_text("{")
    assert cli.run(["profile"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "measuring again" in said and "run sidelane profile" not in said
    assert Machine.cached() == tables


def test_the_command_keeps_what_it_measured_when_the_cache_cannot_be_written(
    measured, cache, tmp_path, capsys
):
    cache.parent.mkdir()
    cache.touch()
    path = tmp_path / "tables.json"
    assert cli.run(["profile", "--out", str(path)]) == 2
    printed = capsys.readouterr()
    assert "d2h" in printed.out and path.exists()
    assert printed.err.startswith("sidelane: ") and printed.err.count("\n") == 1
