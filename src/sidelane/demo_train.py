"""How the demo trains under a lane, and what it measures there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import nan
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sidelane.demo_model import GPT, Corpus, Shape, call_layer
from sidelane.pipeline.checkpoint import checkpoint
from sidelane.pipeline.offload import offload

MIN_BYTES = 1024  # smaller tensors stay where they are
LEARNING_RATE = 3e-3
UNBOUNDED = 1e30  # an error bound that every code keeps: errors are measured, codes stay as asked


@dataclass(frozen=True)
class Setting:
    """One way to train: arguments of `offload` (no lane: no offload), and whether layers are recomputed."""

    name: str
    lane: str | None
    options: dict[str, Any] = field(default_factory=dict)
    recompute: bool = False

    @property
    def exact(self) -> bool:
        return self.lane in (None, "raw", "exact")

    def context(self, **extra: Any) -> offload:
        return offload(self.lane or "raw", min_bytes=MIN_BYTES, **{**extra, **self.options})


SETTINGS = (
    Setting("no offload", None),
    Setting("raw", "raw"),
    Setting("exact", "exact"),
    Setting("packed, 8 bits", "packed", {"bits": 8}),
    Setting("packed, 4 bits", "packed", {"bits": 4}),
    Setting("packed, 2 bits", "packed", {"bits": 2}),
    Setting("packed, error <= 5%", "packed", {"max_rel_error": 0.05}),
    Setting("checkpoint, exact", "exact", recompute=True),
    Setting("checkpoint, 4 bits", "packed", {"bits": 4}, recompute=True),
    Setting("checkpoint, video", "video-cpu", {"format": "yuv444"}, recompute=True),
)


@dataclass
class Result:
    """What one setting gave.

    Attributes:
        losses: training loss of every step, nats per byte.
        seconds: of one training step, median.
        ratio: bytes of the saved tensors over their bytes on the wire.
        worst_error: largest relative Frobenius error of a saved tensor.
        cosine: of the gradient with the one without offload, same weights and batch.
        held_bytes: most bytes at one time of packets, and of the layer that is being recomputed.
        bitwise: every loss and the gradient equal those without offload bit for bit.
    """

    name: str
    exact: bool
    recompute: bool
    losses: list[float]
    seconds: float
    ratio: float = nan
    worst_error: float = nan
    cosine: float = nan
    held_bytes: int = 0
    bitwise: bool = False


@dataclass(frozen=True)
class Trainer:
    """Trains from one seed on one device."""

    shape: Shape
    corpus: Corpus
    device: torch.device
    seed: int

    def train(self, setting: Setting, steps: int, advance: Callable[[], object]) -> tuple[GPT, Result]:
        """A model trained from the seed's weights on the seed's batches."""
        model = GPT(self.shape, self.seed).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        context = setting.context() if setting.lane else None
        losses, seconds = [], []
        for step in range(steps):
            start = perf_counter()
            optimizer.zero_grad()
            loss = self._loss(model, step, setting, context)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            seconds.append(perf_counter() - start)
            advance()
        return model, Result(setting.name, setting.exact, setting.recompute, losses, median(seconds))

    def gradient(self, model: GPT, batch: int) -> Tensor:
        """The flat gradient of one batch without offload."""
        model.zero_grad()
        self._loss(model, batch, SETTINGS[0], None).backward()  # type: ignore[no-untyped-call]
        return _flat_gradient(model)

    def measure(self, setting: Setting, result: Result, model: GPT, batch: int, reference: Tensor) -> None:
        """Fill in what one batch on the weights of `model` shows; `reference`: gradient without offload."""
        context = setting.context() if setting.exact else setting.context(max_rel_error=UNBOUNDED)
        model.zero_grad()
        self._loss(model, batch, setting, context).backward()  # type: ignore[no-untyped-call]
        gradient = _flat_gradient(model)
        total = context.report().total
        packets = total.bytes_wire if setting.lane else total.bytes_in
        result.ratio = total.bytes_in / packets
        result.worst_error = total.worst_error
        result.cosine = float(torch.cosine_similarity(gradient, reference, dim=0))
        result.bitwise = torch.equal(gradient, reference)
        # All packets of a step exist at the end of its forward.
        result.held_bytes = packets + (self._layer_bytes(model, batch) if setting.recompute else 0)

    def _loss(self, model: GPT, batch: int, setting: Setting, context: offload | None) -> Tensor:
        tokens = self.corpus.batch(self.shape, self.seed, batch).to(self.device)
        cast = torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")
        with context or nullcontext(), cast:
            return model(tokens, checkpoint if setting.recompute else call_layer)  # type: ignore[no-any-return]

    def _layer_bytes(self, model: GPT, batch: int) -> int:
        """Bytes that one layer saves for backward: what recomputing it brings back for a moment."""
        tokens = self.corpus.batch(self.shape, self.seed, batch).to(self.device)
        x = model.embed(tokens[:, :-1])
        with SETTINGS[0].context() as context, torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            model.layers[0](x)
        return context.report().total.bytes_in


def _flat_gradient(model: GPT) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
