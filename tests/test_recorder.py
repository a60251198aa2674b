"""What a trip learns of a step, on a clock that the test sets."""

from __future__ import annotations

import pytest
import torch

from sidelane.pipeline import recorder
from sidelane.pipeline.lesson import Entry, Script
from sidelane.pipeline.recorder import Trip
from sidelane.pipeline.step_model import KEPT
from sidelane.pipeline.step_plan import StepPlan, plan_step

CPU = torch.device("cpu")
BLOCKS = 5


class Clock:
    """Milliseconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def stamp(self, device: torch.device) -> Stamp:
        return Stamp(self.now)


class Stamp:
    def __init__(self, ms: float) -> None:
        self.ms = ms

    def elapsed_time(self, end: Stamp) -> float:
        return end.ms - self.ms

    def query(self) -> bool:
        return True


class Stored:
    """Stands for a stash."""


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recorder, "stamp", clock.stamp)
    return clock


def drive(clock, trip, cold=0.0, slower=(1.0, 1.0), skip=(), code=3.0):
    """Blocks of two tensors and a table of all: 2 + 2 ms forward, 4 + 4 ms backward, 10 ms between.

    Each save and use costs `code` ms of ours.

    Args:
        cold: ms more in the first block. skip: blocks that run again.
    """
    up, down = slower
    table = Stored()

    def save(nbytes, stash, alias=False):
        got, _ = trip.save(nbytes, torch.float32)
        before = trip.before()
        clock.now += 0 if alias else code
        if trip.learning:
            got = trip.learn(stash, Entry(nbytes, torch.float32, -1))
        if not alias:
            trip.saved(got, before)
        return got

    def use(number):
        before = trip.before()
        clock.now += code
        trip.used(number, before, 0)

    numbers = []
    for b in range(BLOCKS):
        again = trip.enter(lambda b=b: [(("input", b), Entry(8, torch.float32, -1))], True)
        if again:
            numbers.append([save(8, Stored())])
            clock.now += 4 * up
        else:
            mine = [save(16, table, alias=b > 0)]
            for k in range(2):
                clock.now += 2 * up + (cold if b == 0 and k == 0 else 0)
                mine.append(save(100 + k, Stored()))
            numbers.append(mine)
        trip.leave(True)
    clock.now += 10
    for b in reversed(range(BLOCKS)):
        if b in skip:
            use(numbers[b][0])
            clock.now += 4 * up + 8 * down
            continue
        for k in (2, 1):
            use(numbers[b][k])
            clock.now += 4 * down
        use(numbers[b][0])
    trip.finish()
    return trip


def test_times_are_of_computing_alone(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    up, over, down = lesson.phases
    assert up == pytest.approx(0.004 * BLOCKS)
    assert over == pytest.approx(0.010)
    assert down == pytest.approx(0.008 * BLOCKS)
    step = lesson.step()
    assert step.seconds == pytest.approx(up + over + down)
    assert [block.seconds for block in step.blocks] == pytest.approx([0.004] * BLOCKS)


def test_the_first_step_computes_with_pauses(clock):
    cold = drive(clock, Trip(CPU, None, False, 0), cold=500.0).lesson()
    clock.now = 0.0
    warm = drive(clock, Trip(CPU, None, False, 0)).lesson()
    assert cold.phases == pytest.approx(warm.phases)
    for a, b in zip(cold.times, warm.times, strict=True):
        assert a == pytest.approx(b)


def test_what_several_blocks_save_belongs_to_none(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    assert [entry.block for entry in lesson.entries if entry.weight == 16] == [-1]
    assert sorted(entry.block for entry in lesson.entries if entry.weight == 100) == list(range(BLOCKS))
    assert [entry.block for entry in lesson.entries if entry.boundary] == list(range(BLOCKS))


def kept(lesson) -> Script:
    return Script.of(lesson, plan_step(lesson.step(), 1 << 40))


def test_a_trip_that_recomputes_nothing_shows_the_step_again(clock):
    script = kept(drive(clock, Trip(CPU, None, False, 0)).lesson())
    clock.now = 0.0
    trip = drive(clock, Trip(CPU, script, True, 0), slower=(2.0, 0.5))
    assert trip.complete
    again = trip.lesson()
    assert again.phases == pytest.approx((0.008 * BLOCKS, 0.010, 0.004 * BLOCKS))
    assert again.rows == script.lesson.rows and again.stretch == (1.0, 1.0, 1.0)


def test_a_trip_that_recomputes_stretches_the_step(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    plan = kept(lesson).plan
    recompute = tuple(b < 2 for b in range(BLOCKS))
    forecast = plan_step(lesson.step(), 0).forecast
    plan = StepPlan((KEPT,) * len(plan.choices), recompute, forecast, 0)
    clock.now = 0.0
    trip = drive(clock, Trip(CPU, Script.of(lesson, plan), True, 0), slower=(2.0, 3.0), skip=(0, 1))
    assert trip.complete
    stretched = lesson.stretched(trip.computing(), again=2 * 0.004)
    assert stretched.stretch == pytest.approx((2.0, 1.0, 3.0), rel=0.1)
    step = stretched.step()
    assert [block.seconds for block in step.blocks] == pytest.approx([0.008] * BLOCKS)


def test_backward_says_when_it_ends(clock):
    trip = Trip(CPU, None, False, 0)
    trip.learn(Stored(), Entry(8, torch.float32, -1))

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            trip.used(0, trip.before(), 0)
            return grad

    class Late(Node):
        @staticmethod
        def backward(ctx, grad):
            clock.now += 50
            return grad

    x = torch.ones(1, requires_grad=True)
    Node.apply(Late.apply(x)).backward()
    assert trip.seconds() == pytest.approx(0.050)


def test_a_trip_that_is_another_step_is_lost(clock):
    script = kept(drive(clock, Trip(CPU, None, False, 0)).lesson())
    trip = Trip(CPU, script, False, 0)
    trip.enter(lambda: [], True)
    assert trip.save(16, torch.float32)[0] >= 0
    assert trip.save(999, torch.float32) == (-1, None) and trip.lost
    assert trip.save(100, torch.float32) == (-1, None), "and stays so"
    assert not trip.complete and trip.lesson() is None
