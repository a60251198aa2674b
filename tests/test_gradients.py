"""The comparison of gradients: what it finds, and that it leaves everything as it was."""

from __future__ import annotations

from math import isnan

import pytest
import torch
from torch import Tensor, nn

import sidelane
from models import MIN_BYTES, build, loss_of, settled
from sidelane.errors import LaneError

pytestmark = pytest.mark.usefixtures("each_device")


def exact(lane: str = "exact", **options: object) -> sidelane.offload:
    return sidelane.offload(lane, gpu_budget=60_000, min_bytes=MIN_BYTES, **options)


class Norms(nn.Module):
    """Batch norm, whose buffers every forward pass changes, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 8))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).tanh()


def test_an_exact_lane_changes_no_bit():
    model, tokens = build()
    context = exact()
    found = sidelane.compare_gradients(lambda: loss_of(model, tokens), model, context)
    assert found.bitwise and found.repeatable and found.loss == found.lane_loss
    assert found.whole.cosine == pytest.approx(1.0, abs=1e-12) and found.whole.rel_error == 0
    assert len(found.parameters) == len(list(model.parameters()))
    assert "equal bit for bit" in str(found) and "differ" not in str(found)
    assert found.encoded > 10 and "nothing" not in str(found)
    assert context.report().total.count > 10 and settled(context)


def test_what_was_not_encoded_is_not_taken_for_exact():
    model, tokens = build()
    context = sidelane.offload("packed", bits=2, min_bytes=1 << 30)
    for _ in range(2):
        found = sidelane.compare_gradients(lambda: loss_of(model, tokens), model, context)
        assert found.bitwise and found.encoded == 0 and "nothing was encoded" in str(found)
    with pytest.raises(LaneError, match="no parameter of the module gets a gradient"):
        sidelane.compare_gradients(lambda: loss_of(model, tokens), nn.Linear(2, 2), context)


def test_lossy_lanes_are_told_apart_by_their_bits():
    model, tokens = build()
    cosines = []
    for bits in (8, 4, 2):
        context = exact("packed", bits=bits)
        found = sidelane.compare_gradients(lambda: loss_of(model, tokens), model, context)
        worst, *_, best = found.parameters.values()
        assert not found.bitwise and found.repeatable and found.loss == found.lane_loss
        assert worst.cosine <= found.whole.cosine <= 1 and worst.cosine < best.cosine
        assert 0 < found.whole.rel_error < 2
        assert found.whole.rel_error**2 >= 1 - found.whole.cosine**2 - 1e-9  # of any two vectors
        cosines.append(found.whole.cosine)
        first = next(iter(found.parameters))
        assert str(found).splitlines()[2].split()[0] == first
    assert 1 > cosines[0] > cosines[1] > cosines[2] and cosines[0] > 0.999


def test_the_program_goes_on_as_if_nothing_had_run():
    model = Norms()
    x = torch.randn(256, 64)
    model(x).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    own = [p.grad for p in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    states = torch.get_rng_state(), torch.cuda.get_rng_state() if x.is_cuda else None

    def loss() -> Tensor:
        return (model(x) + 0.1 * torch.randn(256, 8)).square().mean()

    found = sidelane.compare_gradients(loss, model, exact())
    assert found.bitwise and found.repeatable and "unused" not in found.parameters
    for p, gradient, before in zip(model.parameters(), own, gradients, strict=True):
        assert p.grad is gradient
        assert before is None or torch.equal(gradient, before)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert states[1] is None or torch.equal(torch.cuda.get_rng_state(), states[1])


def test_a_program_that_does_not_repeat_itself_is_told():
    model, count = Norms(), iter(range(1, 10))
    x = torch.randn(256, 64)
    found = sidelane.compare_gradients(lambda: model(x).mean() * next(count), model, exact())
    assert not found.repeatable and not found.bitwise
    assert found.whole.cosine == pytest.approx(1.0) and found.whole.rel_error == pytest.approx(2.0)
    assert "two steps without a lane differ as well" in str(found)


def test_a_plan_is_compared_once_it_is_there():
    model, tokens = build()
    context = exact("auto", bits=4)
    found = sidelane.compare_gradients(lambda: loss_of(model, tokens), model, context)
    assert context.plan is not None and found.whole.cosine > 0.9 and settled(context)


def test_gradients_that_are_no_numbers_come_first():
    model = nn.ModuleDict({"good": nn.Linear(64, 64), "bad": nn.Linear(64, 64, bias=False)})
    x = torch.randn(256, 64)

    def loss() -> Tensor:
        return model["good"](x).tanh().sum() + (model["bad"](x) * float("inf")).sum()

    found = sidelane.compare_gradients(loss, model, exact())
    assert isnan(found.parameters["bad.weight"].cosine) and next(iter(found.parameters)) == "bad.weight"
    assert found.parameters["good.weight"].cosine == pytest.approx(1.0)


class Squares(nn.Module):
    """Its gradient is made of the tensor that was saved, which four bits change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).exp().sin().sum()


def test_gradients_in_memory_of_the_program_are_told_apart():
    """As those that DDP keeps in its buckets: written into again by every backward pass."""
    model, x = Squares(), torch.randn(256, 64)
    bucket = torch.zeros(64)

    def into_bucket(parameter: Tensor) -> None:
        bucket.copy_(parameter.grad)
        parameter.grad = bucket

    model.weight.register_post_accumulate_grad_hook(into_bucket)
    model(x).backward()
    before = bucket.clone()
    found = sidelane.compare_gradients(lambda: 2 * model(x), model, exact("packed", bits=2))
    assert not found.bitwise and found.repeatable and found.whole.cosine < 0.999
    assert model.weight.grad is bucket and torch.equal(bucket, before)


def test_sparse_gradients():
    model = nn.Embedding(64, 32, sparse=True)
    tokens = torch.randint(64, (48,))
    found = sidelane.compare_gradients(lambda: model(tokens).exp().sum(), model, exact())
    assert found.bitwise and found.repeatable and found.whole.cosine == pytest.approx(1.0)


def test_buffers_that_are_assigned_come_back():
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))
            self.register_buffer("average", torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            self.average = 0.9 * self.average + x.mean(0)
            return (x * self.weight * (1 + self.average)).exp().sum()

    model = Average()
    average = model.average
    x = torch.randn(256, 64)
    found = sidelane.compare_gradients(lambda: model(x), model, exact())
    assert found.repeatable and found.bitwise and model.average is average and not average.any()


def test_another_offload_around_it_is_refused():
    model, x = Squares(), torch.randn(256, 64)
    with exact(), pytest.raises(LaneError, match="an offload is active already"):
        sidelane.compare_gradients(lambda: model(x), model, exact())
    sidelane.wrap(model, exact())
    with pytest.raises(LaneError, match="wrapped around the module"):
        sidelane.compare_gradients(lambda: model(x), model, exact())


def test_a_failure_leaves_no_trace():
    model = Norms()
    x = torch.randn(256, 64)
    buffers = [buffer.clone() for buffer in model.buffers()]

    def loss() -> Tensor:
        model(x)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        sidelane.compare_gradients(loss, model, exact())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loss": 5}, "loss is a int: pass the function"),
        ({"module": "model"}, "module is a str: pass the torch.nn.Module"),
        ({"context": None}, "context is a NoneType: pass a sidelane.offload"),
        ({"warm_up": -1}, "warm_up=-1 is not a whole number"),
        ({"loss": lambda: 5.0}, "returned no scalar tensor with a gradient"),
        ({"loss": lambda: torch.ones(3, requires_grad=True)}, "returned no scalar tensor with a gradient"),
        ({"loss": lambda: torch.ones(())}, "returned no scalar tensor with a gradient"),
    ],
    ids=["loss", "module", "context", "warm_up", "number", "vector", "constant"],
)
def test_arguments_of_another_kind(change: dict[str, object], text: str):
    model = nn.Linear(4, 4)
    good = {"loss": lambda: model(torch.ones(2, 4)).sum(), "module": model, "context": exact()}
    with pytest.raises(LaneError) as caught:
        sidelane.compare_gradients(**good | change)
    assert text in str(caught.value) and "\n" not in str(caught.value)
