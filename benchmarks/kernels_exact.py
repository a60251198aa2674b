"""The exact code for the benchmark of codes, on activations of a trained encoder, beside ANS of nvCOMP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import microseconds
from kernels_rows import DEPTHS, GATED, PROGRAMS, TOKENS, Rows, require, same_bits
from nvcomp_ans import ans_calls
from torch import Tensor

from sidelane.kernels._launch import cdiv, span
from sidelane.kernels.exact import (
    exact_decode,
    exact_decode_into,
    exact_encode,
    exact_encode_into,
    exact_encode_late,
)
from sidelane.kernels.reference import (
    EXACT_BLOCK,
    ExactCodes,
    exact_decode_ref,
    exact_encode_ref,
    exact_sizes,
)

BF16, FP32 = torch.bfloat16, torch.float32
READ = 2048  # tokens that the encoder reads
KINDS = ("residual", "query", "context", "norm_input", "pregelu", "gelu")


def measure_exact_code(path: Path | None, rows: Rows) -> None:
    """Every kind of activations, and fewer and fewer programs."""
    found, numel = activations(path), TOKENS * DEPTHS[1]
    for kind in KINDS:
        measure_exact(kind, repeated(found[kind], numel), rows)
    everything = torch.cat([found[kind] for kind in KINDS])
    measure_exact("all kinds", repeated(everything, numel), rows)
    measure_exact("residual", repeated(found["residual, float32"], numel), rows)
    measure_exact("upcast residual", repeated(found["residual"], numel).float(), rows)
    for programs in PROGRAMS:
        measure_exact("all kinds", repeated(everything, numel), rows, programs)


def measure_exact(name: str, x: Tensor, rows: Rows, max_programs: int | None = None) -> None:
    """The launches of the encoder, the whole call with its wait, and the decoder."""
    gate = x[:GATED]
    want, got = exact_encode_ref(gate.cpu()), exact_encode(gate, max_programs=max_programs)
    require(want is not None and got is not None, f"{name} does not get smaller")
    if want is None or got is None:
        return
    for part, tensor in want.sections.items():
        require(torch.equal(got.sections[part].cpu(), tensor), part)
    require(same_bits(exact_decode_ref(want, x.dtype), gate.cpu()), "reference")
    codes = exact_encode(x, max_programs=max_programs)
    if codes is None:
        raise RuntimeError(f"{name} does not get smaller")
    require(same_bits(exact_decode(codes, x.dtype, max_programs=max_programs), x), "restored")
    numel, raw, out = x.numel(), x.numel() * x.element_size(), torch.empty_like(x)
    ratio, moved = round(raw / codes.nbytes, 4), raw + codes.nbytes
    room = codes.escapes.numel() // 2
    buffer = torch.empty(span(exact_sizes(x.dtype, numel, 0, room)), dtype=torch.uint8, device=x.device)
    columns = {
        "code": "exact",
        "data": name,
        "dtype": str(x.dtype)[6:],
        "elements": numel,
        "group": EXACT_BLOCK,
        "symmetric": "",
        "rounding": "",
        "max_programs": max_programs or "",
    }
    times = microseconds(lambda: exact_encode_into(x, buffer, room, max_programs=max_programs))
    rows.add(columns, "encode, launches", "sidelane", times, moved, raw, ratio)
    times = waited(lambda: exact_encode(x, max_programs=max_programs))
    rows.add(columns, "encode, call", "sidelane", times, moved, raw, ratio)
    times = microseconds(lambda: exact_decode_into(codes, out, max_programs=max_programs))
    rows.add(columns, "decode", "sidelane", times, moved, raw, ratio)
    if max_programs is None:
        notice = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        late = exact_encode_late(x, notice)
        torch.cuda.synchronize()
        settled = None if late is None else late.settle()
        if not isinstance(settled, ExactCodes) or settled.nbytes != codes.nbytes:
            raise RuntimeError("the code of late size has another one")
        require(same_bits(exact_decode(settled, x.dtype), x), "restored from the code of late size")
        calls: dict[str, Callable[[], Any]] = {
            "encode late, call": lambda: exact_encode_late(x, notice),
            "decode, call": lambda: exact_decode(codes, x.dtype),
        }
        for direction, run in calls.items():
            rows.add(columns, direction, "sidelane", waited(run), moved, raw, ratio)
        for direction, method, run, nbytes in ans_calls(x):
            rows.add(columns, direction, method, waited(run), raw + nbytes, raw, round(raw / nbytes, 4))


def waited(run: Callable[[], Any]) -> tuple[float, float, float]:
    """Quartiles of the microseconds that a call takes the host when the device has nothing else to do."""
    times = []
    for _ in range(22):
        torch.cuda.synchronize()
        start = perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e6 * (perf_counter() - start))
    q1, middle, q3 = quantiles(times[2:], n=4)
    return q1, middle, q3


def activations(path: Path | None) -> dict[str, Tensor]:
    """bfloat16 vectors of a trained encoder by kind, and float32 `residual, float32`."""
    if path is None:
        return read_activations()
    found = {}
    with np.load(path) as file:
        for name in file.files:
            words = torch.from_numpy(file[name])
            found[name] = words.view(BF16 if words.dtype == torch.int16 else FP32)
    return found


def read_activations() -> dict[str, Tensor]:
    """Of layers 2 and 5 of MiniLM reading Python's standard library."""
    from minilm import MiniLM, standard_library

    lm = MiniLM()
    found: dict[str, list[Tensor]] = {}

    def save(name: str, of_input: bool = False) -> Any:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            tensor = (inputs[0] if of_input else made).detach().reshape(-1)
            found.setdefault(name, []).append(tensor.bfloat16())
            if name == "residual":
                found.setdefault("residual, float32", []).append(tensor.clone())

        return hook

    for layer in (lm.model.encoder.layer[i] for i in (2, 5)):
        layer.register_forward_hook(save("residual"))
        layer.attention.self.query.register_forward_hook(save("query"))
        layer.attention.output.dense.register_forward_hook(save("context", of_input=True))
        layer.attention.output.LayerNorm.register_forward_hook(save("norm_input", of_input=True))
        layer.intermediate.dense.register_forward_hook(save("pregelu"))
        layer.intermediate.register_forward_hook(save("gelu"))
    with torch.inference_mode():
        for batch in torch.split(lm.windows(standard_library()[1], READ), 8):
            lm.model(batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def save_activations(path: Path, each: int) -> None:
    """`each` elements of every kind, spread evenly in runs of a block."""
    kept: dict[str, Any] = {}
    for name, x in activations(None).items():
        blocks = x[: x.numel() // EXACT_BLOCK * EXACT_BLOCK].view(-1, EXACT_BLOCK)
        chosen = blocks[:: max(1, cdiv(blocks.shape[0] * EXACT_BLOCK, each))].reshape(-1)
        kept[name] = chosen.view(torch.int16).numpy() if x.dtype == BF16 else chosen.numpy()
    np.savez_compressed(path, **kept)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def repeated(x: Tensor, numel: int) -> Tensor:
    return x.cuda().repeat(cdiv(numel, x.numel()))[:numel].contiguous()
