"""A small decoder with the parts that offloading has to get right, and how its gradients are taken."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 64, 32, 4, 2, 64, 2
MIN_BYTES = 1024


class Block(nn.Module):
    """Pre-norm attention (RoPE, grouped queries, fused qkv) and SwiGLU, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.head = WIDTH // HEADS
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * self.head, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, -1, self.head).transpose(1, 2)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.drop(self.out(a.transpose(1, 2).reshape(b, t, WIDTH)))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.drop(self.down(F.silu(gate) * up))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Decoder(nn.Module):
    def __init__(self, wrap=None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.wrap = wrap or (lambda block, x, **kw: block(x, **kw))

    def forward(self, tokens: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        angle = torch.arange(tokens.shape[1], device=tokens.device)[:, None] / 10.0 ** torch.arange(
            half, device=tokens.device
        )
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.wrap(block, x, cos=angle.cos(), sin=angle.sin())
        return x @ self.embed.weight.t()  # tied


def build(device: torch.device | str | None = None, wrap=None) -> tuple[Decoder, Tensor]:
    """A decoder and its tokens [2, 48], the same at every call, on `device` or the default one."""
    device = torch.get_default_device() if device is None else device
    torch.manual_seed(1)
    model = Decoder(wrap).to(device)
    draw = torch.Generator().manual_seed(2)
    return model, torch.randint(0, VOCAB, (2, 48), generator=draw, device="cpu").to(device)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy of the next token; dropout draws from the global generators, seeded here."""
    torch.manual_seed(3)
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def gradients(
    model: nn.Module,
    tokens: Tensor,
    forward: AbstractContextManager | None = None,
    *,
    autocast: bool = False,
    backward_inside: bool = False,
) -> list[Tensor]:
    """Gradients of all parameters, the forward pass under `forward`."""
    model.zero_grad()
    with forward or nullcontext():
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(model, tokens)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Every tensor equal in every bit."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and torch.equal(a, e), f"tensor {i} differs by {(a - e).abs().max()}"


def settled(context: Any) -> bool:
    """Nothing that an offload context packed is held."""
    report = context.report()
    return (report.host_bytes, report.device_bytes, report.tickets) == (0, 0, 0)
