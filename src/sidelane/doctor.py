"""`sidelane doctor`: which lanes and engines work on this machine, why the others do not, and what to do."""

from __future__ import annotations

import ctypes
import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Column, Table
from rich.text import Text

from sidelane import __version__
from sidelane.codec._driver import hidden_gpus_hint
from sidelane.codec.engines import capabilities
from sidelane.codec.hevc import hevc_support
from sidelane.codec.probe import probe_nvdec, probe_nvenc
from sidelane.errors import DriverError, LaneUnavailable, ProfileError
from sidelane.pipeline.machine import Machine, driver_version

PCIE_BYTES = 64 << 20  # of the transfer whose rate is shown

_STYLES = {"yes": "green", "no": "red", "not probed": "yellow"}


@dataclass(frozen=True)
class Finding:
    """One line of the table. `state`: "yes", "no" or "not probed"; `remedy`: what would change a "no"."""

    subject: str
    state: str
    detail: str
    remedy: str = ""


def report() -> Table:
    """Everything that was found, as a table."""
    title = f"sidelane {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    table = Table(
        Column("", no_wrap=True), "works", "found, and what to do", title=title, title_justify="left"
    )
    for finding in findings():
        text = Text(finding.detail)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(finding.subject, Text(finding.state, style=_STYLES[finding.state]), text)
    return table


def findings() -> Iterator[Finding]:
    yield from _gpus()
    yield _triton()
    yield Finding("lanes raw, exact, packed", "yes", _kernel_path())
    yield from _video_cpu()
    yield _video()
    yield _nvenc()
    yield _nvdec()
    yield _nvcomp()
    yield _memory()
    yield _pcie()


def _gpus() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            detail = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
            yield Finding(f"CUDA device {i}", "yes", f"{detail}, driver {driver_version()}")
    elif torch.version.cuda is None:
        yield Finding(
            "CUDA device", "no", "this torch is built without CUDA", "install a CUDA build of torch"
        )
    elif reason := _load_error("libcuda.so.1"):
        yield Finding(
            "CUDA device", "no", reason, "install the NVIDIA driver, or give the container its GPUs"
        )
    else:
        detail = f"driver {driver_version()} shows no device that torch for CUDA {torch.version.cuda} can use"
        yield Finding("CUDA device", "no", detail, "check nvidia-smi and CUDA_VISIBLE_DEVICES")


def _triton() -> Finding:
    if find_spec("triton") is None:
        return Finding("Triton", "no", "not installed", "pip install triton")
    import triton

    if torch.cuda.is_available():
        return Finding("Triton", "yes", f"{triton.__version__}, compiles the kernels for the GPU")
    return Finding(
        "Triton", "no", f"{triton.__version__}, but no CUDA device to compile for", "see CUDA device"
    )


def _kernel_path() -> str:
    if torch.cuda.is_available():
        return "Triton kernels on CUDA tensors, plain torch on CPU tensors"
    return "plain torch on CPU tensors"


def _video_cpu() -> Iterator[Finding]:
    try:
        support = hevc_support()
    except LaneUnavailable as error:
        yield Finding("lane video-cpu", "no", str(error), "install the PyAV wheel from PyPI")
        return
    if works := [name for name, reason in support.items() if reason is None]:
        yield Finding("lane video-cpu", "yes", f"HEVC surfaces {', '.join(works)}")
    for name, reason in support.items():
        if reason is not None:
            yield Finding(f"lane video-cpu, {name}", "no", reason, "install the PyAV wheel from PyPI")


def _video() -> Finding:
    """Which engines the lane takes on the first GPU, or without one, for which formats, and why."""
    try:
        found = capabilities("cuda" if torch.cuda.is_available() else "cpu")
    except (LaneUnavailable, DriverError) as error:
        return Finding("lane video", "no", str(error), "install the PyAV wheel from PyPI")
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for name, able in found.items():
        for work, engine in (("lossless", able.lossless), ("QP", able.constant_qp), ("decode", able.decode)):
            lines[f"{work} by {engine.name} ({engine.reason})"].append(name)
    every = list(found)
    detail = "\n".join(
        f"{'all formats' if names == every else ', '.join(names)}: {work}" for work, names in lines.items()
    )
    works = all(able.lossless.name != "none" and able.decode.name != "none" for able in found.values())
    remedy = "" if works else "install the PyAV wheel from PyPI"
    return Finding("lane video", "yes" if works else "no", detail, remedy)


def _nvenc() -> Finding:
    if not torch.cuda.is_available():
        return _library("NVENC", "libnvidia-encode.so.1")
    probe = probe_nvenc()
    if probe.available:
        return Finding("NVENC", "yes", f"a session opens, API {probe.driver_api}")
    return Finding("NVENC", "no", probe.reason, _remedy("the video lanes encode in software"))


def _nvdec() -> Finding:
    if not torch.cuda.is_available():
        return _library("NVDEC", "libnvcuvid.so.1")
    try:
        caps = [c for c in probe_nvdec() if c.supported]
    except (LaneUnavailable, DriverError) as error:
        remedy = _remedy("install the NVIDIA driver with its video libraries")
        return Finding("NVDEC", "no", str(error), remedy)
    if not caps:
        return Finding("NVDEC", "no", "this GPU decodes nothing", "the video lanes decode in software")
    kinds = ", ".join(f"{c.codec} {c.chroma} {c.bits} bit" for c in caps)
    return Finding("NVDEC", "yes", f"{max(c.engines for c in caps)} engines: {kinds}")


def _remedy(otherwise: str) -> str:
    """What to do about an engine that the driver refuses: it may only be the container that hides GPUs."""
    if not hidden_gpus_hint():
        return otherwise
    return "give the container every /dev/nvidia* node or update the driver; software works until then"


def _library(engine: str, name: str) -> Finding:
    """An engine that cannot be asked, since no CUDA device works."""
    if reason := _load_error(name):
        return Finding(engine, "no", reason, "install the NVIDIA driver with its video libraries")
    return Finding(engine, "not probed", f"{name} is here, but no CUDA device to ask")


def _load_error(library: str) -> str:
    """What dlopen says, or "" when the library loads."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def _nvcomp() -> Finding:
    # find_spec imports the parent package, which is missing where no NVIDIA wheel is installed.
    if find_spec("nvidia") is None or find_spec("nvidia.nvcomp") is None:
        return Finding(
            "nvCOMP",
            "no",
            "not installed; nothing but a benchmark needs it",
            "pip install 'sidelane[nvcomp]'",
        )
    return Finding("nvCOMP", "yes", "installed")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{total / 2**30:.1f} GiB"
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        detail += f", limited to {limit / 2**30:.1f} GiB by the control group"
    return Finding("host memory", "yes", detail)


def _pcie() -> Finding:
    """What the profile of this machine says."""
    try:
        machine = Machine.cached()
    except ProfileError as error:
        return Finding("PCIe", "not probed", str(error))
    if machine is None:
        return Finding("PCIe", "not probed", "transfer rates are not measured", "run sidelane profile")
    names = {"d2h": "GPU to pinned host memory", "h2d": "back"}
    rates = [
        f"{what} {machine.wires[name].rate(PCIE_BYTES) / 1e9:.3g} GB/s"
        for name, what in names.items()
        if name in machine.wires
    ]
    if not rates:
        reason = machine.left_out.get("d2h, h2d", "there is no GPU")
        return Finding("PCIe", "not probed", f"the profile has no transfer rates: {reason}")
    return Finding("PCIe", "yes", f"{', '.join(rates)} for {PCIE_BYTES >> 20} MiB, by sidelane profile")


def _cgroup_limit() -> int | None:
    """Bytes that the control groups of this process allow, version 1 or 2; None without a limit."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits.append(_smallest_limit(Path("/sys/fs/cgroup", path.strip("/")), "memory.max"))
        elif "memory" in controllers.split(","):
            group = Path("/sys/fs/cgroup/memory", path.strip("/"))
            limits.append(_smallest_limit(group, "memory.limit_in_bytes"))
    return min((limit for limit in limits if limit is not None), default=None)


def _smallest_limit(group: Path, name: str) -> int | None:
    """The smallest number in the files `name` from `group` up to the root."""
    limits = []
    for directory in (group, *group.parents):
        with suppress(OSError, ValueError):  # no such file, or the word "max"
            limits.append(int((directory / name).read_text()))
    return min(limits, default=None)
