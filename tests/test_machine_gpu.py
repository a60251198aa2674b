"""The measurement on a GPU: complete, in time, the same twice, and right about sizes it did not measure."""

from __future__ import annotations

from importlib.util import find_spec
from statistics import median
from time import perf_counter

import pytest
import torch

from sidelane.pipeline import probe, probe_lanes, probe_wires
from sidelane.pipeline.machine import HOST_TIMES, Curve, Machine, cache_path

pytestmark = pytest.mark.gpu

MIB = 1 << 20
HELD_OUT = (2 * MIB, 32 * MIB)
WIRES = ("d2h", "h2d", "d2h both", "h2d both")
LOADS = ("idle", "busy")


@pytest.fixture(scope="module")
def machine() -> Machine:
    if not torch.cuda.is_available():
        pytest.fail("this test needs a CUDA device; leave it out with -m 'not gpu'")
    begin = perf_counter()
    machine = probe.measure()
    assert perf_counter() - begin < 30
    return machine


def test_everything_is_measured(machine):
    without = [] if find_spec("av") else ["video"]  # its encoder in software
    assert set(machine.left_out) == {f"{lane} {dtype}" for lane in without for dtype in probe_lanes.DTYPES}
    assert {*WIRES, *HOST_TIMES, "disk write", "disk read", "tcp"} <= set(machine.wires)
    assert ("peer" in machine.wires) == (torch.cuda.device_count() > 1)
    lanes = set(probe_lanes.LANES).difference(without)
    names = {f"{lane}|{dtype}|{load}" for lane in lanes for dtype in probe_lanes.DTYPES for load in LOADS}
    assert set(machine.lanes) == names
    assert all(machine.wires[name].sizes == probe.SIZES for name in WIRES)
    for name, speed in machine.lanes.items():
        if not name.startswith("video"):
            assert speed.encode.sizes == speed.decode.sizes == probe.SIZES
    assert machine.key["gpu"] == torch.cuda.get_device_name()


def test_a_load_costs_time(machine):
    """What shares the multiprocessors, or the link, with something else takes longer in the median."""
    pairs = [(machine.lanes[n.replace("idle", "busy")], s) for n, s in machine.lanes.items() if "idle" in n]
    slowed = [b.decode(64 * MIB) / i.decode(64 * MIB) for b, i in pairs]
    assert median(slowed) > 1
    assert machine.wires["d2h both"](256 * MIB) > 0.99 * machine.wires["d2h"](256 * MIB)
    assert machine.wires["h2d both"](256 * MIB) > 0.99 * machine.wires["h2d"](256 * MIB)


def test_a_second_run_finds_the_same_rates(machine):
    again = probe_wires.pcie(torch.device("cuda", torch.cuda.current_device()), probe.SIZES, 3.0)
    for size in (16 * MIB, 64 * MIB, 256 * MIB):
        assert again["d2h"].rate(size) == pytest.approx(machine.wires["d2h"].rate(size), rel=0.05)


def test_sizes_that_were_not_measured_are_predicted():
    """Over all wires of PCIe and all lanes, curves without these sizes are within 10 % in the median."""
    found = probe.measure(sizes=sorted({*probe.SIZES, *HELD_OUT}))
    curves = [found.wires[name] for name in WIRES]
    for speed in found.lanes.values():
        curves += [speed.encode, speed.decode]
    errors = []
    for curve in curves:
        points = list(zip(curve.sizes, curve.seconds, strict=True))
        known = Curve(*zip(*(point for point in points if point[0] not in HELD_OUT), strict=True))
        inside = [p for p in points if p[0] in HELD_OUT and p[0] < known.sizes[-1]]
        errors += [abs(known(size) / seconds - 1) for size, seconds in inside]
    assert len(errors) >= 80
    assert median(errors) < 0.1


def test_the_cache_knows_this_machine(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Machine.cached() is None
    machine.save(cache_path())
    assert Machine.cached() == machine
