"""Blocks of which a plan keeps all: what they save costs two calls, and is counted and checked as ever."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import models
from interrupt import interrupted
from models import MIN_BYTES, assert_same, build, gradients, loss_of, settled
from plans import force
from sidelane.errors import OffloadError
from sidelane.pipeline import passage as passage_module
from sidelane.pipeline import step_auto as auto_module
from sidelane.pipeline.offload import offload
from sidelane.pipeline.passage import Passage, Passed
from sidelane.pipeline.recorder import Trip

automatic = partial(offload, "auto", min_bytes=MIN_BYTES)
SETTLED = 3  # steps: one learns, two are timed
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
push_hooks = torch._C._autograd._push_saved_tensors_default_hooks


@pytest.fixture(autouse=True)
def _four_blocks(monkeypatch):
    monkeypatch.setattr(models, "LAYERS", 4)


@pytest.fixture
def passed(monkeypatch) -> list[Passed]:
    """Those that were made since the list was cleared, alive or not: their numbers and claims."""
    made: list = []

    class Counted(Passed):
        __slots__ = ()

        def __init__(self, tensor, claim, trip, number):
            super().__init__(tensor, claim, trip, number)
            made.append((number, claim.nbytes))

    monkeypatch.setattr(passage_module, "Passed", Counted)
    return made


def below(monkeypatch) -> list[torch.Size]:
    """Shapes of tensors that reach the hooks of a context."""
    shapes: list[torch.Size] = []
    pack = offload._pack
    monkeypatch.setattr(offload, "_pack", lambda self, x: shapes.append(x.shape) or pack(self, x))
    return shapes


@pytest.mark.parametrize("autocast", [False, True])
def test_kept_blocks_do_not_reach_the_context(monkeypatch, passed, autocast):
    model, tokens = build()
    expected = gradients(model, tokens, autocast=autocast)
    context = automatic(gpu_budget=1 << 30, blocks=model.blocks)
    for _ in range(SETTLED):
        assert_same(gradients(model, tokens, context, autocast=autocast), expected)
    assert not passed, "a step that is timed goes through the context"
    shapes = below(monkeypatch)
    with context:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, tokens)
        peak = context.report().device_bytes
    loss.backward()
    assert_same([p.grad for p in model.parameters()], [2 * g for g in expected])
    script = context.plan.script
    blocks = {call.number for row in script.lesson.rows[1::2] for call in row}
    assert {number for number, _ in passed} == blocks
    assert len(shapes) < 20, "only what lies between the blocks"
    assert peak == script.plan.forecast.held, "counted once, as planned"
    assert settled(context)


def test_only_blocks_that_keep_all_are_passed(monkeypatch, passed):
    force(monkeypatch, "keep raw", recompute=0.5)
    model, tokens = build()
    expected = gradients(model, tokens)
    context = automatic(gpu_budget=1 << 30, blocks=model.blocks)
    for _ in range(SETTLED + 2):
        passed.clear()
        assert_same(gradients(model, tokens, context), expected)
    script = context.plan.script
    assert 0 < sum(context.plan.recompute) < 4
    kept = [
        row for row, again in zip(script.lesson.rows[1::2], context.plan.recompute, strict=True) if not again
    ]
    assert {number for number, _ in passed} == {call.number for row in kept for call in row}
    assert settled(context)


def test_a_budget_that_turns_out_too_small(monkeypatch, passed):
    """Plans that do not fit send off what has no room, as without the short way."""
    force(monkeypatch, "keep raw")
    model, tokens = build()
    expected = gradients(model, tokens)
    context = automatic(gpu_budget=50_000, blocks=model.blocks)
    for _ in range(SETTLED + 2):
        assert_same(gradients(model, tokens, context), expected)
        assert settled(context)
    assert passed and context.report().device_peak <= 50_000


def test_a_block_that_saves_something_else_is_learned_again(monkeypatch, passed):
    force(monkeypatch, "keep raw")
    model, tokens = build()
    context = automatic(gpu_budget=1 << 30, blocks=model.blocks)
    plain = model.blocks[2].forward
    for _ in range(SETTLED + 1):
        gradients(model, tokens, context)
    count = len(context.plan.script.lesson.entries)
    model.blocks[2].forward = lambda x, **kw: plain(x, **kw) * x.exp()
    expected = gradients(model, tokens)
    for _ in range(SETTLED + 3):
        passed.clear()
        assert_same(gradients(model, tokens, context), expected)
        assert settled(context)
    assert len(context.plan.script.lesson.entries) > count and passed


def test_a_change_in_place_is_found(monkeypatch, passed):
    force(monkeypatch, "keep raw")

    class Changing(nn.Linear):
        change = False

        def forward(self, x):
            x = super().forward(x).exp()
            y = x.sin()
            if self.change:
                x.data.add_(0)
                x.add_(1)
            return y

    blocks = nn.ModuleList(Changing(64, 64) for _ in range(2))
    context = automatic(gpu_budget=1 << 20, blocks=blocks)

    def step():
        with context:
            y = torch.ones(64, 64)
            for block in blocks:
                y = block(y)
        y.sum().backward()

    for _ in range(SETTLED + 1):
        step()
    assert passed
    blocks[1].change = True
    with pytest.raises(OffloadError, match="modified in place"):
        step()
    blocks[1].change = False
    step()
    assert settled(context)


def test_no_hooks_are_left_behind(monkeypatch, passed):
    force(monkeypatch, "keep raw")
    monkeypatch.setattr(auto_module, "DRIFT", float("inf"))  # steps that are traced take longer
    model, tokens = build()
    expected = gradients(model, tokens)
    context = automatic(gpu_budget=1 << 30, blocks=model.blocks)
    for _ in range(SETTLED):
        gradients(model, tokens, context)
    handle = model.blocks[2].norm2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(model, tokens, context)
    handle.remove()
    assert top_hooks(True) is None
    at = 0
    while interrupted(lambda: gradients(model, tokens, context), at, passage_module):
        assert top_hooks(True) is None, f"at point {at}"
        assert_same(gradients(model, tokens, context), expected)
        assert settled(context)
        at += 1 if at < 40 else 97
    assert at > 500 and passed


class Grouped(nn.Linear):
    """Blocks of which the first hands what is saved, up to the end of the last, to hooks of its own."""

    first = last = False

    def __init__(self, packed):
        super().__init__(64, 64)
        self.packed = packed

    def forward(self, x):
        if self.first:
            Grouped.hooks = saved_tensors_hooks(lambda x: self.packed.append(x.shape) or x, lambda x: x)
            Grouped.hooks.__enter__()
        y = super().forward(x).sin()
        if self.last:
            Grouped.hooks.__exit__()
        return y


def test_hooks_that_a_block_leaves_behind_stay_until_another_removes_them(monkeypatch, passed):
    force(monkeypatch, "keep raw", recompute=1.0)
    packed: list = []
    blocks = nn.ModuleList(Grouped(packed) for _ in range(4))
    blocks[1].first = blocks[2].last = True
    x = torch.ones(64, 64)

    def step(around):
        blocks.zero_grad()
        with around:
            y = x
            for block in blocks:
                y = block(y)
        assert top_hooks(True) is None
        y.sum().backward()
        return [p.grad.clone() for p in blocks.parameters()]

    expected = step(nullcontext())
    grouped = len(packed)
    context = automatic(gpu_budget=1 << 30, blocks=blocks)
    for _ in range(SETTLED + 2):
        packed.clear(), passed.clear()
        assert_same(step(context), expected)
        assert len(packed) == grouped > 0
        assert settled(context)
    # The second block left its hooks, and the context never saw the third.
    assert context.plan.recompute == (True, False, True)
    force(monkeypatch, "keep raw")
    context = automatic(gpu_budget=1 << 30, blocks=blocks)
    for _ in range(SETTLED + 2):
        packed.clear(), passed.clear()
        assert_same(step(context), expected)
        assert len(packed) == grouped
    assert passed and settled(context)


def installed_after(below, pushed, at=1 << 30):
    """The hooks above none after a block that pushes some, in order; and whether an interrupt came."""

    def forward():
        for pair in pushed:
            push_hooks(*pair)

    push_hooks(*below)
    trip = Trip(torch.device("cpu"), None, False, 0)
    hit = interrupted(lambda: Passage(trip, None, 0, None).run(forward, (), {}), at, passage_module)
    left = []
    while (found := top_hooks(True)) is not None:
        left.insert(0, found)
        pop_hooks()
    return left, hit


def test_interrupts_while_hooks_change_places():
    """Ours go, those on top of them and below stay in their order."""
    below, *pushed = [(lambda x: x, lambda x: x) for _ in range(3)]
    hit, at = True, 0
    while hit:
        left, hit = installed_after(below, pushed, at)
        assert left in ([below], [below, *pushed]), f"at point {at}"
        at += 1
    assert at > 20 and len(left) == 3


def test_hooks_may_be_installed_twice():
    below, pair = [(lambda x: x, lambda x: x) for _ in range(2)]
    assert installed_after(below, [pair, pair]) == ([below, pair, pair], False)


class Aggregate(nn.Module):
    """A layer over a graph, whose adjacency is sparse."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.adjacency = torch.eye(64).to_sparse()

    def forward(self, x):
        return torch.tanh(torch.sparse.mm(self.adjacency, self.linear(x)))


def test_kept_blocks_may_save_sparse_tensors():
    blocks = nn.ModuleList(Aggregate() for _ in range(3))
    context = automatic(gpu_budget=1 << 30, blocks=blocks)
    x = torch.ones(64, 32, requires_grad=True)

    def gradient(around):
        with around:
            y = x
            for block in blocks:
                y = block(y)
        return torch.autograd.grad(y.sum(), x)[0]

    expected = gradient(nullcontext())
    for _ in range(SETTLED + 2):
        assert torch.equal(gradient(context), expected)
    assert context.plan is not None and settled(context)


class Twice(nn.Module):
    """Saves x, and a copy of it where x is not contiguous."""

    def forward(self, x):
        return x.contiguous().cos() * x.sin()


TWICE = nn.ModuleList(Twice() for _ in range(4))


def held_by(context, transposed):
    with context:
        y = torch.ones(256, 256, requires_grad=True).sin()
        for block in TWICE:
            y = block(y.t() if transposed else y)
        held = context.report().device_bytes
    y.sum().backward()
    return held


def test_tensors_that_no_longer_share_memory_are_counted_each():
    learned = [automatic(gpu_budget=1 << 30, blocks=TWICE) for _ in range(2)]
    for _ in range(SETTLED + 2):
        held_by(learned[0], False)
        expected = held_by(learned[1], True)
    assert held_by(learned[0], True) == expected > 0
