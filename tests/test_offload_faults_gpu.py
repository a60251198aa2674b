"""Failures on a device: in codecs and copies, out of memory, full disks. The next step is correct, every slot
is back."""

from __future__ import annotations

import gc
from itertools import count

import pytest
import torch

from faults import Countdown, Flaky
from models import MIN_BYTES, assert_same, build, gradients, loss_of, settled
from races import SLEEP
from sidelane.errors import OffloadError
from sidelane.pipeline import disk as disk_module
from sidelane.pipeline import store as store_module
from sidelane.pipeline.arena import shared
from sidelane.pipeline.blockfile import BlockFile
from sidelane.pipeline.late import LatePacket
from sidelane.pipeline.offload import offload
from sidelane.pipeline.tiers import PacketLayout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("math_attention")]

MIB = 1 << 20
TIGHT = {"min_bytes": MIN_BYTES, "gpu_budget": 20_000}


def assert_settled(context: offload, pinned: int) -> None:
    """Nothing is held, and the arena has what it had."""
    # The autograd engine keeps what was queued in a failed pass until the next pass of the thread.
    torch.ones((), requires_grad=True, device="cuda").backward()
    torch.ones((), requires_grad=True).backward()
    gc.collect()
    assert settled(context)
    assert offload.current() is None and shared().held == pinned


@pytest.mark.parametrize("where", ["encode", "decode", "write", "read"])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_every_call_of_codecs_and_copies_may_fail(cuda, monkeypatch, where, error):
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    pinned, fail = shared().held, Countdown(error)
    lane = Flaky(fail) if where == "encode" else "exact"
    target, name = {
        "encode": (None, ""),
        "decode": (store_module, "decode_packet"),
        "write": (PacketLayout, "write"),
        "read": (PacketLayout, "read_to"),
    }[where]
    if target is not None:
        call = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *args: (fail(), call(*args))[1])
    context = offload(lane, **TIGHT)
    failed = 0
    for at in count(0, 4):
        fail.left = at
        try:
            gradients(model, tokens, context)
            break
        except error:
            failed += 1
        assert_settled(context, pinned)
        fail.left = -1
        assert_same(gradients(model, tokens, context), expected)
    assert failed > 2


@pytest.mark.parametrize("where", ["settle", "write", "read"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_calls_may_fail_while_sizes_of_codes_are_unknown(cuda, monkeypatch, where, error):
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    pinned, fail = shared().held, Countdown(error)
    monkeypatch.setattr(store_module, "EXACT_BYTES", 0)
    target, name = {
        "settle": (LatePacket, "settle"),
        "write": (PacketLayout, "write"),
        "read": (PacketLayout, "read_to"),
    }[where]
    call = getattr(target, name)
    monkeypatch.setattr(target, name, lambda *args: (fail(), call(*args))[1])
    context = offload("exact", min_bytes=MIN_BYTES, gpu_budget=400_000)
    for _ in range(2):  # learn what leaves
        fail.left = -1
        assert_same(gradients(model, tokens, context), expected)
    calls, failed = -1 - fail.left, 0  # how much leaves also depends on when sizes become known
    for at in count(0, max(calls // 5, 1)):
        fail.left = at
        try:
            gradients(model, tokens, context)
            break
        except error:
            failed += 1
        assert_settled(context, pinned)
        fail.left = -1
        assert_same(gradients(model, tokens, context), expected)
    assert calls > 1 and failed > min(calls, 5) // 2


def test_out_of_memory_while_a_packet_comes_back(cuda):
    x = torch.randn(64 * MIB // 4, device=cuda, requires_grad=True)

    def loss():
        return (x * 2).exp().sin().cos().sum()

    expected = torch.autograd.grad(loss(), x)[0]
    pinned = shared().held
    context = offload("raw", gpu_budget=0)
    with context:
        y = loss()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 32 * MIB) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(y, x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del y
    assert_settled(context, pinned)
    with context:
        y = loss()
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)
    del y
    assert_settled(context, pinned)


def test_out_of_memory_in_the_program_between_packing_and_unpacking(cuda):
    """The program may free memory and call backward again: nothing was lost."""
    x = torch.randn(4 * MIB, device=cuda, requires_grad=True)
    context = offload("raw", gpu_budget=0)
    with context:
        y = (x * 2).exp().sin().sum()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 42, device=cuda)
    expected = torch.autograd.grad((x * 2).exp().sin().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


@pytest.mark.parametrize("fault", ["none", "full", "late", "slow"])
def test_disk(cuda, tmp_path, monkeypatch, fault):
    """Packets on a disk come back; a disk that is full, fails late or is slow costs nothing but memory or
    time."""
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    pinned = shared().held
    context = offload(host_budget=0, on_full="spill", spill_dir=str(tmp_path), **TIGHT)
    if fault == "full":
        context = offload(
            host_budget=0, on_full="spill", spill_dir=str(tmp_path), min_bytes=MIN_BYTES, gpu_budget=64 * MIB
        )
        monkeypatch.setattr(disk_module, "RESERVE", 1 << 60)
    write, calls = BlockFile.write, count()

    def failing(file, data, offset):
        if fault == "slow":
            torch.cuda._sleep(SLEEP)
            torch.cuda.synchronize()
        if fault == "late" and next(calls) % 3 == 2:
            raise OSError(28, "No space left on device")
        write(file, data, offset)

    if fault in ("late", "slow"):
        monkeypatch.setattr(BlockFile, "write", failing)
    for _ in range(1 if fault == "slow" else 3):
        assert_same(gradients(model, tokens, context), expected)
        assert_settled(context, pinned)
    report = context.report()
    assert (report.spilled.count > 0) == (fault != "full") and report.host_peak == 0


def test_a_disk_that_cannot_be_read(cuda, tmp_path, monkeypatch):
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    pinned = shared().held
    context = offload(host_budget=0, on_full="spill", spill_dir=str(tmp_path), **TIGHT)

    def failing(file, data, offset):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(BlockFile, "read", failing)
        with context:
            loss = loss_of(model, tokens)
        while context._store.tiers._disk._finish_write():
            pass
        with pytest.raises(OffloadError, match="cannot be read back"):
            loss.backward()
        del loss
        assert_settled(context, pinned)
    assert_same(gradients(model, tokens, context), expected)


def test_capture_of_a_whole_step(cuda):
    """Forward and backward in one CUDA graph: what is saved stays on the device, and replays are correct."""
    x = torch.randn(256, 256, device=cuda, requires_grad=True)
    context = offload(min_bytes=MIN_BYTES, gpu_budget=0)

    def run():
        with context:
            return torch.autograd.grad((x * 2).exp().sin().sum(), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    packed = context.report().total.count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = run()
    assert context.report().total.count == packed
    for scale in (0.5, 2.0):
        with torch.no_grad():
            x.mul_(scale)
        graph.replay()
        assert torch.equal(grad, torch.autograd.grad((x * 2).exp().sin().sum(), x)[0])


def test_capture_of_a_backward_pass_alone_is_refused(cuda):
    """What was offloaded before a capture cannot be fetched inside it, which is said before it is broken."""
    x = torch.randn(256, 256, device=cuda, requires_grad=True)
    expected = torch.autograd.grad((x * 2).exp().sin().sum(), x)[0]
    context = offload(min_bytes=MIN_BYTES, gpu_budget=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), context:
        y = (x * 2).exp().sin().sum()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(OffloadError, match="capture"), torch.cuda.graph(graph, stream=side):
        torch.autograd.grad(y, x, retain_graph=True)
    with torch.cuda.stream(side):
        actual = torch.autograd.grad(y, x)[0]
    torch.cuda.synchronize()
    assert torch.equal(actual, expected)
