"""Which lane is chosen on machines made by hand, why, and what the lane "auto" does with it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sidelane
from sidelane import cli
from sidelane.errors import LaneError, ProfileError
from sidelane.pipeline import choice, samples, tensor_auto
from sidelane.pipeline import machine as machine_module
from sidelane.pipeline.chain import Chain
from sidelane.pipeline.choice import LOADS, NO_PROFILE, choose
from sidelane.pipeline.compress import relative_error
from sidelane.pipeline.decision import EWMA, FADE, MIN_GAIN, SWITCH_AFTER, Residuals
from sidelane.pipeline.machine import CHAIN_TIMES, LOAD_SIDE, Curve, LaneSpeed, Machine
from sidelane.pipeline.planner import SCATTER
from sidelane.pipeline.prediction import MARGIN
from sidelane.pipeline.samples import LANES, SAMPLE, Probes, Sample, kind_of, lane_named, probe, sample_of
from sidelane.pipeline.tensor_auto import (
    BREAKS,
    FORGIVE,
    LEARN,
    REPLAN,
    SELDOM,
    SELDOM_REPLAN,
    WARM,
    AutoLane,
)

GB = 1e9
MIB = 1 << 20
RATIOS = {"exact": (1.33, 0.0), "packed:8": (1.9, 0.006), "packed:4": (3.6, 0.09), "packed:2": (6.4, 0.5)}
KERNELS = {  # rates of encode and decode
    "raw": (2000 * GB, 2000 * GB),
    "exact": (700 * GB, 1900 * GB),
    "packed:8": (1500 * GB, 2000 * GB),
    "packed:4": (1500 * GB, 2000 * GB),
    "packed:2": (1500 * GB, 2000 * GB),
}


def made(
    wire: float = 55 * GB, latency: float = 0.0, kernels=KERNELS, wires=None, busy: float | None = None
) -> Machine:
    """A machine of straight lines, whose host takes no time for a chain unless `wires` say so; with `busy`,
    kernels beside products wait so many seconds."""
    lanes = {}
    for lane, (encode, decode) in kernels.items():
        for table in ("bfloat16", "float32"):
            for load, extra in [("idle", 0.0)] + [("busy", busy)] * (busy is not None):
                lanes[f"{lane}|{table}|{load}"] = LaneSpeed(
                    Curve.line(latency + extra, encode), Curve.line(latency + extra, decode)
                )
    named = {"d2h": Curve.line(latency, wire), "h2d": Curve.line(latency, wire)}
    named |= dict.fromkeys(CHAIN_TIMES, Curve.line(0.0, 1e30)) | (wires or {})
    return Machine({}, named, lanes, 7e14, {"nvenc": 0, "nvdec": 7})


def slow(rate: float = 0.01 * GB) -> Machine:
    """Kernels that are free beside a wire of that rate."""
    return made(rate, kernels=dict.fromkeys(KERNELS, (1e15, 1e15)))


def described(nbytes: int = 64 * MIB, dtype=torch.bfloat16, ratios=RATIOS):
    return dtype, nbytes, ratios


def activations(rows: int = 512, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No profile but those that a test makes, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice.present.cache_clear()
    tensor_auto._shared.clear()
    monkeypatch.setattr(choice, "SHARED", Probes())
    yield
    choice.present.cache_clear()
    tensor_auto._shared.clear()


# Choices


def test_times_are_those_of_the_model() -> None:
    n = 64 * MIB
    found = choose(described(n), 10 * GB, made(latency=1e-5), exact=False).candidates
    for lane, (encode, decode) in KERNELS.items():
        ratio = RATIOS.get(lane, (1.0, 0.0))[0]
        expected = 2e-5 + n / encode + n / ratio / (10 * GB) + n / decode
        assert found[lane].seconds == pytest.approx(expected), lane
        assert found[lane].binds == "10 GB/s"


def norm(*seconds: float) -> float:
    return sum(each**SCATTER for each in seconds) ** (1 / SCATTER)


def test_many_tensors_count_the_busiest_stage_of_each_way() -> None:
    n = 64 * MIB
    machine = made(wires={"d2h": Curve.line(0, 400 * GB), "h2d": Curve.line(0, 3000 * GB)})
    found = choose(described(n), ("d2h", "h2d"), machine, exact=False, together=4).candidates["exact"]
    kernel = n / (700 * GB)
    out = norm(kernel, n / 1.33 / (400 * GB), kernel)  # for which the host waits too
    back = norm(n / (1900 * GB), n / 1.33 / (3000 * GB))
    assert found.seconds == pytest.approx(out + back)


def test_a_chain_costs_the_host() -> None:
    cost = {"chain out": Curve.line(2e-4, 1e18), "chain back": Curve.line(1e-4, 1e18)}
    machine = made(wires=cost, latency=1e-5)
    machine.lanes["exact|bfloat16|idle"] = LaneSpeed(Curve.line(8e-5, 1e15), Curve.line(1e-5, 1e15))
    found = choose(described(1024), ("d2h", "h2d"), machine, together=4).candidates
    assert found["raw"].seconds == pytest.approx(3e-4, rel=1e-3)
    assert choose(described(1024), ("d2h", "h2d"), machine).candidates["raw"].seconds < 1e-4
    found = choose(described(64 * MIB), ("d2h", "h2d"), machine, exact=False, together=4).candidates
    waited = 64 * MIB / 1e15  # for the encoder, to know the size
    assert found["exact"].stages["chain out"] == pytest.approx(2e-4 + 7e-5 + waited, rel=1e-3)
    assert found["packed:4"].stages["chain out"] == pytest.approx(2e-4, rel=1e-3)


def test_a_chain_costs_the_host_what_was_measured_for_the_lane() -> None:
    cost = {f"chain out{lane}": Curve.line(seconds, 1e18) for lane, seconds in (("", 2e-4), (" exact", 9e-4))}
    machine = made(wires=cost, kernels=dict.fromkeys(KERNELS, (1e15, 1e15)), latency=1e-5)
    machine.lanes["exact|float32|idle"] = LaneSpeed(Curve.line(5e-5, 1e15), Curve.line(1e-5, 1e15))

    def out(dtype: torch.dtype, lane: str) -> float:
        found = choose(described(dtype=dtype), ("d2h", "h2d"), machine, exact=False, together=4)
        return found.candidates[lane].stages["chain out"]

    assert out(torch.bfloat16, "exact") == pytest.approx(9e-4, rel=1e-3)
    assert out(torch.float32, "exact") == pytest.approx(9e-4 + 4e-5, rel=1e-3)
    assert out(torch.bfloat16, "raw") == out(torch.bfloat16, "packed:4") == pytest.approx(2e-4, rel=1e-3)


def test_no_chain_leads_to_a_disk() -> None:
    wires = {"chain out": Curve.line(0.5, 1e18), "chain back": Curve.line(0.5, 1e18)}
    wires |= {f"disk {way}": Curve.line(1e-3, 1e18) for way in ("write", "read")}
    route = ("d2h", "disk write", "disk read", "h2d")
    found = choose(described(), route, made(1e15, wires=wires), together=4).candidates["raw"]
    assert found.seconds == pytest.approx(2e-3, rel=0.1)


@pytest.mark.parametrize("rate, milliseconds", [(1e9, 3.1), (5e8, 5.2)])
def test_kernels_beside_products_wait_for_half_of_one(rate: float, milliseconds: float) -> None:
    """Products of 1 ms, 2.1 MB, a wire that takes 2.1 or 4.2 ms; tables that have longer waits, as those of
    calls that are launched late."""
    machine = replace(
        made(kernels=dict.fromkeys(KERNELS, (1e15, 1e15)), busy=8e-4), gemm=2 * LOAD_SIDE**3 / 1e-3
    )
    found = choose((torch.bfloat16, 2_100_000, {}), rate, machine, "busy").candidates["raw"]
    assert found.seconds == pytest.approx(milliseconds * 1e-3, rel=1e-3)


def test_what_was_learned_beside_products_holds_for_the_waits_as_well() -> None:
    """Products of 0.2 ms, tables whose kernels wait for 1 ms, and calls that took 0.3 of that."""
    machine = replace(
        made(kernels=dict.fromkeys(KERNELS, (1e15, 1e15)), busy=1e-3), gemm=2 * LOAD_SIDE**3 / 2e-4
    )
    residuals = Residuals()
    for _ in range(50):
        for stage in ("encode raw", "decode raw"):
            residuals.observe(stage, 1e6, 1e-3, 3e-4)
    stages = choose((torch.bfloat16, 1_000_000, {}), 1e9, machine, "busy", residuals=residuals).candidates
    found = stages["raw"].stages
    assert found["encode raw"] == pytest.approx(1e-4, rel=0.01) == found["decode raw"]


def test_tensors_together_share_the_wait_for_products() -> None:
    machine = made(1 * GB, kernels=dict.fromkeys(KERNELS, (1e15, 1e15)), busy=1e-3)
    found = choose(described(), ("d2h", "h2d"), machine, "busy", exact=False, together=4).candidates
    assert found["packed:4"].stages["encode packed:4"] == pytest.approx(1e-3 / 4, rel=1e-3)
    assert found["exact"].stages["encode exact"] == pytest.approx(1e-3, rel=1e-3)  # whose host waits
    assert found["exact"].stages["decode exact"] == pytest.approx(1e-3 / 4, rel=1e-3)


def test_a_load_without_tables_is_said() -> None:
    decision = choose(described(), "d2h", made(), "busy")
    assert decision.explain().splitlines()[1] == "busy was not measured: idle figures"
    assert decision.seconds == choose(described(), "d2h", made()).seconds
    assert choose(described(), "d2h", made(busy=0.0), "busy").note == ""
    assert choose(described(), "d2h", made(), "idle").note == ""


def test_a_lane_without_tables_for_the_load_is_named() -> None:
    """Beside lanes that wait for products its idle figures look better than they are."""
    machine = made(busy=1e-3)
    for lane in ("exact", "packed:4"):
        del machine.lanes[f"{lane}|bfloat16|busy"]
    found = choose(described(), "d2h", machine, "busy", exact=False)
    assert found.note == "busy was not measured for exact, packed:4: idle figures"
    assert choose(described(), "d2h", machine, "busy").note == "busy was not measured for exact: idle figures"
    assert choose(described(dtype=torch.float32), "d2h", machine, "busy").note == ""


def test_exact_lanes_only_without_a_bound() -> None:
    decision = choose(described(), 1 * GB, made())
    assert decision.lane == "exact"
    assert all("not exact" in decision.candidates[lane].why for lane in LANES[2:])


@pytest.mark.parametrize(
    "bound, lane", [(0.6, "packed:2"), (0.5, "packed:4"), (0.01, "packed:8"), (0, "exact")]
)
def test_the_bound_leaves_out_what_breaks_it(bound: float, lane: str) -> None:
    decision = choose(described(), 1 * GB, made(), max_rel_error=bound)
    assert decision.lane == lane
    for name, (_, error) in RATIOS.items():
        assert (error <= MARGIN * bound) == (decision.candidates[name].seconds < float("inf"))


def test_exact_beside_a_bound() -> None:
    assert choose(described(), 1 * GB, made(), max_rel_error=0.6, exact=True).lane == "exact"


def test_raw_where_nothing_gains_enough() -> None:
    assert choose(described(), 1e15, made(), exact=False).lane == "raw"
    only = described(ratios={"exact": (1 / (1 - 0.9 * MIN_GAIN), 0.0)})
    free = made(1 * GB, kernels=dict.fromkeys(KERNELS, (1e18, 1e18)))
    decision = choose(only, "d2h", free)
    assert decision.lane == "raw"
    assert re.search(r"exact .*saves 4\.\d% of raw, less than 5% beside raw", decision.explain())


def test_kernels_that_take_longer_than_raw_are_not_probed() -> None:
    probes = Probes()
    x = activations()
    machine = made(1e15)
    decision = choose(x, "d2h", machine, exact=False, probes=probes)
    assert decision.lane == "raw"
    assert decision.candidates["exact"].sample is None
    assert "kernels alone" in decision.candidates["exact"].why


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float64])
def test_what_every_lane_stores_raw(dtype: torch.dtype) -> None:
    decision = choose(torch.zeros(1000, dtype=dtype), 0.001 * GB, made(), exact=False)
    assert decision.lane == "raw"
    assert f"stores {str(dtype).removeprefix('torch.')} raw" in decision.explain()


def test_empty_tensors() -> None:
    decision = choose(torch.empty(0, 4), 0.001 * GB, made(), exact=False)
    assert decision.lane == "raw"
    assert "empty" in decision.explain()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex32])
def test_complex_tensors_have_no_lossy_lane(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 100, 2, generator=random).to(dtype.to_real())
    x = torch.view_as_complex(x)
    decision = choose(x, 1e6, slow(), max_rel_error=0.3, probes=Probes())
    assert "packed:4     " in decision.explain() and f"stores {str(dtype)[6:]} raw" in decision.explain()
    packet = sidelane.compress(x, lane="auto", wire=1e5, machine=slow(), max_rel_error=0.3)
    assert packet.lane in ("raw", "exact")
    back = sidelane.decompress(packet)
    assert torch.equal(torch.view_as_real(back), torch.view_as_real(x))


def test_lanes_that_were_not_measured() -> None:
    machine = replace(made(), left_out={"video bfloat16": "no NVENC"})
    del machine.lanes["exact|bfloat16|idle"]
    decision = choose(described(), 1 * GB, machine, exact=False)
    assert decision.candidates["video"].why == "when profiled: no NVENC"
    assert decision.candidates["exact"].why == "not in the profile"


@settings(max_examples=60)
@example(843911162288.0, 1.0625, 4, 56391656)  # raw is taken beside a lane that saves 8 of 13 %
@given(st.floats(0.01 * GB, 2000 * GB), st.floats(1, 50), st.sampled_from((1, 4)), st.integers(1000, 10**9))
def test_a_faster_wire_is_never_slower(rate: float, faster: float, together: int, nbytes: int) -> None:
    machine = made(latency=2e-5)
    a, b = (
        choose(described(nbytes), wire, machine, exact=False, together=together)
        for wire in (rate, rate * faster)
    )
    # Raw is taken while it loses less than the gain that a lane has to bring.
    assert b.seconds <= a.seconds / (1 - MIN_GAIN) * (1 + 1e-9)
    for decision in (a, b):
        assert decision.seconds <= decision.candidates["raw"].seconds


@pytest.mark.parametrize(
    "wire",
    [
        "h3d",
        0,
        -1.0,
        1.25,
        float("inf"),
        True,
        (),
        float("nan"),
        [],
        None,
        b"d2h",
        10**400,
        {"d2h": 1},
        [None],
    ],
)
def test_wires_that_are_none(wire) -> None:
    for call in (
        lambda: choose(described(), wire, made()),
        lambda: AutoLane(wire, made()),
        lambda: AutoLane(wire),
        lambda: sidelane.compress(activations(), lane="auto", wire=wire, machine=made()),
        lambda: Chain("auto", wire=wire, machine=made()),
    ):
        with pytest.raises(LaneError, match="wire") as error:
            call()
        assert "\n" not in str(error.value)


def test_host_times_are_no_wires() -> None:
    machine = made(wires={"chain out": Curve.line(1e-5, 1e15)})
    with pytest.raises(LaneError, match="it has d2h, h2d; or give a rate"):
        choose(described(), "chain out", machine)


def test_several_wires_as_a_list() -> None:
    x = activations()
    for wire in (["d2h", 1e6], ("d2h", 1e6)):
        assert sidelane.compress(x, lane="auto", wire=wire, machine=made()).lane == "exact"


@pytest.mark.parametrize("machine", [3, "profile.json"])
def test_what_is_no_machine(machine) -> None:
    for call in (choose, AutoLane):
        with pytest.raises(LaneError, match="is no Machine"):
            call(activations() if call is choose else "d2h", machine=machine)


@pytest.mark.parametrize("options", [{"load": "full"}, {"max_rel_error": -1}, {"together": 0}])
def test_bad_arguments(options) -> None:
    with pytest.raises(LaneError, match=next(iter(options))):
        choose(described(), "d2h", made(), **options)
    with pytest.raises(LaneError, match=next(iter(options))):
        AutoLane(machine=made(), **options)


def test_a_curve_is_a_wire() -> None:
    decision = choose(described(), Curve.line(0.5, 1e18), made())
    assert decision.seconds == pytest.approx(0.5, rel=1e-2)
    assert "curve" in decision.explain()


def test_explain_shows_every_lane_and_measured_times() -> None:
    text = choose(described(), 1 * GB, made(), exact=False).explain({"raw": 0.25})
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(LANES)
    assert lines[0].endswith("one at a time: packed:2")
    assert " 250 " in lines[2]
    assert "x the time of packed:2" in lines[2]


# Probes


@pytest.mark.parametrize("lane", ["exact", "packed:8", "packed:4", "packed:2"])
def test_a_sample_speaks_for_the_tensor(lane: str) -> None:
    x = activations(4096, 512)
    found, opened = probe(lane, x), lane_named(lane)
    packet = opened.encode(x)
    assert found.share == pytest.approx(packet.nbytes / x.nbytes, rel=0.02)
    error = relative_error(x.flatten(), opened.decode(packet).flatten())
    assert found.rel_error == pytest.approx(error, rel=0.05, abs=0)


def test_what_gets_no_smaller_has_a_share_of_one() -> None:
    noise = torch.randint(-(2**15), 2**15, (1 << 19,), dtype=torch.int16).view(torch.bfloat16)
    assert probe("exact", noise).share == pytest.approx(1.0, abs=0.01)
    assert probe("raw", noise) == Sample(1.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=0, max_size=3), st.booleans())
def test_samples_are_pieces_of_the_tensor(shape: list[int], transposed: bool) -> None:
    x = torch.zeros(shape[:2] or [], dtype=torch.bfloat16)
    x = x.t() if transposed and x.ndim == 2 else x
    some = sample_of(x)
    assert some.numel() <= x.numel()
    assert some.nbytes <= 2 * SAMPLE
    assert some.numel() == x.numel() or some.nbytes >= SAMPLE / 4


def test_samples_come_from_everywhere() -> None:
    x = torch.arange(1 << 22, dtype=torch.float32).view(-1, 64)
    some = sample_of(x)
    assert some.shape[1] == 64
    assert some[0, 0] == 0
    assert some[-1, -1] == x[-1, -1]
    assert set(some[:, 0].tolist()) <= set(x[:, 0].tolist())


def test_probes_are_remembered_by_kind() -> None:
    probes = Probes()
    x = activations()
    pick = {"machine": slow(), "exact": False, "probes": probes}
    assert choose(x, **pick).probe_seconds > 0
    assert choose(activations(1024, seed=1), **pick).probe_seconds == 0
    assert choose(activations(512, 128), **pick).probe_seconds > 0
    assert choose(x, name="other", **pick).probe_seconds > 0
    probes.forget(kind_of(x))
    assert choose(x, **pick).probe_seconds > 0


def test_lengths_are_no_kinds_of_their_own() -> None:
    assert kind_of(torch.zeros(100)) == kind_of(torch.zeros(1000)) != kind_of(torch.zeros(10, 10))


def test_no_more_samples_are_remembered_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_SAMPLES", 4)
    probes, x = Probes(), activations(4, 4)
    for i in range(20):
        probes.sample((str(i),), "raw", x)
        assert len(probes._samples) <= 4


class Timed(Probes):
    """Samples of 1 MiB whose stages took so many seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self._times = seconds

    def sample(self, kind, lane: str, tensor: torch.Tensor) -> Sample:
        share = 1 / RATIOS.get(lane, (1.0,))[0]
        return Sample(share, nbytes=MIB, encode=self._times[lane], decode=self._times[lane])


def timed_choice(seconds: dict[str, float], load: str = "idle", **more):
    """Over 10 GB/s, of 2 MiB, where tables say 50 us for each kernel of 1 MiB and 51 for this."""
    machine = made()
    curve = Curve((MIB, 2 * MIB), (50e-6, 51e-6))
    lanes = {name: LaneSpeed(curve, curve) for name in machine.lanes}
    x = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    pick = {"exact": False, "probes": Timed(seconds)} | more
    return choose(x, 10 * GB, replace(machine, lanes=lanes), load, **pick).candidates


def test_launches_take_what_they_took_for_the_sample() -> None:
    """Half of what a sample took more or less than its table, up to twice and down to half of that."""
    wire = 2 * MIB / (10 * GB)
    times = {"raw": 20e-6, "exact": 50e-6, "packed:8": 70e-6, "packed:4": 900e-6, "packed:2": 30e-6}
    expected = {"raw": 38.5e-6, "exact": 51e-6, "packed:8": 61e-6, "packed:4": 76e-6, "packed:2": 41e-6}
    found = timed_choice(times)
    for lane, kernel in expected.items():
        crossing = wire / RATIOS.get(lane, (1.0,))[0]
        assert found[lane].seconds == pytest.approx(2 * kernel + crossing, rel=1e-3), lane


def test_beside_other_work_samples_say_nothing() -> None:
    idle, busy = (timed_choice(dict.fromkeys(KERNELS, 70e-6), load) for load in LOADS)
    assert idle["exact"].stages["encode exact"] == pytest.approx(61e-6)
    assert busy["exact"].stages["encode exact"] == pytest.approx(51e-6)


def test_times_that_are_known_count_more_than_the_sample() -> None:
    residuals = Residuals()
    for _ in range(60):
        residuals.observe("encode exact", 2 * MIB, 51e-6, 40e-6)
    found = timed_choice(dict.fromkeys(KERNELS, 70e-6), residuals=residuals)["exact"].stages
    assert found["encode exact"] == pytest.approx(40e-6, rel=1e-3)
    assert found["decode exact"] == pytest.approx(61e-6)


# Without a profile


def test_no_profile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProfileError, match="sidelane profile"):
        choose(activations())
    lane = AutoLane()
    x = activations()
    packet = lane.encode(x)
    assert packet.lane == "raw"
    assert NO_PROFILE in lane.explain()
    assert torch.equal(lane.decode(packet), x)


def test_a_wire_that_the_profile_lacks_takes_everything_raw() -> None:
    """A program for a GPU runs where there is none."""
    machine = made()
    del machine.wires["d2h"]
    x = activations()
    with Chain("auto", machine=machine) as chain:
        assert torch.equal(chain.receive(chain.send(x)), x)
        assert "no wire 'd2h'" in chain.explain()


def test_the_profile_of_this_machine_is_found() -> None:
    machine = replace(slow(), key=machine_module.current_key())
    machine.save(machine_module.cache_path())
    assert choose(activations()).lane == "exact"
    assert sidelane.compress(activations(), lane="auto").lane == "exact"


def test_a_damaged_profile_is_refused() -> None:
    path = machine_module.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    for call in (choose, lambda x: sidelane.compress(x, lane="auto")):
        with pytest.raises(ProfileError, match="sidelane profile"):
            call(activations())


# The lane


def test_compress_takes_the_wire_into_account() -> None:
    x = activations()
    for rate, lane in ((1e15, "raw"), (1e6, "exact")):
        packet = sidelane.compress(x, lane="auto", wire=rate, machine=made())
        assert packet.lane == lane
        assert torch.equal(sidelane.decompress(packet), x)


@pytest.mark.parametrize("bound, bits", [(0.15, 4), (0.02, 8)])
def test_compress_keeps_the_bound(bound: float, bits: int) -> None:
    x = activations()
    packet = sidelane.compress(x, lane="auto", wire=1e5, machine=slow(), max_rel_error=bound)
    assert (packet.lane, packet.bits) == ("packed", bits)
    assert packet.rel_error == relative_error(x.flatten(), sidelane.decompress(packet).flatten()) <= bound


def test_the_promise_costs_time() -> None:
    """A wire on which 4 bits pay, but not when each packet is decoded and measured."""
    x = activations(2048, 1024)
    probes = Probes()
    pick = {"machine": made(), "probes": probes}
    plain = choose(x, 25 * GB, exact=False, **pick).candidates["packed:4"]
    bound = choose(x, 25 * GB, max_rel_error=0.5, **pick).candidates["packed:4"]
    assert bound.seconds > plain.seconds
    assert choose(x, 1e4, max_rel_error=0.5, **pick).lane == "packed:4"


def test_a_tensor_that_breaks_the_bound_is_probed_anew() -> None:
    calm, wild = torch.ones(256, 64).bfloat16(), activations(256, 64)
    calm[:, 0] = 2
    lane = AutoLane(machine=slow(1e5), max_rel_error=0.01, probes=Probes())
    first = lane.encode(calm)
    assert first.lane == "packed"
    assert first.bits < 8
    packet = lane.encode(wild)
    assert packet.bits == 8
    assert lane.encode(wild).bits == 8
    assert lane.decide(wild).lane == "packed:8"


class Hopeful(Probes):
    """Takes 2 bits to be enough."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten = 0

    def sample(self, kind, lane: str, tensor: torch.Tensor) -> Sample:
        return Sample(0.1, 0, 0.0) if lane == "packed:2" else super().sample(kind, lane, tensor)

    def forget(self, kind) -> None:
        self.forgotten += 1
        super().forget(kind)


@pytest.mark.parametrize("way", ["lane", "compress"])
def test_a_lane_that_keeps_breaking_the_bound_is_left_out(way: str) -> None:
    probes, machine, x = Hopeful(), slow(1e5), activations()

    def encode():
        if way == "lane":
            return lane.encode(x)
        return sidelane.compress(x, lane="auto", machine=machine, max_rel_error=0.02, probes=probes)

    lane = AutoLane(machine=machine, max_rel_error=0.02, probes=probes)
    for _ in range(5):
        packet = encode()
        assert packet.bits == 8
        assert packet.rel_error == relative_error(x.flatten(), lane.decode(packet).flatten()) <= 0.02
    assert probes.forgotten == BREAKS
    if way == "lane":
        assert "kept breaking the bound" in lane.explain()


def test_a_lane_that_seldom_breaks_the_bound_stays() -> None:
    calm, wild = torch.ones(256, 64).bfloat16(), activations(256, 64)
    lane = AutoLane(machine=slow(1e5), max_rel_error=0.02, probes=Hopeful())
    for _ in range(2 * BREAKS):
        assert lane.encode(wild).bits == 8
        for _ in range(round(1 / FORGIVE)):
            assert lane.encode(calm).bits == 2


def test_options_that_auto_has_not() -> None:
    for call in (
        lambda: sidelane.compress(activations(), lane="auto", bits=4),
        lambda: Chain("auto", bits=4),
    ):
        with pytest.raises(LaneError, match="no option 'bits'"):
            call()
    with pytest.raises(LaneError, match="chooses nothing"), Chain("exact") as chain:
        chain.explain()


def test_decisions_are_cheap() -> None:
    """Medians far above what a decision takes, so that a slow machine passes and a quadratic one does not."""
    x, machine, probes = activations(), made(latency=1e-5), Probes()
    lane = AutoLane(machine=machine, probes=probes)
    lane.decide(x)

    def cost(work) -> float:
        times = []
        for _ in range(200):
            begin = perf_counter()
            work()
            times.append(perf_counter() - begin)
        return median(times)

    cached, cold = cost(lambda: lane.decide(x)), cost(lambda: choose(x, "d2h", machine, probes=probes))
    assert cached < 50e-6
    assert cold < 1e-3


def learn(lane: AutoLane, stage: str, nbytes: float, factor: float, times: int) -> None:
    for _ in range(times):
        lane.observe(stage, nbytes, 1.0, factor)


def test_a_wire_that_stalls_changes_the_lane() -> None:
    x = activations(2048, 1024)
    lane = AutoLane(machine=made(700 * GB), probes=Probes())
    assert lane.decide(x).lane == "raw"
    learn(lane, "d2h", x.nbytes, 100.0, WARM + 40)
    learn(lane, "d2h", x.nbytes / 1.33, 100.0, 40)
    lanes = []
    for _ in range(SWITCH_AFTER):
        learn(lane, "d2h", x.nbytes, 100.0, 1)
        lanes += [lane.decide(x).lane for _ in range(REPLAN + 1)]
    assert lanes[0] == "raw"
    assert lanes[-1] == "exact"


def test_a_lane_that_is_slower_than_thought_is_left() -> None:
    x = activations(2048, 1024)
    lane = AutoLane(machine=made(5 * GB), probes=Probes())
    assert lane.decide(x).lane == "exact"
    learn(lane, "encode exact", x.nbytes, 100.0, WARM + 40)
    assert [lane.decide(x).lane for _ in range(REPLAN + 1)][-1] == "raw"


def test_what_stays_the_same_is_planned_and_timed_ever_less() -> None:
    """Decisions and events cost time."""
    x = activations(2048, 1024)
    lane = AutoLane(machine=made(700 * GB), probes=Probes())
    plans, every = [], []
    for _ in range(3000):
        lane.observe("d2h", x.nbytes, 1.0, 1.01)
        plans.append(id(lane.decide(x)))
        every.append(lane.every)
    changes = [i for i in range(1, len(plans)) if plans[i] != plans[i - 1]]
    assert changes[0] <= REPLAN
    assert changes[-1] - changes[-2] == SELDOM_REPLAN
    assert (every[0], every[-1]) == (LEARN, SELDOM)
    learn(lane, "d2h", x.nbytes, 100.0, 40)
    learn(lane, "d2h", x.nbytes / 1.33, 100.0, 40)
    lanes = []
    for _ in range(SELDOM_REPLAN + SWITCH_AFTER * REPLAN):
        learn(lane, "d2h", x.nbytes, 100.0, 1)
        lanes.append((lane.decide(x).lane, lane.every))
    assert lanes[0] == ("raw", SELDOM)
    assert ("exact", LEARN) in lanes
    assert lanes[-1][0] == "exact"


def test_first_times_teach_nothing() -> None:
    x = activations(2048, 1024)
    lane = AutoLane(machine=made(700 * GB), probes=Probes())
    before = lane.decide(x).seconds
    learn(lane, "d2h", x.nbytes, 1e6, WARM)
    assert [lane.decide(x).seconds for _ in range(REPLAN + 1)][-1] == before
    learn(lane, "d2h", x.nbytes, 2.0, 1)
    after = [lane.decide(x) for _ in range(REPLAN + 1)][-1]
    expected = choose(x, machine=made(700 * GB), residuals=_taught("d2h", x.nbytes, 2.0)).seconds
    assert after.candidates["raw"].seconds == pytest.approx(expected, rel=FADE)
    assert after.candidates["raw"].seconds / before == pytest.approx(2**EWMA, rel=0.5)


def _taught(stage: str, nbytes: int, factor: float) -> Residuals:
    residuals = Residuals()
    residuals.observe(stage, nbytes, 1.0, factor)
    return residuals


# Chains


class Slow(type(lane_named("exact"))):
    """The exact lane, but its encoder takes 10 ms."""

    def encode(self, tensor):
        sleep(0.01)
        return super().encode(tensor)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_chain_returns_what_it_was_sent(workers: int) -> None:
    kinds = [activations(64 + i % 3 * 64, 32, i) for i in range(20)] + [torch.arange(50), torch.empty(0)]
    with Chain("auto", machine=slow(), workers=workers) as chain:
        for sent, back in zip(kinds, chain.stream(kinds), strict=True):
            assert sent.dtype == back.dtype
            assert torch.equal(sent, back)
        text = chain.explain()
    assert text.count(": exact") == 3
    assert chain.report().lane == "auto"


@pytest.mark.parametrize("missing", CHAIN_TIMES)
def test_a_chain_stays_raw_where_nothing_is_known_of_chains(missing: str) -> None:
    """As in a profile whose time ran out: a lane that costs the host more than it saves would be taken."""
    machine = slow()
    del machine.wires[missing]
    with Chain("auto", machine=machine) as chain:
        chain.receive(chain.send(activations()))
        text = chain.explain()
    assert "the profile has no times of chains: run sidelane profile again, on a GPU" in text
    assert choose(activations(), "d2h", machine).lane == "exact"
    disk = machine.wires | {"disk write": machine.wires["d2h"]}
    assert (
        AutoLane(("d2h", "disk write"), replace(machine, wires=disk), together=2).decide(activations()).lane
        != "raw"
    )


def test_a_chain_keeps_the_bound() -> None:
    x = activations()
    with Chain("auto", machine=slow(1e5), max_rel_error=0.15) as chain:
        back = chain.receive(chain.send(x))
        report = chain.report()
    assert 0 < relative_error(x.flatten(), back.flatten()) <= 0.15
    assert report.ratio > 3


def test_a_chain_learns_that_an_encoder_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations()
    named = {lane: lane_named(lane) for lane in LANES if lane != "video"} | {"exact": Slow()}
    monkeypatch.setattr(tensor_auto, "lane_named", named.__getitem__)
    with Chain("auto", machine=made(0.2 * GB), workers=0) as chain:
        first = chain.send(x)
        assert chain.report().ratio > 1.2
        for _ in range(1000):  # far more than it takes; it is tried again later
            if chain.explain().splitlines()[0].endswith(": raw"):
                break
            chain.send(x)
        else:
            pytest.fail("the slow lane is still taken")
        before = chain.report().bytes_wire
        chain.send(x)
        assert chain.report().bytes_wire - before >= x.nbytes
        assert torch.equal(chain.receive(first), x)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_chain_goes_on_and_learns_after_a_stage_that_failed(workers: int) -> None:
    calls = 0

    def kernel(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls <= 9 and calls % 3 == 0:
            raise ValueError("of the kernel")
        return x

    x, failed = activations(), 0
    with Chain("auto", wire=1e6, machine=made(), kernel=kernel, workers=workers) as chain:
        for i in range(120):
            try:
                assert torch.equal(chain.receive(chain.send(x)), x)
            except ValueError:
                failed += 1
            if i == 9:
                observed = chain._lane._observed
        assert failed == 3
        assert chain._lane._observed > observed + 5


def test_a_trace_beside_learning() -> None:
    with Chain("auto", machine=slow(), trace=True) as chain:
        list(chain.stream(activations(seed=i) for i in range(5)))
        stages = [span.stage.split()[0] for span in chain.trace().spans]
    assert sorted(stages) == sorted(["encode", "store", "load", "decode"] * 5)


@pytest.mark.parametrize("options", [{}, {"max_rel_error": 0.01}])
def test_a_checkpoint_takes_auto(options) -> None:
    weight, x = torch.randn(64, 64), torch.randn(256, 64, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weight)

    (expected,) = torch.autograd.grad(block(x).sum(), x)
    for _ in range(3):
        sidelane.checkpoint(block, x * 1.0, lane="auto", **options).sum().backward()
        assert (x.grad - expected).norm() <= (0.05 if options else 0) * expected.norm()
        x.grad = None


# The command


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "other.json"
    replace(made(latency=1e-5), key={"gpu": "another"}).save(path)
    return path


def test_plan_prints_a_table_for_each_wire_and_size(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--wire",
        "d2h,h2d",
        "--wire",
        "0.125",
        "--mib",
        "2",
        "--mib",
        "32",
        "--max-rel-error",
        "0.2",
    ]
    assert cli.run(["plan", "--profile", str(profile), *arguments]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^raw ", text, re.M)) == 4
    assert "33.6 MB over d2h, h2d, idle, one at a time: packed:4" in text
    assert "over 0.125 GB/s" in text


def test_plan_says_that_a_load_was_not_measured(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--profile", str(profile), "--wire", "d2h", "--mib", "1", "--load"]
    assert cli.run([*arguments, "busy"]) == 0
    assert "\nbusy was not measured: idle figures\n" in capsys.readouterr().out
    assert cli.run([*arguments, "idle"]) == 0
    assert "not measured" not in capsys.readouterr().out


def test_plan_reads_tensors(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"acts": activations(), "ids": torch.arange(10), "none": torch.empty(0)}, path)
    assert cli.run(["plan", str(path), "--profile", str(profile), "--wire", "0.001"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"acts: bfloat16, .*: exact", text)
    assert re.search(r"ids: int64, .*: raw", text)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--wire", "h3d"], "no wire 'h3d'"),
        (["--wire", "-1"], "is no rate: give GB/s"),
        (["--wire", "1e400"], "is no rate: give GB/s"),
        (["--wire", "1.25e9"], "is no rate: give GB/s"),
        (["--mib", "inf"], "inf MiB are more than"),
        (["--dtype", "float4_e2m1fn_x2"], "holds no random numbers"),
        (["--dtype", "int8"], "no floating dtype"),
        (["--load", "full"], "load"),
        (["missing.safetensors"], "is no file"),
        (["--max-rel-error", "-1"], "max_rel_error"),
    ],
)
def test_plan_refuses(
    profile: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["plan", "--profile", str(profile), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_plan_refuses_tensors_that_torch_does_not_have(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = tmp_path / "strange.safetensors"
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    strange.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    assert cli.run(["plan", "--profile", str(profile), str(strange)]) == 2
    error = capsys.readouterr().err
    assert f"{strange}: tensor 'a' has the dtype F6_E2M3: convert it to one of F64, " in error
    assert error.count("\n") == 1


def test_plan_of_a_file(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"full": torch.randn(64, 64), "empty": torch.empty(0, 3)}, tmp_path / "in")
    arguments = ["plan", "--profile", str(profile), "--wire", "1", str(tmp_path / "in")]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert "empty: no elements, nothing to send\n" in out and "full: float32, 0.0164 MB over 1 GB/s" in out
    for more in (["--mib", "3"], ["--dtype", "float32"]):
        assert cli.run([*arguments, *more]) == 2
        assert "are of random numbers: leave them out beside a file" in capsys.readouterr().err


def test_the_command_says_why_everything_goes_raw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.randn(64, 64)}, tmp_path / "in")
    machine = made()
    del machine.wires["d2h"]
    for found, says in ((None, "no profile of this machine"), (machine, "the profile has no wire 'd2h'")):
        monkeypatch.setattr(Machine, "cached", lambda found=found: found)
        choice.present.cache_clear()
        arguments = ["compress", str(tmp_path / "in"), str(tmp_path / "out"), "--force", "--lane", "auto"]
        assert cli.run([*arguments, "--wire", "d2h"]) == 0
        assert says in capsys.readouterr().err
        assert cli.run([*arguments, "--wire", "1"]) == 0
        assert (found is None) == ("goes raw" in capsys.readouterr().err)


def test_plan_shows_names_in_letters_alone(profile: Path, tmp_path: Path, capsys) -> None:
    from safetensors.torch import save_file

    save_file({"a\x1b[31m\n": torch.randn(64, 64)}, tmp_path / "in")
    assert cli.run(["plan", "--profile", str(profile), str(tmp_path / "in")]) == 0
    assert "'a\\x1b[31m\\n': " in capsys.readouterr().out


def test_plan_without_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with the arguments is said first."""
    from safetensors.torch import save_file

    empty = tmp_path / "empty.safetensors"
    save_file({"a": torch.empty(0, 3)}, empty)
    for arguments, says in (
        ([], "run sidelane profile"),
        (["--dtype", "foo"], "no floating dtype"),
        (["--wire", "0"], "is no rate"),
        (["--load", "full"], "load='full'"),
        (["--max-rel-error", "-1"], "max_rel_error"),
        ([str(empty)], "has no tensor with elements"),
    ):
        assert cli.run(["plan", *arguments]) == 2
        assert says in capsys.readouterr().err
