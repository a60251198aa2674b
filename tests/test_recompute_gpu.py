"""Recomputing beside the wire on a device: in order whatever the streams do, overlapped, without a wait."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from kv_layers import Layer, within_rounding
from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.recompute import Rates, restore_all

pytestmark = pytest.mark.gpu

TOKENS, BATCH, HEADS, DIM = 1024, 4, 16, 64
SLEEP = 400_000_000  # cycles, 0.2 s at 2 GHz
LONG = 0.1  # seconds; shorter than SLEEP, longer than any call that does not wait for the device
RATES = Rates(wire=50e9, compute=500e12)


@pytest.fixture(autouse=True)
def _sums_in_float32():
    """As the bound supposes: no partial sums in the dtype of the inputs."""
    settings = torch.backends.cuda.matmul
    names = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    before = [getattr(settings, name) for name in names]
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(settings, name, value)


def make(cuda, dtype=torch.float16, tokens=TOKENS, **options):
    return Layer(tokens, (BATCH,), heads=HEADS, kv_heads=HEADS, dim=DIM, dtype=dtype, device=cuda, **options)


def late(to, source):
    """A copy that begins late."""
    torch.cuda._sleep(SLEEP)
    to.copy_(source, non_blocking=True)


def restored(layer, kv, front):
    return torch.equal(kv[:, front:], layer.kv[:, front:]) and within_rounding(layer, kv, front)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rope"])
def test_every_split_restores_the_same_values(cuda, dtype, rotated):
    layer = make(cuda, dtype, rotated=rotated, bias=True)
    stored = layer.store(rates=RATES)
    assert stored.device == layer.kv.device
    for front in (0, 1, 64, 333, TOKENS):
        assert restored(layer, stored.restore(front), front)


def test_sources_on_the_host_are_restored_on_the_device(cuda):
    layer = make(cuda)
    stored = layer.store(rates=RATES, x=layer.x.cpu(), kv=layer.kv.cpu())
    kv = stored.restore(128)
    assert kv.device == layer.kv.device and restored(layer, kv, 128)


def test_sources_may_be_overwritten_at_once(cuda):
    layer = make(cuda)
    true = layer.kv.clone()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    stored = layer.store(rates=RATES)
    layer.kv.zero_()
    layer.x.zero_()
    kv = stored.restore(0)
    assert torch.equal(kv, true)
    assert torch.allclose(stored.restore(TOKENS), true, atol=2e-2)


@pytest.mark.parametrize("front", [0, 512, TOKENS])
def test_readers_wait_for_both_streams_and_the_host_for_none(cuda, front):
    layer = make(cuda)
    stored = layer.store(rates=RATES, copy=late)
    out = stored.empty().zero_()
    stored.restore(front, out=out)  # the libraries are loaded
    out.zero_()
    torch.cuda.synchronize()
    before = time.perf_counter()
    copy = stored.restore(front, out=out).clone()
    assert time.perf_counter() - before < LONG
    assert restored(layer, copy, front)


def test_products_of_the_first_piece_run_while_the_next_is_in_flight(cuda):
    layer = make(cuda, tokens=4096)
    copies, reached = [], []

    def copy(to, source):
        if copies:  # not that of the first piece
            torch.cuda._sleep(SLEEP)
        to.copy_(source, non_blocking=True)
        copies.append(torch.cuda.current_stream().record_event())

    def rotate(keys, positions):
        reached.append(torch.cuda.current_stream().record_event())
        return keys

    stored = layer.store(rates=RATES, copy=copy, rotate=rotate, pieces=4)
    stored.restore(4096)
    torch.cuda.synchronize()
    copies.clear()
    reached.clear()
    kv = stored.restore(4096)
    reached[0].synchronize()
    assert len(reached) == 4 and not copies[1].query()
    assert within_rounding(layer, kv, 4096)


@pytest.mark.parametrize("front", [0, 512, TOKENS])
def test_memory_is_written_after_its_users_before(cuda, front):
    layer = make(cuda)
    stored = layer.store(rates=RATES)
    out = stored.empty()
    stored.restore(front, out=out)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    out.fill_(7)
    assert restored(layer, stored.restore(front, out=out), front)


def test_a_rotation_that_fails_leaves_no_copy_behind(cuda):
    """The memory that was being loaded is lent to somebody else, whose values stay."""

    def fail(keys, positions):
        raise ValueError("broken")

    stored = make(cuda).store(rates=RATES, rotate=fail, copy=late)
    torch.cuda.synchronize()
    out = stored.empty()
    address = out.data_ptr()
    with pytest.raises(ValueError, match="broken"):
        stored.restore(512, out=out)
    del out
    gc.collect()  # what the error's frames hold
    other = stored.empty().fill_(7)
    assert other.data_ptr() == address
    torch.cuda.synchronize()
    assert bool((other == 7).all())


def test_products_run_while_the_rest_is_in_flight(cuda):
    """The copies of keys and values are held up; the rotation, behind the products, is reached before."""
    layer = make(cuda)
    copies, reached = [], []

    def copy(to, source):
        if copies:  # not that of the inputs
            torch.cuda._sleep(SLEEP)
        to.copy_(source, non_blocking=True)
        copies.append(torch.cuda.current_stream().record_event())

    def rotate(keys, positions):
        reached.append(torch.cuda.current_stream().record_event())
        return keys

    stored = layer.store(rates=RATES, copy=copy, rotate=rotate)
    stored.restore(512)
    torch.cuda.synchronize()
    copies.clear()
    reached.clear()
    stored.restore(512)
    reached[0].synchronize()
    assert len(copies) == len(reached) + 2 == 3 and copies[0].query() and not copies[1].query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("lane", ["exact", "packed"])
def test_lanes(cuda, lane):
    opened = open_lane(lane)
    layer = make(cuda, torch.bfloat16, tokens=1000, rotated=True)
    stored = layer.store(rates=RATES, lane=opened)
    for front in (0, 128, 1000):
        torch.cuda._sleep(SLEEP // 10)
        kv = stored.restore(front, out=stored.empty().fill_(7))
        assert within_rounding(layer, kv, front)
        blocks = layer.kv[:, front:].split(64, dim=1) if front < 1000 else ()
        for i, block in enumerate(blocks):
            at = front + i * 64
            expected = torch.stack([opened.decode(opened.encode(part)) for part in block])
            assert torch.equal(kv[:, at : at + 64], expected)


def test_inputs_through_the_exact_lane(cuda):
    layer = make(cuda, torch.bfloat16)
    stored = layer.store(rates=RATES, x_lane=open_lane("exact"))
    assert stored.nbytes < layer.x.nbytes + layer.kv.nbytes
    assert restored(layer, stored.restore(512), 512)


def test_rates_are_measured(cuda):
    stored = make(cuda, tokens=4096).store()
    rates = stored.measure()
    assert 5e9 < rates.wire < 500e9  # bytes/s of any PCIe from version 3, or C2C
    assert rates.compute > 1e12
    assert 0 < stored.split().tokens <= 4096
    assert stored.split(Rates(1e15, 1e12)).tokens < 2048


def test_layers_are_restored_ahead(cuda):
    """The layer after the next is only written when the readers of its memory are done."""
    layers = [make(cuda, seed=i) for i in range(4)]
    stored = [layer.store(rates=RATES, copy=late) for layer in layers]
    for _ in restore_all(stored):  # the libraries are loaded
        pass
    torch.cuda.synchronize()
    read = []
    before = time.perf_counter()
    for kv in restore_all(stored, ahead=1):
        torch.cuda._sleep(SLEEP)
        read.append(kv.clone())
    assert time.perf_counter() - before < LONG
    front = stored[0].split().tokens
    assert all(restored(layer, kv, front) for layer, kv in zip(layers, read, strict=True))
