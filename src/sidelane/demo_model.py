"""What the demo trains: a small byte-level GPT and Python's own standard library as its text."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Caller = Callable[[nn.Module, Tensor], Tensor]  # runs a layer; checkpointing brings its own


def call_layer(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a batch."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int  # of the feed-forward
    context: int  # bytes of a sequence
    batch: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


FULL = Shape(layers=4, width=96, heads=4, kv_heads=2, hidden=256, context=64, batch=4)
QUICK = Shape(layers=2, width=32, heads=2, kv_heads=1, hidden=64, context=32, batch=2)


class Attention(nn.Module):
    """Causal attention with rotary positions and fewer key-value heads than query heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.query = nn.Linear(shape.width, shape.heads * shape.head_dim, bias=False)
        self.key_value = nn.Linear(shape.width, 2 * shape.kv_heads * shape.head_dim, bias=False)
        self.out = nn.Linear(shape.heads * shape.head_dim, shape.width, bias=False)
        half = torch.arange(shape.head_dim // 2)
        angle = torch.arange(shape.context)[:, None] * 10000.0 ** (
            -2 * half / shape.head_dim
        )  # [T, head_dim / 2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.query(x).view(b, t, self.shape.heads, -1).transpose(1, 2)  # [B, heads, T, head_dim]
        k, v = self.key_value(x).view(b, t, 2 * self.shape.kv_heads, -1).transpose(1, 2).chunk(2, dim=1)
        y = F.scaled_dot_product_attention(
            self._rotate(q), self._rotate(k), v, is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[2]].to(x.dtype), self.sin[: x.shape[2]].to(x.dtype)  # type: ignore[index]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Layer(nn.Module):
    """Attention and SwiGLU feed-forward, each after an RMS norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(shape.width, eps=1e-6)
        self.attention = Attention(shape)
        self.norm_feed = nn.RMSNorm(shape.width, eps=1e-6)
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        gate, up = self.gate_up(self.norm_feed(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Next-byte model; `forward` returns the mean cross-entropy in nats of tokens [B, T + 1]."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(256, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens: Tensor, call: Caller = call_layer) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = call(layer, x)
        logits = self.head(self.norm(x))  # [B, T, 256]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Corpus:
    """The sources of the standard library's top-level modules as one row of bytes."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        data = b"\n".join(path.read_bytes() for path in files)
        self.files = len(files)
        self.text = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def batch(self, shape: Shape, seed: int, step: int) -> Tensor:
        """Tokens [B, T + 1] int64, the same for the same seed and step."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.text) - shape.context - 1, (shape.batch,), generator=generator)
        return torch.stack([self.text[s : s + shape.context + 1] for s in starts.tolist()]).long()
