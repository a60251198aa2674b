"""Single saved tensors: how they are packed and compared."""

from __future__ import annotations

import torch
from torch import Tensor


class Save(torch.autograd.Function):
    """Saves tensors and does nothing else."""

    @staticmethod
    def forward(ctx, anchor, tensors):
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def save(context, *tensors):
    """The graph node that holds `tensors`, packed by `context`; read them back as `.saved_tensors`."""
    with context:
        return Save.apply(torch.zeros(1, requires_grad=True), tensors).grad_fn


def assert_identical(actual: Tensor, expected: Tensor) -> None:
    """Same type, device, dtype, size, stride, flags and bits."""
    assert type(actual) is type(expected)
    for name in ("device", "dtype", "shape", "layout"):
        assert getattr(actual, name) == getattr(expected, name), name
    assert actual.stride() == expected.stride()
    assert (actual.is_conj(), actual.is_neg()) == (expected.is_conj(), expected.is_neg())
    a, e = actual.detach().resolve_conj().resolve_neg(), expected.detach().resolve_conj().resolve_neg()
    assert torch.equal(a.contiguous().view(-1).view(torch.uint8), e.contiguous().view(-1).view(torch.uint8))


def activation(*shape: int, dtype=torch.float32) -> Tensor:
    """A tensor in the middle of a graph."""
    return torch.randn(*shape, requires_grad=True).to(dtype) * torch.ones((), dtype=dtype)
