"""The surface kernels on a GPU: projection, quantization and packing into a surface, and the inverse.

Every row passes a gate first. Beside it, in the same run and as CUDA graphs too: the projection alone by
cuBLAS, the chain of torch operations, the same chain under torch.compile(max-autotune), and the least time
that the measured copy bandwidth and the measured rate of a large GEMM allow. Inputs are random: these are
times, no statement about compression.

The chains of the inverse multiply in the dtype of x, which rounds codes to 8 bits where that is bfloat16;
"torch.compile, float16" keeps up to 11, as the kernels do. "sidelane, weights ready": with `weigh_components`
called once before, as a lane does for a basis.

    python benchmarks/kernels_surface.py --compiled few
    python benchmarks/kernels_surface.py --essential --compiled none    # five cases
    python benchmarks/kernels_surface.py --essential --channels 1024,512
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, append_rows, environment, figure, microseconds
from torch import Tensor

from sidelane.kernels.reference import project_quantize_ref, unpack_surface_ref
from sidelane.kernels.surface import (
    Weights,
    project_quantize_pack,
    unpack_dequantize_project,
    weigh_components,
)
from sidelane.layout import (
    CHANNEL_ROWS,
    CHANNEL_TILES,
    NV12,
    NV12_SPLIT12,
    P010,
    TOKEN_ROWS,
    SurfaceFormat,
    SurfaceLayout,
    plan_surface,
)

GATED = 512  # tokens whose results are checked
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """x [tokens, depth] of `dtype`, components [depth, channels] of `components`, codes as `format`."""

    tokens: int
    depth: int
    channels: int
    format: SurfaceFormat
    mapping: str = CHANNEL_ROWS
    dtype: torch.dtype = BF16
    components: torch.dtype = BF16

    @property
    def columns(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "depth": self.depth,
            "channels": self.channels,
            "format": self.format.name,
            "mapping": self.mapping,
            "x": str(self.dtype)[6:],
            "components": str(self.components)[6:],
        }


def essential_cases() -> Iterator[Case]:
    """From few to many channels, in one format."""
    for channels in (64, 32, 256, 512, 1024):
        yield Case(16384, 4096, channels, P010)


def cases() -> Iterator[Case]:
    for tokens in (16384, 4096):
        for depth in (4096, 2048):
            for channels in (1024, 512, 256, 64, 32):
                for fmt in (NV12, P010, NV12_SPLIT12):
                    yield Case(tokens, depth, channels, fmt)
    for mapping in (TOKEN_ROWS, CHANNEL_TILES):
        yield Case(16384, 4096, 1024, P010, mapping)
    yield Case(16384, 4096, 512, P010, components=FP32)
    yield Case(16384, 4096, 512, P010, dtype=FP32, components=FP32)


def with_compiled(case: Case, how: str) -> bool:
    """Whether the chain is compiled for `case`: each takes ten seconds or more."""
    plain = case.mapping == CHANNEL_ROWS and case.dtype == case.components == BF16
    few = plain and (case.tokens, case.depth) == (16384, 4096) and case.channels in (1024, 512, 64)
    return how == "all" or (how == "few" and few and case.format == P010)


class Inputs:
    """Operands of a case; the codes span eight standard deviations of the coefficients."""

    def __init__(self, case: Case) -> None:
        place = torch.device("cuda")
        torch.manual_seed(0)
        self.x = torch.randn(case.tokens, case.depth, device=place).to(case.dtype)
        components = torch.randn(case.depth, case.channels, device=place) / case.depth**0.5
        self.components = components.to(case.components)
        self.levels = torch.full((case.channels,), 2.0**case.format.bits - 1, device=place)
        self.inv_scale = self.levels / 8
        self.scale = 1 / self.inv_scale
        self.offset = torch.full((case.channels,), -4.0, device=place)
        self.bias = torch.randn(case.depth, device=place)
        self.layout = plan_surface(case.format, case.mapping, case.tokens, case.channels)
        self.surface = torch.zeros(self.layout.shape, dtype=torch.uint8, device=place)

    def pack(self) -> Tensor:
        quantizer = (self.offset, self.inv_scale, self.levels)
        return project_quantize_pack(self.x, self.components, *quantizer, self.surface, self.layout)

    def unpack(self, weights: Weights | None = None) -> Tensor:
        operands = (self.components, self.scale, self.bias)
        return unpack_dequantize_project(self.surface, self.layout, *operands, self.x.dtype, weights=weights)

    def unpack_ready(self) -> Callable[[], Tensor]:
        operands = (self.components, self.scale, self.bias)
        return partial(self.unpack, weigh_components(*operands, self.layout.format, self.x.dtype))


def gate(inputs: Inputs) -> None:
    """Raises RuntimeError unless codes differ from the reference by one at most, in one of a hundred at most,
    the clamp counts by no more than codes do, and restored values by the stated bound.
    """
    clamped = inputs.pack()
    codes = unpack_surface_ref(inputs.surface, inputs.layout)
    operands = (inputs.components, inputs.offset, inputs.inv_scale, inputs.levels)
    expected, count = project_quantize_ref(inputs.x, *operands)
    off = (codes.int() - expected.int()).abs()
    if off.max() > 1 or off.count_nonzero() > off.numel() // 100:
        raise RuntimeError(f"{int(off.count_nonzero())} codes differ, by up to {int(off.max())}")
    if (clamped - count).abs() > off.count_nonzero():
        raise RuntimeError(f"{int(clamped)} codes were clamped, {int(count)} by the reference")
    some = codes[:GATED]
    whole = inputs.unpack()
    if not torch.equal(inputs.unpack_ready()(), whole):
        raise RuntimeError("weights made before restore other values")
    restored = whole[:GATED].double()
    exact = _restored(some, inputs.components, inputs.scale, inputs.bias)
    away = (some - inputs.layout.fill).abs()
    terms = _restored(away, inputs.components.abs(), inputs.scale, inputs.bias.abs())
    rounding = 2.0**-8 if inputs.x.dtype == BF16 else 2.0**-22
    added = 2.0**-11 if inputs.x.dtype == BF16 else 2.0**-20
    if not ((restored - exact).abs() <= rounding * exact.abs() + added * terms).all():
        raise RuntimeError("restored values are beyond the bound")


def _restored(codes: Tensor, components: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (codes.double() * scale.double()) @ components.double().t() + bias.double()


def chain_pack(inputs: Inputs) -> Callable[[], Tensor]:
    """The same in torch, the product rounded to the dtype of x: what a compiler gets to see."""
    x, components = inputs.x, inputs.components.to(inputs.x.dtype)
    offset, inv_scale, levels = inputs.offset, inputs.inv_scale, inputs.levels
    surface, layout = inputs.surface, inputs.layout

    def run() -> Tensor:
        q = torch.floor(((x @ components).float() - offset) * inv_scale + 0.5)
        codes = torch.minimum(q.clamp_min(0), levels)
        clamped = (codes != q).sum(dtype=torch.int32)
        write_codes(codes.to(torch.int32), surface, layout)
        return clamped

    return run


def chain_unpack(inputs: Inputs, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """The inverse in torch, multiplied in `dtype`, default: that of x."""
    dtype = dtype or inputs.x.dtype
    components, bias = inputs.components.to(dtype).t(), inputs.bias.to(dtype)
    surface, layout, scale = inputs.surface, inputs.layout, inputs.scale

    def run() -> Tensor:
        z = (read_codes(surface, layout).float() * scale).to(dtype)
        return torch.addmm(bias, z, components).to(inputs.x.dtype)

    return run


def in_float16(inputs: Inputs) -> Callable[[], Tensor]:
    return chain_unpack(inputs, torch.float16)


def write_codes(codes: Tensor, surface: Tensor, layout: SurfaceLayout) -> None:
    """int32 codes of an even number of tokens, or channels, into rows of a surface, in few operations."""
    lines = codes if layout.mapping == TOKEN_ROWS else codes.t()
    fmt, spare = layout.format, layout.capacity - layout.positions
    flat = torch.nn.functional.pad(lines.reshape(-1), (0, spare), value=layout.fill)
    rows = flat.view(layout.frames, -1, layout.width)
    if fmt.split:
        planes = surface.view(layout.frames, -1, layout.pitch)[:, :, : layout.width]
        pairs = (rows & 15).view(layout.frames, layout.height // 2, layout.width, 2)
        planes[:, : layout.height] = (rows >> 4).to(torch.uint8)
        planes[:, layout.height :] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    else:
        samples = surface.view(torch.int16) if fmt.itemsize == 2 else surface
        samples = samples.view(layout.frames, -1, layout.pitch // fmt.itemsize)
        samples[:, :, : layout.width] = (rows << fmt.shift).to(samples.dtype)


def read_codes(surface: Tensor, layout: SurfaceLayout) -> Tensor:
    """What `write_codes` wrote, int32 [T, K]."""
    fmt = layout.format
    if fmt.split:
        planes = surface.view(layout.frames, -1, layout.pitch)[:, :, : layout.width].to(torch.int32)
        low = planes[:, layout.height :]
        low = torch.stack((low & 15, low >> 4), dim=-1).view(layout.frames, layout.height, layout.width)
        rows = planes[:, : layout.height] << 4 | low
    else:
        samples = surface.view(torch.int16) if fmt.itemsize == 2 else surface
        samples = samples.view(layout.frames, -1, layout.pitch // fmt.itemsize)[:, :, : layout.width]
        rows = (samples.to(torch.int32) & 0xFFFF) >> fmt.shift
    used = rows.reshape(-1)[: layout.positions]
    if layout.mapping == TOKEN_ROWS:
        return used.view(layout.tokens, layout.channels)
    return used.view(layout.channels, layout.tokens).t()


@dataclass(frozen=True)
class Limits:
    """What the machine does at best in this run: bytes and floating-point operations in a microsecond."""

    copy: float
    gemm: dict[torch.dtype, float]

    @classmethod
    def measure(cls) -> Limits:
        source = torch.zeros(2**28, dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        # A kernel: a copy becomes a memcpy node of the graph, which is slower.
        copy = 2 * source.nbytes / microseconds(lambda: torch.neg(source, out=target))[1]
        gemm = {}
        for dtype in (BF16, FP32):
            a = torch.randn(8192, 8192, device="cuda").to(dtype)
            gemm[dtype] = 2 * 8192**3 / microseconds(partial(torch.matmul, a, a))[1]
        return cls(copy, gemm)

    def least(self, case: Case, layout: SurfaceLayout) -> float:
        """Microseconds: every operand is moved once, every product made once."""
        moved = case.tokens * case.depth * case.dtype.itemsize + layout.rows * layout.pitch
        moved += case.depth * case.channels * case.components.itemsize
        operations = 2 * case.tokens * case.depth * case.channels
        return max(moved / self.copy, operations / self.gemm[case.dtype])


def measure(case: Case, limits: Limits, compiled: bool) -> Iterator[dict[str, Any]]:
    inputs = Inputs(case)
    gate(inputs)
    least = limits.least(case, inputs.layout)
    x, components = inputs.x, inputs.components.to(case.dtype)
    z, y = x @ components, torch.empty_like(x)
    for direction, ours, chains, product in (
        ("pack", {"": inputs.pack}, {"": chain_pack}, lambda: torch.mm(x, components, out=z)),
        (
            "unpack",
            {"": inputs.unpack, ", weights ready": inputs.unpack_ready()},
            {"": chain_unpack} | ({", float16": in_float16} if case.dtype == BF16 else {}),
            lambda: torch.mm(z, components.t(), out=y),
        ),
    ):
        runs: dict[str, Callable[[], Any]] = {"cublas, projection alone": product}
        runs |= {f"sidelane{name}": own for name, own in ours.items()}
        if case.mapping != CHANNEL_TILES:
            runs["torch"] = chains[""](inputs)
            if compiled:
                torch._dynamo.reset()
                for name, other in chains.items():
                    run = torch.compile(other(inputs), mode="max-autotune-no-cudagraphs")
                    runs[f"torch.compile{name}"] = run
        times = {name: microseconds(run) for name, run in runs.items()}
        alone = times["cublas, projection alone"][1]
        for name, (q1, median, q3) in times.items():
            yield {
                **environment(),
                **case.columns,
                "direction": direction,
                "method": name,
                "us": round(median, 2),
                "us_q1": round(q1, 2),
                "us_q3": round(q3, 2),
                "of_cublas": round(median / alone, 3),
                "least_us": round(least, 2),
                "of_limit": round(least / median, 3),
            }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Times over K at T = 16384, D = 4096 in P010, one panel for each direction."""
    names = {"cublas, projection alone": "o", "sidelane": "s", "torch.compile": "^", "torch": "v"}
    shown = {"tokens": 16384, "depth": 4096, "format": "p010", "mapping": CHANNEL_ROWS, "x": "bfloat16"}
    shown |= {"components": "bfloat16"}
    with figure(path, 2) as axes:
        for axis, direction in zip(axes, ("pack", "unpack"), strict=True):
            chosen = [r for r in rows if r["direction"] == direction and shown.items() <= r.items()]
            for name, marker in names.items():
                line = sorted((r["channels"], r["us"]) for r in chosen if r["method"] == name)
                axis.plot(*zip(*line, strict=True), marker=marker, label=name)
            line = sorted({(r["channels"], r["least_us"]) for r in chosen})
            axis.plot(*zip(*line, strict=True), "k:", label="copy and GEMM rate")
            axis.set(xscale="log", yscale="log", xlabel="K", ylabel="µs", title=direction)
            axis.set_xticks([32, 64, 256, 512, 1024], ["32", "64", "256", "512", "1024"])
            axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--compiled", choices=("none", "few", "all"), default="few")
    parser.add_argument("--essential", action="store_true", help="five cases, without the figure")
    parser.add_argument("--channels", default="", help="K of cases, by commas; default: all, with the figure")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_surface.csv")
    options = parser.parse_args()
    limits = Limits.measure()
    rates = ", ".join(f"{str(k)[6:]} {v / 1e6:.0f} TFLOP/s" for k, v in limits.gemm.items())
    print(f"copy {limits.copy / 1e6:.2f} TB/s, {rates}")
    rows: list[dict[str, Any]] = []
    wanted = [int(channels) for channels in options.channels.split(",") if channels]
    for case in essential_cases() if options.essential else cases():
        if wanted and case.channels not in wanted:
            continue
        found = list(measure(case, limits, with_compiled(case, options.compiled)))
        append_rows(options.out, found)
        rows += found
        for row in found:
            kept = [
                row[name] for name in (*case.columns, "direction", "method", "us", "of_cublas", "of_limit")
            ]
            print(*kept, flush=True)
    if not (options.essential or wanted):
        draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
