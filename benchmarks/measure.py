"""One setting of the offload benchmark in this process: its gate, its times, its memory, its copies."""

from __future__ import annotations

import gc
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from common import DISTURBED, loop_us, quiet_cpus, timing_event
from llama import Llama, Shape, batch, gradients, train_step
from peers import Method, Setting, none
from torch import Tensor, nn

from sidelane.pipeline.report import Report

GIB = 1 << 30
WARM, TIMED = 5, 20
SLOW, SLOW_WARM, SLOW_TIMED = 1.0, 2, 5  # seconds; fewer steps of settings that take longer than that
QUIET = 2  # CPUs that a setting has
MOST = 1.25  # times as many steps as are wanted, at most, to find undisturbed ones
LEAST_BUDGET = 256 << 20
MARGIN = 32 << 20  # a peak that is closer to the one that was asked for is close enough
BUDGETS = 7  # tried, two steps each

Step = Callable[[], Tensor]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(setting: Setting, shape: Shape, head: bool, keep: Path | None = None) -> dict[str, Any]:
    """The row of a setting, timed by `quiet_timings`. `keep`: see `trace`.

    Raises RuntimeError when its gradients fail the gate.
    """
    with quiet_cpus(QUIET) as move:
        return _measured(setting, shape, head, keep, move)


def _measured(
    setting: Setting, shape: Shape, head: bool, keep: Path | None, move_to_quiet_cpus: Callable[[], None]
) -> dict[str, Any]:
    place = device()
    model, tokens = Llama(shape, place, head), batch(shape, place)
    reference = _gate_gradients(model, none(model), tokens)
    host_before = host_used()
    move_to_quiet_cpus()
    method, budget = fitted(setting, model, tokens)
    for _ in range(setting.settle):
        stepper(model, method, tokens)()
    gradients_found = _gate_gradients(model, method, tokens)
    agreement = compare(reference, gradients_found)
    if setting.exact and agreement["gradients"] != "bitwise":
        raise RuntimeError(f"gradients differ from those without offload: {agreement}")
    del reference, gradients_found
    release(model)
    step = stepper(model, method, tokens)
    seconds = [_seconds(step) for _ in range(2)][-1]
    warm, timed = (WARM, TIMED) if seconds < SLOW else (SLOW_WARM, SLOW_TIMED)
    for _ in range(warm - 2):
        step()
    before = method.report() if method.report else None
    base = _reset_peak(model)
    found = quiet_timings(step, timed, move_to_quiet_cpus)
    peak, reserved = _peak() - base, _reserved()
    after = method.report() if method.report else None
    host = host_used() - host_before
    q1, middle, q3 = quantiles(found.ms, n=4)
    return {
        **agreement,
        "steps": len(found.ms),
        "left_out": found.left_out,
        "slowed": round(found.slowed, 2),
        "ms": round(middle, 2),
        "ms_q1": round(q1, 2),
        "ms_q3": round(q3, 2),
        "peak_gib": round(peak / GIB, 3),
        "reserved_gib": round(reserved / GIB, 3),
        "gpu_budget_gib": "" if budget is None else round(budget / GIB, 3),
        **copied(trace(step, keep)),
        "waited_ms": _waited(before, after, found.run),
        "host_gib": round(host / GIB, 2),
        "package": method.version,
    }


def stepper(model: nn.Module, method: Method, tokens: Tensor) -> Step:
    return lambda: train_step(model, tokens, method.around_forward, method.around_step)


def fitted(setting: Setting, model: nn.Module, tokens: Tensor) -> tuple[Method, int | None]:
    """The method, with the largest GPU budget found whose peak stays below that of the setting."""
    if setting.peak is None:
        return setting.open(model, **setting.options), setting.options.get("gpu_budget")
    methods: dict[int, Method] = {}

    def peak(budget: int) -> int:
        methods[budget] = setting.open(model, gpu_budget=budget, **setting.options)
        step = stepper(model, methods[budget], tokens)
        step()  # an engine may fetch in a better order once it has seen a step
        release(model)
        base = _reset_peak(model)
        step()
        return _peak() - base

    best = largest_budget(peak, int(setting.peak * GIB))
    return methods[best], best


def largest_budget(peak: Callable[[int], int], target: int) -> int:
    """A budget whose peak is at most `target` and close to it; LEAST_BUDGET if there is none.

    Newton's method; a peak grows at most as much as its budget.
    """
    rooms: dict[int, int] = {}
    budget, last, slope = LEAST_BUDGET, 0, 1.0
    while budget not in rooms and len(rooms) < BUDGETS:
        rooms[budget] = room = target - peak(budget)
        if 0 <= room < MARGIN:
            break
        if last:
            slope = min(1.0, max(0.25, (rooms[last] - room) / (budget - last)))
        last, budget = budget, max(LEAST_BUDGET, budget + int((room - MARGIN // 2) / slope))
    return max((budget for budget, room in rooms.items() if room >= 0), default=LEAST_BUDGET)


def _gate_gradients(model: nn.Module, method: Method, tokens: Tensor) -> dict[str, Tensor]:
    with deterministic():
        stepper(model, method, tokens)()
    found = gradients(model)
    release(model)
    return found


@contextmanager
def deterministic() -> Iterator[None]:
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Pinned memory would be filled too, on one thread.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def compare(reference: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Whether gradients are equal bit for bit; cosine over all parameters, and that of the worst one."""
    if reference.keys() != found.keys():
        raise RuntimeError(f"other parameters have gradients: {sorted(reference.keys() ^ found.keys())[:3]}")
    if all(torch.equal(reference[name], found[name]) for name in reference):
        return {"gradients": "bitwise", "cosine": 1.0, "worst_cosine": 1.0}
    dots, ours, theirs, cosines = 0.0, 0.0, 0.0, []
    for name, a in reference.items():
        x, y = a.double().flatten(), found[name].double().flatten()
        dot, xx, yy = float(x @ y), float(x @ x), float(y @ y)
        dots, ours, theirs = dots + dot, ours + xx, theirs + yy
        if xx > 0:
            cosines.append(dot / (xx * yy) ** 0.5 if yy > 0 else 0.0)
    whole = dots / (ours * theirs) ** 0.5 if ours * theirs > 0 else 0.0
    return {"gradients": "lossy", "cosine": round(whole, 6), "worst_cosine": round(min(cosines), 6)}


def timings(step: Step, count: int) -> list[float]:
    """Milliseconds of each of `count` steps, back to back: between events, without waiting in between."""
    marks = [_now()]
    for _ in range(count):
        step()
        marks.append(_now())
    _synchronize()
    return [_ms(a, b) for a, b in zip(marks, marks[1:], strict=False)]


@dataclass(frozen=True)
class Timings:
    """Steps that were timed.

    Attributes:
        ms: of those that count. slowed: worst of these, by the loop of Python. left_out: others. run: all.
    """

    ms: list[float]
    slowed: float
    left_out: int
    run: int


def quiet_timings(step: Step, count: int, move_to_quiet_cpus: Callable[[], None]) -> Timings:
    """`count` undisturbed steps, or the least disturbed ones of at most MOST times as many.

    A loop of Python runs before and after every step, while the device is still busy with it; how much longer
    it takes than the least between two steps tells how disturbed these are. After a disturbed step other CPUs
    are chosen.
    """
    found: list[tuple[float, float]] = []  # (loop, ms)
    least, missing, run = float("inf"), count, 0
    limit = int(MOST * count)
    while missing > 0 and len(found) < limit:
        move_to_quiet_cpus()
        step()
        loops = [loop_us()]
        marks: list[tuple[Any, Any]] = []
        most = min(missing, limit - len(found))
        while len(marks) < most and (not marks or loops[-1] < DISTURBED * min(least, *loops)):
            begin = _now()
            step()
            marks.append((begin, _now()))
            loops.append(loop_us())
        _synchronize()
        found += [
            (max(before, after), _ms(*mark))
            for before, after, mark in zip(loops, loops[1:], marks, strict=False)
        ]
        least, run = min(least, *loops), run + 1 + len(marks)
        missing = count - sum(loop < DISTURBED * least for loop, _ in found)
    chosen = sorted(found, key=itemgetter(0))[:count]
    return Timings([ms for _, ms in chosen], chosen[-1][0] / least, len(found) - len(chosen), run)


def _now() -> Any:
    """A point of the current stream, or a time."""
    if device().type == "cpu":
        return perf_counter()
    event = timing_event()
    event.record()
    return event


def _ms(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if device().type == "cpu" else float(begin.elapsed_time(end))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(step: Step) -> float:
    start = perf_counter()
    step()
    _synchronize()
    return perf_counter() - start


@dataclass(frozen=True)
class Span:
    """Something the GPU did; times in microseconds."""

    kind: str  # "kernel", "DtoH", "HtoD" or "other"
    start: float
    end: float
    nbytes: int


def trace(step: Step, keep: Path | None) -> list[Span]:
    """What the GPU did during one step, as the profiler saw it; `keep`: file for the Chrome trace."""
    if not torch.cuda.is_available():
        return []
    torch.cuda.synchronize()
    gpu = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=gpu, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        data = path.read_bytes()
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_bytes(gzip.compress(data, 6))
    return [span for event in json.loads(data)["traceEvents"] if (span := _span(event))]


def _span(event: dict[str, Any]) -> Span | None:
    category, name = event.get("cat"), event.get("name", "")
    if event.get("ph") != "X" or category not in ("kernel", "gpu_memcpy", "gpu_memset"):
        return None
    kind = "kernel" if category == "kernel" else next((k for k in ("DtoH", "HtoD") if k in name), "other")
    nbytes = int(event.get("args", {}).get("bytes", 0))
    return Span(kind, float(event["ts"]), float(event["ts"]) + float(event["dur"]), nbytes)


def copied(spans: Sequence[Span]) -> dict[str, Any]:
    """Bytes each way, how long copies ran, the share of that beside a kernel, and how long no kernel ran."""
    kernels = _union([s for s in spans if s.kind == "kernel"])
    copies = _union([s for s in spans if s.kind in ("DtoH", "HtoD")])
    everything = _union(spans)
    whole = everything[-1][1] - everything[0][0] if everything else 0.0
    copying = sum(b - a for a, b in copies)
    return {
        "out_gib": round(sum(s.nbytes for s in spans if s.kind == "DtoH") / GIB, 3),
        "in_gib": round(sum(s.nbytes for s in spans if s.kind == "HtoD") / GIB, 3),
        "idle_ms": round((whole - sum(b - a for a, b in kernels)) / 1e3, 2),
        "copy_ms": round(copying / 1e3, 2),
        "overlapped": round(_common(copies, kernels) / copying, 3) if copying else "",
    }


def _union(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Disjoint intervals in order that cover the same times."""
    out: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.start):
        if out and span.start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], span.end)
        else:
            out.append((span.start, span.end))
    return out


def _common(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """Length of the intersection of two lists of disjoint intervals in order."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def bandwidth() -> dict[str, Any]:
    """GB/s between the device and pinned memory, each way alone; best of five copies of 256 MiB."""
    if not torch.cuda.is_available():
        return {"d2h_gb_s": "", "h2d_gb_s": ""}
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")

    def best(copy: Step) -> float:
        return round(max(host.nbytes / ms / 1e6 for ms in timings(copy, 5)), 2)

    return {
        "d2h_gb_s": best(lambda: host.copy_(there, non_blocking=True)),
        "h2d_gb_s": best(lambda: there.copy_(host, non_blocking=True)),
    }


def host_used() -> int:
    """Bytes of memory in use on this machine, pinned or not."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return (kib["MemTotal"] - kib["MemAvailable"]) << 10


def _waited(before: Report | None, after: Report | None, steps: int) -> float | str:
    """Milliseconds per step that compute stood still for copies, as sidelane counts them."""
    if before is None or after is None:
        return ""
    return round(1e3 * (after.seconds_waited - before.seconds_waited) / steps, 2)


def release(model: nn.Module) -> None:
    """Give the memory that no tensor uses back to the GPU."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _reset_peak(model: nn.Module) -> int:
    """Bytes allocated between steps, from where the next peak is measured."""
    model.zero_grad(set_to_none=True)
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _reserved() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
