"""A lossy lane in one part of the GPT, to see which part suffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sidelane.demo_model import GPT, Attention, Layer

REGIONS = ("norms", "attention", "feed-forward", "head and loss")
INNER = {"norms": nn.RMSNorm, "attention": Attention}


@contextmanager
def lane_in(model: GPT, region: str, lane: AbstractContextManager[Any]) -> Iterator[None]:
    """Inside, what forward saves in `region` goes through `lane` and everything else stays as it is.

    "feed-forward" is what a layer saves outside of its norms and its attention; "head and loss" all that
    follows the last norm.
    """
    keep = saved_tensors_hooks(_same, _same)
    hooks = []
    if region == "head and loss":
        hooks.append(model.head.register_forward_pre_hook(lambda *_: lane.__enter__() and None))
        hooks.append(model.register_forward_hook(lambda *_: lane.__exit__(None, None, None)))
    elif region in INNER:
        hooks += _around(model, INNER[region], lane)
    else:
        hooks += _around(model, Layer, lane)
        for kind in INNER.values():
            hooks += _around(model, kind, keep)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _around(model: nn.Module, kind: type, context: AbstractContextManager[Any]) -> list[Any]:
    """Hooks that enter `context` for every module of a kind."""
    hooks = []
    for module in model.modules():
        if isinstance(module, kind):
            hooks.append(module.register_forward_pre_hook(lambda *_: context.__enter__() and None))
            hooks.append(module.register_forward_hook(lambda *_: context.__exit__(None, None, None)))
    return hooks


def _same(tensor: Tensor) -> Tensor:
    return tensor
