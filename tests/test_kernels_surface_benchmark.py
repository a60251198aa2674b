"""The chains that the surface benchmark compares with write and read the surfaces of the reference."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from sidelane.kernels.reference import pack_surface_ref
from sidelane.layout import CHANNEL_ROWS, NV12, NV12_SPLIT12, P010, TOKEN_ROWS, SurfaceFormat, plan_surface


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import kernels_surface

    return kernels_surface


@pytest.mark.parametrize("mapping", [CHANNEL_ROWS, TOKEN_ROWS])
@pytest.mark.parametrize("fmt", [NV12, P010, NV12_SPLIT12], ids=lambda f: f.name)
def test_chains_write_and_read_surfaces(benchmark: ModuleType, fmt: SurfaceFormat, mapping: str) -> None:
    layout = plan_surface(fmt, mapping, 4096, 32, max_side=144)
    assert layout.frames > 1
    codes = torch.randint(0, 2**fmt.bits, (4096, 32), dtype=torch.int32)
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    benchmark.write_codes(codes, surface, layout)
    expected = torch.zeros(layout.shape, dtype=torch.uint8)
    pack_surface_ref(codes.to(torch.int16), expected, layout)
    assert torch.equal(surface, expected)
    assert torch.equal(benchmark.read_codes(surface, layout), codes)
