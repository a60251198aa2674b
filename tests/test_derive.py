"""Tensors that others make again, and those of which the upper halves are all: every bit comes back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from models import assert_same
from plans import force
from sidelane.pipeline import derive as derive_module
from sidelane.pipeline.derive import is_widened, recipe_of, same_bits, upper_halves
from sidelane.pipeline.offload import offload
from sidelane.pipeline.stash import Kept
from sidelane.pipeline.step_model import DERIVED, HERE, UPPER, Choice

automatic = partial(offload, "auto", min_bytes=1024, gpu_budget=1 << 30, checker=True)
TOKENS, WIDTH = 64, 48


def made_by(function, *inputs):
    """The result, and its recipe as of a hook that comes to save it."""
    with saved_tensors_hooks(Kept, Kept.open):
        result = function(*inputs)
    return result, recipe_of(result)


def again(recipe):
    with torch.no_grad():
        return recipe.run([source.open() for source in recipe.sources])


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


MAKERS = {
    "product": lambda x, y: x * y,
    "silu": lambda x, y: F.silu(x),
    "gelu": lambda x, y: F.gelu(x),
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh"),
    "norm": lambda x, y: (x * x.detach().square().mean(-1, keepdim=True).rsqrt().requires_grad_()).bfloat16(),
    "weighted": lambda x, y: y[0] * x,
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_operations_come_out_the_same(maker, dtype, transposed):
    def made(x, y):
        x, y = x * 1, y * 1  # no leaves
        return maker(x.t(), y.t()) if transposed else maker(x, y)

    result, recipe = made_by(made, leaf(30, 70, dtype=dtype), leaf(30, 70, dtype=dtype))
    flat = again(recipe)
    assert flat.dtype == result.dtype and flat.ndim == 1 and flat.storage_offset() == 0
    assert torch.equal(flat, torch.empty(0, dtype=result.dtype).set_(result.untyped_storage()))


def test_a_view_has_the_recipe_of_what_it_views():
    x, y = leaf(30, 70), leaf(30, 70)
    result, recipe = made_by(lambda: (x * y).view(70, 30))
    assert torch.equal(again(recipe).view(70, 30), result)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + x,
        lambda x: x * 2.0,  # a number is not saved through hooks
        lambda x: x * torch.ones(40, 40),  # x is not saved
        lambda x: (x * x).mul_(2.0),
        lambda x: (x * x)[:20],
        lambda x: (x * x)[0].expand(40, 40),
        lambda x: (x * x).conj() if x.is_complex() else x.exp(),
        lambda x: x,
    ],
)
def test_what_has_no_recipe(function):
    assert made_by(function, leaf(40, 40))[1] is None


def test_a_change_without_autograd_is_seen():
    x = leaf(40, 40)
    result, recipe = made_by(lambda: x * x)
    assert recipe is not None
    with torch.no_grad():
        result.add_(1)
    assert recipe_of(result) is None


def test_without_hooks_there_are_no_sources_that_are_ours():
    x = leaf(40, 40)
    recipe = recipe_of(x * x)
    assert recipe is None or not any(isinstance(source, Kept) for source in recipe.sources)


def test_bits_are_compared():
    x = torch.tensor([0.0, 1.0, float("nan")])
    assert same_bits(x, x.clone()) and not same_bits(x, -x)
    assert same_bits(torch.zeros(4, 2).t().reshape(-1), torch.zeros(2, 4))
    assert not same_bits(torch.tensor([1, 2, 3], dtype=torch.int8), torch.tensor([1, 2, 4], dtype=torch.int8))


def test_upper_halves_are_all_bits_of_what_was_bfloat16():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    x = bits.view(torch.bfloat16)
    wide = x.float()
    assert torch.equal(
        upper_halves(wide).view(torch.int16), wide.view(torch.int32).bitwise_right_shift(16).short()
    )
    assert torch.equal(upper_halves(wide).float().view(torch.int32), wide.view(torch.int32))


def test_what_was_widened():
    x = leaf(8, 8, dtype=torch.bfloat16)
    wide = (x * 1).float()
    assert is_widened(wide) and is_widened(x.float()) and is_widened(wide.view(64))
    assert not is_widened((x * 1).half().float())
    assert not is_widened(x.double()) and not is_widened(x * 1) and not is_widened(wide.mul_(3))


# In a context


class Gated(nn.Module):
    """A norm in float32 and a gated layer, as in a Llama."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH).bfloat16())
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, dtype=torch.bfloat16) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x):
        wide = x.float()
        normed = (wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()).to(x.dtype)
        y = self.weight * self.between(normed)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def between(self, x):
        return x


def step(blocks, around):
    blocks.zero_grad()
    device = blocks[0].weight.device
    x = torch.linspace(-2, 2, TOKENS * WIDTH, device=device).view(TOKENS, WIDTH).bfloat16().requires_grad_()
    with around:
        y = x * 1
        for block in blocks:
            y = block(y)
    y.float().square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in blocks.parameters())]


@pytest.fixture
def blocks():
    torch.manual_seed(3)
    return nn.ModuleList(Gated() for _ in range(3))


def settled(context):
    report = context.report()
    return (report.host_bytes, report.device_bytes, report.tickets) == (0, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("prefer", [f"here {DERIVED}", f"here {UPPER}", f"away {UPPER}", "away raw", None])
@pytest.mark.parametrize("gpu_budget", [1 << 30, 60_000, 0])
def test_gradients_on_a_gpu_are_bitwise_unchanged(cuda, monkeypatch, blocks, gpu_budget, prefer):
    force(monkeypatch, prefer)
    blocks.to(cuda)
    expected = step(blocks, torch.enable_grad())
    context = automatic(gpu_budget=gpu_budget, checker=False)
    for _ in range(5):
        assert_same(step(blocks, context), expected)
        assert settled(context)
    lane = (prefer or "").partition(" ")[2]
    assert sum(choice.lane == lane for choice in context.plan.choices) >= 3 * (prefer is not None)


@pytest.mark.parametrize("checker", [False, True])
@pytest.mark.parametrize("prefer", [f"here {DERIVED}", f"here {UPPER}", f"away {UPPER}", None])
def test_gradients_are_bitwise_unchanged(monkeypatch, blocks, prefer, checker):
    force(monkeypatch, prefer)
    expected = step(blocks, torch.enable_grad())
    context = automatic(checker=checker)
    for _ in range(4):
        assert_same(step(blocks, context), expected)
        assert settled(context)
    choices = context.plan.choices
    if prefer is not None:
        lane = prefer.partition(" ")[2]
        # Per block: normed, with its weight, silu and product; the wide input of the norm.
        assert sum(choice.lane == lane for choice in choices) == 3 * {DERIVED: 4, UPPER: 1}[lane]


def test_derived_tensors_hold_nothing_and_sources_are_decoded_once(monkeypatch, blocks):
    force(monkeypatch, f"here {DERIVED}")
    context = automatic(checker=False)
    for _ in range(4):
        step(blocks, context)
    before = context.report()
    step(blocks, context)
    after = context.report()
    lesson, script = context.plan.script.lesson, context.plan.script
    derived = [
        e.weight for e, c in zip(lesson.entries, script.plan.choices, strict=True) if c.lane == DERIVED
    ]
    assert after.kept[DERIVED].nbytes - before.kept[DERIVED].nbytes == sum(derived) > 0
    assert after.decodes - before.decodes == len(derived), (
        "each is made once, for its own use and as a source"
    )
    assert after.device_peak == max(script.plan.forecast.held, before.device_peak)


def test_what_the_graph_does_not_show_is_found_by_comparing(monkeypatch, blocks):
    """An intermediate that nobody saves is changed without autograd."""
    plans = force(monkeypatch, f"here {DERIVED}")

    def forward(x):
        wide = x.float()
        y = wide * wide.pow(2).mean(-1, keepdim=True).rsqrt()
        with torch.no_grad():
            y.mul_(1.5)
        y = Gated.weight_of(blocks[1]) * y.to(x.dtype)
        return x + blocks[1].down(F.silu(blocks[1].gate(y)) * blocks[1].up(y))

    Gated.weight_of = staticmethod(lambda block: block.weight)
    blocks[1].forward = forward
    expected = step(blocks, torch.enable_grad())
    context = automatic()
    for _ in range(4):
        assert_same(step(blocks, context), expected)
    assert sum(choice.lane == DERIVED for choice in plans[-1].choices) == 3 * 4 - 1


def test_without_memory_to_try_it_out_nothing_is_derived(monkeypatch, blocks):
    def fail(recipe, sources):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(derive_module.Recipe, "run", fail)
    plans = force(monkeypatch, f"here {DERIVED}")
    expected = step(blocks, torch.enable_grad())
    context = automatic()
    for _ in range(3):
        assert_same(step(blocks, context), expected)
    assert plans and all(choice.lane != DERIVED for choice in plans[-1].choices)


def test_a_tensor_that_cannot_be_derived_any_more_is_stored(monkeypatch, blocks):
    force(monkeypatch, f"here {DERIVED}")

    def touched(x):
        with torch.no_grad():
            return x.add_(0.25)

    context = automatic()
    for _ in range(3):
        step(blocks, context)
    blocks[1].between = touched
    expected = step(blocks, torch.enable_grad())
    for _ in range(3):
        assert_same(step(blocks, context), expected)
        assert settled(context)


def test_only_what_may_lose_bits_is_derived_from_what_may(monkeypatch):
    """A column of statistics stays exact, though its factors may not."""
    force(monkeypatch, f"here {DERIVED}")
    x = torch.randn(2048, 4).requires_grad_()

    def run(around):
        x.grad = None
        with around:
            a, b = x.sin(), x.cos()
            rows = a * b  # may lose bits, as its factors
            column = a[:, :1].contiguous() * b[:, :1].contiguous()
            out = (rows.exp() * rows).sum() + (column.exp() * column).sum()
        out.backward()
        return x.grad

    expected = run(torch.enable_grad())
    for options in ({}, {"bits": 8}, {"max_rel_error": 0.1}):
        context = automatic(**options)
        for _ in range(3):
            got = run(context)
        if not options:
            assert torch.equal(got, expected)
        lesson = context.plan.script.lesson
        derived = [e.weight for e in lesson.entries if e.sources is not None]
        rows, column = 2048 * 4 * 4, 2048 * 4
        wanted = {"": [rows, column], "bits": [rows, column], "max_rel_error": [column]}
        assert set(derived) == set(wanted[next(iter(options), "")])
        assert (got - expected).norm() <= 0.2 * expected.norm()


def test_weights_are_no_sources_where_processes_train_together(monkeypatch, blocks):
    monkeypatch.setattr(derive_module, "is_distributed", lambda: True)
    force(monkeypatch, f"here {DERIVED}")
    expected = step(blocks, torch.enable_grad())
    context = automatic()
    for _ in range(3):
        assert_same(step(blocks, context), expected)
    assert context.plan.choices.count(Choice(HERE, DERIVED)) == 3 * 3


def test_derived_tensors_and_blocks_that_run_again(monkeypatch, blocks):
    force(monkeypatch, None, recompute=0.5)
    expected = step(blocks, torch.enable_grad())
    for _ in range(4):
        context = automatic(blocks=blocks, gpu_budget=40_000)
        for _ in range(4):
            assert_same(step(blocks, context), expected)
            assert settled(context)


def test_backward_twice(monkeypatch, blocks):
    force(monkeypatch, f"here {DERIVED}")
    context = automatic()
    for _ in range(3):
        step(blocks, context)
    x = torch.randn(TOKENS, WIDTH).bfloat16()

    def grads(around):
        with around:
            y = x
            for block in blocks:
                y = block(y)
            loss = y.float().sum()
        out = [torch.autograd.grad(loss, list(blocks.parameters()), retain_graph=True) for _ in range(2)]
        return [grad for pair in out for grad in pair]

    assert_same(grads(context), grads(torch.enable_grad()))
    assert settled(context)
