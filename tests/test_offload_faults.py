"""Steps that fail anywhere: the next one is correct, no hook stays installed, every byte is back."""

from __future__ import annotations

import gc
import signal
import sys
import time
from contextlib import nullcontext
from itertools import count
from types import ModuleType

import pytest
import torch
from torch import Tensor

from faults import Countdown, Flaky
from interrupt import interrupted
from models import MIN_BYTES, assert_same, build, gradients, loss_of, settled
from sidelane.errors import BudgetError, OffloadError
from sidelane.pipeline import disk as disk_module
from sidelane.pipeline import store as store_module
from sidelane.pipeline.blockfile import BlockFile
from sidelane.pipeline.offload import offload

KIB = 1 << 10


def assert_settled(context: offload) -> None:
    """Nothing is held, nothing installed, no mode of the thread is changed."""
    # The autograd engine keeps what was queued in a failed pass until the next pass of the thread.
    torch.ones((), requires_grad=True).backward()
    if not settled(context):
        gc.collect()  # the traceback of the failure may be part of a cycle
    assert settled(context)
    assert offload.current() is None
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    before = context.report()
    (torch.ones(KIB, requires_grad=True) * 2).exp()
    after = context.report()
    assert after.total.count == before.total.count and after.kept == before.kept, "a hook is still installed"


ERRORS = [RuntimeError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["encode", "decode"])
@pytest.mark.parametrize("inside", [False, True])
def test_every_call_of_a_codec_may_fail(monkeypatch, error, where, inside):
    model, tokens = build()
    expected = gradients(model, tokens)
    fail, decode = Countdown(error), store_module.decode_packet
    if where == "encode":
        context = offload(Flaky(fail), min_bytes=MIN_BYTES)
    else:
        context = offload(min_bytes=MIN_BYTES)
        monkeypatch.setattr(store_module, "decode_packet", lambda *args: (fail(), decode(*args))[1])
    failed = 0
    for at in count(0, 9):
        fail.left = at
        try:
            gradients(model, tokens, context, backward_inside=inside)
            break
        except error:
            failed += 1
        assert_settled(context)
        assert_same(gradients(model, tokens, context), expected)
    assert failed > 2


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where, error):
        ctx.error = error if where == "backward" else None
        ctx.save_for_backward(x)
        if where == "forward":
            raise error("stop")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.error is not None:
            raise ctx.error("stop")
        return grad, None, None


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("inside", [False, True])
def test_the_model_may_fail(where, error, block, inside):
    model, tokens = build()
    expected = gradients(model, tokens)
    context = offload(min_bytes=MIN_BYTES, checker=True)
    plain = model.wrap

    def wrap(b, x, **kwargs):
        out = plain(b, x, **kwargs)
        return Fails.apply(out, where, error) if b is model.blocks[block] else out

    model.wrap = wrap
    for _ in range(2):
        with pytest.raises(error):
            gradients(model, tokens, context, backward_inside=inside)
        assert_settled(context)
    model.wrap = plain
    assert_same(gradients(model, tokens, context), expected)
    assert_settled(context)


def test_a_failed_step_amid_others():
    """The graphs of two micro batches are alive when a third fails."""
    model, tokens = build()
    expected = gradients(model, tokens)
    context = offload(min_bytes=MIN_BYTES, checker=True)
    with context:
        losses = [loss_of(model, tokens) for _ in range(2)]
    with pytest.raises(ZeroDivisionError), context:
        loss_of(model, tokens)
        raise ZeroDivisionError
    for loss in losses:
        model.zero_grad()
        loss.backward()
        assert_same([p.grad for p in model.parameters()], expected)
    del losses, loss
    assert_settled(context)


# Budgets and disks


def wanted() -> int:
    """Bytes that the packets of a step take together."""
    model, tokens = build()
    context = offload(min_bytes=MIN_BYTES)
    gradients(model, tokens, context)
    return context.report().host_peak


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("on_full", ["keep", "spill", "error"])
def test_full_host_budget(tmp_path, on_full, share):
    model, tokens = build()
    expected = gradients(model, tokens)
    budget = int(wanted() * share)
    context = offload(min_bytes=MIN_BYTES, host_budget=budget, on_full=on_full, spill_dir=str(tmp_path))
    for _ in range(2):
        if on_full == "error":
            with pytest.raises(BudgetError, match="host budget"):
                gradients(model, tokens, context)
        else:
            assert_same(gradients(model, tokens, context), expected)
        assert_settled(context)
    report = context.report()
    assert report.host_peak <= budget
    moved = {"keep": report.over_budget, "spill": report.spilled}
    assert on_full == "error" or moved[on_full].count > 0
    assert_same(gradients(model, tokens), expected)


def test_full_host_and_device_budgets():
    model, tokens = build()
    expected = gradients(model, tokens)
    half = wanted() // 2
    context = offload(min_bytes=MIN_BYTES, host_budget=half, gpu_budget=half // 2)
    with pytest.raises(BudgetError, match="host and device budgets"):
        gradients(model, tokens, context)
    assert_settled(context)
    report = context.report()
    assert report.host_peak <= half and report.device_peak <= half // 2
    enough = offload(min_bytes=MIN_BYTES, host_budget=half, gpu_budget=2 * half)
    assert_same(gradients(model, tokens, enough), expected)


def test_a_full_disk_falls_back_to_keeping(tmp_path, monkeypatch):
    model, tokens = build()
    expected = gradients(model, tokens)
    context = offload(min_bytes=MIN_BYTES, host_budget=0, on_full="spill", spill_dir=str(tmp_path))
    monkeypatch.setattr(disk_module, "RESERVE", 1 << 60)
    assert_same(gradients(model, tokens, context), expected)
    assert_settled(context)
    report = context.report()
    assert report.spilled.count == 0 and report.over_budget.count > 20
    monkeypatch.undo()
    assert_same(gradients(model, tokens, context), expected)
    assert context.report().spilled.count > 20, "there is room again"


@pytest.mark.parametrize("at", [0, 3])
def test_a_disk_that_fails_while_it_writes(tmp_path, monkeypatch, at):
    model, tokens = build()
    expected = gradients(model, tokens)
    context = offload(min_bytes=MIN_BYTES, host_budget=0, on_full="spill", spill_dir=str(tmp_path))
    write, left = BlockFile.write, [at]

    def failing(file, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(file, data, offset)

    monkeypatch.setattr(BlockFile, "write", failing)
    for _ in range(2):
        assert_same(gradients(model, tokens, context), expected)
        assert_settled(context)


def test_a_disk_that_cannot_be_read(tmp_path, monkeypatch):
    model, tokens = build()
    expected = gradients(model, tokens)
    context = offload(min_bytes=MIN_BYTES, host_budget=0, on_full="spill", spill_dir=str(tmp_path))

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
        assert_settled(context)
    assert_same(gradients(model, tokens, context), expected)


# Interrupts


def own_modules() -> list[ModuleType]:
    return [m for name, m in sys.modules.items() if name.startswith("sidelane.") and hasattr(m, "__file__")]


def small_step(context, x: Tensor) -> Tensor:
    """A gradient by way of a packed, a deduplicated and a kept tensor."""
    with context:
        h = x * 2
        y = (h.exp() * h.t().tanh().t()).sum() + x[0].square().sum()
    return torch.autograd.grad(y, x)[0]


def interrupt_everywhere(folder, policy: str, every: int) -> None:
    """Interrupt a step at every so many of the points, about 2,000, at which signals are let in."""
    x = torch.randn(64, 64, requires_grad=True)
    expected = small_step(nullcontext(), x)
    spill = {"host_budget": 20 * KIB, "on_full": "spill", "spill_dir": str(folder)}
    context = offload(min_bytes=KIB, **(spill if policy == "spill" else {}))

    def step():
        if policy == "nested":
            with offload(min_bytes=0):
                small_step(context, x)
        else:
            small_step(context, x)

    step()
    modules = own_modules()
    for at in count(0, every):
        hit = interrupted(step, at, *modules)
        try:
            assert_settled(context)
            assert torch.equal(small_step(context, x), expected)
        except AssertionError as error:
            error.args = (f"at point {at}: {error}",)
            raise
        if not hit:
            break
    assert at > 1000


@pytest.mark.parametrize("policy", ["host", "spill", "nested"])
def test_an_interrupt_at_many_points(tmp_path, policy):
    interrupt_everywhere(tmp_path, policy, every=13)


@pytest.mark.soak
@pytest.mark.parametrize("policy", ["host", "spill", "nested"])
def test_an_interrupt_at_any_point(tmp_path, policy):
    interrupt_everywhere(tmp_path, policy, every=1)


@pytest.mark.soak
# What hits a callback of the standard library's weak dictionaries is reported by the interpreter, and lost.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_by_a_timer():
    """As a user presses Ctrl-C: whenever the interpreter lets signals in, C code included."""
    model, tokens = build()
    expected = gradients(model, tokens)
    context = offload(min_bytes=MIN_BYTES)
    before = time.perf_counter()
    gradients(model, tokens, context)
    duration = time.perf_counter() - before

    def stop(*args):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, stop)
    hits = 0
    try:
        for i in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, duration * (0.02 + (i * 0.618) % 1))
                gradients(model, tokens, context)
            except KeyboardInterrupt:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert_settled(context)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert hits > 10
    assert_same(gradients(model, tokens, context), expected)
