"""The cost model against closed forms, brute force and what must hold for any machine."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise, product
from math import ceil, exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidelane.errors import LaneError
from sidelane.pipeline.decision import (
    EWMA,
    FADE,
    FAR,
    MIN_GAIN,
    SWITCH_AFTER,
    Hysteresis,
    Residuals,
    best_lane,
)
from sidelane.pipeline.linear import MAX_VERTICES, minimise
from sidelane.pipeline.planner import (
    SCATTER,
    LaneLoad,
    Split,
    Stage,
    best_chunks,
    break_even_rate,
    busiest,
    chunks_estimate,
    crossover,
    fewest_chunks,
    kv_split,
    kv_split_time,
    meeting_point,
    overlapped_time,
    peak_bytes,
    pipelined_time,
    prefill_flops,
    serial_time,
    split_lanes,
    step_time,
    transfer_time,
)

GB = 1e9
RATES = st.floats(0.1 * GB, 1000 * GB)
RATIOS = st.floats(1.05, 30)
LATENCIES = st.floats(0, 1e-3)
SIZES = st.floats(1e3, 1e10)


def line(latency: float, rate: float):
    return lambda nbytes: latency + nbytes / rate


def lane(latency: float, encode: float, wire: float, decode: float, ratio: float) -> list[Stage]:
    return [
        Stage("encode", line(latency, encode)),
        Stage("wire", line(latency, wire), 1 / ratio),
        Stage("decode", line(latency, decode)),
    ]


def overlapped(stages: list[Stage], nbytes: float, chunks: int) -> float:
    """The end of the last chunk when each stage takes chunks in order, one at a time."""
    free = dict.fromkeys((stage.resource or stage.name for stage in stages), 0.0)
    end = 0.0
    for _ in range(chunks):
        end = 0.0
        for stage in stages:
            key = stage.resource or stage.name
            free[key] = end = max(end, free[key]) + stage(nbytes / chunks)
    return end


def test_needs_no_torch() -> None:
    code = "import sys, sidelane.pipeline.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Stages


def test_pieces_pay_the_latency_each() -> None:
    assert transfer_time(line(1e-5, GB), 1e6, 4) == pytest.approx(4e-5 + 1e-3)


@given(LATENCIES, RATES, RATES, RATES, RATIOS, SIZES)
def test_serial_time_is_the_sum(
    latency: float, encode: float, wire: float, decode: float, ratio: float, n: float
) -> None:
    expected = 3 * latency + n / encode + n / ratio / wire + n / decode
    assert serial_time(lane(latency, encode, wire, decode, ratio), n) == pytest.approx(expected)


@given(LATENCIES, RATES, RATES, RATES, RATIOS, SIZES, st.integers(1, 40))
def test_pipelined_time_is_that_of_a_simulation(
    latency: float, encode: float, wire: float, decode: float, ratio: float, n: float, chunks: int
) -> None:
    stages = lane(latency, encode, wire, decode, ratio)
    assert pipelined_time(stages, n, chunks) == pytest.approx(overlapped(stages, n, chunks))


def test_stages_of_one_resource_do_not_overlap() -> None:
    stages = [
        Stage("encode", line(0, 2), resource="sm"),
        Stage("wire", line(0, 2)),
        Stage("decode", line(0, 2), resource="sm"),
    ]
    assert busiest(stages, 8) == ("sm", 8.0)
    assert pipelined_time(stages, 8, 4) == pytest.approx(3 + 3 * 2)


@given(st.floats(1e-6, 1e-3), RATES, RATES, RATES, st.floats(1e6, 1e10))
def test_best_chunks_is_the_best_power_of_two(
    latency: float, encode: float, wire: float, decode: float, n: float
) -> None:
    stages = lane(latency, encode, wire, decode, 2.0)
    chunks, seconds = best_chunks(stages, n, most=128)
    times = {1 << k: overlapped(stages, n, 1 << k) for k in range(8)}
    assert chunks in times
    assert seconds == pytest.approx(min(times.values()))


def test_best_chunks_is_near_the_closed_form() -> None:
    rates = 500 * GB, 300 * GB, 110 * GB
    stages = lane(1e-5, rates[0], rates[2], rates[1], 1.0)
    chunks, _ = best_chunks(stages, 4e9)
    assert 0.5 <= chunks / chunks_estimate(4e9, 1e-5, rates) <= 2


def test_best_chunks_keeps_to_its_range() -> None:
    stages = lane(0, GB, GB, GB, 2.0)
    assert best_chunks(stages, 1e9, least=3, most=16)[0] == 16
    assert best_chunks(lane(1, GB, GB, GB, 2.0), 1e6, least=3)[0] == 4
    assert best_chunks(stages, 1e9, least=5, most=6)[0] == 5


@given(SIZES, st.integers(1, 8), RATIOS, SIZES)
def test_memory_guard(n: float, ring: int, ratio: float, memory: float) -> None:
    chunks = fewest_chunks(n, ring, ratio, memory)
    assert peak_bytes(n, chunks, ring, ratio) <= memory * (1 + 1e-9)
    assert chunks == 1 or peak_bytes(n, chunks - 1, ring, ratio) > memory


def test_no_memory_is_refused() -> None:
    with pytest.raises(LaneError, match="memory"):
        fewest_chunks(1e9, 2, 4.0, 0)


# Break-even


@given(RATIOS, RATES, RATES, st.booleans())
def test_break_even_is_where_the_times_cross(
    ratio: float, encode: float, decode: float, pipelined: bool
) -> None:
    n, chunks = 1e9, 1 << 20

    def time(rate: float, r: float) -> float:
        stages = lane(0, encode, rate, decode, r) if r > 1 else [Stage("wire", line(0, rate))]
        return pipelined_time(stages, n, chunks) if pipelined else serial_time(stages, n)

    rate = break_even_rate(ratio, encode, decode, pipelined)
    assert time(0.98 * rate, ratio) < time(0.98 * rate, 1)
    assert time(1.02 * rate, ratio) > time(1.02 * rate, 1)
    found = crossover(lambda wire: time(wire, ratio), lambda wire: time(wire, 1), rate / 100, rate * 100)
    assert found == pytest.approx(rate, rel=1e-3)


def test_what_gets_no_smaller_never_pays() -> None:
    assert break_even_rate(1.0, 1e12, 1e12) == 0
    assert crossover(lambda rate: 2 / rate, lambda rate: 1 / rate, 1, 100) is None


def test_published_rates() -> None:
    """Break-even wires computed from the rates that KVTC and SplitZip report."""
    assert break_even_rate(20, 28 * GB, 40 * GB) == pytest.approx(15.65 * GB, rel=0.01)
    assert break_even_rate(1.324, 613 * GB, 2182 * GB) == pytest.approx(117 * GB, rel=0.01)


def test_stolen_time_counts_for_the_step() -> None:
    assert step_time(1.0, 0.25, 0.5) == 1.25
    assert step_time(1.0, 0.25, 2.0) == 2.0


# Recomputing


@settings(max_examples=200)
@given(
    st.integers(0, 400),
    st.floats(0, 1e5),
    st.floats(1, 1e5),
    st.floats(1, 1e9),
    RATES,
    st.floats(1e11, 1e15),
    st.none() | st.integers(0, 500),
    st.sampled_from((1, 7, 64)),
)
def test_kv_split_is_the_best_of_all(
    tokens: int, a: float, k: float, f: float, wire: float, v: float, limit: int | None, multiple: int
) -> None:
    most = tokens if limit is None else min(limit, tokens)
    allowed = {*range(0, most + 1, multiple), most}
    split = kv_split(tokens, a, k, f, wire, v, limit, multiple)
    times = {m: kv_split_time(m, tokens, a, k, f, wire, v) for m in allowed}
    assert split.tokens in allowed and not split.layers
    assert split.seconds == pytest.approx(min(times.values()), rel=1e-9)
    assert split.seconds == times[split.tokens]


def test_grouped_heads_recompute_nothing() -> None:
    """Llama 3.1 8B: an input has 8192 bytes per token, keys and values of a layer 4096."""
    assert kv_split(8192, 8192, 4096, 4 * 4096 * 1024, 25 * GB, 1e18).tokens == 0


def test_an_infinite_gpu_saves_half_with_all_heads() -> None:
    split = kv_split(10_000, 8192, 16384, 4 * 4096 * 4096, 25 * GB, 1e30)
    assert split.tokens == 10_000
    assert split.seconds == pytest.approx(0.5 * 10_000 * 16384 / (25 * GB))


def test_published_saving_of_a_split() -> None:
    """OPT-6.7B at 100 TFLOP/s and 25 GB/s: a quarter of the transfer."""
    width, tokens = 4096, 8192
    split = kv_split(tokens, 2 * width, 4 * width, 4 * width**2, 25 * GB, 100e12)
    assert 1 - split.seconds / (tokens * 4 * width / (25 * GB)) == pytest.approx(0.247, abs=0.005)


@settings(max_examples=300)
@given(
    st.integers(0, 3000),
    st.floats(1, 1e5),
    st.floats(1, 1e10),
    st.floats(0, 1e6),
    RATES,
    st.floats(1e11, 1e15),
    st.sampled_from(((1, 1), (64, 1), (512, 1), (64, 2), (512, 32))),
)
def test_meeting_point_is_the_best_of_all(
    tokens: int, k: float, f: float, attention: float, wire: float, v: float, grain: tuple[int, int]
) -> None:
    multiple, layers = grain
    pieces = [*range(0, tokens, multiple), tokens]
    flops = [prefill_flops(m, f, attention) / v for m in pieces]
    times = {(tokens, 0): flops[-1]}
    for i, (m, end) in enumerate(pairwise(pieces)):
        for j in range(layers):
            left = tokens - m - (end - m) * j / layers
            times[m, j] = max(flops[i] + (flops[i + 1] - flops[i]) * j / layers, left * k / wire)
    split = meeting_point(tokens, k, f, attention, wire, v, multiple, layers)
    assert split.seconds == pytest.approx(min(times.values()), rel=1e-9)
    assert split.seconds == pytest.approx(times[split.tokens, split.layers], rel=1e-9)


def test_meeting_point_without_attention_divides_in_proportion() -> None:
    assert meeting_point(1000, 3.0, 1.0, 0.0, 1.0, 1.0, multiple=1) == Split(750, 750.0)


# Several lanes


@given(st.lists(RATES, min_size=1, max_size=5), SIZES)
def test_independent_resources_share_in_proportion(rates: list[float], n: float) -> None:
    found = split_lanes({str(i): LaneLoad({str(i): 1 / rate}) for i, rate in enumerate(rates)}, n)
    assert found.seconds == pytest.approx(n / sum(rates), rel=1e-6)
    for i, rate in enumerate(rates):
        assert found.fractions[str(i)] == pytest.approx(rate / sum(rates), abs=1e-6)
    assert found.binding == tuple(sorted(str(i) for i in range(len(rates))))


@given(RATES, RATES, RATIOS)
def test_an_engine_beside_the_same_wire(wire: float, engine: float, ratio: float) -> None:
    found = split_lanes(
        {
            "raw": LaneLoad({"d2h": 1 / wire}),
            "video": LaneLoad({"d2h": 1 / wire / ratio, "nvenc": 1 / engine}),
        },
        GB,
    )
    expected = min(wire + engine * (1 - 1 / ratio), ratio * wire)
    assert GB / found.seconds == pytest.approx(expected, rel=1e-6)


@given(RATES, RATES, st.floats(0, 0.9))
def test_recomputing_adds_its_rate(wire: float, compute: float, busy: float) -> None:
    lanes = {"raw": LaneLoad({"h2d": 1 / wire}), "recompute": LaneLoad({"sm": 1 / compute})}
    found = split_lanes(lanes, GB, busy={"sm": busy})
    assert GB / found.seconds == pytest.approx(wire + (1 - busy) * compute, rel=1e-6)


def test_limits_of_error_and_memory() -> None:
    lanes = {
        "raw": LaneLoad({"d2h": 1 / GB}),
        "packed": LaneLoad({"sm": 1 / GB}, rel_error=0.1, memory=1.0),
    }
    assert split_lanes(lanes, GB).fractions["packed"] == pytest.approx(0.5)
    assert split_lanes(lanes, GB, max_rel_error=0.02).fractions["packed"] == pytest.approx(0.2)
    assert split_lanes(lanes, GB, memory=0.1 * GB).fractions["packed"] == pytest.approx(0.1)
    with pytest.raises(LaneError, match="limits"):
        split_lanes({"packed": lanes["packed"]}, GB, max_rel_error=0.05)
    with pytest.raises(LaneError, match="no lanes"):
        split_lanes({}, GB)
    with pytest.raises(LaneError, match="busy"):
        split_lanes(lanes, GB, busy={"sm": 1.0})


def test_work_ahead_moves_bytes_elsewhere() -> None:
    lanes = {"a": LaneLoad({"a": 1 / GB}), "b": LaneLoad({"b": 1 / GB})}
    found = split_lanes(lanes, GB, ahead={"a": 0.5})
    assert found.seconds == pytest.approx(0.75)
    assert found.fractions["a"] == pytest.approx(0.25)
    assert split_lanes(lanes, GB, ahead={"a": 5.0}).fractions["b"] == pytest.approx(1.0)


COSTS = st.dictionaries(st.sampled_from(("sm", "d2h", "nvdec", "disk")), st.floats(1e-12, 1e-8), min_size=1)


@given(st.dictionaries(st.sampled_from("abc"), COSTS, min_size=1), st.randoms(use_true_random=False))
def test_no_other_split_is_faster(costs: dict[str, dict[str, float]], random) -> None:
    lanes = {name: LaneLoad(cost) for name, cost in costs.items()}
    found = split_lanes(lanes, GB)
    resources = {p for cost in costs.values() for p in cost}
    assert sum(found.fractions.values()) == pytest.approx(1.0)
    assert min(found.fractions.values()) >= 0

    def seconds(x: dict[str, float]) -> float:
        return max(GB * sum(costs[name].get(p, 0) * part for name, part in x.items()) for p in resources)

    assert found.seconds == pytest.approx(seconds(found.fractions), rel=1e-6)
    for _ in range(50):
        parts = np.array([random.random() ** 3 for _ in lanes]) + 1e-12
        other = dict(zip(lanes, (parts / parts.sum()).tolist(), strict=True))
        assert seconds(other) >= found.seconds * (1 - 1e-6)


def test_linear_program_against_a_grid() -> None:
    """min -x - 2y with x + y <= 1.5, y <= 1, x <= 1."""
    a = np.array([[1.0, 1], [0, 1], [1, 0]])
    x = minimise(np.array([-1.0, -2]), a, np.array([1.5, 1, 1]), np.empty((0, 2)), np.empty(0))
    assert x is not None
    grid = [p for p in product(np.linspace(0, 1, 101), repeat=2) if p[0] + p[1] <= 1.5]
    assert -x[0] - 2 * x[1] == pytest.approx(min(-p[0] - 2 * p[1] for p in grid))
    assert x.tolist() == pytest.approx([0.5, 1.0])


def test_linear_program_without_a_solution() -> None:
    one = np.ones((1, 1))
    assert minimise(np.ones(1), one, np.array([1.0]), one, np.array([2.0])) is None


def test_linear_program_of_too_many_vertices() -> None:
    n = 12
    with pytest.raises(LaneError, match="too many"):
        minimise(np.ones(n), np.ones((MAX_VERTICES // 1000, n)), np.ones(200), np.ones((1, n)), np.ones(1))


# More can never be worse


@given(LATENCIES, RATES, RATES, RATES, RATIOS, SIZES, st.floats(1, 100))
def test_a_faster_wire_is_never_slower(
    latency: float, encode: float, wire: float, decode: float, ratio: float, n: float, faster: float
) -> None:
    def plans(rate: float) -> dict[str, float]:
        return {
            "raw": best_chunks([Stage("wire", line(latency, rate))], n)[1],
            "packed": best_chunks(lane(latency, encode, rate, decode, ratio), n)[1],
        }

    slow, fast = plans(wire), plans(wire * faster)
    assert min(fast.values()) <= min(slow.values()) * (1 + 1e-9)
    # Raw is taken while it loses less than the gain that a lane has to bring.
    assert fast[best_lane(fast)] <= slow[best_lane(slow)] / (1 - MIN_GAIN) * (1 + 1e-9)


@given(COSTS, COSTS, st.sampled_from(("sm", "d2h", "nvdec", "disk")), st.floats(1, 100))
def test_a_faster_resource_is_never_slower(
    a: dict[str, float], b: dict[str, float], resource: str, faster: float
) -> None:
    def seconds(speed: float) -> float:
        loads = ({p: c / (speed if p == resource else 1) for p, c in cost.items()} for cost in (a, b))
        return split_lanes({str(i): LaneLoad(load) for i, load in enumerate(loads)}, GB).seconds

    assert seconds(faster) <= seconds(1.0) * (1 + 1e-6)


# Decisions


@given(LATENCIES, RATES, RATES, RATES, SIZES)
def test_a_lane_without_gain_is_never_chosen(
    latency: float, encode: float, wire: float, decode: float, n: float
) -> None:
    raw = [Stage("wire", line(latency, wire))]
    same = lane(latency, encode, wire, decode, 1.0)
    for time in (serial_time, lambda stages, n: best_chunks(stages, n)[1]):
        times = {"raw": time(raw, n), "packed": time(same, n)}
        assert best_lane(times) == "raw"
        assert Hysteresis().update(times) == "raw"


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(1e-6, 1.0)), st.floats(1e-6, 1.0))
def test_best_lane_loses_at_most_the_gain(times: dict[str, float], raw: float) -> None:
    times = times | {"raw": raw}
    chosen = best_lane(times)
    assert times[chosen] <= raw
    assert times[chosen] <= min(times.values()) / (1 - MIN_GAIN) * (1 + 1e-9)
    assert chosen == "raw" or times[chosen] <= (1 - MIN_GAIN) * raw


def test_raw_must_be_there() -> None:
    with pytest.raises(LaneError, match="raw"):
        best_lane({"exact": 1.0})


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6))
def test_what_overlaps_takes_little_more_than_the_busiest(seconds: list[float]) -> None:
    stages = [Stage(str(i), lambda nbytes, each=each: each) for i, each in enumerate(seconds)]
    found, most = overlapped_time(stages, 1.0), max(seconds)
    assert most <= found * (1 + 1e-12) and found <= most * len(seconds) ** (1 / SCATTER) * (1 + 1e-12)
    if all(each <= most / 2 for each in seconds if each != most) and seconds.count(most) == 1:
        assert found <= 1.01 * most
    shared = [Stage(str(i), lambda nbytes: 1.0, resource="host") for i in range(3)]
    assert overlapped_time(shared, 1.0) == pytest.approx(3.0)


def test_residuals_learn_a_drift_and_keep_sizes_apart() -> None:
    residuals = Residuals()
    assert residuals.factor("exact", 1e6) == 1
    for _ in range(30):
        residuals.observe("exact", 1e6, 1.0, 2.0)
    assert residuals.factor("exact", 1e6) == pytest.approx(2.0, rel=0.01)
    assert residuals.factor("exact", 1e9) == 1
    assert residuals.factor("exact", 4e6) == residuals.factor("exact", 1e6)
    assert residuals.known("exact", 1e6)
    assert not residuals.known("exact", 1e9)
    assert residuals.factor("packed:4", 1e6) == 1


def test_residuals_fade() -> None:
    residuals = Residuals()
    for _ in range(30):
        residuals.observe("exact", 1e6, 1.0, 1e6)
    for _ in range(ceil(log(0.001) / log(1 - FADE))):
        residuals.fade()
    assert residuals.factor("exact", 1e6) == pytest.approx(1.0, abs=0.05)


def test_residuals_begin_where_they_are_told_until_times_are_known() -> None:
    """The beginning counts as one time, and again when the times fade."""
    residuals = Residuals()
    assert residuals.factor("exact", 1e6, 1.5) == 1.5
    residuals.observe("exact", 1e6, 1.0, 1.5)
    assert residuals.factor("exact", 1e6, 1.5) == pytest.approx(1.5)
    assert residuals.factor("exact", 1e6, 1 / 1.5) == pytest.approx(1.0)
    for _ in range(30):
        residuals.observe("exact", 1e6, 1.0, 1.5)
    assert residuals.factor("exact", 1e6, 9.0) == pytest.approx(1.5, rel=0.01)
    for _ in range(ceil(log(0.001) / log(1 - FADE))):
        residuals.fade()
    assert residuals.factor("exact", 1e6, 9.0) == pytest.approx(9.0, rel=0.01)


@given(st.lists(st.floats(exp(-FAR / 2), exp(FAR / 2)), min_size=1, max_size=30))
def test_residuals_are_the_moving_mean_of_logarithms(ratios: list[float]) -> None:
    """That of all times and one that was as predicted, until a new one counts `EWMA`."""
    residuals, mean = Residuals(), 0.0
    for i, ratio in enumerate(ratios):
        residuals.observe("a", 1e6, 0.5, 0.5 * ratio)
        weight = max(EWMA, 1 / (i + 2))
        mean += weight * (log(ratio) - mean)
    assert residuals.factor("a", 1e6) == pytest.approx(exp(mean))


def test_one_time_far_off_does_not_decide() -> None:
    residuals = Residuals()
    for _ in range(10):
        residuals.observe("a", 1e6, 1.0, 1.1)
    residuals.observe("a", 1e6, 1.0, 1000.0)
    assert residuals.factor("a", 1e6) < 1.3
    residuals.observe("a", 1e6, 1.0, 1.1)
    residuals.observe("a", 1e6, 1.0, 1e-3)
    assert 0.9 < residuals.factor("a", 1e6) < 1.3


def test_times_that_stay_far_off_are_learned_at_once() -> None:
    residuals = Residuals()
    for _ in range(5):
        residuals.observe("a", 1e6, 1.0, 1000.0)
    assert residuals.factor("a", 1e6) > 100


@pytest.mark.parametrize("predicted, actual", [(0.0, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_times_of_nothing_teach_nothing(predicted: float, actual: float) -> None:
    residuals = Residuals()
    residuals.observe("a", 1e6, predicted, actual)
    assert residuals.factor("a", 1e6) == 1


def test_hysteresis_switches_after_three_in_a_row() -> None:
    choice = Hysteresis()
    assert choice.update({"raw": 1.0, "exact": 0.99, "packed:4": 2.0}) == "raw"
    better = {"raw": 1.0, "exact": 0.9, "packed:4": 2.0}
    assert [choice.update(better) for _ in range(SWITCH_AFTER)] == ["raw", "raw", "exact"]
    rival = {"raw": 1.0, "exact": 0.9, "packed:4": 0.5}
    for _ in range(5):
        assert choice.update(rival) == "exact"
        assert choice.update(better) == "exact"


def test_hysteresis_stays_where_the_gain_is_small() -> None:
    choice = Hysteresis("exact")
    assert {choice.update({"raw": 1.0, "exact": 0.8, "packed:4": 0.75}) for _ in range(10)} == {"exact"}


def test_hysteresis_returns_to_raw_at_once() -> None:
    assert Hysteresis("exact").update({"raw": 1.0, "exact": 1.01}) == "raw"
    assert Hysteresis("exact").update({"raw": 1.0, "exact": 1.01, "packed:4": 0.5}) == "packed:4"
    assert Hysteresis("exact").update({"raw": 1.0, "exact": 0.99}) == "exact"


def test_hysteresis_leaves_a_lane_that_is_gone() -> None:
    assert Hysteresis("video").update({"raw": 1.0, "exact": 0.5}) == "exact"


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10)), max_size=20))
def test_hysteresis_never_loses_to_raw(series: list[tuple[float, float, float]]) -> None:
    choice = Hysteresis()
    for times in series:
        seconds = dict(zip(("raw", "a", "b"), times, strict=True))
        lane = choice.update(seconds)
        assert lane == "raw" or seconds[lane] < seconds["raw"]
