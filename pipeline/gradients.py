"""What a lane does to the gradients of one step: the same step without and with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor, nn

from sidelane.errors import LaneError
from sidelane.pipeline.checker import same_bits
from sidelane.pipeline.offload import offload
from sidelane.pipeline.wrap import offload_of

SHOWN = 10  # parameters in the text of a comparison

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Of a gradient under the lane from that without.

    Attributes:
        cosine: of the angle between them; 1 where both are zero.
        rel_error: Frobenius norm of the difference over that of the gradient without.
    """

    cosine: float
    rel_error: float


@dataclass(frozen=True)
class GradientComparison:
    """What `compare_gradients` found.

    Attributes:
        loss, lane_loss: of the step without and with the lane.
        whole: over all parameters together.
        parameters: by name, the least cosine first.
        bitwise: all gradients are equal in every bit.
        encoded: tensors that the lane stored in the step.
        repeatable: so they are in two steps without a lane. Where they are not, the program itself is a part
            of the differences: kernels that add in any order, or random numbers from elsewhere than torch.
    """

    loss: float
    lane_loss: float
    whole: Difference
    parameters: dict[str, Difference]
    bitwise: bool
    repeatable: bool
    encoded: int

    def __str__(self) -> str:
        lines = [f"loss {self.loss:.6g} without, {self.lane_loss:.6g} with the lane"]
        if self.bitwise:
            lines.append(f"gradients of {len(self.parameters)} parameters: equal bit for bit")
        else:
            lines.append(
                f"gradients: cosine {self.whole.cosine:.6f}, error {self.whole.rel_error:.2g}; worst:"
            )
            worst = list(self.parameters.items())[:SHOWN]
            width = max((len(name) for name, _ in worst), default=0)
            lines += [f"  {name:{width}}  {each.cosine:9.6f}  {each.rel_error:.2g}" for name, each in worst]
        if not self.encoded:
            lines.append("nothing was encoded: tensors are below min_bytes=, or stay where they are")
        if not self.repeatable:
            lines.append("two steps without a lane differ as well: not all of this is the lane's")
        return "\n".join(lines)


def compare_gradients(
    loss: Callable[[], Tensor], module: nn.Module, context: offload, *, warm_up: int | None = None
) -> GradientComparison:
    """Run a step twice without and once with `context`, and compare the gradients of `module`.

    Every run starts with the same random numbers of torch and the same buffers, and leaves random states,
    buffers and `.grad` of `module` as they were. Other leaves get gradients and hooks run as in any backward
    pass: leave optimizers that step in hooks out of it. Takes the memory of three more sets of gradients.

    Args:
        loss: the forward pass, which returns a scalar loss.
        module: whose parameters are compared.
        context: what the forward pass runs in; its report counts these runs.
        warm_up: runs under the context before the one that counts. Default: none, and one with lane "auto",
            which learns in it; in the next twelve that tries plans.

    Raises LaneError for arguments of another kind, a loss that is no scalar with a gradient for the module,
    and where another context is active already.
    """
    if not callable(loss):
        raise LaneError(f"loss is a {type(loss).__name__}: pass the function that returns it")
    if not isinstance(module, nn.Module):
        raise LaneError(f"module is a {type(module).__name__}: pass the torch.nn.Module")
    if not isinstance(context, offload):
        raise LaneError(f"context is a {type(context).__name__}: pass a sidelane.offload")
    if offload.current() is not None or any(offload_of(each) is not None for each in module.modules()):
        raise LaneError(
            "an offload is active already, or wrapped around the module (`del module.forward` unwraps it): "
            "compare without it"
        )
    if warm_up is None:
        warm_up = 1 if context.automatic else 0
    if type(warm_up) is not int or warm_up < 0:
        raise LaneError(f"warm_up={warm_up!r} is not a whole number from 0 up")
    alone, expected = _run(loss, module, nullcontext())
    if not expected:
        raise LaneError("no parameter of the module gets a gradient: pass the loss of this module")
    _, again = _run(loss, module, nullcontext())
    repeatable = _equal(expected, again)
    del again
    for _ in range(warm_up):
        _run(loss, module, context)
    before = context.report().total.count
    value, found = _run(loss, module, context)
    names = [name for name, _ in module.named_parameters() if name in expected or name in found]
    pairs = {name: _sums(expected.get(name), found.get(name)) for name in names}
    each = {name: _difference(sums) for name, sums in pairs.items()}
    order = sorted(each, key=lambda name: (not isnan(each[name].cosine), each[name].cosine))
    total = torch.tensor(list(pairs.values()) or [[0.0] * 4], dtype=torch.float64, device="cpu").sum(0)
    return GradientComparison(
        loss=alone,
        lane_loss=value,
        whole=_difference(total.tolist()),
        parameters={name: each[name] for name in order},
        bitwise=_equal(expected, found),
        repeatable=repeatable,
        encoded=context.report().total.count - before,
    )


def _run(
    loss: Callable[[], Tensor], module: nn.Module, around: AbstractContextManager[object]
) -> tuple[float, Gradients]:
    """The loss of a step and the gradients that it makes; everything else is as before."""
    with _undone(module):
        with around:
            value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise LaneError("loss() returned no scalar tensor with a gradient: return the loss to minimize")
        value.backward()  # type: ignore[no-untyped-call]
        found = {name: _dense(p.grad) for name, p in module.named_parameters() if p.grad is not None}
        return float(value.detach()), found


@contextmanager
def _undone(module: nn.Module) -> Iterator[None]:
    """Inside there are no gradients; afterwards these, buffers and random states are as before."""
    gradients = [(p, p.grad) for p in module.parameters()]
    owners = [(each._buffers, dict(each._buffers)) for each in module.modules()]
    tensors = [gradient for _, gradient in gradients if gradient is not None]  # DDP writes into its buckets
    tensors += module.buffers()
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    devices = {p.device.index for p, _ in gradients if p.is_cuda}
    try:
        for p, _ in gradients:
            p.grad = None
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        for owner, before in owners:
            owner.update(before)
        for tensor, value in values:
            if not same_bits(_dense(tensor), _dense(value)):
                tensor.data.copy_(value)


def _equal(a: Gradients, b: Gradients) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def _dense(tensor: Tensor) -> Tensor:
    """A copy that is strided and contiguous."""
    plain = tensor.detach()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return plain.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _sums(a: Tensor | None, b: Tensor | None) -> list[float]:
    """Products [a b, a a, b b] and the square of the difference; None is zero."""
    x, y = (None if part is None else _flat(part) for part in (a, b))
    x = torch.zeros_like(y) if x is None and y is not None else x
    y = torch.zeros_like(x) if y is None and x is not None else y
    if x is None or y is None:
        return [0.0] * 4
    return [float(value) for value in (x @ y, x @ x, y @ y, (x - y).square().sum())]


def _flat(gradient: Tensor) -> Tensor:
    real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    return real.reshape(-1).double()


def _difference(sums: list[float]) -> Difference:
    product, mine, theirs, off = sums
    if mine == theirs == 0:
        return Difference(1.0, 0.0)
    norms = (mine * theirs) ** 0.5
    return Difference(
        product / norms if norms else 0.0,
        (off / mine) ** 0.5 if mine else float("inf"),
    )
