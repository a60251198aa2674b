"""Offload on a real device: races are provoked with sleeping kernels and latches, never waited for."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from latch import LIMIT, Latch
from models import MIN_BYTES, assert_same, build, gradients, loss_of, settled
from races import SLEEP, garbage
from sidelane.errors import BudgetError
from sidelane.pipeline import store as store_module
from sidelane.pipeline.checkpoint import checkpoint
from sidelane.pipeline.offload import offload
from sidelane.pipeline.streams import side_stream
from sidelane.pipeline.tiers import PacketLayout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("math_attention")]

EXACT_BYTES = store_module.EXACT_BYTES
exact = partial(offload, min_bytes=MIN_BYTES)


@pytest.fixture(autouse=True)
def _small_tensors_are_coded(monkeypatch):
    monkeypatch.setattr(store_module, "EXACT_BYTES", 0)


@pytest.mark.parametrize("lane", ["raw", "exact"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gpu_budget", [None, 200_000, 20_000, 0])
def test_gradients_are_bitwise_unchanged(cuda, lane, autocast, gpu_budget):
    model, tokens = build(cuda)
    expected = gradients(model, tokens, autocast=autocast)
    assert_same(gradients(model, tokens, autocast=autocast), expected)  # the step repeats
    context = exact(lane, gpu_budget=gpu_budget)
    for inside in (False, True):
        assert_same(gradients(model, tokens, context, autocast=autocast, backward_inside=inside), expected)
    report = context.report()
    assert report.total.count > 40
    assert settled(context)
    assert gpu_budget is None or report.device_peak <= gpu_budget
    if gpu_budget is None:
        assert report.host_peak == report.fetched == 0
    if gpu_budget == 0:
        assert report.fetched > 0 and report.prefetched == 0


@pytest.mark.parametrize("where", ["compute", "out", "in"])
@pytest.mark.parametrize("gpu_budget", [None, 200_000, 20_000, 0])
def test_no_order_of_streams_changes_gradients(cuda, monkeypatch, where, gpu_budget):
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    write, read = PacketLayout.write, PacketLayout.read_to
    copies = iter(range(1 << 30))

    def slow(copy, self, *args):
        if next(copies) % 8 == 0:
            torch.cuda._sleep(SLEEP)
        return copy(self, *args)

    if where == "out":
        monkeypatch.setattr(PacketLayout, "write", lambda self, *args: slow(write, self, *args))
    if where == "in":
        monkeypatch.setattr(PacketLayout, "read_to", lambda self, *args: slow(read, self, *args))
    if where == "compute":
        plain = model.wrap

        def wrap(block, x, **kwargs):
            torch.cuda._sleep(SLEEP)
            return plain(block, x, **kwargs)

        model.wrap = wrap
    for _ in range(2):
        context = exact(gpu_budget=gpu_budget)
        model.zero_grad()
        with context:
            loss = loss_of(model, tokens)
            garbage(cuda)
        loss.backward()
        garbage(cuda)
        assert_same([p.grad for p in model.parameters()], expected)
    assert where == "compute" or gpu_budget is None or next(copies) > 8


@pytest.mark.parametrize("lane", ["exact", "packed", "raw"])
def test_all_memory_of_the_device_is_of_the_stream_that_computes(cuda, lane):
    """Other streams would have pools of their own, which the forward pass cannot use."""

    def streams():
        return {segment["stream"] for segment in torch.cuda.memory_snapshot()}

    model, tokens = build(cuda)
    context = offload(lane, min_bytes=MIN_BYTES, gpu_budget=20_000)
    gc.collect()
    torch.cuda.empty_cache()
    before = streams()
    for _ in range(2):
        gradients(model, tokens, context)
    assert context.report().fetched > 0
    assert streams() <= before | {torch.cuda.current_stream().cuda_stream}


def test_model_on_another_stream(cuda):
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    context = exact(gpu_budget=20_000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        got = gradients(model, tokens, context)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(got, expected)


def test_a_function_that_launches_on_its_own_stream(cuda):
    other = torch.cuda.Stream()

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            current = torch.cuda.current_stream()
            other.wait_stream(current)
            with torch.cuda.stream(other):
                torch.cuda._sleep(SLEEP)
                y = x * x
            current.wait_stream(other)
            y.record_stream(current)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            return 2 * x * grad + 0 * y

    x = torch.randn(256, 256, device=cuda, requires_grad=True)
    grads = []
    for context in (nullcontext(), exact(gpu_budget=0)):
        with context:
            y = Square.apply(Square.apply(x * 2).sin()).sum()
        garbage(cuda)
        grads.append(torch.autograd.grad(y, x)[0])
    assert torch.equal(*grads)


def test_views_of_unpacked_tensors_outlive_their_node(cuda):
    class ReturnsSaved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, table):
            ctx.save_for_backward(table)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            (table,) = ctx.saved_tensors
            return table[1:-1].t().t(), None

    table = torch.randn(258, 256, device=cuda)
    x = torch.zeros(256, 256, device=cuda, requires_grad=True)
    for gpu_budget in (1 << 20, 0):
        context = exact(gpu_budget=gpu_budget)
        with context:
            y = ReturnsSaved.apply(x, table).sum()
        assert context.report().total.count == 1
        (grad,) = torch.autograd.grad(y, x)
        del y
        garbage(cuda)
        assert torch.equal(grad, table[1:-1])


def test_a_change_in_place_after_packing_does_not_reach_the_gradient(cuda):
    x = torch.randn(512, 512, device=cuda, requires_grad=True)
    with torch.cuda.stream(side_stream(x.device, "copy out")):
        torch.cuda._sleep(SLEEP)  # the copy out comes after the change
    with exact("raw"):
        h = x * 1
        y = (h * h).sum()
    with torch.no_grad():
        h.zero_()
    y.backward()
    assert torch.equal(x.grad, 2 * x)


def test_device_memory_returns_to_its_level(cuda):
    model, tokens = build(cuda)
    context = exact()
    gradients(model, tokens, context)
    torch.cuda.synchronize()
    level = torch.cuda.memory_allocated()
    for i in range(20):
        with context:
            loss = loss_of(model, tokens)
        if i % 2:
            loss.backward()
        del loss
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == level
        assert context.report().host_bytes == 0


def test_offloading_lowers_peak_memory(cuda):
    layers = torch.nn.Sequential(*(torch.nn.Tanh() for _ in range(16)))
    peaks = []
    for context in (nullcontext(), exact("raw", gpu_budget=32 << 20)):
        x = torch.randn(8 << 20, device=cuda, requires_grad=True)  # 32 MiB
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with context:
            y = layers(x).sum()
        y.backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        del x, y
    assert peaks[1] < peaks[0] - (200 << 20)


def test_full_budgets(cuda):
    x = torch.randn(1 << 20, device=cuda, requires_grad=True)
    with pytest.raises(BudgetError), exact(host_budget=0, gpu_budget=0):
        (x * 2).exp()
    context = exact(host_budget=5 << 20, gpu_budget=64 << 20)
    with context:
        y = (x * 2).exp().sin().cos().sum()
    report = context.report()
    assert report.over_budget.count >= 1 and report.host_peak <= 5 << 20
    (got,) = torch.autograd.grad(y, x)
    assert torch.equal(got, torch.autograd.grad((x * 2).exp().sin().cos().sum(), x)[0])


def test_spill(cuda, tmp_path):
    x = torch.randn(1 << 18, device=cuda, requires_grad=True)
    context = exact(host_budget=0, on_full="spill", spill_dir=str(tmp_path))
    with context:
        y = (x * 2).exp().sin().sum()
    assert context.report().spilled.count == 1
    (got,) = torch.autograd.grad(y, x)
    assert torch.equal(got, torch.autograd.grad((x * 2).exp().sin().sum(), x)[0])


@pytest.mark.parametrize("inside", [False, True])
def test_checkpoint_restores_device_random_state(cuda, inside):
    model, tokens = build(cuda, wrap=lambda block, x, **kw: checkpoint(block, x, **kw))
    expected = gradients(build(cuda)[0], tokens)
    context = exact(gpu_budget=0)
    state = torch.cuda.get_rng_state()
    assert_same(gradients(model, tokens, context, backward_inside=inside), expected)
    assert context.report().total.count > 0 and state.shape == torch.cuda.get_rng_state().shape


def test_threads_with_their_own_streams(cuda):
    xs = [torch.randn(256, 256, device=cuda, requires_grad=True) for _ in range(3)]
    torch.cuda.synchronize()

    def loss(x):
        return (x * 2).exp().sin().cos().sum()

    expected = [torch.autograd.grad(loss(x), x)[0] for x in xs]
    torch.cuda.synchronize()
    context = exact(gpu_budget=1 << 20)
    got = {}

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                with context:
                    y = loss(xs[i])
                (got[i],) = torch.autograd.grad(y, xs[i])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, e in enumerate(expected):
        assert torch.equal(got[i], e)


def test_graph_capture_keeps_tensors(cuda):
    x = torch.randn(256, 256, device=cuda, requires_grad=True)
    context = exact()

    def run():
        with context:
            return torch.autograd.grad((x * 2).exp().sin().sum(), x)[0]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    packed = context.report().total.count
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = run()
    assert context.report().total.count == packed and context.report().kept["graph capture"].count > 0
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    assert torch.equal(grad, torch.autograd.grad((x * 2).exp().sin().sum(), x)[0])


def test_lossy_gradients_equal_those_of_a_synchronous_round_trip(cuda):
    model, tokens = build(cuda)
    options = {"max_rel_error": 0.05, "min_bytes": MIN_BYTES}
    kept_on_device = gradients(model, tokens, offload(host_budget=0, **options))
    context = offload(gpu_budget=0, **options)
    assert_same(gradients(model, tokens, context), kept_on_device)
    assert 0 < context.report().total.worst_error <= 0.05


def test_small_tensors_of_the_exact_lane_cross_raw(cuda, monkeypatch):
    monkeypatch.setattr(store_module, "EXACT_BYTES", (1 << 20) + 1)
    x = torch.randn(1 << 18, device=cuda, requires_grad=True)
    context = exact()
    with context:
        y = (x * 2).exp().sum() + (torch.cat((x, x[:4])) * 2).exp().sum()
    assert sorted(row.lane for row in context.report().classes) == ["exact", "raw"]
    y.backward()


def test_the_host_does_not_wait_for_the_sizes_of_exact_codes(cuda):
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    context = exact(gpu_budget=64 << 20)
    for seconds in (0, 0, LIMIT):  # first, compile, pin and learn
        model.zero_grad()
        with Latch(seconds) as latch:
            with context:
                loss = loss_of(model, tokens)
            early = latch.holds
        loss.backward()
        assert_same([p.grad for p in model.parameters()], expected)
    assert early


@pytest.mark.parametrize("gpu_budget", [None, 64 << 20])
def test_backward_may_be_enqueued_before_any_size_is_known(cuda, gpu_budget):
    """The host waits then, on the thread of backward."""
    model, tokens = build(cuda)
    expected = gradients(model, tokens)
    context = exact(gpu_budget=gpu_budget)
    for _ in range(2):
        gradients(model, tokens, context)
    model.zero_grad()
    with Latch(0.5), context:
        loss_of(model, tokens).backward()
    assert_same([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("gpu_budget", [None, 64 << 20, 3 << 20, 0])
def test_tensors_that_do_not_become_smaller_come_back(cuda, gpu_budget):
    """Half of them are raw in the end, which the host learns after they are gone."""

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, saved):
            ctx.save_for_backward(saved)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + ctx.saved_tensors[0].view(torch.int16).sum(), None

    def run(context):
        generator = torch.Generator(cuda).manual_seed(0)
        x = torch.zeros((), device=cuda, requires_grad=True)
        with context:
            y = x
            for i in range(16):
                saved = torch.randint(-(2**15), 2**15, (1 << 18,), device=cuda, generator=generator)
                if i % 2:
                    saved = saved % 256 + 0x3F00  # ordinary exponents
                y = Saves.apply(y, saved.short().view(torch.bfloat16))
                del saved
        garbage(cuda)
        y.backward()
        return x.grad

    context = exact(gpu_budget=gpu_budget)
    assert torch.equal(run(context), run(nullcontext()))
    assert sorted((row.lane, row.count) for row in context.report().classes) == [("exact", 8), ("raw", 8)]


def test_the_host_never_waits_for_the_device_in_the_packed_lane(cuda, monkeypatch):
    """The device is held up while a whole step is enqueued. What stays exact crosses raw, as it does below
    `EXACT_BYTES`: backward waits for the size of an exact code."""
    monkeypatch.setattr(store_module, "EXACT_BYTES", EXACT_BYTES)
    model, tokens = build(cuda)
    expected = None
    context = offload("packed", bits=4, min_bytes=MIN_BYTES, gpu_budget=100_000)
    for seconds in (0, 0, 0, LIMIT):  # first, compile, pin and learn
        model.zero_grad()
        with Latch(seconds) as latch:
            with context:
                loss = loss_of(model, tokens)
            loss.backward()
            early = latch.holds
        grads = [p.grad.clone() for p in model.parameters()]
        assert_same(grads, expected or grads)
        expected = grads
    assert early
