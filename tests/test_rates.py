"""Speeds that plans are made with."""

from __future__ import annotations

import pytest
import torch

from sidelane.errors import ProfileError
from sidelane.pipeline import rates
from sidelane.pipeline.machine import Curve, LaneSpeed, Machine
from sidelane.pipeline.rates import profiled_speed, tried_speed, wires

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A profile whose exact lane has a latency of 1 ms and 100 GB/s, and its wires 10 GB/s."""
    slow = Curve.fit([1 << 20, 1 << 28], [1e-3, 1e-3 + (1 << 28) / 100e9])
    wire = Curve.line(0.0, 10e9)
    found = Machine(
        key={},
        wires={"d2h": wire, "h2d": wire},
        lanes={"exact|bfloat16|idle": LaneSpeed(slow, slow)},
        gemm=1.0,
        engines={},
    )
    monkeypatch.setattr(rates, "_machine", lambda: found)
    return found


def test_a_profile_counts_by_its_rate_and_not_by_its_latency(machine):
    speed = profiled_speed("exact", torch.bfloat16, CUDA)
    alone = machine.lanes["exact|bfloat16|idle"].encode
    assert speed.encode(1 << 20) < 0.1 * alone(1 << 20)
    assert speed.encode(1 << 30) == pytest.approx(alone(1 << 30), rel=0.01)
    assert profiled_speed("exact", torch.float16, CUDA) == speed
    assert profiled_speed("packed:4", torch.bfloat16, CUDA) is None
    assert profiled_speed("exact", torch.bfloat16, CPU) is None
    assert wires(CUDA)[0](10e9) == pytest.approx(1.0)


def test_a_group_code_is_tried_and_draws_no_random_numbers():
    rates._tried.cache_clear()
    state = torch.get_rng_state()
    speed = tried_speed("packed:4", CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert speed.encode(1 << 30) > speed.encode(1 << 20) > 0 and speed.decode(1 << 30) > 0
    assert tried_speed("packed:4", CPU) is speed, "once"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "measured in passing; there is no profile: run sidelane profile"),
        (ProfileError("profile.json: damaged: measure again"), "measured in passing; profile.json: damaged"),
    ],
)
def test_plans_say_why_no_profile_counts(monkeypatch, found, said):
    def cached():
        if found is not None:
            raise found

    monkeypatch.setattr(Machine, "cached", cached)
    rates._cached.cache_clear()
    assert rates.source(CUDA).startswith(said) and rates._machine() is None
    rates._cached.cache_clear()
    assert rates.source(CPU) == "tried and guessed, as for every CPU"


def test_plans_say_that_a_profile_counts(monkeypatch):
    profile = Machine(key={}, wires={}, lanes={}, gemm=1.0, engines={})
    monkeypatch.setattr(Machine, "cached", lambda: profile)
    rates._cached.cache_clear()
    assert rates.source(CUDA).startswith("the profile of this machine;") and rates._machine() is profile
    rates._cached.cache_clear()


def test_a_processor_has_no_wires():
    assert wires(CPU) is None
