"""The longest sequence that a setting trains on within 79.3 GiB of the GPU: what a card of 80 GB has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llama import Llama, Shape, batch
from measure import GIB, device, host_used, release, stepper, timings
from peers import Setting

SHARE = 80 / 141
HOST_LIMIT = 100 * GIB  # of the host's memory; a process that passes its end is killed
PROBES = 8192, 16384
GRAIN = 1024  # tokens
STRIDE = 1.04  # from a length that fits to the next one tried
TRIALS = 4
MOST = 96 << 10  # tokens that are tried: attention makes a step of them take 8 s or more


@dataclass(frozen=True)
class Trial:
    """One step: whether it ran, and bytes on the device and on the host."""

    tokens: int
    fits: bool
    peak: int
    host: int
    ms: float


def longest(setting: Setting, shape: Shape, head: bool) -> dict[str, Any]:
    """Row of the longest sequence. `limit` names the memory that a longer one would not fit in; "tried": MOST
    tokens fit."""
    torch.cuda.set_per_process_memory_fraction(SHARE)
    total = int(SHARE * torch.cuda.get_device_properties(0).total_memory)
    model, idle = Llama(shape, device(), head), host_used()
    trials, limit = search(
        lambda tokens: _attempt(setting, model, shape.with_tokens(tokens), idle), total, HOST_LIMIT
    )
    best = max((trial for trial in trials if trial.fits), key=lambda trial: trial.tokens)
    return {
        "tokens": best.tokens,
        "limit": limit,
        "ms": round(best.ms, 1),
        "peak_gib": round(best.peak / GIB, 2),
        "host_gib": round(best.host / GIB, 2),
        "trials": " ".join(f"{t.tokens}{'' if t.fits else '!'}" for t in trials),
    }


def search(attempt: Callable[[int], Trial], device_limit: int, host_limit: int) -> tuple[list[Trial], str]:
    """Trials, the longest that fits within about STRIDE of the end, and what ends there: "gpu", "host" or
    "tried".

    Memory is affine in the length: two short steps predict the end, longer ones confirm or correct it. The
    end of the host's memory is never tried, only predicted. Raises RuntimeError when a short step fails.
    """
    trials = [attempt(tokens) for tokens in PROBES]
    if not all(trial.fits for trial in trials):
        raise RuntimeError(f"{PROBES} tokens do not fit")
    a, b = trials
    host_end = crossing((a.tokens, a.host), (b.tokens, b.host), host_limit)
    guess = crossing((a.tokens, a.peak), (b.tokens, b.peak), device_limit) * 0.98
    good, bad = max(PROBES), float("inf")
    while len(trials) < len(PROBES) + TRIALS:
        tokens = int(min(guess, host_end, MOST)) // GRAIN * GRAIN
        if not good < tokens < bad:
            break
        trials.append(attempt(tokens))
        if trials[-1].fits:
            good, guess = tokens, tokens * STRIDE
        else:
            bad, guess = tokens, max(tokens / STRIDE, (good + tokens) / 2)
    if good == MOST:
        return trials, "tried"
    return trials, "host" if good + GRAIN > host_end else "gpu"


def crossing(a: tuple[int, int], b: tuple[int, int], limit: int) -> float:
    """Where the line through two points (tokens, bytes) reaches `limit`; infinite if it does not rise."""
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return b[0] + (limit - b[1]) / slope if slope > 0 else float("inf")


def _attempt(setting: Setting, model: Llama, shape: Shape, idle: int) -> Trial:
    """`idle`: bytes of host memory in use before the first."""
    torch.cuda.reset_peak_memory_stats()
    ms, fits = 0.0, True
    try:
        ms = _step(setting, model, shape)
    except torch.OutOfMemoryError:
        fits = False
    trial = Trial(shape.tokens, fits, torch.cuda.max_memory_allocated(), host_used() - idle, ms)
    release(model)
    torch._C._host_emptyCache()
    return trial


def _step(setting: Setting, model: Llama, shape: Shape) -> float:
    """Milliseconds of one step."""
    return timings(stepper(model, setting.open(model, **setting.options), batch(shape, device())), 1)[0]
