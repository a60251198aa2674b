"""Tensors that others make again, and those of which the upper halves are all: every bit comes back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from models import assert_same
from plans import force
from sidelane.pipeline import derive as derive_module
from sidelane.pipeline import step_auto
from sidelane.pipeline.derive import equal_in_memory, is_widened, recipe_of, upper_halves
from sidelane.pipeline.lesson import BOUNDED
from sidelane.pipeline.offload import offload
from sidelane.pipeline.stash import Kept
from sidelane.pipeline.step_model import DERIVE, DERIVED, UPPER, Simulator
from sidelane.pipeline.step_plan import StepPlan

DERIVED_AGAIN = " ".join(DERIVE)  # as `force` names choices
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
    assert equal_in_memory(x, x.clone()) and not equal_in_memory(x, -x)
    assert equal_in_memory(torch.zeros(4, 2).t().reshape(-1), torch.zeros(2, 4))
    assert not equal_in_memory(
        torch.tensor([1, 2, 3], dtype=torch.int8), torch.tensor([1, 2, 4], dtype=torch.int8)
    )


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
@pytest.mark.parametrize("prefer", [DERIVED_AGAIN, f"here {UPPER}", f"away {UPPER}", "away raw", None])
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
@pytest.mark.parametrize("prefer", [DERIVED_AGAIN, f"here {UPPER}", f"away {UPPER}", None])
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
    force(monkeypatch, DERIVED_AGAIN)
    context = automatic(checker=False)
    for _ in range(4):
        step(blocks, context)
    before = context.report()
    step(blocks, context)
    after = context.report()
    lesson, script = context.plan.script.lesson, context.plan.script
    derived = [e.weight for e, c in zip(lesson.entries, script.plan.choices, strict=True) if c == DERIVE]
    assert after.kept[DERIVED].nbytes - before.kept[DERIVED].nbytes == sum(derived) > 0
    assert after.decodes - before.decodes == len(derived), (
        "each is made once, for its own use and as a source"
    )
    assert after.device_peak == max(script.plan.forecast.held, before.device_peak)


def test_what_the_graph_does_not_show_is_found_by_comparing(monkeypatch, blocks):
    """An intermediate that nobody saves is changed without autograd."""
    plans = force(monkeypatch, DERIVED_AGAIN)

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
    assert sum(choice == DERIVE for choice in plans[-1].choices) == 3 * 4 - 1


def test_without_memory_to_try_it_out_nothing_is_derived(monkeypatch, blocks):
    def fail(recipe, sources):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(derive_module.Recipe, "run", fail)
    plans = force(monkeypatch, DERIVED_AGAIN)
    expected = step(blocks, torch.enable_grad())
    context = automatic()
    for _ in range(3):
        assert_same(step(blocks, context), expected)
    assert plans and all(choice != DERIVE for choice in plans[-1].choices)


def test_a_tensor_that_cannot_be_derived_any_more_is_stored(monkeypatch, blocks):
    force(monkeypatch, DERIVED_AGAIN)

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
    force(monkeypatch, DERIVED_AGAIN)
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


def test_an_error_bound_permits_to_derive_where_nothing_loses_bits(monkeypatch):
    force(monkeypatch, DERIVED_AGAIN)
    plan = step_auto.plan_step

    def the_more_the_faster(*arguments):
        made = plan(*arguments)
        count = made.choices.count(DERIVE)
        return replace(made, forecast=replace(made.forecast, seconds=1 / (1 + count)))

    monkeypatch.setattr(step_auto, "plan_step", the_more_the_faster)
    x = torch.randn(2048, 4).requires_grad_()

    def run(around):
        x.grad = None
        with around:
            product = x.sin() * x.cos()
            out = (product.exp() * product).sum()
        out.backward()
        return x.grad

    expected, context = run(torch.enable_grad()), automatic(max_rel_error=0.1)
    for _ in range(3):
        assert torch.equal(run(context), expected)
    assert context.plan.choices.count(DERIVE) == 1


def test_what_trips_show_may_turn_a_plan_without_loss_into_one_with_it(monkeypatch):
    seconds = {False: 2.0, True: 1.0}  # by whether nothing may be lost

    def plan(step, limit, host_limit):
        lossless = all(code.lane != BOUNDED for saved in step.saved for code in saved.codes)
        force(monkeypatch, DERIVED_AGAIN if lossless else f"here {BOUNDED}")
        made = step_auto.plan_step(step, limit, host_limit)
        monkeypatch.setattr(step_auto, "plan_step", plan)
        return replace(made, forecast=replace(made.forecast, seconds=seconds[lossless]))

    monkeypatch.setattr(step_auto, "plan_step", plan)
    context, x = automatic(max_rel_error=0.1), torch.randn(2048, 4).requires_grad_()
    lanes = []
    for _ in range(10):
        with context:
            product = x.sin() * x.cos()
            out = (product.exp() * product).sum()
        out.backward()
        plan_now = context.plan
        lanes.append({choice.lane for choice in plan_now.choices} if plan_now else set())
        seconds[False] = 0.0 if len(lanes) > 2 else 2.0
    assert DERIVED in lanes[1] and BOUNDED not in lanes[1]
    assert any(BOUNDED in each for each in lanes)


class Look(torch.autograd.Function):
    """The sum of a tensor, which backward gets to see."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.save_for_backward(x)
        ctx.seen = seen
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(ctx.saved_tensors[0].clone())
        return grad * torch.ones_like(ctx.seen[-1]), None


@pytest.mark.parametrize("checker", [False, True])
def test_what_other_steps_lost_is_no_source_where_nothing_is_lost(monkeypatch, checker):
    """Two kinds of steps save the same tensors, one with loss, and their graphs are alive together."""
    context = automatic(max_rel_error=0.094, checker=checker)
    x, wide, narrow = (torch.randn(*s).requires_grad_() for s in ((2048, 4), (4096, 4), (2048, 3)))
    seen = []

    def with_loss(a, b):
        return (wide * 1).exp().sum() + (a * b).sum()

    def without(a, b):
        return (narrow * 1).exp().sum() + Look.apply(a * b, seen)

    for prefer, function in (("here bounded", with_loss), (DERIVED_AGAIN, without)):
        force(monkeypatch, prefer)
        for _ in range(4):
            with context:
                loss = function(20 * x, x + 0.5)
            loss.backward()
        assert any(f"{choice.place} {choice.lane}" == prefer for choice in context.plan.choices)
    a, b = 20 * x, x + 0.5
    with context:
        loss = with_loss(a, b) + without(a, b)
    loss.backward()
    assert torch.equal(seen[-1], (a * b).detach())


def choose(monkeypatch, *wanted, lossless):
    """Plans take the first of these choices that a tensor has, with loss permitted or without."""

    def plan(step, limit, host_limit):
        simulator = Simulator(step, limit)
        names = [[f"{o.choice.place} {o.choice.lane}" for o in options] for options in simulator.options]
        picks = [next((mine.index(want) for want in wanted if want in mine), 0) for mine in names]
        again = (False,) * len(step.blocks)
        choices = tuple(o[pick].choice for o, pick in zip(simulator.options, picks, strict=True))
        exact = all(not code.lane.startswith("packed") for saved in step.saved for code in saved.codes)
        forecast = replace(simulator.run(picks, again), seconds=float(exact != lossless))
        return StepPlan(choices, again, forecast, limit, host_limit)

    monkeypatch.setattr(step_auto, "plan_step", plan)


@pytest.mark.parametrize("checker", [False, True])
def test_what_is_derived_from_what_lost_bits_is_no_source_either(monkeypatch, checker):
    context = automatic(bits=4, checker=checker)
    x, wide, narrow = (torch.randn(*s).requires_grad_() for s in ((2048, 4), (4096, 4), (2048, 3)))
    seen = []

    def product():
        return (20 * x) * (x + 0.5)

    def with_loss():
        out = (wide * 1).exp().sum()
        y = product()
        return out + (y * y).sum(), y

    def without(y):
        return (narrow * 1).exp().sum() + Look.apply((y * y).view(-1), seen)

    choose(monkeypatch, DERIVED_AGAIN, "here packed:4", lossless=False)
    for _ in range(4):
        with context:
            loss, _ = with_loss()
        loss.backward()
    choose(monkeypatch, DERIVED_AGAIN, lossless=True)
    for _ in range(4):
        y = product()
        with context:
            loss = without(y)
        loss.backward()
    assert context.plan.script.lesson.lossless
    with context:
        loss, y = with_loss()
        loss = loss + without(y)
    loss.backward()
    assert torch.equal(seen[-1], (y * y).view(-1).detach())


def test_a_trip_that_learns_takes_no_code_of_another_one_for_its_own(monkeypatch):
    force(monkeypatch, "here packed:4")
    x, wide, narrow = (torch.randn(*s).requires_grad_() for s in ((2048, 64), (4096, 4), (2048, 3)))

    def square(a, other):
        return (other * 1).exp().sum() + (a * a).sum()

    context = automatic(bits=4, checker=False)
    for _ in range(4):
        with context:
            loss = square(x * 2, wide)
        loss.backward()
    a = x * 2
    with context:
        loss = square(a, wide) + square(a, narrow)  # the second is new, and the first still alive
    loss.backward()
    with context:
        loss = square(x * 2, narrow)
    loss.backward()
    assert all(entry.wire > 0.8 * entry.weight for entry in context.plan.script.lesson.entries)


def test_weights_are_no_sources_where_processes_train_together(monkeypatch, blocks):
    monkeypatch.setattr(derive_module, "is_distributed", lambda: True)
    force(monkeypatch, DERIVED_AGAIN)
    expected = step(blocks, torch.enable_grad())
    context = automatic()
    for _ in range(3):
        assert_same(step(blocks, context), expected)
    assert context.plan.choices.count(DERIVE) == 3 * 3


def test_derived_tensors_and_blocks_that_run_again(monkeypatch, blocks):
    force(monkeypatch, None, recompute=0.5)
    expected = step(blocks, torch.enable_grad())
    for _ in range(4):
        context = automatic(blocks=blocks, gpu_budget=40_000)
        for _ in range(4):
            assert_same(step(blocks, context), expected)
            assert settled(context)


def test_backward_twice(monkeypatch, blocks):
    force(monkeypatch, DERIVED_AGAIN)
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


def train(model, forward, around, steps=5, rate=0.5):
    """Weights after each step of a model, bit for bit."""
    optimizer, found = torch.optim.SGD(model.parameters(), rate), []
    for number in range(steps):
        torch.manual_seed(number)
        x = torch.randn(256, 64).requires_grad_()
        with around:
            losses = forward(model, x)
        for loss in losses:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found += [p.detach().clone() for p in model.parameters()]
    return found


def test_a_result_of_zeros_is_no_proof(monkeypatch):
    """A gate begins at zero: all products are zero while the step is learned, whatever happens to them."""
    plans = force(monkeypatch, DERIVED_AGAIN)

    def model():
        torch.manual_seed(0)
        made = nn.Linear(64, 32).bfloat16()
        made.gate = nn.Parameter(torch.zeros(64))
        return made

    def forward(m, x):
        y = x.sin() * m.gate
        with torch.no_grad():
            y.mul_(1.5)
        return [(m(y.bfloat16()) - 1).float().square().mean()]

    expected = train(model(), forward, torch.enable_grad())
    assert_same(train(model(), forward, automatic(checker=False)), expected)
    assert all(choice != DERIVE for plan in plans for choice in plan.choices)


@pytest.mark.parametrize("prefer", [f"here {UPPER}", f"away {UPPER}"])
def test_lower_halves_that_the_graph_does_not_show_are_found(monkeypatch, prefer):
    plans = force(monkeypatch, prefer)

    def forward(m, x):
        y = x.bfloat16().float()
        y.data.mul_(1.1)
        return [m(y).square().mean()]

    expected = train(nn.Linear(64, 32), forward, torch.enable_grad(), rate=0.0)
    model = nn.Linear(64, 32)
    model.load_state_dict(dict(zip(("weight", "bias"), expected, strict=False)))
    context = automatic(checker=False)
    assert_same(train(model, forward, context, rate=0.0), expected)
    assert plans and all(choice.lane != UPPER for plan in plans for choice in plan.choices)


@pytest.mark.parametrize("first", ["main", "probe"])
def test_a_detached_head_may_run_after_the_optimizer(monkeypatch, first):
    """It shares the memory of a tensor whose own backward is over, and whose weight has changed by then."""
    force(monkeypatch, DERIVED_AGAIN)

    def model():
        torch.manual_seed(0)
        made = nn.ModuleDict({"main": nn.Linear(64, 32), "probe": nn.Linear(64, 8)})
        made.gate = nn.Parameter(torch.randn(64))
        return made

    def forward(m, x):
        h = (x * 1).sin() * m.gate
        calls = {"main": lambda: m["main"](h), "probe": lambda: m["probe"](h.detach())}
        order = sorted(calls, key=lambda name: name != first)
        losses = {name: calls[name]().square().mean() for name in order}
        return [losses["main"], losses["probe"]]

    expected = train(model(), forward, torch.enable_grad())
    context = automatic(checker=False)
    assert_same(train(model(), forward, context), expected)
    assert settled(context)


def product(a, b):
    return ((a * 1) * (b * 1)).conj()


def cast(a, b):
    return ((a * 1) * (b * 1)).to(torch.float32)


@pytest.mark.parametrize("make", [product, cast])
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_complex_products(monkeypatch, make):
    force(monkeypatch, DERIVED_AGAIN)

    def run(around):
        torch.manual_seed(0)
        a, b = (torch.randn(64, 64, dtype=torch.complex64).requires_grad_() for _ in range(2))
        with around:
            z = make(a, b)
            loss = (z * b).abs().sum() + z.exp().abs().sum()
        loss.backward()
        return [a.grad, b.grad]

    expected, context = run(torch.enable_grad()), automatic(checker=False)
    for _ in range(4):
        assert_same(run(context), expected)


class Weighted(nn.Module):
    """A product with a weight, or with a view of it."""

    def __init__(self, view):
        super().__init__()
        self.w = nn.Parameter(torch.rand(64) + 0.5)
        self.view = view

    def forward(self, x):
        return x.sin() * (self.w[None] if self.view else self.w)


def move(freed):
    """Takes the weights of a module away, and gives what brings them back."""

    def away(module):
        kept = {p: p.data.clone() for p in module.parameters(recurse=False)}
        for p in kept:
            if freed:
                p.untyped_storage().resize_(0)
            else:
                p.data = torch.empty(0)

        def back(*_):
            for p, data in kept.items():
                if freed:
                    p.untyped_storage().resize_(data.nbytes)
                    p.data.copy_(data)
                else:
                    p.data = data

        return back

    return away


@pytest.mark.parametrize("freed", [True, False], ids=["freed", "exchanged"])
@pytest.mark.parametrize("view", [True, False], ids=["view", "leaf"])
@pytest.mark.parametrize("distributed", [True, False])
def test_weights_that_are_away_until_their_own_backward(monkeypatch, freed, view, distributed):
    """As wrappers have it that keep a part of the weights on each GPU, or all on the host."""
    monkeypatch.setattr(derive_module, "is_distributed", lambda: distributed)
    force(monkeypatch, DERIVED_AGAIN)

    def run(around):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), Weighted(view), nn.Linear(64, 32))
        x = torch.randn(128, 64)
        with around:
            y = net[0](x)
            y = net[1](y)
            back = move(freed)(net[1])
            y.register_hook(back)
            loss = net[2](y).square().mean()
        loss.backward()
        return [p.grad for p in net.parameters()]

    expected, context = run(torch.enable_grad()), automatic(checker=False)
    for _ in range(4):
        assert_same(run(context), expected)


def test_a_long_chain_is_stored_in_between(monkeypatch):
    force(monkeypatch, DERIVED_AGAIN)
    layer = nn.Linear(16, 16)

    def run(around):
        layer.zero_grad()
        with around:
            h = layer(torch.ones(64, 16))
            for _ in range(60):
                h = F.gelu(h)
        h.sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    expected, context = run(torch.enable_grad()), automatic(checker=False)
    for _ in range(3):
        assert_same(run(context), expected)
    before = context.report().decodes
    run(context)
    derived = sum(choice == DERIVE for choice in context.plan.choices)
    assert 40 <= derived < 60 and context.report().decodes - before <= 2 * 61


def test_sources_are_of_the_same_block_or_of_none(monkeypatch):
    """What another block saved is not there when that one runs again."""
    force(monkeypatch, DERIVED_AGAIN)

    class First(nn.Module):
        def forward(self, x):
            return (x * 1).sin() * (x * 1).cos()

    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    pair, x = nn.ModuleList([First(), Second()]), torch.randn(64, 64)

    def run(around):
        pair.zero_grad()
        inputs = x.clone().requires_grad_()
        with around:
            y = pair[1](pair[0](inputs * 1))
        y.square().sum().backward()
        return [inputs.grad, *(p.grad.clone() for p in pair.parameters())]

    expected, context = run(torch.enable_grad()), automatic(blocks=pair, checker=False)
    for _ in range(4):
        assert_same(run(context), expected)
    lesson = context.plan.script.lesson
    for entry in lesson.entries:
        assert all(lesson.entries[s].block in (-1, entry.block) for s in entry.sources or ())
