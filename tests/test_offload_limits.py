"""The limits of an offload context: budgets, the checker, failures, entering and leaving."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from models import settled
from saving import activation, assert_identical, save
from sidelane.codec.packet import Packet
from sidelane.errors import BudgetError, LaneError, OffloadError
from sidelane.pipeline import disk as disk_module
from sidelane.pipeline.lanes import ExactLane, RawLane
from sidelane.pipeline.offload import offload

KIB = 1 << 10


# Budgets


def incompressible(kib: int) -> Tensor:
    return torch.randint(0, 256, (kib * KIB,), dtype=torch.uint8)


def test_host_budget_holds_and_the_rest_stays():
    context = offload(min_bytes=0, host_budget=20 * KIB)
    tensors = [incompressible(8) for _ in range(5)]
    nodes = [save(context, t) for t in tensors]
    report = context.report()
    assert report.host_peak <= 20 * KIB and report.over_budget.count == 3
    assert 24 * KIB <= report.device_bytes < 26 * KIB
    for t, node in zip(tensors, nodes, strict=True):
        assert_identical(node.saved_tensors[0], t)
    nodes.clear()
    del node
    assert settled(context)
    save(context, tensors[0])
    assert context.report().over_budget.count == 3  # there is room again


def test_full_budgets_are_one_clear_error():
    context = offload(min_bytes=0, host_budget=10 * KIB, gpu_budget=10 * KIB)
    nodes = [save(context, incompressible(8)) for _ in range(2)]
    with pytest.raises(BudgetError, match=r"uint8 \[8192\] needs 8\d+ bytes.*raise gpu_budget"):
        save(context, incompressible(8))
    assert len(nodes) == 2 and context.report().tickets == 2
    nodes.clear()
    save(context, incompressible(8))


def test_policy_error_names_the_budget():
    context = offload(min_bytes=0, host_budget=4 * KIB, on_full="error")
    with pytest.raises(BudgetError, match="host budget: uint8 .8192. needs"):
        save(context, incompressible(8))
    assert context.report().host_bytes == 0


def test_spilled_packets_come_back_and_leave_no_file(tmp_path):
    context = offload(min_bytes=0, host_budget=10 * KIB, on_full="spill", spill_dir=str(tmp_path))
    tensors = [incompressible(8), torch.randn(64, 64).t(), incompressible(8)]
    nodes = [save(context, t) for t in tensors]
    report = context.report()
    assert report.spilled.count == 2 and report.host_peak <= 10 * KIB and report.device_bytes == 0
    for t, node in zip(tensors, nodes, strict=True):
        assert_identical(node.saved_tensors[0], t)
    assert not list(tmp_path.iterdir())


def test_a_damaged_spill_file_is_an_error(tmp_path, monkeypatch):
    read = os.preadv

    def damaged(*args):
        count = read(*args)
        args[1][0][0] ^= 1
        return count

    context = offload(min_bytes=0, host_budget=0, on_full="spill", spill_dir=str(tmp_path))
    node = save(context, incompressible(8))
    context._store.tiers._disk._writers.shutdown()
    monkeypatch.setattr(disk_module.os, "preadv", damaged)
    with pytest.raises(OffloadError, match="spilled tensor cannot be read back.*checksum"):
        node.saved_tensors  # noqa: B018


def test_a_full_disk_falls_back_to_keeping(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_module, "RESERVE", 1 << 60)
    context = offload(min_bytes=0, host_budget=0, on_full="spill", spill_dir=str(tmp_path))
    x = incompressible(8)
    node = save(context, x)
    report = context.report()
    assert (report.spilled.count, report.over_budget.count) == (0, 1)
    assert_identical(node.saved_tensors[0], x)


# Checker


def test_checker_finds_a_change_that_version_counters_hide():
    x = torch.randn(64)
    context = offload(min_bytes=0, checker=True)
    node = save(context, x)
    x.data.add_(1)
    with pytest.raises(OffloadError, match=r"float32 \[64\] changed since it was first saved"):
        save(context, x)
    del node
    save(context, x)


@dataclass(frozen=True)
class Faulty(RawLane):
    """Flips a bit of what it stores."""

    def encode(self, tensor: Tensor) -> Packet:
        packet = super().encode(tensor)
        packet.sections["data"][0] ^= 1
        return packet


def test_checker_finds_a_lane_that_breaks_its_promise():
    with pytest.raises(OffloadError, match=r"float32 \[64\] has error inf in lane 'raw', above 0"):
        save(offload(Faulty(), min_bytes=0, checker=True), torch.ones(64))


# Failure


class Fails:
    """An exact lane whose second encode, or first decode, is interrupted."""

    name, exact = "exact", True

    def __init__(self, error):
        self.calls, self.error = 0, error

    def encode(self, tensor):
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return ExactLane().encode(tensor)

    def decode(self, packet):
        return ExactLane().decode(packet)

    def finer(self):
        return None


@pytest.mark.parametrize("error", [RuntimeError("codec"), KeyboardInterrupt(), MemoryError()])
def test_a_failing_codec_leaves_nothing_behind(error):
    context = offload(Fails(error), min_bytes=0)
    x = torch.randn(8, 8, requires_grad=True)
    with pytest.raises(type(error)), context:
        torch.tanh(x * 2).exp().sum()
    error.__traceback__ = None
    report = context.report()
    assert (report.host_bytes, report.tickets) == (0, 0) and offload.current() is None
    with context:
        y = torch.tanh(x * 2).exp().sum()
    y.backward()
    assert context.report().tickets == 0


def test_a_graph_that_saves_its_own_output_is_freed_without_gc():
    context = offload(min_bytes=1 << 20)  # everything is kept
    gc.collect()
    gc.disable()
    try:
        with context:
            y = torch.randn(8, 8, requires_grad=True).exp()
        assert context.report().kept["below min_bytes"].count == 1
        memory = StorageWeakRef(y.untyped_storage())
        del y
        assert memory.expired()
    finally:
        gc.enable()


# The context itself


def test_the_innermost_context_applies_and_contexts_can_be_entered_again():
    outer, inner = offload(min_bytes=0), offload(min_bytes=0)
    x = torch.randn(8, 8, requires_grad=True)
    with outer:
        assert offload.current() is outer
        with inner, outer, inner:
            assert offload.current() is inner
            (x * 2).exp()
        assert offload.current() is outer
        assert (outer.report().total.count, inner.report().total.count) == (0, 1)
        y = (x * 3).exp()
    assert offload.current() is None and outer.report().total.count == 1
    (x * 2).exp()
    assert outer.report().total.count == 1
    y.sum().backward()


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"lane": "fast"}, "unknown lane 'fast'"),
        ({"gpu_bugdet": 1}, "offload has no argument 'gpu_bugdet': gpu_budget= is meant"),
        ({"lane_options": {}}, "has no option 'lane_options'"),
        ({"lane": "packed", "bits": 3}, "bits=3"),
        ({"lane": "exact", "bits": 4}, "no option 'bits'"),
        ({"lane": "auto", "bogus": 1}, "lane 'auto' has no option 'bogus'"),
        ({"lane": RawLane(), "bits": 4}, "bits cannot be set on a lane that is open"),
        ({"max_rel_error": -1.0}, "max_rel_error=-1.0"),
        ({"max_rel_error": float("nan")}, "max_rel_error=nan"),
        ({"min_bytes": -1}, "min_bytes=-1 is not a whole number"),
        ({"host_budget": 1.5}, "host_budget=1.5 is not a whole number from 0 up or None"),
        ({"gpu_budget": True}, "gpu_budget=True"),
        ({"gpu_budget": -1}, "gpu_budget=-1 is not a whole number from 0 up or None"),
        ({"on_full": "wait"}, "on_full='wait' is not one of keep, spill, error"),
        ({"checker": "yes"}, "checker='yes' is neither True nor False"),
        ({"lane": "auto", "blocks": 5}, "blocks=5 is no list of modules"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, problem):
    with pytest.raises(LaneError) as caught:
        offload(**arguments)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_report_counts_classes_and_prints_them():
    context = offload("packed", bits=4, min_bytes=0)
    node = save(context, activation(64, 64), torch.rand(128) > 0.5, activation(64, 64), torch.zeros(0))
    node.saved_tensors  # noqa: B018
    report = context.report()
    by_lane = {row.lane: row for row in report.classes}
    assert (by_lane["packed"].count, by_lane["packed"].bytes_in) == (2, 2 * 64 * 64 * 4)
    assert (by_lane["raw"].count, by_lane["raw"].bytes_in) == (1, 128)
    assert report.total.bytes_wire == sum(row.bytes_wire for row in report.classes) == report.host_bytes
    assert (report.unpacks, report.decodes, report.tickets) == (3, 3, 3)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "tensors",
        "lane",
        "count",
        "MiB",
        "in",
        "MiB",
        "wire",
        "ratio",
        "worst",
        "error",
    ]
    assert lines[1].startswith("float32 [64, 64]  packed") and lines[1].endswith("not measured")
    assert lines[2].startswith("bool [128]") and lines[3].startswith("total")
    assert "below min_bytes 1" in lines[4]


def test_reports_of_many_shapes_stay_bounded():
    context = offload(min_bytes=0)
    for n in range(1, 301):
        save(context, torch.zeros(n, dtype=torch.uint8))
    report = context.report()
    assert len(report.classes) == 257 and report.total.count == 300
    assert "other shapes" in str(report)
