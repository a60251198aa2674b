"""What a trip learns of a step, on a clock that the test sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sidelane.pipeline import lesson as lesson_module
from sidelane.pipeline import recorder
from sidelane.pipeline.lesson import Entry, Script
from sidelane.pipeline.marks import SAVE
from sidelane.pipeline.recorder import Trip
from sidelane.pipeline.step_model import AWAY, DERIVED, KEPT, Choice
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
    """The host takes half of the time."""

    def __init__(self, ms: float) -> None:
        self.ms = ms
        self.came = self.left = ms / 2e3

    def elapsed(self, end: Stamp) -> float:
        return (end.ms - self.ms) / 1e3

    def query(self) -> bool:
        return True


class Stored:
    """Stands for a stash."""


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recorder, "Stamp", clock.stamp)
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
    step = lesson.step()
    assert step.seconds == pytest.approx(0.004 * BLOCKS + 0.010 + 0.008 * BLOCKS)
    assert [block.seconds for block in step.blocks] == pytest.approx([0.004] * BLOCKS)
    assert [block.used for block in step.blocks][::-1] == pytest.approx(
        [0.004 * BLOCKS + 0.010 + 0.008 * b for b in range(BLOCKS)]
    )


def test_the_first_step_computes_with_pauses(clock):
    cold = drive(clock, Trip(CPU, None, False, 0), cold=500.0).lesson()
    clock.now = 0.0
    warm = drive(clock, Trip(CPU, None, False, 0)).lesson()
    assert cold.timeline.seconds == pytest.approx(warm.timeline.seconds)
    for a, b in zip(cold.timeline.times, warm.timeline.times, strict=True):
        assert a == pytest.approx(b)


def test_what_several_blocks_save_belongs_to_none(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    assert [entry.block for entry in lesson.entries if entry.weight == 16] == [-1]
    assert sorted(entry.block for entry in lesson.entries if entry.weight == 100) == list(range(BLOCKS))
    assert [entry.block for entry in lesson.entries if entry.boundary] == list(range(BLOCKS))


def script_of(lesson, recompute=()) -> Script:
    plan = plan_step(lesson.step(), 1 << 40)
    return Script.of(lesson, replace(plan, recompute=tuple(b in recompute for b in range(BLOCKS))))


def again(clock, lesson, recompute=(), discard_old=False, **options):
    """What a timed trip adds to a lesson."""
    clock.now = 0.0
    trip = drive(clock, Trip(CPU, script_of(lesson, recompute), True, 0), skip=recompute, **options)
    assert trip.complete
    return lesson.updated(trip.shown(), trip.script.plan.choices, discard_old)


def test_the_shortest_times_count(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0), slower=(3.0, 1.0)).lesson()
    later = again(clock, lesson, slower=(1.0, 4.0))
    assert later.step().seconds == pytest.approx(0.004 * BLOCKS + 0.010 + 0.008 * BLOCKS)
    assert later.rows == lesson.rows


def test_a_trip_that_recomputes_shows_the_other_blocks(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0), slower=(3.0, 3.0)).lesson()
    before = lesson.step()
    assert before.seconds == pytest.approx(3 * 0.012 * BLOCKS + 0.010)
    later = again(clock, lesson, recompute=(0, 1)).step()
    # Blocks that are alike take alike; the table, used at the end of each, belongs to none of them.
    assert [block.seconds for block in later.blocks] == pytest.approx([0.004] * BLOCKS)
    assert later.seconds == pytest.approx(0.012 * BLOCKS + 0.010 + 2 * 0.008)


def test_a_step_that_has_become_slower_is_seen_afresh(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    later = again(clock, lesson, recompute=(0, 1), discard_old=True, slower=(2.0, 2.0)).step()
    assert [block.seconds for block in later.blocks] == pytest.approx([0.008] * BLOCKS, rel=0.15)
    assert later.seconds == pytest.approx(2 * 0.012 * BLOCKS + 0.010, rel=0.1)


def test_a_host_that_is_late_in_most_blocks_does_not_lengthen_them(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    gaps = list(lesson.gaps)
    for i, mark in enumerate(lesson.marks):
        if mark.kind == SAVE and lesson.entries[mark.number].block in (0, 1, 2):
            gaps[i] += 0.1
    assert replace(lesson, gaps=tuple(gaps)).step().seconds == pytest.approx(lesson.step().seconds)


def test_the_clock_of_the_host(clock, monkeypatch):
    """It takes half of the time of the device (see `Stamp`)."""
    monkeypatch.setattr(lesson_module, "wires", lambda device: (lambda n: 0.0, lambda n: 0.0))
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    assert lesson.step().host_cost is None, "of a processor, clocks are one"
    lesson = replace(lesson, device=torch.device("cuda"))
    step = lesson.step()
    for saved in step.saved:
        if saved.block >= 0 and not saved.boundary:
            assert saved.host_times == pytest.approx((saved.saved / 2, saved.used / 2))
    assert [block.host_seconds for block in step.blocks] == pytest.approx([0.002] * BLOCKS)
    before = step.host_cost(KEPT), step.host_cost(Choice(AWAY, "raw"))
    kept = again(clock, lesson, code=4.0)
    assert kept.host_costs == {KEPT: pytest.approx((0.002, 0.002))}
    step = replace(kept, level=True).step()
    assert step.host_cost(KEPT) == pytest.approx((0.002, 0.002))
    slower = 0.002 / before[0][0]
    assert step.host_cost(Choice(AWAY, "raw"))[0] == pytest.approx(slower * before[1][0]), "by rule of thumb"
    assert not kept.level and kept.step().host_cost is None, "the device had other things to do"


def test_what_a_lane_takes_besides_its_kernels(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    choices = (Choice(AWAY, "raw"),) * len(lesson.entries)
    plan = StepPlan(choices, (False,) * BLOCKS, plan_step(lesson.step(), 1 << 40).forecast, 1 << 40)
    for code in (5.0, 7.0):
        clock.now = 0.0
        trip = drive(clock, Trip(CPU, Script.of(lesson, plan), True, 0), code=code)
        lesson = lesson.updated(trip.shown(), choices)
    assert lesson.extra == {"raw": pytest.approx((0.005, 0.005))}, "the least that was seen"
    codes = [code for saved in lesson.step().saved for code in saved.codes]
    assert {code.lane for code in codes} == {"raw"}
    assert [code.encode for code in codes] == pytest.approx([0.005] * len(codes))
    fresh = lesson.updated(trip.shown(), choices, discard_old=True)
    assert fresh.extra == {"raw": pytest.approx((0.007, 0.007))}


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
    script = script_of(drive(clock, Trip(CPU, None, False, 0)).lesson())
    trip = Trip(CPU, script, False, 0)
    trip.enter(lambda: [], True)
    assert trip.save(16, torch.float32)[0] >= 0
    assert trip.save(999, torch.float32) == (-1, None) and trip.lost
    assert trip.save(100, torch.float32) == (-1, None), "and stays so"
    assert not trip.complete and trip.lesson() is None


def test_what_makes_others_again_is_needed_when_they_are(clock):
    lesson = drive(clock, Trip(CPU, None, False, 0)).lesson()
    before = lesson.step().saved
    # Of one block: its table's neighbour makes the other one again, and that one the first of the next block.
    a, b = (i for i, entry in enumerate(lesson.entries) if entry.block == 1 and not entry.boundary)
    c = next(i for i, entry in enumerate(lesson.entries) if entry.block == 2 and not entry.boundary)
    lesson.entries[b].sources, lesson.entries[c].sources = (a,), (b,)
    lesson.entries[b].moved = 20_000_000
    after = lesson.step().saved
    assert before[c].used < before[b].used < before[a].used
    assert after[a].used == after[b].used == after[c].used == before[c].used
    assert (after[a].saved, after[a].freed) == (before[a].saved, before[a].freed)
    derived = next(code for code in after[b].codes if code.lane == DERIVED)
    assert derived.nbytes == 0 and derived.encode == 0 and derived.decode == pytest.approx(2e-3)
    assert all(code.lane != DERIVED for code in after[a].codes)
