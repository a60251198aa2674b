"""Keys and values that are partly computed again: what comes back, how many, what is refused."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import Linear

from kv_layers import Layer, rope, within_rounding
from sidelane.errors import BudgetError, LaneError
from sidelane.pipeline.arena import Arena
from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.machine import Curve, Machine
from sidelane.pipeline.planner import kv_split, kv_split_time, meeting_point, prefill_flops
from sidelane.pipeline.recompute import Rates, StoredKV, restore_all

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TOKENS = 200  # not a multiple of a block
RATES = Rates(wire=50e9, compute=1.6e12)  # of these small layers about half is recomputed


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_split_restores_the_same_values(dtype, bias, batch, rotated):
    layer = Layer(TOKENS, batch, heads=4, kv_heads=4, dtype=dtype, bias=bias, rotated=rotated)
    stored = layer.store(rates=RATES)
    for front in (0, 1, 64, 100, TOKENS):
        kv = stored.restore(front)
        assert torch.equal(kv[:, front:], layer.kv[:, front:])
        assert within_rounding(layer, kv, front)


def test_the_bound_notices_an_error_of_two_roundings():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.bfloat16)
    kv = layer.store(rates=RATES).restore(64)
    kv[1, 3, 2, 5] *= 1 + 4 * torch.finfo(torch.bfloat16).eps
    assert not within_rounding(layer, kv, 64)


def test_keys_are_rotated_by_their_own_positions():
    """The positions of a sequence that begins at 1000; those from 0 on give other keys."""
    layer = Layer(TOKENS, (2,), heads=4, kv_heads=4, dtype=torch.float32, rotated=True, first=1000)
    assert within_rounding(layer, layer.store(rates=RATES).restore(TOKENS), TOKENS)
    plain = StoredKV(layer.x, layer.kv, layer.keys, layer.values, rotate=rope, rates=RATES)
    assert not within_rounding(layer, plain.restore(TOKENS), TOKENS)


def test_what_was_stored_does_not_follow_its_source():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32)
    stored = layer.store(rates=RATES)
    kv = layer.kv.clone()
    layer.kv.zero_()
    layer.x.zero_()
    assert torch.equal(stored.restore(0), kv)
    assert torch.allclose(stored.restore(TOKENS), kv, atol=1e-5)


def test_restore_by_itself_takes_the_split_of_the_planner():
    layer = Layer(TOKENS, (2,), heads=4, kv_heads=4, dtype=torch.float32)
    stored = layer.store(rates=RATES)
    width = 4 * 16
    shape = TOKENS, 2 * width * 4, 2 * 2 * width * 4, 2 * 2 * 2 * width * width
    expected = kv_split(*shape, RATES.wire, RATES.compute, multiple=64)  # too few rows for two pieces
    assert stored.split() == expected
    assert 0 < expected.tokens < TOKENS
    front = []
    rotating = layer.store(rates=RATES, rotate=lambda keys, positions: front.append(len(keys)) or keys)
    rotating.restore()
    assert front == [expected.tokens]


@pytest.mark.parametrize("lane", [None, "exact"])
def test_inputs_cross_in_pieces(lane):
    """Of whole blocks, the last of what is left; each with its own positions."""
    layer = Layer(TOKENS, (32,), heads=2, kv_heads=2, dtype=torch.float32, rotated=True, first=9)
    found = []

    def rotate(keys, positions):
        found.append(positions.tolist())
        return rope(keys, positions)

    opened = None if lane is None else open_lane(lane)
    stored = layer.store(rates=RATES, rotate=rotate, x_lane=opened, lane=opened, pieces=8)
    assert within_rounding(layer, stored.restore(TOKENS), TOKENS)
    assert [len(positions) for positions in found] == [64, 64, 64, 8]  # 2048 rows each
    assert sum(found, []) == list(range(9, 9 + TOKENS))
    whole = layer.store(rates=RATES, rotate=rotate, pieces=1)
    found.clear()
    assert within_rounding(layer, whole.restore(TOKENS), TOKENS)
    assert len(found) == 1
    assert stored.split().seconds < whole.split().seconds


def test_pieces_in_the_cost_model():
    """With many pieces and a GPU faster than the wire, only inputs cross: half the time of loading."""
    opt = 1024, 2 * 32 * 4096, 4 * 32 * 4096, 4 * 32 * 4096**2
    rates = 55.3e9, 744e12
    load = kv_split_time(0, *opt, *rates)
    gains = [1 - kv_split(*opt, *rates, pieces=pieces).seconds / load for pieces in (1, 2, 8, 64)]
    assert gains == pytest.approx([0.383, 0.435, 0.481, 0.497], abs=0.005)
    for pieces in (1, 3, 8):
        for compute in (50e12, 200e12, 744e12):
            split = kv_split(*opt, rates[0], compute, pieces=pieces)
            times = [kv_split_time(front, *opt, rates[0], compute, pieces) for front in range(1025)]
            assert split.seconds == pytest.approx(min(times), rel=1e-12)


def test_the_split_follows_the_machine():
    """A slow GPU recomputes less, an infinitely fast one everything."""
    stored = Layer(4096, (), heads=4, kv_heads=4, dtype=torch.float32).store()
    splits = [stored.split(Rates(1e9, compute)).tokens for compute in (1e6, 1e10, 1e11, 1e15)]
    assert splits == sorted(set(splits)) and splits[0] == 0 and splits[-1] == 4096


def test_grouped_queries_are_loaded():
    """Llama-3.1-8B in small: 4 query heads for one of keys, so inputs are twice what keys and values are."""
    layer = Layer(TOKENS, (), heads=8, kv_heads=2, dtype=torch.bfloat16)
    stored = layer.store(rates=RATES)
    assert layer.x.nbytes == 2 * layer.kv.nbytes
    assert stored.limit == 0 and stored.nbytes == layer.kv.nbytes
    assert stored.split().tokens == 0
    assert torch.equal(stored.restore(), layer.kv)
    kept = layer.store(rates=RATES, limit=TOKENS)
    assert kept.split().tokens == 0
    assert within_rounding(layer, kept.restore(TOKENS), TOKENS)


def test_real_shapes_by_the_formula():
    """OPT-6.7B on two machines, and Llama-3.1-8B, whose inputs of 8192 bytes stand against 4096."""
    batch, width = 64, 4096
    opt = 1024, 2 * batch * width, 4 * batch * width, 4 * batch * width**2
    for rates, share, saved in (((25e9, 100e12), 0.49, 0.247), ((55e9, 700e12), 0.757, 0.378)):
        best = kv_split(*opt, *rates)
        assert best.tokens / 1024 == pytest.approx(share, abs=0.01)
        assert 1 - best.seconds / kv_split_time(0, *opt, *rates) == pytest.approx(saved, abs=0.005)
    assert kv_split(1024, 8192, 4096, 4 * width * 1024, 55e9, 700e12).tokens == 0


def test_rates_of_a_profile():
    machine = Machine({}, {"h2d": Curve.line(1e-5, 50e9)}, {}, 600e12, {})
    rates = Rates.of(machine, 10**9)
    assert rates.wire == pytest.approx(50e9, rel=1e-3) and rates.compute == 600e12
    assert Rates.of(machine, 10**4).wire < 1e9


def test_limit_bounds_what_is_kept_and_recomputed():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32)
    stored = layer.store(rates=Rates(1e9, 1e15), limit=50)
    assert stored.nbytes == layer.kv.nbytes + layer.x[:50].nbytes
    assert stored.split().tokens == 50
    assert within_rounding(layer, stored.restore(), 50)
    with pytest.raises(LaneError, match="inputs of 50 tokens are kept"):
        stored.restore(51)


@pytest.mark.parametrize("lane", ["exact", "packed"])
def test_keys_and_values_through_a_lane(lane):
    layer = Layer(TOKENS, (2,), heads=4, kv_heads=4, dtype=torch.bfloat16, rotated=True)
    stored = layer.store(rates=RATES, lane=open_lane(lane))
    assert stored.kv_nbytes < layer.kv.nbytes
    for front in (0, 64, TOKENS):
        kv = stored.restore(front)
        assert within_rounding(layer, kv, front)
        rest = torch.cat(
            [
                torch.stack([open_lane(lane).decode(open_lane(lane).encode(part)) for part in block])
                for block in layer.kv[:, front:].split(64, dim=1)
            ],
            dim=1,
        )
        assert torch.equal(kv[:, front:], rest)
    assert torch.equal(stored.restore(TOKENS), stored.restore(TOKENS))
    with pytest.raises(LaneError, match="no multiple of the 64 tokens in a packet"):
        stored.restore(65)


def test_a_lane_moves_the_split():
    """Smaller keys and values leave less to win; smaller inputs more."""
    layer = Layer(4096, (), heads=4, kv_heads=4, dtype=torch.bfloat16)
    slow = Rates(1e9, 2e10)
    plain, small_kv, small_x = (
        layer.store(rates=slow, **lanes)
        for lanes in (
            {},
            {"lane": open_lane("packed", bits=4), "limit": 4096},
            {"x_lane": open_lane("packed", bits=4)},
        )
    )
    assert small_kv.split().tokens == 0  # half a byte against two of an input
    assert plain.split().tokens > 0
    assert small_x.split().seconds < plain.split().seconds


def test_inputs_through_an_exact_lane():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.bfloat16)
    stored = layer.store(rates=RATES, x_lane=open_lane("exact"), limit=130)
    assert stored.limit == 128  # whole packets
    plain = layer.store(rates=RATES)
    assert torch.equal(stored.restore(128), plain.restore(128))


def test_memory_is_given_from_outside():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32)
    stored = layer.store(rates=RATES)
    out = stored.empty().fill_(float("nan"))
    assert stored.restore(64, out=out) is out
    assert within_rounding(layer, out, 64)
    for wrong in (out[:, 1:], out.double(), out.transpose(2, 3)):
        with pytest.raises(LaneError, match="not like what empty"):
            stored.restore(64, out=wrong)


def test_gradients_are_not_recorded():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32)
    layer.keys.requires_grad_()
    assert not layer.store(rates=RATES).restore(64).requires_grad


def test_measured_rates_are_those_of_this_machine():
    stored = Layer(2048, (4,), heads=4, kv_heads=4, dtype=torch.float32).store()
    rates = stored.measure(repeats=3)
    assert 1e7 < rates.wire < 1e13 and 1e7 < rates.compute < 1e15
    assert 0 <= stored.split().tokens <= 2048


def test_layers_come_in_order():
    layers = [Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32, seed=i) for i in range(5)]
    for ahead in (0, 1, 3, 7):
        restored = restore_all((layer.store(rates=RATES) for layer in layers), ahead)
        count = 0
        for layer, kv in zip(layers, restored, strict=True):
            assert within_rounding(layer, kv, 128)
            count += 1
        assert count == 5
    with pytest.raises(LaneError, match="ahead"):
        next(restore_all([], -1))


def test_the_meeting_point_balances_both_ends():
    shape = 32768, 131072, 16e9, 2 * 32 * 4096
    rates = 10e9, 400e12
    m = meeting_point(*shape, *rates)
    compute = prefill_flops(m.tokens, *shape[2:]) / rates[1]
    load = (shape[0] - m.tokens) * shape[1] / rates[0]
    grain = max(prefill_flops(m.tokens + 512, *shape[2:]) / rates[1] - compute, 512 * shape[1] / rates[0])
    assert 0 < m.tokens < shape[0] and abs(compute - load) <= grain


def test_what_does_not_fit_is_refused():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32)
    for text, change in (
        (r"is not \[2, tokens", {"kv": layer.kv[0]}),
        ("differ in tokens", {"x": layer.x[1:]}),
        ("keys: weights", {"keys": Linear(64, 32)}),
        ("values: weights", {"values": Linear(32, 64)}),
        ("one dtype", {"kv": layer.kv.half()}),
        ("positions", {"positions": torch.arange(3)}),
        ("block=0", {"block": 0}),
        ("pieces=0", {"pieces": 0}),
        ("limit=-1", {"limit": -1}),
        ("limit=True", {"limit": True}),
    ):
        with pytest.raises(LaneError, match=text):
            layer.store(**change)
    stored = layer.store(rates=RATES)
    with pytest.raises(LaneError, match="tokens=-1"):
        stored.restore(-1)
    with pytest.raises(LaneError, match="no wire 'h2d'"):
        Rates.of(Machine({}, {}, {}, 1e12, {}), 1 << 20)
    for rates in ((0, 1), (1, -1), (float("nan"), 1)):
        with pytest.raises(LaneError, match="above 0"):
            Rates(*rates)


def test_the_order_of_dimensions_is_said():
    """What a batch first needs: 4 sequences of 128 tokens."""
    x, kv = torch.randn(4, 128, 64), torch.randn(2, 4, 128, 64)
    order = r"kv is \[2, tokens, batch, heads, dim\] and x \[tokens, batch, width\]"
    for given in (kv, torch.randn(2, 128, 4, 4, 16)):
        with pytest.raises(LaneError, match=order):
            StoredKV(x, given, Linear(64, 64), Linear(64, 64))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": "a"}, "x is a str, no tensor"),
        ({"kv": None}, "kv is a NoneType, no tensor"),
        ({"keys": None}, "keys is a NoneType, no torch.nn.Linear"),
        ({"values": torch.ones(64, 64)}, "values is a Tensor, no torch.nn.Linear"),
        ({"rotate": 3}, "rotate=3 is no function of keys and positions"),
        ({"positions": [1, 2]}, "positions is a list, no tensor"),
        ({"lane": "zip"}, "unknown lane 'zip'"),
        ({"x_lane": 3}, "lane=3 is neither the name of a lane nor a lane"),
        ({"rates": 5}, "rates is a int: pass Rates"),
        (
            {"keys": Linear(64, 64, device="meta"), "values": Linear(64, 64, device="meta")},
            "keys: weights are on",
        ),
    ],
)
def test_arguments_of_another_type(change, text):
    layer = Layer(8, (), heads=4, kv_heads=4, dtype=torch.float32)
    with pytest.raises(LaneError) as caught:
        layer.store(**change)
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


def test_results_of_another_type():
    layer = Layer(8, (), heads=4, kv_heads=4, dtype=torch.float32)
    with pytest.raises(LaneError, match="out is a int"):
        layer.store(rates=RATES).restore(0, out=5)
    with pytest.raises(LaneError, match="rotate returned no tensor"):
        layer.store(rates=RATES, rotate=lambda keys, positions: keys[:1]).restore(8)


@pytest.mark.parametrize("lane", [None, "exact"])
def test_sources_that_require_a_gradient(lane):
    """As they come from projections outside of no_grad."""
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32)
    x, kv = layer.x.clone().requires_grad_(), layer.kv.clone().requires_grad_()
    restored = layer.store(rates=RATES, x=x, kv=kv, lane=lane).restore(64)
    assert not restored.requires_grad and torch.equal(restored[:, 64:], layer.kv[:, 64:])
    assert within_rounding(layer, restored, 64)


def test_lanes_by_name():
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.bfloat16)
    for lane in ("raw", "exact"):
        by_name = layer.store(rates=RATES, lane=lane, x_lane=lane)
        assert by_name.nbytes == layer.store(rates=RATES, lane=open_lane(lane), x_lane=open_lane(lane)).nbytes
        assert torch.equal(by_name.restore(0), layer.kv)
        assert within_rounding(layer, by_name.restore(64), 64)


def test_host_memory_goes_back():
    arena = Arena(1 << 20, pinned=False)
    layer = Layer(TOKENS, (), heads=4, kv_heads=4, dtype=torch.float32)
    stored = layer.store(rates=RATES, arena=arena)
    assert arena.held >= stored.nbytes
    del stored
    assert arena.held == 0
    with pytest.raises(BudgetError, match="find no room"):
        layer.store(arena=Arena(4096, pinned=False))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("recompute")


def test_measured_rows(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recompute.py", "--tiny", "--out", str(tmp_path), "--repeats", "2"])
    benchmark.main()
    with (tmp_path / "recompute.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["lane"] for row in rows} == {"raw", "exact"}
    assert (tmp_path / "recompute.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert int(row["x_bytes"]) < int(row["kv_bytes"])
        assert float(row["rel_error"]) <= torch.finfo(torch.float32).eps
        recomputed, rates = int(row["front"]), (float(row["wire_gb_s"]), float(row["tflops"]))
        assert 0 <= recomputed <= int(row["tokens"]) == 256 and min(rates) >= 0


def test_the_gate_of_the_benchmark_has_teeth(benchmark):
    layer = benchmark.Layer(benchmark.SHAPES["tiny, MHA"], torch.device("cpu"))
    stored = layer.store("raw", 1, 1)
    out = stored.empty()
    assert benchmark.gate(layer, stored, 128, out).relative < 1e-6
    layer.kv[1, 200, 0, 0, 0] += 1e-3
    with pytest.raises(RuntimeError, match="loaded values are wrong"):
        benchmark.gate(layer, stored, 128, out)
    with pytest.raises(RuntimeError, match="recomputed values are off"):
        layer.kv[0, :128] *= 1 + 1e-5
        benchmark.gate(layer, stored, 256, out)
