"""The model of the offload benchmark: a Llama of transformers with random weights, and one training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a batch of `batch` sequences of `tokens` tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed: int
    vocab: int
    batch: int
    tokens: int

    def with_tokens(self, tokens: int) -> Shape:
        """One sequence of `tokens` tokens."""
        return replace(self, batch=1, tokens=tokens)


SHAPES = {
    "1b": Shape(2048, 22, 32, 4, 5632, 32000, batch=4, tokens=4096),
    "1b8": Shape(2048, 22, 32, 4, 5632, 32000, batch=8, tokens=4096),
    "8b": Shape(4096, 8, 32, 8, 14336, 32000, batch=1, tokens=8192),
    "tiny": Shape(64, 2, 4, 2, 176, 128, batch=2, tokens=32),
}


class Llama(nn.Module):
    """bfloat16 Llama; `forward` returns the mean cross-entropy of tokens [B, T + 1].

    The head takes CHUNK tokens at a time and computes their logits again in backward, so that it does not set
    the peak. Without `head` the loss is the mean of the last hidden state.
    """

    def __init__(self, shape: Shape, device: torch.device, head: bool) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.feed,
            vocab_size=shape.vocab,
            max_position_embeddings=max(shape.tokens, 8192),
            attn_implementation="sdpa",  # type: ignore[call-arg]
            use_cache=False,
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                torch.manual_seed(0)
                self.backbone = LlamaModel(config).train()
                self.head = nn.Linear(shape.hidden, shape.vocab, bias=False) if head else None
        finally:
            torch.set_default_dtype(default)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.backbone(input_ids=tokens[:, :-1]).last_hidden_state
        if self.head is None:
            return hidden.float().mean()
        targets = tokens[:, 1:].flatten()
        # Hooks that do nothing take the place of those around: like TRL and torchtune, no setting offloads
        # what the head saves.
        with saved_tensors_hooks(_same, _same):
            total = torch.zeros((), device=hidden.device)
            chunks = torch.split(hidden.flatten(0, 1), CHUNK), torch.split(targets, CHUNK)
            for h, t in zip(*chunks, strict=True):
                total = total + checkpoint(_chunk_loss, h, self.head.weight, t, use_reentrant=False)
        return total / targets.numel()


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)  # [CHUNK, vocab]
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def batch(shape: Shape, device: torch.device) -> Tensor:
    """Random tokens [B, T + 1], the same for the same shape."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocab, (shape.batch, shape.tokens + 1), generator=generator).to(device)


def train_step(
    model: nn.Module,
    tokens: Tensor,
    around_forward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Gradients of one batch, into empty `.grad`; returns the loss, detached."""
    model.zero_grad(set_to_none=True)
    with around_step():
        with ExitStack() as stack:
            stack.enter_context(around_forward())
            loss: Tensor = model(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Taken out of the model: its `.grad` are empty afterwards."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
