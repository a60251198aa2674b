"""Tensors of the benchmark of the planner: activations of a small GPT, trained for seconds."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from sidelane.demo_model import GPT, Corpus, Layer, Shape

FULL = Shape(layers=4, width=512, heads=8, kv_heads=2, hidden=1536, context=512, batch=16)
TINY = Shape(layers=2, width=64, heads=4, kv_heads=2, hidden=128, context=64, batch=2)


def trained(shape: Shape, device: torch.device, seconds: float) -> tuple[GPT, Corpus]:
    """A GPT after so many seconds of training under bf16 autocast on Python's standard library."""
    model, corpus = GPT(shape, seed=0).to(device), Corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    end, step, loss = perf_counter() + seconds, 0, torch.zeros(())
    while perf_counter() < end:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(corpus.batch(shape, 0, step).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 8 == 0:
            loss.item()  # the host does not run ahead
    print(f"trained {step} steps, loss {loss.item():.3f}", flush=True)
    return model, corpus


def activations(shape: Shape, device: torch.device, seconds: float, nbytes: int) -> dict[str, Tensor]:
    """By kind [T, width] with at least `nbytes`, from batches that were not trained on: "hidden", "mlp" and
    "kv" in bf16, "norm" in fp32, and "codes", int8 with a scale for each row of "hidden"."""
    model, corpus = trained(shape, device, seconds)
    found: dict[str, list[Tensor]] = {kind: [] for kind in ("hidden", "mlp", "norm", "kv")}

    def keep(kind: str, dtype: torch.dtype) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0] if kind == "mlp" else output
            found[kind].append(x.detach().flatten(0, 1).to(dtype))

        return hook

    for layer in (module for module in model.modules() if isinstance(module, Layer)):
        layer.register_forward_hook(keep("hidden", torch.bfloat16))
        layer.down.register_forward_hook(keep("mlp", torch.bfloat16))
        layer.norm_feed.register_forward_hook(keep("norm", torch.float32))
        layer.attention.key_value.register_forward_hook(keep("kv", torch.bfloat16))
    step = 0
    while min(sum(x.nbytes for x in parts) for parts in found.values()) < nbytes:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            model(corpus.batch(shape, 1, step).to(device))
        step += 1
    kinds = {kind: torch.cat(parts) for kind, parts in found.items()}
    hidden = kinds["hidden"].float()
    scale = 127 / hidden.abs().amax(1, keepdim=True)
    kinds["codes"] = (hidden * scale).round().to(torch.int8).repeat(2, 1)
    return kinds


def head(x: Tensor, nbytes: int) -> Tensor:
    """The first rows of `x`, about `nbytes` of them, on their own."""
    return x[: max(nbytes // (x.shape[1] * x.itemsize), 1)].clone()
