"""Which parts of the GPT suffer from a lossy lane, and a lane that spares them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet
from sidelane.demo_model import GPT, Attention, Layer

REGIONS = ("norms", "attention", "feed-forward", "head and loss")
INNER = {"norms": nn.RMSNorm, "attention": Attention}


@dataclass(frozen=True)
class SoftmaxSpared:
    """`low`, but `high` for what softmax works on: heads [B, H, T, D] and logits [B T, 256] in float32.

    Backward computes the softmax of attention again, from saved queries and keys; their errors are in its
    exponent.
    """

    low: Lane
    high: Lane

    name = "packed"
    exact = False

    def encode(self, tensor: Tensor) -> Packet:
        logits = tensor.dtype == torch.float32 and tensor.ndim == 2 and tensor.shape[-1] == 256
        return (self.high if tensor.ndim == 4 or logits else self.low).encode(tensor)

    def decode(self, packet: Packet) -> Tensor:
        return self.low.decode(packet)

    def finer(self) -> Lane | None:
        return self.high


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
