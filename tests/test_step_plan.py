"""The model of a step by hand, and the search against every choice there is."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest

from sidelane.pipeline import step_model, step_plan
from sidelane.pipeline.step_model import (
    AWAY,
    DERIVE,
    DERIVED,
    HERE,
    KEPT,
    Block,
    Choice,
    Code,
    Saved,
    Simulator,
    Step,
    simulate,
)
from sidelane.pipeline.step_plan import plan_step

MIB, GIB = 1 << 20, 1 << 30
RAW_AWAY = Choice(AWAY, "raw")


def wire(rate: float):
    return lambda nbytes: nbytes / rate


@pytest.fixture
def _no_free_window(monkeypatch):
    """Nothing may be fetched ahead beyond the share of the budget that is left."""
    monkeypatch.setattr(step_model, "AHEAD", 0)


def three(rate_out: float = 100.0, rate_back: float = 100.0) -> Step:
    """100 bytes each, saved at 1, 2, 3 s, used at 5, 6, 7 s (newest first), each for a second."""
    raw = (Code("raw", 100), Code("exact", 50, encode=0.25, decode=0.5))
    saved = tuple(Saved(100, 1.0 + i, 7.0 - i, 8.0 - i, raw) for i in range(3))
    return Step(saved, (), 8.0, wire(rate_out), wire(rate_back))


# The model


def test_keeping_all_adds_nothing_and_holds_all():
    forecast = simulate(three(), [KEPT] * 3, [], limit=1000)
    assert (forecast.seconds, forecast.held, forecast.away) == (8.0, 300, 0)


def test_a_code_adds_its_times_and_holds_its_bytes():
    forecast = simulate(three(), [KEPT, Choice(HERE, "exact"), KEPT], [], limit=1000)
    assert (forecast.seconds, forecast.held, forecast.coding) == (8.75, 250, 0.75)


def test_copies_that_nobody_waits_for_are_free():
    # The first leaves from 1 to 2 s and is needed at 7 s; its room is used by the third at 3 s.
    forecast = simulate(three(), [RAW_AWAY, KEPT, KEPT], [], limit=200)
    assert (forecast.seconds, forecast.held, forecast.away) == (8.0, 200, 100)
    assert forecast.waited_out == forecast.waited_back == 0


def test_room_that_is_not_free_yet_is_waited_for():
    # Out from 1 to 3.5 s, needed by the third at 3 s. Back from 6.5 s (room at 6 s + 0.5 late) on.
    forecast = simulate(three(rate_out=40.0), [RAW_AWAY, KEPT, KEPT], [], limit=200)
    assert forecast.waited_out == pytest.approx(0.5)
    assert forecast.seconds == pytest.approx(8.5)


def test_what_comes_back_late_is_waited_for():
    # Room when the third is freed, at 6 s: back from 6 to 10 s, used at 7 s.
    forecast = simulate(three(rate_back=25.0), [RAW_AWAY, KEPT, KEPT], [], limit=200)
    assert forecast.waited_back == pytest.approx(3.0)
    assert forecast.seconds == pytest.approx(11.0)


def test_without_any_room_a_tensor_leaves_before_computing_goes_on():
    # Each copy out of 1 s is waited for, and each copy in.
    forecast = simulate(three(), [RAW_AWAY] * 3, [], limit=0)
    assert forecast.waited_out == pytest.approx(3.0) and forecast.waited_back == pytest.approx(3.0)
    assert forecast.seconds == pytest.approx(14.0)


@pytest.mark.usefixtures("_no_free_window")
def test_less_is_fetched_ahead_the_further_backward_comes_down():
    # At 5 s the third is used: two of three tensors are left, so two thirds of 300 bytes are allowed.
    step = three(rate_back=50.0)
    ample = simulate(step, [RAW_AWAY, RAW_AWAY, KEPT], [], limit=300)
    tight = simulate(step, [RAW_AWAY, RAW_AWAY, KEPT], [], limit=150)
    assert ample.waited_back == 0 < tight.waited_back


def test_a_recomputed_block_saves_its_input_alone_and_runs_again():
    inner = Saved(400, 1.0, 5.0, 6.0, block=0)
    entry = Saved(10, 0.5, 5.0, 6.0, block=0, boundary=True)
    step = Step((entry, inner), (Block(1.5, 5.0, 6.0),), 8.0)
    kept, again = (simulate(step, [KEPT, KEPT], [flag], 1000) for flag in (False, True))
    assert (kept.seconds, kept.held, kept.working) == (8.0, 400, 400)
    assert (again.seconds, again.held, again.working) == (9.5, 10, 410)


def test_a_derived_tensor_holds_nothing_and_adds_its_time():
    derived = (Code(DERIVED, 0, decode=0.5),)
    step = replace(three(), saved=tuple(replace(s, codes=derived) for s in three().saved))
    forecast = simulate(step, [KEPT, DERIVE, KEPT], [], limit=1000)
    assert (forecast.seconds, forecast.held, forecast.coding) == (8.5, 200, 0.5)
    assert all(len(options) == 2 for options in Simulator(step, 0).options), "there is nothing to send"


def late(step: Step, save: float, use: float = 0.0) -> Step:
    """A host that is as fast as the device, and needs seconds more for a tensor that is not kept."""
    saved = tuple(replace(s, host_times=(s.saved, s.used)) for s in step.saved)
    costs = {step_model.KEEP: (0.0, 0.0), HERE: (save, use), AWAY: (save, use)}
    return replace(step, saved=saved, host_cost=lambda choice: costs[choice.place])


def test_the_device_waits_for_a_host_that_is_late():
    # By half a second more after each of them.
    forecast = simulate(late(three(), 0.5), [RAW_AWAY] * 3, [], limit=1000)
    assert forecast.waited_host == pytest.approx(1.5) and forecast.seconds == pytest.approx(9.5)
    kept = simulate(late(three(), 0.5), [KEPT] * 3, [], limit=1000)
    assert kept.waited_host == 0 and kept.seconds == 8.0


def test_a_host_that_is_ahead_has_time_for_more():
    step = three()
    ahead = tuple(replace(s, host_times=(0.5 * s.saved, 0.5 * s.used)) for s in step.saved)
    step = replace(late(step, 0.5), saved=ahead)
    assert simulate(step, [RAW_AWAY] * 3, [], limit=1000).waited_host == 0


def test_parts_cost_the_host_what_their_tensors_do():
    step = late(replace(model(4), blocks=()), 1e-3)
    step = replace(step, saved=tuple(replace(s, block=-1) for s in step.saved if not s.boundary))
    parts = step_plan._parts(step)
    merged = step_plan._merged(step, parts)
    assert len(merged.saved) < len(step.saved) and sum(s.count for s in merged.saved) == len(step.saved)
    sums = [sum(mine[1].host_costs[0] for mine in Simulator(s, 1e12).options) for s in (step, merged)]
    assert sums[0] == pytest.approx(sums[1])


def test_a_host_that_is_late_changes_the_plan():
    """Codes are cheap for the device and dear for the host: blocks run again instead."""
    step = model(22, lossy=True)
    limit = 0.3 * total(step)
    assert not any(plan_step(step, limit).recompute)
    plan = plan_step(late(step, 1e-3), limit)
    assert sum(plan.recompute) > 5
    assert plan.forecast.seconds < simulate(late(step, 1e-3), *following(step, limit), limit).seconds


def following(step: Step, limit: float):
    plan = plan_step(step, limit)
    return plan.choices, plan.recompute


def test_a_choice_that_a_tensor_does_not_have():
    with pytest.raises(ValueError, match="not possible for tensor 1"):
        simulate(three(), [KEPT, Choice(AWAY, "packed:4"), KEPT], [], limit=1000)


# The search


def model(blocks: int, seed: int | None = None, lossy: bool = False) -> Step:
    """Blocks of 24 tensors as of a Llama of 1.1 B on an H200; with a seed, of a few of random sizes."""
    rng = random.Random(seed)
    forward, backward = 0.1 / blocks, 0.227 / blocks
    saved, parts = [], []
    for b in range(blocks):
        begin, turn = b * forward, 0.1 + (blocks - 1 - b) * backward
        again = 0.0038 * 22 / blocks
        sizes = [128] * 2 + [64] * 8 + [176] * 3 + [2] * 11
        if seed is not None:
            sizes = [rng.choice((64, 200, 700)) for _ in range(rng.choice((1, 2)))]
            again *= rng.choice((0.5, 1, 4))
        entry = Code("raw", 64 * MIB)
        saved.append(Saved(64 * MIB, begin, turn, turn + backward, (entry,), b, True))
        parts.append(Block(again, turn, turn + backward, seed is None or rng.random() < 0.8))
        for j, size in enumerate(sizes):
            nbytes = size * MIB
            codes = [Code("raw", nbytes)]
            ratio = 2.66 if size == 128 else 1.33
            codes.append(Code("exact", int(nbytes / ratio), nbytes / 745e9, nbytes / 1900e9))
            if lossy:
                codes.append(Code("packed:4", int(nbytes / 3.55), nbytes / 3e12, nbytes / 3e12))
            at, use = ((j + 1) / (len(sizes) + 1), (len(sizes) - j) / (len(sizes) + 1))
            used = turn + backward * use
            saved.append(Saved(nbytes, begin + forward * at, used, used + 0.1 * backward, tuple(codes), b))
    return Step(tuple(saved), tuple(parts), 0.327, wire(55e9), wire(55e9))


def total(step: Step) -> int:
    return sum(s.nbytes for s in step.saved if not s.boundary)


def best_of_all(step: Step, limit: float) -> tuple[float, float]:
    """(bytes too many, seconds) of the best of all choices."""
    simulator = Simulator(step, limit)
    again = [(False, True) if block.repeatable else (False,) for block in step.blocks]
    best = (float("inf"), float("inf"))
    for recompute in product(*again):
        counts = [
            range(len(options)) if s.block < 0 or recompute[s.block] == s.boundary else range(1)
            for s, options in zip(step.saved, simulator.options, strict=True)
        ]
        for picks in product(*counts):
            forecast = simulator.run(picks, recompute)
            best = min(best, (max(0.0, forecast.held - limit), forecast.seconds))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_the_search_finds_what_trying_everything_finds(seed, share):
    step = model(3, seed)
    limit = share * total(step)
    plan = plan_step(step, limit)
    over, seconds = best_of_all(step, limit)
    assert max(0.0, plan.forecast.held - limit) <= over * 1.001
    assert plan.forecast.seconds <= 1.03 * seconds


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_of_a_tiny_step_the_best_is_found(seed, share):
    step = replace(model(1, seed), saved=model(1, seed).saved[:3])
    step = replace(step, saved=(*step.saved, Saved(100 * MIB, 0.11, 0.12, 0.13, (Code("raw", 100 * MIB),))))
    limit = share * total(step)
    plan = plan_step(step, limit)
    over, seconds = best_of_all(step, limit)
    assert max(0.0, plan.forecast.held - limit) <= over
    assert plan.forecast.seconds == pytest.approx(seconds, abs=1e-4)  # a byte that leaves counts a little


def test_with_room_for_all_nothing_is_done():
    step = model(22)
    plan = plan_step(step, total(step))
    assert plan.idle and plan.forecast.seconds == pytest.approx(0.327)
    assert plan.binding() == "nothing: all fits"


@pytest.mark.parametrize("lossy", [False, True])
def test_no_plain_policy_is_better(lossy):
    step = model(22, lossy=lossy)
    before = float("inf")
    for share in (0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        limit = share * total(step)
        plan = plan_step(step, limit)
        assert plan.fits, plan.binding()
        for name, other in plan.others.items():
            if other.held <= limit:
                assert plan.forecast.seconds <= other.seconds * 1.005, (share, name)  # of parts
        assert plan.forecast.seconds <= before * 1.005, "more room, more time"
        before = plan.forecast.seconds


def gated(share: float, *sizes: int) -> tuple[Step, float]:
    """A step of which tensors of these MiB can be derived, and what a share of its bytes is."""
    step, saved = model(22), []
    for s in step.saved:
        codes = s.codes
        if s.nbytes // MIB in sizes and not s.boundary:
            codes = (Code(DERIVED, 0, decode=s.nbytes / 800e9), *codes)
        saved.append(replace(s, codes=codes))
    return replace(step, saved=tuple(saved)), share * total(step)


def test_what_can_be_derived_is_where_that_is_quicker():
    before = float("inf")
    for share in (0.1, 0.2, 0.35, 0.5, 0.8):
        step, limit = gated(share, 64, 176)
        plan, plain = plan_step(step, limit), plan_step(model(22), limit)
        assert plan.fits and plan.forecast.seconds < plain.forecast.seconds
        assert plan.forecast.seconds <= before
        before = plan.forecast.seconds
        for name, other in plan.others.items():
            if other.held <= limit:
                assert plan.forecast.seconds <= other.seconds * 1.005, (share, name)
    assert not any(plan.recompute) and any(choice == DERIVE for choice in plan.choices)


def test_mixtures_of_three_are_found():
    """Little room: the last blocks are derived, since what the wire takes is not enough for all, and others
    run again while their inputs leave."""
    step, limit = gated(0.1, 64)
    plan = plan_step(step, limit)
    most = replace(plan, recompute=(True,) * 22, choices=(KEPT,) * len(plan.choices)).for_step(step)
    assert plan.fits and 0 < sum(plan.recompute) < 22
    assert plan.forecast.seconds < most.forecast.seconds - 2 * 0.0038


def test_small_tensors_stay():
    """Those of 2 MiB are 2 % of all: they cost the host as much as large ones."""
    step = model(22, lossy=True)
    plan = plan_step(late(step, 1e-4, 1e-4), 0.2 * total(step))
    small = [c for s, c in zip(step.saved, plan.choices, strict=True) if s.nbytes == 2 * MIB]
    assert small.count(KEPT) > 0.9 * len(small) and plan.fits


def test_the_last_blocks_are_kept():
    step = model(22)
    plan = plan_step(step, 0.4 * total(step))
    kept = [0] * 22
    for saved, choice in zip(step.saved, plan.choices, strict=True):
        if not saved.boundary and not plan.recompute[saved.block] and choice == KEPT:
            kept[saved.block] += saved.nbytes
    assert sum(kept[11:]) > 3 * sum(kept[:11])
    assert plan.recompute[:11].count(True) > plan.recompute[11:].count(True)


def test_what_leaves_stays_below_the_host_limit():
    step = model(22)
    limit = 0.3 * total(step)
    free, tight = plan_step(step, limit), plan_step(step, limit, host_limit=GIB)
    assert free.forecast.away > GIB >= tight.forecast.away and tight.fits
    assert tight.forecast.seconds >= free.forecast.seconds


def test_blocks_that_must_not_run_twice_do_not():
    step = model(22)
    blocks = tuple(replace(block, repeatable=b % 2 == 0) for b, block in enumerate(step.blocks))
    plan = plan_step(replace(step, blocks=blocks), 0.1 * total(step))
    assert any(plan.recompute) and not any(plan.recompute[1::2])


def test_a_limit_that_nothing_meets():
    step = replace(model(4), out=None, back=None, blocks=())
    step = replace(step, saved=tuple(replace(s, block=-1) for s in step.saved if not s.boundary))
    plan = plan_step(step, 0.1 * total(step))
    assert not plan.fits and "no plan fits" in plan.binding()
    assert plan.forecast.held < 0.8 * total(step)  # exact codes, in place


def test_of_plans_that_nothing_meets_the_nearer_costs_less_though_it_is_slower():
    codes = {
        "small": (Code("raw", 100 * MIB), Code("packed:4", 28 * MIB, 2e-3, 2e-3)),
        "fast": (Code(DERIVED, 0, 0.0, 1e-4), Code("raw", 100 * MIB)),
    }
    plans = {}
    for name, found in codes.items():
        saved = [
            Saved(
                100 * MIB, 1e-3 * i, 1e-3 * (48 - i), 1e-3 * (49 - i), found[i % 4 > 0 and name == "fast" :]
            )
            for i in range(24)
        ]
        plans[name] = plan_step(Step(tuple(saved), (), 0.049, wire(50e9), wire(50e9)), 50 * MIB, 500 * MIB)
    small, fast = plans["small"], plans["fast"]
    assert not small.fits and not fast.fits
    assert small.forecast.seconds > fast.forecast.seconds
    assert small.cost < fast.cost


def test_a_plan_is_a_few_hundred_simulations(monkeypatch):
    calls = []
    run = Simulator.run
    monkeypatch.setattr(Simulator, "run", lambda self, *args: calls.append(0) or run(self, *args))
    plan_step(model(22), 0.3 * total(model(22)))
    assert len(calls) < 1500
