"""A module whose forward passes run inside an offload context."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import wraps
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from sidelane.errors import LaneError
from sidelane.pipeline.offload import offload

M = TypeVar("M", bound=nn.Module)
_OFFLOAD = "sidelane_offload"  # attribute of a forward pass that is wrapped: its context


def wrap(module: M, context: AbstractContextManager[object]) -> M:
    """Run every forward pass of `module` inside `context`, an `offload` or any other; returns `module`.

    For loops that somebody else writes: wrap the model, then hand it to a trainer. Signature, state dict and
    copies of the module are as before; `del module.forward` undoes it. Wrap before DistributedDataParallel,
    and wrap or compile the blocks of a model, not the whole, where `torch.compile` is used: all that one
    compiled graph saves comes back before its backward pass begins.

    With `lane="auto"` the context may recompute the blocks of `module`, if none were given to it: the members
    of its longest `nn.ModuleList`.

    Raises LaneError when `module` is no nn.Module or `context` no context, and for a second `offload` around
    a module that has one: only the inner one would get anything.
    """
    if not isinstance(module, nn.Module):
        raise LaneError(f"{type(module).__name__} is no torch.nn.Module: wrap the model itself")
    if isinstance(context, type) or not isinstance(context, AbstractContextManager):
        raise LaneError(f"context={context!r} is no context: pass offload(...), with its arguments")
    inner: Any = module.forward
    if isinstance(context, offload) and getattr(inner, _OFFLOAD, context) is not context:
        raise LaneError(f"{type(module).__name__} has an offload already: `del module.forward` takes it out")
    if isinstance(context, offload):
        context.find_blocks(module)
    if getattr(inner, "__self__", None) is module:
        # A method again, not a closure over `inner`, or a copy of the module would run this one.
        module.forward = MethodType(_inside(inner.__func__, context), module)
    else:
        module.forward = _inside(inner, context)
    return module


def offload_of(module: nn.Module) -> offload | None:
    """The context that `wrap` has put around `module`."""
    found: offload | None = getattr(module.forward, _OFFLOAD, None)
    return found


def _inside(function: Any, context: AbstractContextManager[object]) -> Any:
    @wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with context:
            return function(*args, **kwargs)

    if isinstance(context, offload):
        setattr(forward, _OFFLOAD, context)  # `wraps` copies it to what goes around
    return forward
