"""Checkpointing through a lane: gradients of the recomputed step against the plain one, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from models import MIN_BYTES, assert_same, build, gradients, loss_of
from sidelane.errors import LaneError, OffloadError
from sidelane.pipeline.checkpoint import checkpoint
from sidelane.pipeline.compress import relative_error
from sidelane.pipeline.offload import offload

exact = partial(offload, min_bytes=MIN_BYTES, checker=True)


def through_kwargs(block, x, **kwargs):
    return checkpoint(block, x, **kwargs)


def nested(block, x, **kwargs):
    return checkpoint(lambda h, tables: checkpoint(block, h, **tables), x, kwargs)


@pytest.mark.parametrize("wrap", [through_kwargs, nested])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_bitwise_those_without_checkpoint(wrap, autocast):
    model, tokens = build(wrap=wrap)
    expected = gradients(build()[0], tokens, autocast=autocast)
    assert_same(gradients(model, tokens, autocast=autocast), expected)
    context = exact()
    for inside in (False, True):
        got = gradients(model, tokens, context, autocast=autocast, backward_inside=inside)
        assert_same(got, expected)
    assert context.report().tickets == 0 and context.report().total.count > 0


def test_only_inputs_are_saved_and_parameters_are_kept():
    layer = nn.Linear(64, 64)
    x = torch.randn(32, 64)  # its gradient is not asked for
    context = exact()

    def fn(h, weight):
        return torch.tanh(h @ weight.t()).exp().square()

    with context:
        y = checkpoint(fn, x, layer.weight)
    report = context.report()
    assert report.total.count == 1 and report.total.bytes_in == 32 * 64 * 4
    assert report.kept["weight"].count == 1
    y.sum().backward()
    got, layer.weight.grad = layer.weight.grad, None
    fn(x, layer.weight).sum().backward()
    assert torch.equal(got, layer.weight.grad)


def test_nested_inputs_and_outputs():
    layer = nn.Linear(8, 8)

    def fn(tree, scale, *, extra):
        h = layer(tree["x"][0]) * scale + extra["bias"]
        return {"out": (h, h.argmax(-1)), "same": tree["x"][1], "name": "head", "count": 3}

    def run(call):
        layer.zero_grad()
        a, b, bias = (torch.ones(4, 8).mul(i).requires_grad_() for i in (1, 2, 3))
        out = call(fn, {"x": [a, b]}, 2.0, extra={"bias": bias})
        assert (out["name"], out["count"]) == ("head", 3)
        assert not out["out"][1].requires_grad and out["out"][1].dtype == torch.int64
        (out["out"][0].square().sum() + (out["same"] * 3).sum()).backward()
        return [t.grad for t in (a, b, bias, layer.weight, layer.bias)]

    assert_same(run(checkpoint), run(lambda fn, *args, **kwargs: fn(*args, **kwargs)))


def test_parameters_get_gradients_though_no_input_needs_one():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    checkpoint(layer, x).square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert_same(got, [p.grad for p in layer.parameters()])
    assert x.grad is None


def test_results_without_tensors_and_calls_without_arguments():
    assert checkpoint(lambda: 3) == 3
    weight = torch.ones(2, requires_grad=True)
    checkpoint(lambda: weight * 2).sum().backward()
    assert weight.grad.tolist() == [2, 2]


def test_without_grad_the_function_just_runs():
    calls = []

    def fn(x):
        calls.append(torch.is_grad_enabled())
        return x * 2

    with torch.no_grad():
        y = checkpoint(fn, torch.ones(2, requires_grad=True))
    assert calls == [False] and not y.requires_grad


def test_random_state_is_that_of_the_first_run_and_is_put_back():
    x = torch.randn(64, 64, requires_grad=True)
    masks = []

    def fn(h):
        masks.append(torch.rand(64, 64))
        return h * masks[-1]

    y = checkpoint(fn, x).sum()
    torch.rand(7)
    state = torch.get_rng_state()
    y.backward()
    assert torch.equal(masks[0], masks[1]) and torch.equal(x.grad, masks[0])
    assert torch.equal(torch.get_rng_state(), state)
    y = checkpoint(fn, x, preserve_rng_state=False).sum()
    y.backward()
    assert not torch.equal(masks[2], masks[3])


def test_autocast_of_the_first_run_applies_in_backward():
    dtypes = []
    layer = nn.Linear(8, 8)

    def fn(x):
        dtypes.append(layer(x).dtype)
        return x * 2

    x = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(fn, x)
    y.sum().backward()
    z = checkpoint(fn, x)
    with torch.autocast("cpu", torch.bfloat16):
        z.sum().backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_one_input_used_twice_and_retained_graphs():
    x = torch.randn(16, 16, requires_grad=True)
    context = exact()
    with context:
        h = x * 1
        y = checkpoint(torch.mm, h, h).sum()
    assert context.report().deduplicated.count == 1
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)
    ones = torch.ones(16, 16)
    torch.testing.assert_close(once, ones @ x.t() + x.t() @ ones)
    assert context.report().tickets == 0


def test_a_lossy_lane_recomputes_from_the_coded_input():
    seen = []

    def fn(h):
        seen.append(h.detach().clone())
        return h.square()

    x = torch.randn(512, 256, requires_grad=True)
    checkpoint(fn, x * 1, max_rel_error=0.05).sum().backward()
    error = relative_error(seen[0].flatten(), seen[1].flatten())
    assert 0 < error <= 0.05
    assert torch.equal(x.grad, 2 * seen[1])
    seen.clear()
    checkpoint(fn, x * 1, lane="exact").sum().backward()
    assert torch.equal(*seen)


def test_lane_given_overrides_the_enclosing_context():
    x = torch.randn(512, 256, requires_grad=True) * 1
    context = exact()
    with context:
        checkpoint(torch.square, x, lane="raw")
        assert context.report().total.count == 0
        checkpoint(torch.square, x)
    assert context.report().total.count == 1


def test_inputs_changed_in_place_are_refused():
    with pytest.raises(OffloadError, match=r"changes input 0, float32 \[4\], in place: clone it inside"):
        checkpoint(lambda h: h.mul_(2), torch.ones(4, requires_grad=True) * 1)
    h = torch.randn(64, 64, requires_grad=True) * 1
    y = checkpoint(torch.square, h)
    with torch.no_grad():
        h.mul_(2)  # below the size floor: kept, so backward must notice
    with pytest.raises(OffloadError, match="modified in place"):
        y.sum().backward()


@pytest.mark.parametrize("how", ["grad", "inputs", "twice"])
def test_what_cannot_be_differentiated_is_one_clear_error(how):
    x = torch.ones(4, requires_grad=True)
    y = checkpoint(torch.square, x).sum()
    with pytest.raises(OffloadError, match="use_reentrant=False"):
        if how == "grad":
            torch.autograd.grad(y, x)
        elif how == "inputs":
            y.backward(inputs=[x])
        else:
            y.backward(create_graph=True)


@pytest.mark.parametrize("first", [True, False])
def test_a_failing_function_leaves_nothing_behind(first):
    calls = []

    def fn(h):
        calls.append(0)
        if len(calls) == (1 if first else 2):
            raise RuntimeError("stop")
        return h.square()

    context = exact()
    x = torch.randn(64, 64, requires_grad=True)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), context:
        checkpoint(fn, x * 1).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert context.report().tickets == 0 and offload.current() is None
    checkpoint(fn, x).sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_a_parameter_among_the_outputs_stays_a_leaf():
    w, x = torch.nn.Parameter(torch.ones(3)), torch.full((3,), 2.0, requires_grad=True)
    y, p = checkpoint(lambda x: (x * w, w), x)
    assert w.is_leaf and w.grad_fn is None
    (y.sum() + 3 * p.sum()).backward()
    assert torch.equal(w.grad, torch.full((3,), 5.0)) and torch.equal(x.grad, torch.ones(3))


def test_what_cannot_be_called_is_refused():
    with pytest.raises(LaneError, match="fn=None cannot be called"):
        checkpoint(None, torch.ones(3))


def test_what_is_no_lane_is_refused():
    with pytest.raises(LaneError, match=r"lane=\[\] is no lane"):
        checkpoint(torch.sin, torch.ones(3), lane=[])


def test_a_function_that_returns_more_the_second_time_is_refused():
    runs = []

    def fn(x):
        runs.append(None)
        return [x * 2] * len(runs)

    x = torch.ones(512, requires_grad=True)
    (y,) = checkpoint(fn, x)
    with pytest.raises(OffloadError, match="returned 1 tensors, and 2 when it ran again"):
        y.sum().backward()


def test_the_keyword_of_another_checkpoint_is_refused():
    with pytest.raises(LaneError, match="use_reentrant"):
        checkpoint(lambda x: x, torch.ones(3), use_reentrant=False)


def test_offloaded_inputs_do_not_keep_the_tensor_alive():
    model, tokens = build(wrap=through_kwargs)
    context = exact()
    with context:
        loss = loss_of(model, tokens)
    held = context.report()
    assert held.tickets > 0 and held.host_bytes > 0
    del loss
    assert (context.report().tickets, context.report().host_bytes) == (0, 0)
